"""Involution, the operator and the module ("Involution: Inverting the Inherence of Convolution for Visual Recognition",
CVPR 2021). Compared with a convolution, the roles of positions and channels are exchanged: the kernel differs from
position to position, computed from the features there, and is shared by the channels of a group.

Letters in formulas: B images, C channels, G groups, K kernel size, P = (K - 1) / 2 padding, S stride,
H' = ceil(H / S), W' = ceil(W / S).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from cit_scale.distributed.world import warn_once_per_job
from cit_scale.models import involution_cpu, involution_loop

GROUP_CHANNELS = 16
"""Number of channels that share one kernel, in all published networks."""

REDUCTION = 4
"""The kernel is computed from channels / REDUCTION features, in all published networks."""


def involution(x: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    """Filter each position of x with its own kernel.

        out[b, c, i, j] = sum over u, v of  kernel[b, g(c), u, v, i, j] * x[b, c, S*i + u - P, S*j + v - P]

    where g(c) = c // (C / G), and x is zero outside its borders.

    x: (B, C, H, W). kernel: (B, G, K, K, H', W'), with C a multiple of G and K odd. stride: 1 or 2.
    Returns (B, C, H', W') in the dtype and memory format of x. Products and sums are computed in float32 or float64;
    the output and each gradient are rounded once. Differentiable in x and kernel to any order, in reverse mode only.
    Allocates little more than its output: no (B, C, K*K, H', W') buffer of unfolded patches.
    Under autocast both inputs are cast to the autocast dtype, as for a convolution; float64 inputs are not cast.
    Raises ValueError if shapes, dtypes or devices do not fit.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102  two, or TorchScript compiles the second, whose global it cannot read
        if _in_torchs_operators:
            return involution_loop.filtered(x, kernel, stride).to(x.dtype)
    return torch.ops.cit_scale.involution(x, kernel, stride)


_in_torchs_operators = False


@contextlib.contextmanager
def in_torchs_operators() -> Iterator[None]:
    """Meanwhile ``involution`` is made of torch's own operators: pad, and a product for each of the K x K taps.

    For exports: what is traced so needs nothing of this project. Slow, and not for training.
    """
    global _in_torchs_operators
    _in_torchs_operators = True
    try:
        yield
    finally:
        _in_torchs_operators = False


# ---------------------------------------------------------------------------------------------------------------------
# The operators and their gradients
#
# The scalar sum(grad_out * involution(x, kernel)) is linear in each of its three tensors. Its gradient with respect to
# one tensor is therefore an operator of the other two: three operators, whose gradients are the same three operators.
# Custom operators and not traced Python: tracing the backward of the loop tripled the compile time.


