"""What fp16 multiplies the loss by, so that small gradients do not vanish."""

from __future__ import annotations

import torch
from torch import Tensor

INITIAL_SCALE = 2.0**16
GROWTH_STEPS = 2000


class LossScale:
    """The loss scale of fp16: halved when a gradient is not finite, doubled after GROWTH_STEPS good steps in a row.

    is_dynamic: whether the precision is fp16. At others it is 1, for good.

    Always a power of two, so that multiplying by it and dividing again is exact. Ours under every engine, because they
    have to agree on it: torch's GradScaler knows nothing of DeepSpeed's partitions, and DeepSpeed's own scaler comes
    only with fp16 weights.
    """

    def __init__(self, is_dynamic: bool) -> None:
        self._is_dynamic = is_dynamic
        self._start()

    def _start(self) -> None:
        self.value = INITIAL_SCALE if self._is_dynamic else 1.0
        self._good_steps = 0

    def update(self, skipped: bool) -> None:
        """A step was skipped, or applied."""
        if not self._is_dynamic:
            return
        self._good_steps = 0 if skipped else self._good_steps + 1
        if skipped:
            self.value = max(self.value / 2, 1.0)
        elif self._good_steps == GROWTH_STEPS:
            self.value *= 2
            self._good_steps = 0

    def to_tensor(self) -> Tensor:
        """float32, (2,): the scale and the good steps since it changed; zeros where there is none."""
        return torch.tensor([self.value, self._good_steps] if self._is_dynamic else [0.0, 0.0])

    def load(self, saved: Tensor) -> None:
        """Go on from what ``to_tensor`` returned; from the start, where that was saved at another precision."""
        self._start()
        value, good_steps = saved.tolist()
        if self._is_dynamic and value > 0:
            self.value, self._good_steps = value, int(good_steps)
