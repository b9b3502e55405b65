"""Involution in plain PyTorch, on any device: a loop over the K*K taps, each of which multiplies one slice of the
kernel with one shifted slice of x. Used where there is neither a C++ compiler nor Triton. forward, grad_x and
grad_kernel write their result to ``out``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, kernel: Tensor, stride: int, out: Tensor) -> None:
    """Compute the involution of x. x: (B, C, H, W). kernel: (B, G, K, K, H', W'). out: (B, C, H', W')."""
    out.copy_(filtered(x, kernel, stride))


def filtered(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """Return the involution of x, (B, C, H', W'), in float32 or float64. Made of torch's own operators."""
    padded = _pad_and_group(x, kernel)
    total = padded.new_zeros(1)  # broadcast to the full shape by the first tap
    for kernel_tap, x_tap in zip(_kernel_taps(kernel), _shifted_slices(padded, kernel, stride), strict=True):
        total = torch.addcmul(total, x_tap, kernel_tap.to(padded.dtype))
    return total.flatten(1, 2)


def grad_x(grad_out: Tensor, kernel: Tensor, stride: int, out: Tensor) -> None:
    """Compute the gradient with respect to x.

    grad_out: (B, C, H', W'). kernel: (B, G, K, K, H', W'). out: (B, C, H, W).
    """
    grads = _group(grad_out, kernel)
    padded = torch.zeros_like(_pad_and_group(out, kernel))
    for kernel_tap, grad_tap in zip(_kernel_taps(kernel), _shifted_slices(padded, kernel, stride), strict=True):
        grad_tap.addcmul_(kernel_tap.to(padded.dtype), grads)  # a view: adds to `padded` where the tap has read
    # The gradient of the padding is dropped.
    pad, height, width = kernel.shape[2] // 2, *out.shape[2:]
    out.copy_(padded[..., pad : pad + height, pad : pad + width].flatten(1, 2))


def grad_kernel(grad_out: Tensor, x: Tensor, stride: int, out: Tensor) -> None:
    """Compute the gradient with respect to the kernel.

    grad_out: (B, C, H', W'). x: (B, C, H, W). out: (B, G, K, K, H', W').
    """
    grads, padded = _group(grad_out, out), _pad_and_group(x, out)
    for out_tap, x_tap in zip(_kernel_taps(out), _shifted_slices(padded, out, stride), strict=True):
        out_tap.copy_((x_tap * grads).sum(2, keepdim=True))


def _group(image: Tensor, kernel: Tensor) -> Tensor:
    """Split an image into groups, (B, G, C / G, H, W), in the dtype of the sums: float32, or float64 for float64."""
    dtype = torch.promote_types(image.dtype, torch.float32)
    return image.to(dtype).unflatten(1, (kernel.shape[1], -1))


def _pad_and_group(image: Tensor, kernel: Tensor) -> Tensor:
    """Split an image into groups and pad it with zeros: (B, G, C / G, H + 2P, W + 2P)."""
    pad = kernel.shape[2] // 2
    return F.pad(_group(image, kernel), (pad, pad, pad, pad))


def _kernel_taps(kernel: Tensor) -> Iterator[Tensor]:
    """Yield views (B, G, 1, H', W') of the kernel, one per tap, in row-major order."""
    for u in range(kernel.shape[2]):
        for v in range(kernel.shape[3]):
            yield kernel[:, :, u, v].unsqueeze(2)


def _shifted_slices(padded: Tensor, kernel: Tensor, stride: int) -> Iterator[Tensor]:
    """Yield views (B, G, C / G, H', W') of a padded tensor, one per tap: the values that the tap reads per position."""
    size, height, width = kernel.shape[3:]
    rows, columns = stride * (height - 1) + 1, stride * (width - 1) + 1
    for u in range(size):
        for v in range(size):
            yield padded[..., u : u + rows : stride, v : v + columns : stride]
