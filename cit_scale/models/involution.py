"""Involution, the operator and the module ("Involution: Inverting the Inherence of Convolution for Visual Recognition",
CVPR 2021): a convolution turned inside out. Its kernel differs from position to position, as it is computed from the
features there, and is shared by the channels of a group.

Letters in formulas: G groups, K kernel size, P = (K - 1) / 2 padding, S stride, H' = ceil(H / S), W' = ceil(W / S).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

GROUP_CHANNELS = 16
"""Channels that share one kernel, in every published network."""

REDUCTION = 4
"""The kernel is computed from channels / REDUCTION features, in every published network."""


def involution(x: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    """Filter each position of x with the kernel that stands there.

        out[b, c, i, j] = sum over u, v of  kernel[b, g(c), u, v, i, j] * x[b, c, S*i + u - P, S*j + v - P]

    where g(c) = c // (C / G) and x is zero outside its borders.

    x: (B, C, H, W). kernel: (B, G, K, K, H', W') with C a multiple of G and K odd. stride: 1 or 2.
    Returns (B, C, H', W') in x.dtype; products and sums are in float32 at least. Differentiable once, in x and kernel.
    Memory stays near that of inputs and outputs: no (B, C, K*K, H', W') buffer of unfolded patches is made.
    Raises ValueError where the shapes do not fit.
    """
    _check_shapes(x, kernel, stride)
    return _Involution.apply(x, kernel, stride)


def _check_shapes(x: Tensor, kernel: Tensor, stride: int) -> None:
    x_shape, kernel_shape = tuple(x.shape), tuple(kernel.shape)
    if len(x_shape) != 4 or len(kernel_shape) != 6:
        raise ValueError(
            f"involution takes x (B, C, H, W) and kernel (B, G, K, K, H', W'), not {x_shape}, {kernel_shape}"
        )
    if stride not in (1, 2):
        raise ValueError(f"involution has stride 1 or 2, not {stride}")
    batch, channels, height, width = x_shape
    groups, size = kernel_shape[1:3]
    if size % 2 == 0 or kernel_shape[3] != size:
        raise ValueError(
            f"an involution kernel is square and of odd size, not {size} x {kernel_shape[3]}: {kernel_shape}"
        )
    if groups == 0 or channels % groups:
        raise ValueError(f"x has {channels} channels, which is not a multiple of the kernel's {groups} groups")
    expected = (batch, groups, size, size, -(-height // stride), -(-width // stride))
    if kernel_shape != expected:
        raise ValueError(f"x {x_shape} at stride {stride} needs a kernel of shape {expected}, not {kernel_shape}")


class _Involution(torch.autograd.Function):
    """The formula as a loop over the K*K taps: each multiplies one slice of the kernel with one shifted slice of x.

    torch.compile traces the forward loop and fuses it into one kernel. The gradient is written out because autograd
    would make a zero-filled tensor of full size for every slice.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, kernel: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, kernel)
        ctx.stride = stride
        padded = _pad_and_group(x, kernel)
        out = None
        for kernel_tap, x_tap in zip(_kernel_taps(kernel), _shifted_slices(padded, kernel, stride), strict=True):
            out = x_tap * kernel_tap if out is None else out.addcmul_(x_tap, kernel_tap)
        return out.flatten(1, 2).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:
        x, kernel = ctx.saved_tensors
        grad_x, grad_kernel = _involution_backward(grad_out, x, kernel, ctx.stride)
        return grad_x, grad_kernel, None


