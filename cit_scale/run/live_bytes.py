"""Counts the bytes of tensors that are alive while a function runs, on real or on fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is on: bytes of the storages that operators have returned and that are still alive, and their peak.

    What an operator allocates and frees inside itself is not seen: the workspace of a convolution, for example.
    known: tensors that are there already and do not count.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        # Kept alive, so that no other storage gets one's id. PyTorch has one Python object for each storage.
        self._known = [tensor.untyped_storage() for tensor in known]
        self._alive: dict[int, weakref.ref[torch.UntypedStorage] | None] = {id(each): None for each in self._known}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        returned = func(*args, **(kwargs or {}))
        for each in tree_leaves(returned):
            if isinstance(each, Tensor):
                self._count(each.untyped_storage())
        return returned

    def _count(self, storage: torch.UntypedStorage, *, is_new: bool = True) -> None:
        """is_new: otherwise it was there already, and does not count."""
        key, nbytes = id(storage), storage.nbytes() if is_new else 0
        if key in self._alive:
            return

        def forget(_: object) -> None:
            del self._alive[key]
            self.now -= nbytes

        self._alive[key] = weakref.ref(storage, forget)
        self.now += nbytes
        self.peak = max(self.peak, self.now)
