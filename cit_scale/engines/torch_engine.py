"""What the engines without DeepSpeed do alike: PyTorch's own backward pass, clipping and AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from cit_scale.batch import StudentLogits
from cit_scale.engines.base import Engine, EngineSetup
from cit_scale.engines.state import ParameterPlacement
from cit_scale.models.network import Network
from cit_scale.optim import adamw, set_learning_rate


class TorchEngine(Engine):
    """An ``Engine`` whose parameters are tensors, or DTensors, that AdamW updates itself.

    A subclass compiles and shards the module, and says where its parameters lie.
    """

    def __init__(self, module: Network, setup: EngineSetup) -> None:
        super().__init__(module, setup)
        # Sharding comes before the optimizer: it replaces the module's parameters, and AdamW must update the new ones.
        self._placement = self._place(module, setup)
        self._optimizer = adamw(module, setup.optim)
        self._keep_state(self._optimizer, self._placement)

    def _place(self, module: Network, setup: EngineSetup) -> ParameterPlacement:
        """Collective. Compile the module if asked to, shard it, and say where its parameters lie."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> StudentLogits:
        return self.module(images)

    def _backward(self, loss: Tensor) -> None:
        (loss / self.micro_steps).backward()

    def _update(self, lr: float, loss_scale: float) -> float:
        grad_norm = clip_gradients(self._placement.pieces, self._clip_norm, loss_scale)
        if math.isfinite(grad_norm):
            set_learning_rate(self._optimizer, lr)
            self._optimizer.step()
        self._optimizer.zero_grad()
        return grad_norm


def clip_gradients(parameters: Iterable[Tensor], clip_norm: float, loss_scale: float = 1.0) -> float:
    """Divide the gradients by ``loss_scale`` and scale them down to a global L2 norm of ``clip_norm``.

    Collective where parameters are DTensors. Returns the norm before clipping. A clip_norm of 0 leaves them alone, and
    so does a norm that is not finite.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if loss_scale != 1:
        torch._foreach_mul_(gradients, 1 / loss_scale)
    total_norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(total_norm, DTensor):
        total_norm = total_norm.full_tensor()
    grad_norm = total_norm.item()
    if clip_norm > 0 and math.isfinite(grad_norm):
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, total_norm)
    return grad_norm
