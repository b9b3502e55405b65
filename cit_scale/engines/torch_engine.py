"""What the engines without DeepSpeed do alike: PyTorch's backward pass, clipping, AdamW's update."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from cit_scale.batch import StudentLogits
from cit_scale.engines.base import Engine, EngineSetup, Update
from cit_scale.engines.state import ParameterPlacement
from cit_scale.models.network import Network
from cit_scale.optim import adamw, set_learning_rate


class TorchEngine(Engine):
    """An ``Engine`` whose parameters are tensors, or DTensors, that AdamW updates itself.

    A subclass says by ``_place`` how the module is compiled and sharded.
    """

    def __init__(self, module: Network, setup: EngineSetup) -> None:
        super().__init__(module, setup)
        # Sharding comes before the optimizer: it replaces the module's parameters, and AdamW must update the new ones.
        self._placement = self._place(module, setup)
        self._optimizer = adamw(module, setup.optim)
        self._build_state(self._optimizer, self._placement)

    @abstractmethod
    def _place(self, module: Network, setup: EngineSetup) -> ParameterPlacement:
        """Collective. Compile the module if the setup says so, shard it, and return where its parameters lie."""

    def forward(self, images: Tensor) -> StudentLogits:
        return self.module(images)

    def _backward(self, loss: Tensor) -> None:
        (loss / self.micro_steps).backward()

    def _update(self, lr: float) -> Update:
        update = self._clip(self._placement.pieces, self._optimizer)
        set_learning_rate(self._optimizer, lr)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return update
