"""Involution on a GPU, in Triton. forward, grad_x and grad_kernel write their result to ``out``.

Inputs may have any strides; only those beyond 32 bits are copied. No other memory is allocated.

A program computes BLOCK positions times the channels of one group, in float32 or float64. The kernels are designed for
a channels-last x, in which the 16 channels of a group fill one 32-byte sector of a cache line in bf16, and for an
involution kernel whose positions are adjacent in memory: neighbouring threads then read neighbouring values, and each
value serves all channels of a group.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from cit_scale.errors import one_line
from cit_scale.models.involution_cpu import cache_dir

# (BLOCK, warps): few positions per program for small feature maps, many for large ones. In bf16 a thread computes 8
# channels of one position; with more, the compiler goes through shared memory. The interpreter cannot measure times, so
# it gets a single configuration.
_BLOCKS = ((16, 1), (32, 2), (64, 4), (128, 8))
_CONFIGS = [
    triton.Config({"BLOCK": block}, num_warps=warps)
    for block, warps in (_BLOCKS[-1:] if triton.knobs.runtime.interpret else _BLOCKS)
]


# What is launched where results must not depend on timing: another start may measure another choice, and the sum over
# a group's channels in the gradient of the kernel runs in another order with it.
_FIXED = {"BLOCK": 64, "num_warps": 4}


# How the kernels are compiled. A product and its sum in one instruction, rounded once: what Triton chooses up to
# version 3.9, which warns that 3.10 will not. The sums of all three kernels are made of such pairs.
OPTIONS = {"enable_fp_fusion": True}


class _TritonFunction(Protocol):
    """A compiled and tuned Triton function, which is launched as function[grid](arguments)."""

    base_fn: Callable[..., None]
    fn: Any  # the same without tuning

    def __getitem__(self, grid: Callable[[Mapping[str, int]], tuple[int, int]]) -> Callable[..., None]: ...


def _autotune(*layout: str) -> Callable[[Any], _TritonFunction]:
    """Return the autotuning decorator, which measures again for each shape, dtype and memory format.

    layout: names of the strides that tell memory formats apart.
    """
    shape = ("batch", "groups", "out_height", "out_width", "GROUP_CHANNELS", "KERNEL_SIZE", "STRIDE")
    return triton.autotune(_CONFIGS, key=[*shape, *layout], do_bench=_measure, cache_results=True)


def _measure(call: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
    """Measure one configuration as Triton does by default, in milliseconds."""
    _say_what_is_waited_for()
    return triton.runtime.driver.active.get_benchmarker()(call, quantiles=quantiles)


def forward(x: Tensor, kernel: Tensor, stride: int, out: Tensor) -> None:
    """Compute the involution of x. x: (B, C, H, W). kernel: (B, G, K, K, H', W'). out: (B, C, H', W')."""
    positions = out.shape[0] * out.shape[2] * out.shape[3]
    _launch(_forward, (positions, 1), x, kernel, stride, (x, kernel, out))


def grad_x(grad_out: Tensor, kernel: Tensor, stride: int, out: Tensor) -> None:
    """Compute the gradient with respect to x.

    grad_out: (B, C, H', W'). kernel: (B, G, K, K, H', W'). out: (B, C, H, W).
    """
    # At stride 2, a position of x is read by every second tap only; by which ones depends on whether its row and its
    # column are even or odd. Each of these stride * stride classes of positions has its own programs.
    positions = grad_out.shape[0] * grad_out.shape[2] * grad_out.shape[3]
    _launch(_grad_x, (positions, stride * stride), out, kernel, stride, (grad_out, kernel, out))


def grad_kernel(grad_out: Tensor, x: Tensor, stride: int, out: Tensor) -> None:
    """Compute the gradient with respect to the kernel.

    grad_out: (B, C, H', W'). x: (B, C, H, W). out: (B, G, K, K, H', W').
    """
    positions = grad_out.shape[0] * grad_out.shape[2] * grad_out.shape[3]
    _launch(_grad_kernel, (positions, 1), x, out, stride, (grad_out, x, out))


def _launch(
    function: _TritonFunction,
    work: tuple[int, int],
    x: Tensor,
    kernel: Tensor,
    stride: int,
    tensors: tuple[Tensor, ...],
) -> None:
    """Launch a kernel.

    work: number of positions and of classes of positions. x, kernel: tensors with the shapes of x and kernel, inputs or
    outputs. tensors: the arguments of `function`, the output last.
    """
    positions, classes = work
    batch, channels, height, width = x.shape
    groups, size, _, out_height, out_width = kernel.shape[1:]
    *inputs, out = tensors
    # The operator has allocated it densely: this fails where one image of it has 2**31 elements. A copy would be filled
    # instead of the tensor that the caller reads.
    assert _has_short_steps(out), f"the involution's output {tuple(out.shape)} is too large for 32-bit offsets"
    tensors = (*(tensor if _has_short_steps(tensor) else tensor.contiguous() for tensor in inputs), out)
    launched, choice = (function.fn, _FIXED) if torch.are_deterministic_algorithms_enabled() else (function, {})
    with torch.cuda.device_of(x), _first_of_its_kind(function, stride, tensors):
        # Triton launches on the current device; device_of is no-op for the interpreter's CPU tensors.
        launched[lambda meta: (triton.cdiv(positions, meta["BLOCK"]) * groups, classes)](
            *tensors,
            *(step for tensor in tensors for step in tensor.stride()),
            batch,
            groups,
            height,
            width,
            out_height,
            out_width,
            GROUP_CHANNELS=channels // groups,
            CHANNELS=triton.next_power_of_2(channels // groups),
            KERNEL_SIZE=size,
            STRIDE=stride,
            SUM_DTYPE=tl.float64 if x.dtype == torch.float64 else tl.float32,
            **OPTIONS,
            **choice,
        )


def _has_short_steps(tensor: Tensor) -> bool:
    """Whether 32-bit offsets reach all elements of an image from its first. Offsets between images have 64 bits."""
    sizes_and_steps = list(zip(tensor.shape, tensor.stride(), strict=True))
    return sum((size - 1) * step for size, step in sizes_and_steps[1:]) < 2**31


# ---------------------------------------------------------------------------------------------------------------------
# What Triton compiles and measures at the first launch of each kind: kept on disk, and done by one process of a machine

TURN_S = 60.0
"""How long a process waits for another one to compile and measure a kernel, which takes some seconds."""

_launched: set[tuple] = set()  # what this process has compiled, or found on disk
_first_launches = threading.Lock()  # where Triton keeps things is a setting of the whole process


def _first_of_its_kind(
    function: _TritonFunction, stride: int, tensors: tuple[Tensor, ...]
) -> contextlib.AbstractContextManager[None]:
    """Return the context of a launch. Only the first one with such tensors has something to do in it."""
    kind = (function.base_fn.__name__, stride, *((tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors))
    device = tensors[0].device
    if (device, kind) in _launched or triton.knobs.runtime.interpret:
        return contextlib.nullcontext()
    _launched.add((device, kind))
    folder = _cache_folder(torch.cuda.get_device_name(device))
    return contextlib.nullcontext() if folder is None else _kept_in(folder, repr(kind))


@contextlib.contextmanager
def _kept_in(folder: Path, kind: str) -> Iterator[None]:
    """Meanwhile Triton keeps in `folder` what it compiles and measures, and one process of a machine does `kind`.

    Elsewhere it would be Triton's folder of this rank: Inductor gives each device one of its own, in /tmp as a rule.
    """
    lock = folder / f"{hashlib.sha256(kind.encode()).hexdigest()[:16]}.lock"
    with _first_launches, triton.knobs.cache.scope(), _turn(lock):
        triton.knobs.cache.dir = str(folder)
        yield


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Hold the lock of a file, or go on without it after TURN_S.

    Measuring waits for all that the GPU has to do, collectives included, and those wait for other ranks. With a lock
    for each kind of launch, and ranks that come to the kinds in the same order, that is no circle: what a holder has
    begun, those who wait for it have begun too. Where ranks differ in their order, the time limit ends it.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # no room for the file, or a file system without locks
            _wait_for(stack.enter_context(path.open("w")))
        yield


def _wait_for(lock: IO[str]) -> None:
    last = time.monotonic() + TURN_S
    while time.monotonic() < last:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say_what_is_waited_for()
            time.sleep(0.05)


@functools.cache
def _cache_folder(gpu: str) -> Path | None:
    """Return the folder of a kind of GPU beside the CPU's library; None, for Triton's own, if it cannot be written.

    The rest of the key is Triton's: its version and sources, the kernel's, the GPU's architecture, shapes and dtypes.
    GPUs of one architecture differ in memory and cores, and so in which configuration is the fastest.
    """
    try:
        folder = cache_dir() / "triton" / re.sub(r"\W+", "-", gpu)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError) as error:  # no home folder, or no permission or room to write to it
        print(f"the involution's choices cannot be kept for all ranks: {one_line(error)}", file=sys.stderr, flush=True)
        return None


@functools.cache
def _say_what_is_waited_for() -> None:
    """Once, on rank 0, or before the ranks have joined a process group."""
    if not (dist.is_initialized() and dist.get_rank() > 0):
        what = "the involution is compiled and its fastest form measured for each shape"
        print(f"{what} (some seconds each, once for a kind of GPU)", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The kernels


@_autotune("x_c", "k_w")
@triton.jit
def _forward(
    x, kernel, out,
    x_b, x_c, x_h, x_w, k_b, k_g, k_u, k_v, k_h, k_w, o_b, o_c, o_h, o_w,
    batch, groups, height, width, out_height, out_width,
    GROUP_CHANNELS: tl.constexpr, CHANNELS: tl.constexpr, KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    SUM_DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0) % groups
    b, i, j, is_position = _positions(tl.program_id(0) // groups, batch, out_height, out_width, BLOCK)
    channel = g * GROUP_CHANNELS + tl.arange(0, CHANNELS)[None, :]
    is_channel = tl.arange(0, CHANNELS)[None, :] < GROUP_CHANNELS
    kernel += b * k_b + g * k_g + i * k_h + j * k_w  # (BLOCK,)
    x += (b * x_b)[:, None] + channel * x_c  # (BLOCK, CHANNELS)
    total = tl.zeros((BLOCK, CHANNELS), SUM_DTYPE)
    for u in range(KERNEL_SIZE):
        row = i * STRIDE + u - KERNEL_SIZE // 2
        for v in tl.static_range(KERNEL_SIZE):
            column = j * STRIDE + v - KERNEL_SIZE // 2
            inside = is_position & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            weight = tl.load(kernel + u * k_u + v * k_v, mask=inside, other=0.0)
            value = tl.load(x + (row * x_h + column * x_w)[:, None], mask=inside[:, None] & is_channel, other=0.0)
            total += weight.to(SUM_DTYPE)[:, None] * value.to(SUM_DTYPE)
    out += (b * o_b + i * o_h + j * o_w)[:, None] + channel * o_c
    tl.store(out, total.to(out.dtype.element_ty), mask=is_position[:, None] & is_channel)


@_autotune("g_c", "k_w")
@triton.jit
def _grad_x(
    grad_out, kernel, out,
    g_b, g_c, g_h, g_w, k_b, k_g, k_u, k_v, k_h, k_w, o_b, o_c, o_h, o_w,
    batch, groups, height, width, out_height, out_width,
    GROUP_CHANNELS: tl.constexpr, CHANNELS: tl.constexpr, KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    SUM_DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0) % groups
    first_row = tl.program_id(1) // STRIDE
    first_column = tl.program_id(1) % STRIDE
    # A class has H' rows or one fewer, and W' columns or one fewer: positions beyond the image are masked.
    b, row, column, is_position = _positions(tl.program_id(0) // groups, batch, out_height, out_width, BLOCK)
    row = row * STRIDE + first_row
    column = column * STRIDE + first_column
    is_position = is_position & (row < height) & (column < width)
    channel = g * GROUP_CHANNELS + tl.arange(0, CHANNELS)[None, :]
    is_channel = tl.arange(0, CHANNELS)[None, :] < GROUP_CHANNELS
    kernel += b * k_b + g * k_g  # (BLOCK,)
    grad_out += (b * g_b)[:, None] + channel * g_c  # (BLOCK, CHANNELS)
    total = tl.zeros((BLOCK, CHANNELS), SUM_DTYPE)
    # Output row i has read this row with tap u where STRIDE * i + u - P = row.
    first_u = (first_row + KERNEL_SIZE // 2) % STRIDE
    first_v = (first_column + KERNEL_SIZE // 2) % STRIDE
    for nth_u in range((KERNEL_SIZE + STRIDE - 1) // STRIDE):
        u = first_u + nth_u * STRIDE
        down = row + KERNEL_SIZE // 2 - u
        i = down // STRIDE
        # Means u < KERNEL_SIZE, written with a block of positions: the interpreter has no masks from scalars.
        is_tap = down >= row - KERNEL_SIZE // 2
        met_row = is_position & is_tap & (down >= 0) & (i < out_height)
        for nth_v in tl.static_range((KERNEL_SIZE + STRIDE - 1) // STRIDE):
            v = first_v + nth_v * STRIDE
            right = column + KERNEL_SIZE // 2 - v
            j = right // STRIDE
            is_tap = right >= column - KERNEL_SIZE // 2
            met = met_row & is_tap & (right >= 0) & (j < out_width)
            weight = tl.load(kernel + u * k_u + v * k_v + i * k_h + j * k_w, mask=met, other=0.0)
            grad = tl.load(grad_out + (i * g_h + j * g_w)[:, None], mask=met[:, None] & is_channel, other=0.0)
            total += weight.to(SUM_DTYPE)[:, None] * grad.to(SUM_DTYPE)
    out += (b * o_b + row * o_h + column * o_w)[:, None] + channel * o_c
    tl.store(out, total.to(out.dtype.element_ty), mask=is_position[:, None] & is_channel)


@_autotune("x_c", "o_w")
@triton.jit
def _grad_kernel(
    grad_out, x, out,
    g_b, g_c, g_h, g_w, x_b, x_c, x_h, x_w, o_b, o_g, o_u, o_v, o_h, o_w,
    batch, groups, height, width, out_height, out_width,
    GROUP_CHANNELS: tl.constexpr, CHANNELS: tl.constexpr, KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    SUM_DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0) % groups
    b, i, j, is_position = _positions(tl.program_id(0) // groups, batch, out_height, out_width, BLOCK)
    channel = g * GROUP_CHANNELS + tl.arange(0, CHANNELS)[None, :]
    is_channel = tl.arange(0, CHANNELS)[None, :] < GROUP_CHANNELS
    grad_out += (b * g_b + i * g_h + j * g_w)[:, None] + channel * g_c
    grad = tl.load(grad_out, mask=is_position[:, None] & is_channel, other=0.0).to(SUM_DTYPE)
    x += (b * x_b)[:, None] + channel * x_c  # (BLOCK, CHANNELS)
    out += b * o_b + g * o_g + i * o_h + j * o_w  # (BLOCK,)
    for u in range(KERNEL_SIZE):
        row = i * STRIDE + u - KERNEL_SIZE // 2
        for v in tl.static_range(KERNEL_SIZE):
            column = j * STRIDE + v - KERNEL_SIZE // 2
            inside = is_position & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            value = tl.load(x + (row * x_h + column * x_w)[:, None], mask=inside[:, None] & is_channel, other=0.0)
            total = tl.sum(grad * value.to(SUM_DTYPE), axis=1)
            tl.store(out + u * o_u + v * o_v, total.to(out.dtype.element_ty), mask=is_position)


@triton.jit
def _positions(tile, batch, height, width, BLOCK: tl.constexpr):
    """Return image, row and column of each position of a tile, (BLOCK,) each, and whether the position exists."""
    position = tile * BLOCK + tl.arange(0, BLOCK)
    pixel = position % (height * width)
    b = (position // (height * width)).to(tl.int64)  # offsets between images can exceed 2**31 elements
    return b, pixel // width, pixel % width, position < batch * height * width
