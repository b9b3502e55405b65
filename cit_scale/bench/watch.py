"""What a step does, whatever the speed of the machine: its operators, by part, and the memory of its tensors."""

from __future__ import annotations

import gc
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from cit_scale.run.live_bytes import LiveBytes

PARTS = ("mix", "teachers", "student", "loss", "backward", "update")
"""Of a training step, in their order. A step that is watched says when each begins."""


class Watch(LiveBytes):
    """Counts the operators of an eager step by part, and the bytes of the tensors that it makes.

    Views and empty tensors launch nothing and are no operators here. Operators within compiled code are not seen. Bytes
    are those beyond what was there before. Does not see storages that are resized, as FSDP2 and
    ZeRO-3 do with gathered weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self._part = PARTS[0]

    def mark(self, part: str) -> None:
        self._part = part

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # DTensor goes first, and comes back with this rank's own tensors
        for each in tree_leaves((args, kwargs)):
            if isinstance(each, Tensor):
                self._count(each.untyped_storage(), is_new=False)
        operator: Any = func
        if not (operator.is_view or "empty" in operator.name()):
            self.operators[self._part] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


class PartClock:
    """Milliseconds of each part of a step. On a GPU the device is waited for at each mark, so parts do not overlap."""

    def __init__(self, device: torch.device) -> None:
        self.times: defaultdict[str, float] = defaultdict(float)
        self._device = device
        self._part: str | None = None
        self._since = 0.0

    def mark(self, part: str | None) -> None:
        """The part that begins; None at the end of the step."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._part is not None:
            self.times[self._part] += 1e3 * (now - self._since)
        self._part, self._since = part, now


def allocated_bytes(device: torch.device) -> int:
    """On a GPU what PyTorch has allocated there; on a CPU the storages of all tensors that Python can reach."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    # By exact type: fake tensors and DTensors have no storage of their own.
    tensors = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter) and each.device == device]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def enqueue_ms(step: Callable[[], object], device: torch.device) -> float:
    """Milliseconds until a step has been handed to an idle GPU. Where it holds more kernels than the queue of the GPU,
    about a thousand, this includes waiting for room."""
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    taken = time.perf_counter() - start
    torch.cuda.synchronize(device)
    return 1e3 * taken


KERNEL = "kernel"
"""What Kineto calls a kernel's run on a GPU; copies, and ranges that a program has named, have other names."""


def kernel_intervals(events: Iterable[Any]) -> list[tuple[int, int]]:
    """When each kernel ran, on whichever stream: beginning and end in ns. events: of Kineto."""
    return [(each.start_ns(), each.end_ns()) for each in events if each.activity_type() == KERNEL]


def covered(intervals: Iterable[tuple[int, int]]) -> int:
    """The length of the union of intervals, which may overlap and come in any order."""
    total, reached = 0, None
    for begin, end in sorted(intervals):
        if reached is None or end > reached:
            total += end - (begin if reached is None else max(begin, reached))
            reached = end
    return total


def idle_share(step: Callable[[], object], device: torch.device, step_ms: float, steps: int = 3) -> float | None:
    """The share of a step's time, 0 to 1, in which no kernel runs on a GPU. None where no kernel could be recorded.

    step_ms: a step's time without the profiler, which slows the host and not the kernels. The kernels of NCCL run while
    they wait for other ranks, and do not count as idle.
    """
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize(device)
    results = profiler.profiler
    kernels = [] if results is None else kernel_intervals(results.kineto_results.events())
    return max(0.0, 1 - covered(kernels) / (1e6 * steps * step_ms)) if kernels else None
