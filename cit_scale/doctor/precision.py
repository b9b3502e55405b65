"""Matrix products in float32 and bf16: how fast, and how far from the exact ones."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cit_scale.bench.measure import take_turns
from cit_scale.doctor.devices import all_devices
from cit_scale.doctor.findings import Asked, Finding, ok, worst
from cit_scale.models.arithmetic import set_arithmetic
from cit_scale.models.network import AUTOCAST, Precision
from cit_scale.run.auto import has_bf16
from cit_scale.run.flops import peak_flops
from cit_scale.run.results import device_name

SIZE, GPU_SIZE = 1024, 8192  # rows of the matrices that are multiplied
ROUNDS = 5
SLOW = 0.3  # of the data sheet's rate
DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bf16": AUTOCAST["bf16"]}
# Of the product, relative to the exact one. Seen on a CPU: 2e-7 and 1.7e-3; inputs rounded as TF32 has them, 3e-4.
ALLOWED = {"float32": 1e-5, "bf16": 1e-2}


@dataclass(frozen=True)
class Product:
    """error: norm of the difference from the exact product, over the exact one's. flops_per_s: that were reached."""

    error: float
    flops_per_s: float


def check(asked: Asked) -> Finding:
    """Multiply matrices in each precision."""
    return worst({str(device): look_at(device) for device in all_devices()})


def look_at(device: torch.device) -> Finding:
    set_arithmetic(device)
    size = GPU_SIZE if device.type == "cuda" else SIZE
    # A GPU without bf16 emulates it, and no run asks for that.
    names = [name for name in DTYPES if name == "float32" or device.type == "cpu" or has_bf16(device)]
    name = device_name(device)
    found = {each: multiply(size, DTYPES[each], device) for each in names}
    peaks = {each: None if " MIG " in name else peak_flops(name, each) for each in names}  # of a part nobody says it
    return judge(found, peaks, chosen="bf16" if has_bf16(device) else "float32")


def multiply(size: int, dtype: torch.dtype, device: torch.device) -> Product:
    """Time the product of two matrices of normal values, and compute some of its rows in float64 on the CPU."""
    left, right, rows, exact = draw(size, dtype)
    on_device = left.to(device), right.to(device)
    (times,) = take_turns({"product": lambda: torch.mm(*on_device)}, ROUNDS, device).values()
    computed = torch.mm(*on_device)[rows.to(device)].cpu().double()
    error = torch.linalg.matrix_norm(computed - exact) / torch.linalg.matrix_norm(exact)
    return Product(error.item(), 2 * size**3 / (statistics.median(times) / 1e3))


@functools.cache  # all GPUs have the same: drawing takes longer than multiplying
def draw(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two matrices of normal values, some rows, and these of the exact product, in float64."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator).to(dtype) for _ in range(2))
    rows = torch.arange(0, size, size // 16)
    return left, right, rows, left[rows].double() @ right.double()


def judge(found: Mapping[Precision, Product], peaks: Mapping[Precision, float | None], chosen: str) -> Finding:
    """All by precision. peaks: in FLOP/s, by the device's data sheet. chosen: what ``auto`` stands for here."""
    rates = [f"{name} {each.flops_per_s / 1e12:.3g} TFLOP/s" for name, each in found.items()]
    says = f"{', '.join(rates)}; precision auto is {chosen}"
    figures = {f"{name}_tflops": each.flops_per_s / 1e12 for name, each in found.items()}
    # Not "error > allowed": an error that is NaN is wrong.
    if wrong := [f"{name} {each.error:.1e}" for name, each in found.items() if not each.error <= ALLOWED[name]]:
        advice = "for TF32 in the place of float32 unset NVIDIA_TF32_OVERRIDE; otherwise the device computes wrongly"
        return Finding("failed", f"{says}; matrix products are off by {', '.join(wrong)}", advice, {}, figures)
    slow = [
        f"{name} at {each.flops_per_s / peak:.0%} of its peak"
        for name, each in found.items()
        if (peak := peaks[name]) is not None and each.flops_per_s < SLOW * peak
    ]
    if slow:
        advice = "see clocks, power limit and other processes with nvidia-smi -q -d CLOCK,POWER,PIDS"
        return Finding("warning", f"{says}; {', '.join(slow)}", advice, {"auto": chosen}, figures)
    return ok(says, {"auto": chosen}, figures)
