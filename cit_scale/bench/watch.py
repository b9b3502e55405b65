"""What a step does, whatever the speed of the machine: its operators, by part, and the memory of its tensors."""

from __future__ import annotations

import gc
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
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
