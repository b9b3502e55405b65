"""Counts what a step makes the host wait for, on a machine without a GPU: by the calls that would wait on one."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that give the host a number, or a shape that follows from numbers: on a GPU each waits for all before it.
READING = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "masked_select", "bincount", "argwhere",
    "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave", "_assert_async",
}  # fmt: skip

# What a tensor on the CPU answers without an operator. (``numpy`` is not among them: a GPU's tensor refuses it.)
READING_METHODS = (Tensor.tolist, Tensor.cpu, Tensor.__array__)

PACKAGES = ("cit_scale", "deepspeed", "timm", "nvidia")


class Operators(TorchDispatchMode):
    """``counts``: how often each operator was called. ``reads``: those of READING, by the line that asked."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket._qualified_op_name.split("::")[-1]
        self.counts[name] += 1
        if name in READING:
            self.reads[f"{asking_line()} {name}"] += 1
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    def __init__(self, reads: Counter[str]) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        asks_itself = "cit_scale" in Path(sys._getframe(1).f_code.co_filename).parts
        if func in READING_METHODS or (asks_itself and _moves(func, args, kwargs or {})):
            self._reads[f"{asking_line()} {func.__name__}"] += 1
        return func(*args, **(kwargs or {}))


def _moves(func: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether it may copy from or to a device while the host waits: no CPU shows where a tensor would be."""
    if func is torch.tensor:
        return "device" in kwargs
    if func is not Tensor.to or kwargs.get("non_blocking"):
        return False
    return "device" in kwargs or any(isinstance(each, torch.device | str) for each in args[1:])


def asking_line() -> str:
    """The innermost line of a package of ours or of a library that we call, as ``engines/zero.py:80``."""
    frame = sys._getframe(2)
    while frame is not None:
        parts = Path(frame.f_code.co_filename).parts
        for package in PACKAGES:
            if package in parts:
                inside = parts[len(parts) - 1 - parts[::-1].index(package) :]
                return f"{'/'.join(inside)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


@contextlib.contextmanager
def counting() -> Iterator[Operators]:
    """Count operators and reads of this thread, and of backward passes that it starts."""
    operators = Operators()
    with Methods(operators.reads), operators:
        yield operators


@contextlib.contextmanager
def counting_calls(owner: Any, name: str) -> Iterator[list[tuple[tuple, dict]]]:
    """The arguments of each call of a function, which is called all the same."""
    calls: list[tuple[tuple, dict]] = []
    inner: Callable = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return inner(*args, **kwargs)

    setattr(owner, name, counted)
    try:
        yield calls
    finally:
        setattr(owner, name, inner)


@contextlib.contextmanager
def counting_collectives() -> Iterator[Counter[str]]:
    """Collectives that the host waits for, by name and asking line: of all but the engines, whose tensors lie on a GPU
    where there is one, and which queue their collectives there.
    """
    found: Counter[str] = Counter()
    names = (
        "all_reduce", "broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "barrier",
    )  # fmt: skip
    kept = {name: getattr(dist, name) for name in names}

    def wrap(name: str) -> Callable:
        def counted(*args: Any, **kwargs: Any) -> Any:
            line = asking_line()
            if not kwargs.get("async_op") and line.startswith("cit_scale/") and "/engines/" not in line:
                found[f"{line} {name}"] += 1
            return kept[name](*args, **kwargs)

        return counted

    for name in names:
        setattr(dist, name, wrap(name))
    try:
        yield found
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


def device_waits() -> contextlib.AbstractContextManager[list]:
    """DeepSpeed's calls of ``get_accelerator().synchronize()``, which waits for the whole device."""
    from deepspeed.accelerator import get_accelerator

    return counting_calls(get_accelerator(), "synchronize")
