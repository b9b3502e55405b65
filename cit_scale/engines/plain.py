"""One process, plain PyTorch: what the other engines are tested against."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cit_scale.batch import StudentLogits
from cit_scale.config import EngineConfig, OptimConfig
from cit_scale.engines.base import Hosted, StepResult, clip_gradients
from cit_scale.engines.state import TrainingState, WholeParameters
from cit_scale.optim import adamw, set_learning_rate


class PlainEngine:
    """The ``Engine`` of a process alone."""

    def __init__(
        self, module: nn.Module, optim: OptimConfig, engine: EngineConfig, micro_steps: int, device: torch.device
    ) -> None:
        self.module = module
        self.micro_steps = micro_steps
        self._hosted = Hosted(module, engine.precision, device)
        if engine.compile:
            module.compile()
        self._optimizer = adamw(module, optim)
        self._clip_norm = optim.clip_norm
        self._state = TrainingState(module, self._optimizer, WholeParameters(module), optim.ema_decay)

    def forward(self, images: Tensor) -> StudentLogits:
        return self._hosted(images)

    def backward(self, loss: Tensor) -> None:
        (loss / self.micro_steps).backward()

    def step(self, lr: float) -> StepResult:
        grad_norm = clip_gradients(self.module.parameters(), self._clip_norm)
        skipped = not math.isfinite(grad_norm)
        if skipped:
            self._state.reject()
        else:
            set_learning_rate(self._optimizer, lr)
            self._optimizer.step()
            self._state.accept()
        self._optimizer.zero_grad()
        return StepResult(grad_norm, lr, skipped)

    def state(self) -> dict[str, Tensor]:
        return self._state.whole(is_main=True)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._state.load(state)