# Opaque to torch.compile, which cannot write into slices in place: it would copy the whole gradient at every tap, in
# code that takes minutes to build.
@torch.library.custom_op("cit_scale::involution_backward", mutates_args=())
def _involution_backward(grad_out: Tensor, x: Tensor, kernel: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Gradients with respect to x and kernel, in their shapes, dtypes and memory formats."""
    padded = _pad_and_group(x, kernel)
    grad_padded = torch.zeros_like(padded)
    grad_kernel = torch.empty_like(kernel)
    grad_out = grad_out.to(padded.dtype).unflatten(1, padded.shape[1:3])  # (B, G, C / G, H', W')
    for kernel_tap, grad_kernel_tap, x_tap, grad_x_tap in zip(
        _kernel_taps(kernel),
        _kernel_taps(grad_kernel),
        _shifted_slices(padded, kernel, stride),
        _shifted_slices(grad_padded, kernel, stride),
        strict=True,
    ):
        grad_x_tap.addcmul_(kernel_tap, grad_out)
        grad_kernel_tap.copy_((x_tap * grad_out).sum(2, keepdim=True))
    pad, height, width = kernel.shape[2] // 2, *x.shape[2:]
    grad_x = grad_padded[..., pad : pad + height, pad : pad + width].flatten(1, 2)
    return torch.empty_like(x).copy_(grad_x), grad_kernel


@_involution_backward.register_fake
def _(grad_out: Tensor, x: Tensor, kernel: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(kernel)


def _pad_and_group(x: Tensor, kernel: Tensor) -> Tensor:
    """x in the dtype of the sums, padded and split into groups: (B, G, C / G, H + 2P, W + 2P)."""
    groups, size = kernel.shape[1:3]
    pad = size // 2
    dtype = torch.promote_types(torch.promote_types(x.dtype, kernel.dtype), torch.float32)
    return F.pad(x.to(dtype), (pad, pad, pad, pad)).unflatten(1, (groups, x.shape[1] // groups))


def _kernel_taps(kernel: Tensor) -> Iterator[Tensor]:
    """Views (B, G, 1, H', W') of the kernel, one per tap, in row-major order."""
    for u in range(kernel.shape[2]):
        for v in range(kernel.shape[3]):
            yield kernel[:, :, u, v].unsqueeze(2)


def _shifted_slices(padded: Tensor, kernel: Tensor, stride: int) -> Iterator[Tensor]:
    """Views (B, G, C / G, H', W') of a padded tensor, one per tap: what that tap meets at each position."""
    size, height, width = kernel.shape[3:]
    rows, columns = stride * (height - 1) + 1, stride * (width - 1) + 1
    for u in range(size):
        for v in range(size):
            yield padded[..., u : u + rows : stride, v : v + columns : stride]


class Involution2d(nn.Module):
    """Involution with the kernel computed from its own input; takes the place of a convolution that keeps the width.

    kernel = span(ReLU(BatchNorm(reduce(x)))), where reduce and span are 1x1 convolutions C -> C / 4 -> K*K*C / 16. At
    stride 2 it is computed from x averaged over 2x2 windows; at odd sizes the last window holds what is left.

    Forward: (B, C, H, W) -> (B, C, ceil(H / stride), ceil(W / stride)).
    Raises ValueError unless channels is a multiple of 16.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        if channels < 1 or channels % GROUP_CHANNELS:
            below = max(channels // GROUP_CHANNELS * GROUP_CHANNELS, GROUP_CHANNELS)
            raise ValueError(
                f"an involution of {channels} channels cannot be split into groups of {GROUP_CHANNELS}; "
                f"near by are {below} and {below + GROUP_CHANNELS}"
            )
        self.kernel_size = kernel_size
        self.stride = stride
        self.groups = channels // GROUP_CHANNELS
        reduced = channels // REDUCTION
        self.pool = nn.AvgPool2d(stride, stride, ceil_mode=True) if stride > 1 else nn.Identity()
        self.reduce = nn.Conv2d(channels, reduced, 1, bias=False)
        self.bn = nn.BatchNorm2d(reduced)
        self.span = nn.Conv2d(reduced, kernel_size**2 * self.groups, 1)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.span(F.relu(self.bn(self.reduce(self.pool(x)))))  # (B, G*K*K, H', W')
        kernel = kernel.unflatten(1, (self.groups, self.kernel_size, self.kernel_size))
        return involution(x, kernel, self.stride)
