"""One process, plain PyTorch: what the other engines are tested against."""

from __future__ import annotations

from torch import Tensor, nn

from cit_scale.batch import StudentLogits
from cit_scale.config import EngineConfig, OptimConfig
from cit_scale.distributed.world import World
from cit_scale.engines.hosted import Hosted, HostingEngine, apply_update
from cit_scale.engines.state import WholeParameters
from cit_scale.optim import adamw


class PlainEngine(HostingEngine):
    """The ``Engine`` of a process alone."""

    def __init__(
        self, module: nn.Module, optim: OptimConfig, engine: EngineConfig, micro_steps: int, world: World
    ) -> None:
        super().__init__(module, optim, engine, micro_steps, world)
        self._hosted = Hosted(module, engine.precision, world.device)
        if engine.compile:
            module.compile()
        self._optimizer = adamw(module, optim)
        self._placement = WholeParameters(module)
        self._keep_state(self._optimizer, self._placement)

    def forward(self, images: Tensor) -> StudentLogits:
        return self._hosted(images)

    def _backward(self, loss: Tensor) -> None:
        (loss / self.micro_steps).backward()

    def _update(self, lr: float, loss_scale: float) -> float:
        return apply_update(
            self._optimizer, self._placement.pieces, lr=lr, clip_norm=self._clip_norm, loss_scale=loss_scale
        )
