"""What every engine does around its own way to reduce and update."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cit_scale.batch import StudentLogits
from cit_scale.config import EngineConfig, OptimConfig
from cit_scale.distributed.world import World
from cit_scale.engines.base import StepResult
from cit_scale.engines.batch_norm import RunningStatistics, prepare_batch_norm
from cit_scale.engines.loss_scale import LossScale
from cit_scale.engines.state import ParameterPlacement, TrainingState
from cit_scale.errors import ConfigError
from cit_scale.optim import set_learning_rate

Precision = Literal["float32", "bf16", "fp16"]

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Hosted(nn.Module):
    """A network with its precision: its forward pass under autocast where asked for, its logits in float32.

    Autocast is entered in here, below whatever wraps this module: on a GPU DeepSpeed switches off, with one line in the
    log, an autocast that it finds around its engine.
    """

    def __init__(self, network: nn.Module, precision: Precision, device: torch.device) -> None:
        super().__init__()
        self.network = network.to(device)
        self._dtype = AUTOCAST.get(precision)
        self._device_type = device.type

    def forward(self, images: Tensor) -> StudentLogits:
        """images: (B, 3, H, W) in [0, 1]."""
        with torch.autocast(self._device_type, self._dtype, enabled=self._dtype is not None):
            logits = self.network(images)
        return type(logits)(*(head.float() for head in logits))


class HostingEngine(ABC):
    """The ``Engine`` but for three verbs: how to compute, to reduce and to update.

    Counts micro-steps, scales the loss, and after an update lets the rest of the state follow or go back. A subclass
    puts up its ``hosted`` module and calls ``_keep_state`` when the parameters lie where they will stay.
    """

    def __init__(
        self, module: nn.Module, optim: OptimConfig, engine: EngineConfig, micro_steps: int, world: World
    ) -> None:
        self.module = module
        self.micro_steps = micro_steps
        self._backwards = 0
        self._clip_norm = optim.clip_norm
        self._ema_decay = optim.ema_decay
        self._loss_scale = LossScale(is_dynamic=engine.precision == "fp16")
        prepare(module, engine, world)
        self._statistics = RunningStatistics(module, world)

    def _keep_state(self, optimizer: torch.optim.AdamW, placement: ParameterPlacement) -> None:
        self._state = TrainingState(self.module, optimizer, placement, self._ema_decay, self._loss_scale)

    @abstractmethod
    def forward(self, images: Tensor) -> StudentLogits: ...

    @abstractmethod
    def _backward(self, loss: Tensor) -> None:
        """Collective. Add the gradient of ``loss`` / ``micro_steps``."""

    @abstractmethod
    def _update(self, lr: float, loss_scale: float) -> float:
        """Collective. Divide by ``loss_scale``, clip, apply what is finite, clear. Returns the norm before clipping."""

    @property
    def _is_last(self) -> bool:
        """Whether the micro-step that is under way is the update's last."""
        return self._backwards == self.micro_steps - 1

    def backward(self, loss: Tensor) -> None:
        self._backward(loss * self._loss_scale.value)
        self._backwards += 1

    def step(self, lr: float) -> StepResult:
        if self._backwards != self.micro_steps:
            raise RuntimeError(f"step after {self._backwards} backward calls, an update takes {self.micro_steps}")
        self._backwards = 0
        loss_scale = self._loss_scale.value
        grad_norm = self._update(lr, loss_scale)
        skipped = not math.isfinite(grad_norm)
        if skipped:
            self._state.reject()
        else:
            self._statistics.average()
            self._state.accept()
        self._loss_scale.update(skipped)
        return StepResult(grad_norm, lr, skipped, loss_scale)

    def state_shapes(self) -> dict[str, torch.Size]:
        return self._state.shapes()

    def state(self, keys: Container[str]) -> dict[str, Tensor]:
        return self._state.copies(keys)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._state.load(state)

    def averaged(self) -> AbstractContextManager[None]:
        return self._state.averaged()


def prepare(module: nn.Module, engine: EngineConfig, world: World) -> None:
    """Make a network compute as ``engine`` says, in place, or ConfigError where it cannot."""
    if engine.activation_checkpointing:
        checkpoint_activations(module)
    prepare_batch_norm(module, engine.batch_norm, world)


def apply_update(
    optimizer: torch.optim.AdamW, parameters: Sequence[Tensor], *, lr: float, clip_norm: float, loss_scale: float
) -> float:
    """Clip, update unless a gradient is not finite, clear. Collective for DTensors. Returns the norm before."""
    grad_norm = clip_gradients(parameters, clip_norm, loss_scale)
    if math.isfinite(grad_norm):
        set_learning_rate(optimizer, lr)
        optimizer.step()
    optimizer.zero_grad()
    return grad_norm


def clip_gradients(parameters: Iterable[Tensor], clip_norm: float, loss_scale: float = 1.0) -> float:
    """Divide the gradients by ``loss_scale`` and scale them down to a global L2 norm of ``clip_norm``.

    Collective where parameters are DTensors. Returns the norm before clipping. A clip_norm of 0 leaves them alone, and
    so does a norm that is not finite.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in parameters]
    if loss_scale != 1:
        torch._foreach_mul_(gradients, 1 / loss_scale)
    total_norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(total_norm, DTensor):
        total_norm = total_norm.full_tensor()
    grad_norm = total_norm.item()
    if clip_norm > 0 and math.isfinite(grad_norm):
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, total_norm)
    return grad_norm


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a network's model, by timm's name for them; none where it has no such name."""
    return list(getattr(_model(module), "blocks", ()))


def checkpoint_activations(module: nn.Module) -> None:
    """Have the model compute its blocks again in the backward pass, or ConfigError where it cannot."""
    model = _model(module)
    way_out = "set engine.activation_checkpointing=false"
    # Computing a BatchNorm again would move its running statistics twice. What stands outside the blocks is not.
    inside = blocks_of(module) or [model]
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for block in inside for layer in block.modules()):
        raise ConfigError(f"{type(model).__name__} has BatchNorm where it would be computed twice; {way_out}")
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:  # timm asserts where a model has the method alone
        raise ConfigError(f"{type(model).__name__} cannot checkpoint its activations; {way_out}") from error


def _model(module: nn.Module) -> nn.Module:
    """timm's model inside a Network; other modules are their own."""
    return getattr(module, "model", module)
