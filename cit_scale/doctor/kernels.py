"""The involution's kernels, C++ on a CPU and Triton on a GPU, beside unfolded patches in float64 on the CPU."""

from __future__ import annotations

import time

import torch

from cit_scale.bench.involution import Case, Way, by_autograd, unfold
from cit_scale.distributed.world import World
from cit_scale.doctor.findings import Asked, Finding, failed, ok, warning
from cit_scale.models import involution_loop
from cit_scale.models.involution import implementation, involution
from cit_scale.run.auto import has_bf16

# RedNet's kernel at both strides, at even and odd sizes, and its stem's.
CASES = (Case(2, 64, 4, 7, 1, 28, 28), Case(2, 64, 4, 7, 2, 29, 27), Case(2, 32, 2, 3, 1, 56, 56))
# Norm of the difference over the norm. Sums are in float32 and rounded once, in bf16 to 8 bits: 1.7e-3.
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
RESULTS = ("output", "gradient of x", "gradient of the kernel")


def check(asked: Asked) -> Finding:
    """Compare the output and both gradients, in float32 and bf16. The first use builds or tunes the kernels."""
    device = World().device
    code = implementation(device.type, torch.float32)
    start = time.monotonic()
    wrong = compare(Way(involution, by_autograd(involution), kernel_channels_last=device.type == "cpu"), device)
    return judge(code.__name__.rpartition(".")[2], wrong, time.monotonic() - start, code is involution_loop)


def compare(way: Way, device: torch.device) -> list[str]:
    """What differs by more than is allowed, in words. way: computes on ``device``."""
    wrong = []
    for case in CASES:
        for dtype, allowed in ALLOWED.items():
            if dtype == torch.bfloat16 and device.type == "cuda" and not has_bf16(device):
                continue  # emulated there, and no run asks for it
            x, kernel, grad_out = case.draw(dtype, torch.device("cpu"))
            expected = by_autograd(unfold)(x.double(), kernel.double(), case.stride, grad_out.double())
            laid_out = [tensor.to(device) for tensor in way.laid_out(x, kernel, grad_out)]
            computed = way.gradients(*laid_out[:2], case.stride, laid_out[2])
            for name, ours, theirs in zip(RESULTS, computed, expected, strict=True):
                distance = ((ours.cpu().double() - theirs).norm() / theirs.norm()).item()
                if not distance <= allowed:  # NaN is wrong, too
                    wrong.append(f"{name} by {distance:.1e} for {case} in {str(dtype).removeprefix('torch.')}")
    return wrong


def judge(code: str, wrong: list[str], seconds: float, is_slow: bool) -> Finding:
    """code: the module that computes. wrong: as of ``compare``. is_slow: it is the loop in PyTorch's operators."""
    if wrong:
        return failed(
            f"{code} differs from unfolded patches, {len(wrong)} times: {wrong[0]}",
            "remove what is kept of earlier builds (~/.cache/cit_scale, ~/.triton) and try again; then report it",
        )
    compared = f"output and gradients are those of unfolded patches in {len(CASES)} shapes, {seconds:.1f} s"
    if is_slow:
        return warning(
            f"{code}, several times slower than kernels; {compared}",
            "see the row of compilers, and on a GPU Triton",
        )
    return ok(f"{code}: {compared}")