@torch.library.custom_op("cit_scale::involution", mutates_args=())
def _forward(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    out = _empty_output(x, kernel, stride)
    if out.numel() > 0:
        implementation(x.device.type, x.dtype).forward(x, kernel, stride, out)
    return out


@torch.library.custom_op("cit_scale::involution_grad_x", mutates_args=())
def _grad_x(grad_out: Tensor, kernel: Tensor, stride: int, height: int, width: int, channels_last: bool) -> Tensor:
    out = _empty_grad_x(grad_out, kernel, stride, height, width, channels_last)
    if out.numel() > 0:
        implementation(out.device.type, out.dtype).grad_x(grad_out, kernel, stride, out)
    return out


@torch.library.custom_op("cit_scale::involution_grad_kernel", mutates_args=())
def _grad_kernel(
    grad_out: Tensor, x: Tensor, stride: int, groups: int, kernel_size: int, channels_last: bool
) -> Tensor:
    out = _empty_grad_kernel(grad_out, x, stride, groups, kernel_size, channels_last)
    if grad_out.numel() > 0:
        implementation(out.device.type, out.dtype).grad_kernel(grad_out, x, stride, out)
        return out
    return out.zero_()  # no channels: the sum over them is empty


# The functions that allocate the outputs also serve as fake implementations, so that shapes are checked alike when
# torch.compile and torch.export trace.
@_forward.register_fake
def _empty_output(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    _check(x.shape, kernel.shape, stride, (x, kernel))
    return _empty_image(x, (x.shape[0], x.shape[1], *kernel.shape[4:]), _is_channels_last(x))


@_grad_x.register_fake
def _empty_grad_x(
    grad_out: Tensor, kernel: Tensor, stride: int, height: int, width: int, channels_last: bool
) -> Tensor:
    shape = (*grad_out.shape[:2], height, width)
    _check(shape, kernel.shape, stride, (grad_out, kernel), grad_out.shape)
    return _empty_image(kernel, shape, channels_last)


@_grad_kernel.register_fake
def _empty_grad_kernel(
    grad_out: Tensor, x: Tensor, stride: int, groups: int, kernel_size: int, channels_last: bool
) -> Tensor:
    shape = (x.shape[0], groups, kernel_size, kernel_size, *grad_out.shape[2:])
    _check(x.shape, shape, stride, (grad_out, x), grad_out.shape)
    if channels_last:
        # In memory (B, H', W', G, K, K): the taps of a position lie side by side.
        return x.new_empty([shape[i] for i in (0, 4, 5, 1, 2, 3)]).permute(0, 3, 4, 5, 1, 2)
    return x.new_empty(shape)


def _empty_image(like: Tensor, shape: tuple[int, ...], channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether channels (in a kernel: taps) instead of columns are adjacent in memory."""
    return tensor.stride(-1) > tensor.stride(-3)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, second, ctx.stride, *_ = inputs
    ctx.save_for_backward(first, second)


def _backward_of_forward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    x, kernel = ctx.saved_tensors
    wants_x, wants_kernel, _ = ctx.needs_input_grad
    grad_x = _toward_x(grad_out, x, kernel, ctx.stride) if wants_x else None
    grad_kernel = _toward_kernel(grad_out, x, kernel, ctx.stride) if wants_kernel else None
    return grad_x, grad_kernel, None


# The argument `x` or `kernel` of the next two is the gradient of the operator's output; it has the shape of an x or a
# kernel, and takes their place in the formulas.
def _backward_of_grad_x(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
    grad_out, kernel = ctx.saved_tensors
    wants_out, wants_kernel, *_ = ctx.needs_input_grad
    toward_out = involution(x, kernel, ctx.stride) if wants_out else None
    toward_kernel = _toward_kernel(grad_out, x, kernel, ctx.stride) if wants_kernel else None
    return toward_out, toward_kernel, None, None, None, None


def _backward_of_grad_kernel(ctx: Any, kernel: Tensor) -> tuple[Tensor | None, ...]:
    grad_out, x = ctx.saved_tensors
    wants_out, wants_x, *_ = ctx.needs_input_grad
    toward_out = involution(x, kernel, ctx.stride) if wants_out else None
    toward_x = _toward_x(grad_out, x, kernel, ctx.stride) if wants_x else None
    return toward_out, toward_x, None, None, None, None


def _toward_x(grad_out: Tensor, x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """Return the gradient with respect to x, in the shape and memory format of x; the values of x are not read."""
    height, width = x.shape[2:]
    return torch.ops.cit_scale.involution_grad_x(grad_out, kernel, stride, height, width, _is_channels_last(x))


def _toward_kernel(grad_out: Tensor, x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """Return the gradient with respect to the kernel, in its shape and memory format; its values are not read."""
    groups, size = kernel.shape[1:3]
    return torch.ops.cit_scale.involution_grad_kernel(grad_out, x, stride, groups, size, _is_channels_last(kernel))


_forward.register_autograd(_backward_of_forward, setup_context=_save)
_grad_x.register_autograd(_backward_of_grad_x, setup_context=_save)
_grad_kernel.register_autograd(_backward_of_grad_kernel, setup_context=_save)


AUTOCAST_FROM = (torch.float32, torch.float16, torch.bfloat16)  # float64 and integers are not cast

# Autocast is implemented by hand: register_autocast would fix one dtype per device, whatever autocast is told.
_LIBRARY = torch.library.Library("cit_scale", "FRAGMENT")


def _register_autocast(device_type: str, dispatch_key: str) -> None:
    """Make the operator cast its inputs to the current autocast dtype of a device."""

    def cast_and_call(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        x, kernel = (tensor.to(dtype) if tensor.dtype in AUTOCAST_FROM else tensor for tensor in (x, kernel))
        with torch.autocast(device_type, enabled=False):  # otherwise the call would lead here again
            return involution(x, kernel, stride)

    _LIBRARY.impl("involution", cast_and_call, dispatch_key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")


@functools.cache
def implementation(device_type: str, dtype: torch.dtype) -> ModuleType:
    """Return the module that computes the operators, with the functions forward, grad_x and grad_kernel.

    Warns once per job if this is the slow loop in PyTorch.
    """
    match device_type:
        case "cpu" if dtype not in involution_cpu.DTYPES:
            reason = f"the C++ library has no {dtype}"
        case "cpu":
            try:
                involution_cpu.load()
                return involution_cpu
            except involution_cpu.BuildError as error:
                reason = f"{error}. Install a C++ compiler, such as g++, or name one in CXX"
        case "cuda" if importlib.util.find_spec("triton") is not None:
            from cit_scale.models import involution_triton  # here, as it imports Triton

            return involution_triton
        case "cuda":
            reason = "Triton is not installed"
        case _:
            reason = f"there is no code of its own for {device_type}"
    warn_once_per_job(f"involution runs as a loop in PyTorch, several times slower and in more memory: {reason}")
    return involution_loop


def _check(
    x: Sequence[int],
    kernel: Sequence[int],
    stride: int,
    tensors: tuple[Tensor, Tensor],
    grad_out: Sequence[int] | None = None,
) -> None:
    """Raise ValueError unless shapes, dtypes and devices fit.

    x, kernel, grad_out: shapes. tensors: the operator's two tensors.
    """
    x, kernel = tuple(x), tuple(kernel)
    if len(x) != 4 or len(kernel) != 6:
        raise ValueError(f"involution takes x (B, C, H, W) and kernel (B, G, K, K, H', W'), not {x}, {kernel}")
    if stride not in (1, 2):
        raise ValueError(f"involution has stride 1 or 2, not {stride}")
    batch, channels, height, width = x
    groups, size = kernel[1:3]
    if size % 2 == 0 or kernel[3] != size:
        raise ValueError(f"an involution kernel is square and of odd size, not {size} x {kernel[3]}: {kernel}")
    if groups == 0 or channels % groups:
        raise ValueError(
            f"x {x} has {channels} channels, which is not a multiple of the {groups} groups of the kernel {kernel}"
        )
    out_size = -(-height // stride), -(-width // stride)
    expected = (batch, groups, size, size, *out_size)
    if kernel != expected:
        raise ValueError(f"x {x} at stride {stride} needs a kernel of shape {expected}, not {kernel}")
    if grad_out is not None and tuple(grad_out) != (batch, channels, *out_size):
        raise ValueError(
            f"x {x} at stride {stride} has an output of shape {(batch, channels, *out_size)}, not {tuple(grad_out)}"
        )
    first, second = tensors
    if first.dtype != second.dtype or not first.dtype.is_floating_point:
        raise ValueError(f"involution takes tensors of one floating-point dtype, not {first.dtype}, {second.dtype}")
    if first.device != second.device:
        raise ValueError(f"involution takes tensors on one device, not {first.device}, {second.device}")


class Involution2d(nn.Module):
    """Involution whose kernel is computed from its input; replaces a convolution that keeps the number of channels.

    kernel = span(ReLU(BatchNorm(reduce(x)))), where reduce and span are 1x1 convolutions C -> C / 4 -> K*K*C / 16. At
    stride 2 the kernel is computed from x averaged over 2x2 windows; at odd sizes the last window is smaller.

    Forward: (B, C, H, W) -> (B, C, ceil(H / stride), ceil(W / stride)).
    Raises ValueError unless channels is a multiple of 16.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        if channels < 1 or channels % GROUP_CHANNELS:
            below = max(channels // GROUP_CHANNELS * GROUP_CHANNELS, GROUP_CHANNELS)
            raise ValueError(
                f"an involution of {channels} channels cannot be split into groups of {GROUP_CHANNELS}; "
                f"use {below} or {below + GROUP_CHANNELS}"
            )
        self.kernel_size = kernel_size
        self.stride = stride
        self.groups = channels // GROUP_CHANNELS
        reduced = channels // REDUCTION
        self.pool = nn.AvgPool2d(stride, stride, ceil_mode=True) if stride > 1 else nn.Identity()
        self.reduce = nn.Conv2d(channels, reduced, 1, bias=False)
        self.bn = nn.BatchNorm2d(reduced)
        self.span = _Span(reduced, kernel_size**2 * self.groups)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.bn(self.reduce(self.pool(x))))
        kernel = self.span(features)  # (B, G*K*K, H', W')
        kernel = kernel.unflatten(1, (self.groups, self.kernel_size, self.kernel_size))
        return involution(x, kernel, self.stride)


class _Span(nn.Conv2d):
    """The 1x1 convolution that computes an involution's kernel, with a layout that suits the device."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        return _span(features, self.weight, self.bias)


@torch.fx.wrap  # the choice depends on the tensor, not on the proxy that fx puts in its place
def _span(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert bias is not None
    return _planar_span(features, weight, bias) if features.is_cuda else F.conv2d(features, weight, bias)


def _planar_span(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute the 1x1 convolution as one matrix product per image, (G*K*K, C / 4) x (C / 4, H'*W').

    Neighbouring positions of the result are adjacent in memory, which involution_triton is made for, in whatever memory
    format the features are.
    """
    weight = weight.flatten(1).expand(len(features), -1, -1)
    return torch.baddbmm(bias[:, None], weight, features.flatten(2)).unflatten(2, features.shape[2:])
