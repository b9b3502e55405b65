"""Involutions to compute, and how far an implementation is from the sum over unfolded patches."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from cit_scale.bench.involution import unfold

# channels, groups, kernel size, stride, height, width
CASES = {
    "7x7, two groups": (32, 2, 7, 1, 8, 9),
    "3x3, one group": (16, 1, 3, 1, 6, 6),
    "every channel its own group": (4, 4, 5, 1, 5, 7),
    "40 channels a group": (80, 2, 3, 1, 4, 5),
    "1x1": (6, 3, 1, 1, 4, 4),
    "1x1, stride 2": (6, 3, 1, 2, 4, 5),
    "9x9": (16, 1, 9, 1, 10, 11),
    "stride 2, even size": (32, 2, 7, 2, 8, 8),
    "stride 2, odd size": (32, 2, 3, 2, 7, 9),
    "7x7, stride 2, odd size": (16, 1, 7, 2, 5, 17),
    "kernel larger than x": (4, 2, 7, 2, 3, 2),
}

HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
on_gpu = pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])

# Root mean square error, relative, against float64 on the same rounded inputs.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 4e-4}


def draw(
    channels: int, groups: int, size: int, stride: int, height: int, width: int, batch: int = 2, device: str = "cpu"
) -> list[Tensor]:
    """x, a kernel that fits it and a gradient of their output, float64."""
    generator = torch.Generator().manual_seed(channels + size + stride + height)
    out_height, out_width = -(-height // stride), -(-width // stride)
    shapes = (
        (batch, channels, height, width),
        (batch, groups, size, size, out_height, out_width),
        (batch, channels, out_height, out_width),
    )
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for shape in shapes]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def errors(
    implementation: ModuleType,
    stride: int,
    x: Tensor,
    kernel: Tensor,
    grad_out: Tensor,
    out_dtype: torch.dtype | None = None,
) -> list[float]:
    """Relative errors of the output and both gradients that an implementation fills in, against float64."""
    wide = [tensor.double().requires_grad_() for tensor in (x, kernel)]
    expected = unfold(*wide, stride)
    expected_grads = torch.autograd.grad(expected, wide, grad_out.double())
    out, grad_x, grad_kernel = (
        torch.full_like(tensor, torch.nan, dtype=out_dtype or tensor.dtype) for tensor in (grad_out, x, kernel)
    )
    implementation.forward(x, kernel, stride, out)
    implementation.grad_x(grad_out, kernel, stride, grad_x)
    implementation.grad_kernel(grad_out, x, stride, grad_kernel)
    return [
        relative_error(actual, right)
        for actual, right in zip((out, grad_x, grad_kernel), (expected, *expected_grads), strict=True)
    ]
