"""A number that the device computes, read by the host when it is asked for and not before."""

from __future__ import annotations

import torch
from torch import Tensor


class LateNumber:
    """The value of a scalar tensor, as it is now.

    Its copy to the host is queued behind the work that computes it, and the host goes on. ``read`` waits for that work
    alone: what was queued later keeps the device busy meanwhile.
    """

    def __init__(self, scalar: Tensor) -> None:
        self._value: float | None = None
        if scalar.is_cuda:
            # From the device into page-locked memory: a copy into any other memory would wait for it.
            self._copy = torch.empty_like(scalar, device="cpu", pin_memory=True)
            self._copy.copy_(scalar.detach(), non_blocking=True)
            self._copied = torch.cuda.Event(blocking=True)  # waited for asleep: the cores are there to decode
            self._copied.record()
        else:
            self._value = float(scalar.detach().numpy())

    def read(self) -> float:
        """Wait until the device has computed it."""
        if self._value is None:
            self._copied.synchronize()
            self._value = float(self._copy.numpy())
        return self._value
