"""Involution on a CPU: builds ``involution.cpp`` for this machine at its first use, keeps the library, calls it.

One build takes a C++ compiler some seconds and serves every shape and dtype. It needs no headers of PyTorch, only the
loop over torch's threads that its stable C interface exports. Each function fills ``out``.
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
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

SOURCE = Path(__file__).with_suffix("").with_name("involution.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-Wno-psabi")
COMPILERS = ("c++", "g++", "clang++")

# As involution.cpp numbers them. float16, which CPUs compute in float32 anyhow, is left to the loop.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


class BuildError(Exception):
    """Why there is no library, in one line."""


def forward(x: Tensor, kernel: Tensor, stride: int, out: Tensor) -> None:
    """x: (B, C, H, W). kernel: (B, G, K, K, H', W'). out: (B, C, H', W')."""
    _call("involution_forward", _shape(x, kernel, stride), x, kernel, out)


def grad_x(grad_out: Tensor, kernel: Tensor, stride: int, out: Tensor) -> None:
    """grad_out: (B, C, H', W'). kernel: (B, G, K, K, H', W'). out: (B, C, H, W)."""
    _call("involution_grad_x", _shape(out, kernel, stride), grad_out, kernel, out)


def grad_kernel(grad_out: Tensor, x: Tensor, stride: int, out: Tensor) -> None:
    """grad_out: (B, C, H', W'). x: (B, C, H, W). out: (B, G, K, K, H', W')."""
    _call("involution_grad_kernel", _shape(x, out, stride), grad_out, x, out)


# ---------------------------------------------------------------------------------------------------------------------
# The call. The structures stand in involution.cpp again.


class _Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "batch", "groups", "group_channels", "kernel_size", "stride", "height", "width", "out_height", "out_width"
        )
    ]  # fmt: skip


class _Image(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("steps", ctypes.c_int64 * 4)]


class _Kernel(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("steps", ctypes.c_int64 * 6)]


def _shape(x: Tensor, kernel: Tensor, stride: int) -> _Shape:
    batch, channels, height, width = x.shape
    groups, size, _, out_height, out_width = kernel.shape[1:]
    return _Shape(batch, groups, channels // groups, size, stride, height, width, out_height, out_width)


def _view(tensor: Tensor) -> _Image | _Kernel:
    if tensor.ndim == 4:
        return _Image(tensor.data_ptr(), tensor.stride())
    return _Kernel(tensor.data_ptr(), tensor.stride())


def _call(function: str, shape: _Shape, *tensors: Tensor) -> None:
    views = (ctypes.byref(_view(tensor)) for tensor in tensors)
    status = getattr(load(), function)(DTYPES[tensors[0].dtype], ctypes.byref(shape), *views, _parallel_for())
    if status != 0:
        raise RuntimeError(f"{function} failed in torch's parallel loop; is there memory left?")


@functools.cache
def _parallel_for() -> ctypes.c_void_p:
    torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    return ctypes.cast(torch_cpu.torch_parallel_for, ctypes.c_void_p)


# ---------------------------------------------------------------------------------------------------------------------
# The library


@functools.cache
def is_available() -> bool:
    """Whether there is a library for this machine; builds it if need be. If there is none, says so, once."""
    try:
        load()
    except BuildError as error:
        if not (dist.is_initialized() and dist.get_rank() > 0):
            warnings.warn(
                f"involution runs as a loop in PyTorch, several times slower and in more memory: {error}; "
                f"install a C++ compiler, such as g++, or name one in CXX",
                stacklevel=2,
            )
        return False
    return True


@functools.cache
def load() -> ctypes.CDLL:
    """The library, built where it is missing. Raises BuildError."""
    try:
        return _load_from(cache_dir())
    except OSError:  # a home that cannot be written, say
        with tempfile.TemporaryDirectory() as folder:  # of this process alone; once loaded, the file can go
            return _load_from(Path(folder))


def _load_from(folder: Path) -> ctypes.CDLL:
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"involution-{_fingerprint()}.so"
    with library.with_suffix(".lock").open("w") as lock:
        # One process of a machine builds while the others wait; on a file system without locks each builds its own.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _build(library)
    return ctypes.CDLL(str(library))


def cache_dir() -> Path:
    """Where built libraries stay: ``$XDG_CACHE_HOME/cit_scale``, or ``~/.cache/cit_scale``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cit_scale"


def _fingerprint() -> str:
    """Of what the library is made from and of the CPU it is made for: machines of a cluster may share a cache."""
    cpu = [platform.machine()]
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu += sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    parts = [SOURCE.read_text(), *FLAGS, *cpu]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _build(library: Path) -> None:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    if compiler is None:
        raise BuildError(f"there is no C++ compiler ({', '.join(COMPILERS)})")
    print(f"building the involution for this CPU, some seconds, once: {library}", file=sys.stderr, flush=True)
    partial = library.with_suffix(f".{os.getpid()}")
    command = [*shlex.split(compiler), *FLAGS, str(SOURCE), "-o", str(partial)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise BuildError(f"there is no C++ compiler {compiler}") from error
    except subprocess.CalledProcessError as error:
        complaint = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr.strip())
        raise BuildError(f"{compiler} cannot build {SOURCE.name}: {complaint}") from error
    partial.replace(library)
