"""Involution on a CPU: compiles ``involution.cpp`` for this machine at the first use, caches the library, and calls it.

The build takes some seconds and serves all shapes and dtypes. It needs no PyTorch headers: the library only calls the
parallel loop over torch's threads that PyTorch's stable C interface exports. forward, grad_x and grad_kernel write
their result to ``out``.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import torch
from torch import Tensor

from cit_scale.errors import one_line
from cit_scale.files import sync

SOURCE = Path(__file__).with_name("involution.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-Wno-psabi")
COMPILERS = ("c++", "g++", "clang++")  # tried in this order, unless CXX names one
FUNCTIONS = ("involution_forward", "involution_grad_x", "involution_grad_kernel")

# The numbers that involution.cpp uses for dtypes.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


class BuildError(Exception):
    """The library cannot be built or loaded. The message is the reason, in one line."""


def forward(x: Tensor, kernel: Tensor, stride: int, out: Tensor) -> None:
    """Compute the involution of x. x: (B, C, H, W). kernel: (B, G, K, K, H', W'). out: (B, C, H', W')."""
    _call("involution_forward", _shape(x, kernel, stride), x, kernel, out)


def grad_x(grad_out: Tensor, kernel: Tensor, stride: int, out: Tensor) -> None:
    """Compute the gradient with respect to x.

    grad_out: (B, C, H', W'). kernel: (B, G, K, K, H', W'). out: (B, C, H, W).
    """
    _call("involution_grad_x", _shape(out, kernel, stride), grad_out, kernel, out)


def grad_kernel(grad_out: Tensor, x: Tensor, stride: int, out: Tensor) -> None:
    """Compute the gradient with respect to the kernel.

    grad_out: (B, C, H', W'). x: (B, C, H, W). out: (B, G, K, K, H', W').
    """
    _call("involution_grad_kernel", _shape(x, out, stride), grad_out, x, out)


# ---------------------------------------------------------------------------------------------------------------------
# Calling the library. The structures must match those in involution.cpp.


class _Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "batch", "groups", "group_channels", "kernel_size", "stride", "height", "width", "out_height", "out_width"
        )
    ]  # fmt: skip


class _Image(ctypes.Structure):
    # Steps in elements, as torch gives them, not in bytes.
    _fields_ = [("data", ctypes.c_void_p), ("steps", ctypes.c_int64 * 4)]


class _Kernel(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("steps", ctypes.c_int64 * 6)]


def _shape(x: Tensor, kernel: Tensor, stride: int) -> _Shape:
    """Return the sizes. x, kernel: tensors with these shapes, inputs or outputs."""
    batch, channels, height, width = x.shape
    groups, size, _, out_height, out_width = kernel.shape[1:]
    return _Shape(batch, groups, channels // groups, size, stride, height, width, out_height, out_width)


def _view(tensor: Tensor) -> _Image | _Kernel:
    """Return address and strides of a tensor as a structure of the library."""
    if tensor.ndim == 4:
        return _Image(tensor.data_ptr(), tensor.stride())
    return _Kernel(tensor.data_ptr(), tensor.stride())


def _call(function: str, shape: _Shape, *tensors: Tensor) -> None:
    """Call a function of the library. Raises RuntimeError where it fails."""
    views = (ctypes.byref(_view(tensor)) for tensor in tensors)
    library, parallel_for = load()
    status = getattr(library, function)(DTYPES[tensors[0].dtype], ctypes.byref(shape), *views, parallel_for)
    if status != 0:
        raise RuntimeError(f"{function} failed in torch's parallel loop, perhaps out of memory; use a smaller batch")


# ---------------------------------------------------------------------------------------------------------------------
# Building and loading the library


def load() -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    """Return the library and the address of torch's parallel loop, which it calls. Builds the library if missing.

    Raises BuildError.
    """
    loaded = _load()
    if isinstance(loaded, BuildError):
        raise loaded
    return loaded


@functools.cache
def _load() -> tuple[ctypes.CDLL, ctypes.c_void_p] | BuildError:
    """Load once per process. An error is cached, too, as a second attempt would fail for the same reason."""
    try:
        return _find_or_build()
    except BuildError as error:
        return error


def _find_or_build() -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    """Load the library from the cache folder or, if that cannot be written, build it for this process only."""
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        parallel_for = ctypes.cast(torch_cpu.torch_parallel_for, ctypes.c_void_p)
    except (OSError, AttributeError) as error:
        raise BuildError(f"this PyTorch does not export its parallel loop: {one_line(error)}") from error
    try:
        return _load_from(cache_dir()), parallel_for
    except (OSError, RuntimeError) as error:  # no home folder, or no permission or room to write to it
        print(f"the involution cannot be kept for the next process: {one_line(error)}", file=sys.stderr, flush=True)
    try:
        with tempfile.TemporaryDirectory() as folder:  # a loaded library stays usable when its file is gone
            return _load_from(Path(folder)), parallel_for
    except OSError as error:
        raise BuildError(one_line(error)) from error


def _load_from(folder: Path) -> ctypes.CDLL:
    """Load the library from `folder`, building it there if it is missing or damaged. Raises OSError, BuildError."""
    library = folder / f"involution-{_fingerprint()}.so"
    with contextlib.suppress(OSError):  # missing, or damaged
        return _open(library)
    folder.mkdir(parents=True, exist_ok=True)
    with library.with_suffix(".lock").open("w") as lock:
        # One process per machine builds while the others wait. Where the file system has no locks, each process builds,
        # and the libraries replace each other.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):  # another process has built it while this one waited
            return _open(library)
        _build(library)
    return _open(library)


def _open(library: Path) -> ctypes.CDLL:
    """Load the library. Raises OSError if it cannot be loaded or lacks a function."""
    opened = ctypes.CDLL(str(library))
    if not all(hasattr(opened, function) for function in FUNCTIONS):
        raise OSError(f"{library} lacks some of {', '.join(FUNCTIONS)}")
    return opened


def cache_dir() -> Path:
    """Return ``$XDG_CACHE_HOME/cit_scale`` or ``~/.cache/cit_scale``. Raises RuntimeError without a home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cit_scale"


def _fingerprint() -> str:
    """Return a digest of source, compiler flags and CPU.

    The library is built with -march=native, and machines with different CPUs may share a cache folder.
    """
    cpu = [platform.machine()]
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu += sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    parts = [SOURCE.read_text(), *FLAGS, *cpu]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _build(library: Path) -> None:
    """Compile the library, to a temporary name first. Raises BuildError with the compiler's first error."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    if compiler is None:
        raise BuildError(f"there is no C++ compiler ({', '.join(COMPILERS)})")
    print(f"building the involution for this CPU (some seconds, once): {library}", file=sys.stderr, flush=True)
    partial = library.with_suffix(f".{uuid.uuid4().hex}")
    try:
        command = [*shlex.split(compiler), *FLAGS, str(SOURCE), "-o", str(partial)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        sync(partial)
    except (OSError, ValueError) as error:
        raise BuildError(f"the C++ compiler {compiler} does not run: {one_line(error)}") from error
    except subprocess.CalledProcessError as error:
        partial.unlink(missing_ok=True)
        complaint = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr)
        raise BuildError(f"{compiler} cannot build {SOURCE.name}: {one_line(complaint)}") from error
    partial.replace(library)
