"""Involutions to compute, and a slow reference: the sum over a (B, C, K*K, H', W') buffer of unfolded patches."""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

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

# Root mean square error, relative, against float64 on the same rounded inputs.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 4e-4}


def unfolded(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    batch, channels = x.shape[:2]
    groups, size, _, height, width = kernel.shape[1:]
    patches = F.unfold(x, size, padding=size // 2, stride=stride)
    patches = patches.view(batch, groups, channels // groups, size * size, height, width)
    weighted = patches * kernel.reshape(batch, groups, 1, size * size, height, width)
    return weighted.sum(3).view(batch, channels, height, width)


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


def channels_last(tensor: Tensor) -> Tensor:
    """The same values with channels, or the taps of a kernel, side by side in memory."""
    if tensor.ndim == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.permute(0, 4, 5, 1, 2, 3).contiguous().permute(0, 3, 4, 5, 1, 2)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def errors(implementation: ModuleType, stride: int, x: Tensor, kernel: Tensor, grad_out: Tensor) -> list[float]:
    """Relative errors of the output and both gradients that an implementation fills in, against float64."""
    wide = [tensor.double().requires_grad_() for tensor in (x, kernel)]
    expected = unfolded(*wide, stride)
    expected_grads = torch.autograd.grad(expected, wide, grad_out.double())
    out, grad_x, grad_kernel = (torch.full_like(tensor, torch.nan) for tensor in (grad_out, x, kernel))
    implementation.forward(x, kernel, stride, out)
    implementation.grad_x(grad_out, kernel, stride, grad_x)
    implementation.grad_kernel(grad_out, x, stride, grad_kernel)
    return [
        relative_error(actual, right)
        for actual, right in zip((out, grad_x, grad_kernel), (expected, *expected_grads), strict=True)
    ]
