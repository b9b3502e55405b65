"""What an engine is: it hosts the student and owns accumulation, precision, clipping and the finite check."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cit_scale.batch import StudentLogits
from cit_scale.config import BatchSplit, EngineConfig, OptimConfig
from cit_scale.distributed.world import World
from cit_scale.engines.activation_checkpointing import checkpoint_activations
from cit_scale.engines.batch_norm import RunningStatistics, prepare_batch_norm
from cit_scale.engines.late import LateNumber
from cit_scale.engines.loss_scale import LossScale
from cit_scale.engines.state import ParameterPlacement, TrainingState
from cit_scale.models.network import Network
from cit_scale.optim import clip_gradients, gradients_of, skip_where
from cit_scale.settings import decided


@dataclass(frozen=True)
class EngineSetup:
    """What an engine is built with beside the network, checked by ``build.prepare_engine``.

    ds_config: what DeepSpeed is told; None for the other engines.
    """

    optim: OptimConfig
    engine: EngineConfig
    batch_split: BatchSplit
    world: World
    ds_config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Update:
    """What is known of an update when it is queued.

    grad_norm: scalar on the device, the L2 norm over all parameters, before clipping, of the whole job's mean gradient;
    inf or nan if the update is skipped. is_skipped: None as long as only the device knows it.
    """

    grad_norm: Tensor
    is_skipped: bool | None = None

    def found_inf(self, device: torch.device) -> Tensor:
        """Float32 scalar on ``device``: 1 if the update is skipped, otherwise 0. No waiting: another device than the
        norm's can have it only where ``is_skipped`` is known."""
        if self.is_skipped is not None:
            return torch.full((), float(self.is_skipped), device=device)
        assert device == self.grad_norm.device
        return (~self.grad_norm.isfinite()).float()


class StepResult:
    """What one update did. The device may still be at it: asking for a number of it waits until it is there."""

    def __init__(self, lr: float, grad_norm: Tensor, loss_scale: Tensor | None = None) -> None:
        """grad_norm, loss_scale: scalars on any device."""
        self.lr = lr
        self._grad_norm = LateNumber(grad_norm)
        self._loss_scale = None if loss_scale is None else LateNumber(loss_scale)

    @property
    def grad_norm(self) -> float:
        """L2 norm over all parameters, before clipping, of the whole job's mean gradient; inf or nan if skipped."""
        return self._grad_norm.read()

    @property
    def skipped(self) -> bool:
        """The gradient was not finite, and nothing was changed: weights, moments, buffers, moving average."""
        return not math.isfinite(self.grad_norm)

    @property
    def loss_scale(self) -> float:
        """What fp16 multiplied the loss by in this step, 1 at other precisions. A step that is skipped while it is
        above 1 is how fp16 finds its scale, which is halved then; it is no sign of trouble."""
        return 1.0 if self._loss_scale is None else self._loss_scale.read()


