"""What fp16 multiplies the loss by, so that small gradients do not vanish."""

from __future__ import annotations

import torch
from torch import Tensor

INITIAL_SCALE = 2.0**16
GROWTH_STEPS = 2000


class LossScale:
    """The loss scale of fp16: halved when a gradient is not finite, doubled after GROWTH_STEPS good steps in a row.

    is_dynamic: whether the precision is fp16. At others it is 1, for good. device: where it lies, and follows what is
    known of a step; no method but ``to_tensor`` waits for it.

    Always a power of two, so that multiplying by it and dividing again is exact. Ours under every engine, because they
    have to agree on it: torch's GradScaler knows nothing of DeepSpeed's partitions, and DeepSpeed's own scaler comes
    only with fp16 weights.
    """

    def __init__(self, is_dynamic: bool, device: torch.device) -> None:
        self._is_dynamic = is_dynamic
        self.value = torch.ones((), device=device)
        """float32 scalar."""

        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)
        if is_dynamic:
            self.value.fill_(INITIAL_SCALE)

    def scaled(self, loss: Tensor) -> Tensor:
        return loss * self.value if self._is_dynamic else loss

    @torch.no_grad()
    def unscale(self, gradients: list[Tensor]) -> None:
        """Divide the gradients by the scale, in place."""
        if self._is_dynamic and gradients:
            torch._foreach_mul_(gradients, self.value.reciprocal())

    @torch.no_grad()
    def update(self, found_inf: Tensor) -> None:
        """A step was skipped, or applied. found_inf: 1 or 0, float32 scalar on the scale's device."""
        if not self._is_dynamic:
            return
        torch._amp_update_scale_(self.value, self._good_steps, found_inf, 2.0, 0.5, GROWTH_STEPS)
        self.value.clamp_(min=1.0)

    def to_tensor(self) -> Tensor:
        """float32, (2,), on the CPU: the scale and the good steps since it changed; zeros where there is none."""
        if not self._is_dynamic:
            return torch.zeros(2)
        return torch.stack((self.value, self._good_steps.float())).cpu()

    def load(self, saved: Tensor) -> None:
        """Go on from what ``to_tensor`` returned; from the start, where that was saved at another precision."""
        value, good_steps = saved.tolist()
        if not self._is_dynamic:
            return
        self.value.fill_(value if value > 0 else INITIAL_SCALE)
        self._good_steps.fill_(int(good_steps) if value > 0 else 0)