class Engine(ABC):
    """One update is ``micro_steps`` times ``forward`` and ``backward``, then one ``step``.

    A subclass says how to compute, to reduce and to update: ``forward``, ``_backward``, ``_update``. It puts its
    wrapper, if it has one, around ``module`` and calls ``_build_state`` when the parameters lie where they will stay.
    What is the same everywhere stands here: counting micro-steps, scaling the loss, and after an update letting the
    rest of the state follow or go back.

    Evaluation goes through ``forward`` too, between two updates, after ``module.eval()`` and under ``torch.no_grad()``,
    with the same number of calls on every rank: a sharded module cannot be called by itself.
    """

    def __init__(self, module: Network, setup: EngineSetup, *, host_knows: bool = False) -> None:
        """Collective. module: the same on every rank, on any device; moved to this rank's own.

        host_knows: whether an update is over, and known to be skipped or not, when ``_update`` returns.
        """
        self.module = module
        self.micro_steps = setup.batch_split.micro_steps
        self._backwards = 0
        self._clip_norm = setup.optim.clip_norm
        self._ema_decay = setup.optim.ema_decay
        self._ema_warmup = setup.optim.ema_warmup
        self._loss_scale = LossScale(
            is_dynamic=setup.engine.precision == "fp16",
            device=torch.device("cpu") if host_knows else setup.world.device,
        )
        # BatchNorm and activation checkpointing change the module's code, so they come before compiling and sharding.
        # The module moves to its device before the optimizer is built, which keeps references to the parameters.
        prepare_network(module, setup.engine, setup.world)
        module.to(setup.world.device)
        self._batch_norm_statistics = RunningStatistics(module, setup.world)  # keeps references to the buffers

    def _build_state(self, optimizer: torch.optim.AdamW, placement: ParameterPlacement) -> None:
        self._state = TrainingState(
            self.module, optimizer, placement, self._ema_decay, self._loss_scale, ema_warmup=self._ema_warmup
        )

    # --- What an update is made of ---

    @abstractmethod
    def forward(self, images: Tensor) -> StudentLogits:
        """images: (B, 3, H, W) in [0, 1]. Under autocast where the precision asks for it; logits are float32."""

    @abstractmethod
    def _backward(self, loss: Tensor) -> None:
        """Collective. Add the gradient of ``loss`` / ``micro_steps``. DeepSpeed divides by itself."""

    @abstractmethod
    def _update(self, lr: float) -> Update:
        """Collective. Divide the gradient by the loss scale, check it, clip it, update, clear it.

        Updates nothing where the gradient is not finite, which the device decides where it can.
        """

    def _clip(self, parameters: Sequence[Tensor], optimizer: torch.optim.AdamW) -> Update:
        """Collective where parameters are DTensors. Divide their gradients by the loss scale, check and clip them, and
        let the optimizer's next step skip what is not finite: all on the device."""
        self._loss_scale.unscale(gradients_of(parameters))
        update = Update(clip_gradients(parameters, self._clip_norm))
        skip_where(optimizer, update.found_inf(update.grad_norm.device))
        return update

    @property
    def _is_last_micro_step(self) -> bool:
        """Whether the current micro-step is the last one of the update."""
        return self._backwards == self.micro_steps - 1

    def backward(self, loss: Tensor) -> None:
        """Collective. Add this micro-batch's gradient.

        loss: a mean over this rank's micro-batch. The engine divides by ``micro_steps`` and averages over ranks, so
        that the update is the one of the whole global batch.
        """
        self._backward(self._loss_scale.scaled(loss))
        self._backwards += 1

    def step(self, lr: float) -> StepResult:
        """Collective. Check, clip, update with learning rate ``lr``, clear the gradients.

        The host queues all of it and reads nothing: what does not follow a gradient that is not finite is decided on
        the device. Where DeepSpeed has to know it, from ZeRO stage 1 on, that one number is read by DeepSpeed.
        """
        if self._backwards != self.micro_steps:
            raise RuntimeError(f"step after {self._backwards} backward calls, an update takes {self.micro_steps}")
        self._backwards = 0
        update = self._update(lr)
        # In this order: the moving average follows the mean of the ranks' buffers, or none if the step is skipped.
        self._batch_norm_statistics.average()
        self._state.follow(update.found_inf)
        result = StepResult(lr, update.grad_norm, self._loss_scale.value)
        self._loss_scale.update(update.found_inf(self._loss_scale.value.device))
        return result

    def try_out(self, loss_of_micro_step: Callable[[], Tensor]) -> None:
        """Collective. A whole update that changes nothing, before the first one: to compile, and to see whether it fits
        into memory.

        loss_of_micro_step: goes through ``forward``. The update is skipped for its loss, which is made infinite; what
        an update takes for itself when it is applied is not tried.
        """
        scale = self._loss_scale.to_tensor()
        for _ in range(self.micro_steps):
            self.backward(loss_of_micro_step() * math.inf)
        skipped = self.step(lr=0.0).skipped
        assert skipped
        self._loss_scale.load(scale)  # which the skipped step has lowered

    # --- The training state, in one form for every engine, stage and world size ---

    def state_shapes(self) -> dict[str, torch.Size]:
        """What ``state`` can give: the shape of each tensor of the training state, the same on every rank.

        Keys: ``weight/NAME``, ``exp_avg/NAME``, ``exp_avg_sq/NAME`` for each parameter and ``ema/NAME`` where an
        average is kept (float32, the parameter's own shape), ``buffer/NAME``, and likewise ``ema/NAME``, for each
        buffer of the state dict, ``optimizer_step`` (the number of updates applied, int64 scalar) and ``loss_scale``
        (float32, (2,): the scale of fp16 and the good steps since it changed; zeros elsewhere).
        """
        return self._state.shapes()

    def state(self, keys: Container[str]) -> dict[str, Tensor]:
        """Collective. Copies on the CPU of the tensors that this rank asks for, which may differ by rank.

        To be called between two updates.
        """
        return self._state.copies(keys)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Collective. Every rank passes the whole state, as ``state`` returned it. ConfigError if it does not fit.

        Tensors are looked up one at a time and not kept: the mapping may read each from a file.
        """
        self._state.load(state)

    def averaged(self) -> AbstractContextManager[None]:
        """Collective, to enter and to leave. Within it ``forward`` computes with the moving average of weights and
        buffers, which there has to be; afterwards, also after Stopped, everything is as before, bit for bit."""
        return self._state.averaged()


def prepare_network(module: Network, engine: EngineConfig, world: World) -> None:
    """Set a network's precision, activation checkpointing and BatchNorm, in place, or raise ConfigError.

    Works on the meta device, too, to find out what an engine would refuse.
    """
    module.precision = decided(engine.precision)
    if engine.activation_checkpointing:
        checkpoint_activations(module)
    prepare_batch_norm(module, engine.batch_norm, world)
