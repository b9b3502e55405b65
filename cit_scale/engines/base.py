"""What an engine is: it hosts the student and owns accumulation, precision, clipping and the finite check."""

from __future__ import annotations

from collections.abc import Container, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from cit_scale.batch import StudentLogits


@dataclass(frozen=True)
class StepResult:
    """What one update did.

    grad_norm: L2 norm over all parameters, before clipping, of the whole job's mean gradient; inf or nan if skipped.
    skipped: the gradient was not finite, and nothing was changed: weights, moments, buffers, moving average.
    loss_scale: what fp16 multiplied the loss by in this step, 1 at other precisions. A step that is skipped while it is
    above 1 is how fp16 finds its scale, which is halved then; it is no sign of trouble.
    """

    grad_norm: float
    lr: float
    skipped: bool
    loss_scale: float = 1.0


class Engine(Protocol):
    """One update is ``micro_steps`` times ``forward`` and ``backward``, then one ``step``.

    ``backward`` takes a loss that is a mean over this rank's micro-batch; the engine divides by ``micro_steps`` and
    averages over ranks, so that the update is the one of the whole global batch.

    Evaluation goes through ``forward`` too, between two updates, after ``module.eval()`` and under ``torch.no_grad()``,
    with the same number of calls on every rank: a sharded module cannot be called by itself.
    """

    module: nn.Module
    micro_steps: int

    def forward(self, images: Tensor) -> StudentLogits:
        """images: (B, 3, H, W) in [0, 1]. Under autocast where the precision asks for it; logits are float32."""

    def backward(self, loss: Tensor) -> None:
        """Collective. Add this micro-batch's gradient."""

    def step(self, lr: float) -> StepResult:
        """Collective. Check, clip, update with learning rate ``lr``, clear the gradients.

        Reads one number from the device: whether the gradient is finite has to be known before the update.
        """

    def state_shapes(self) -> dict[str, torch.Size]:
        """What ``state`` can give: the shape of each tensor of the training state, the same on every rank.

        Keys: ``weight/NAME``, ``exp_avg/NAME``, ``exp_avg_sq/NAME`` for each parameter and ``ema/NAME`` where an
        average is kept (float32, the parameter's own shape), ``buffer/NAME``, and likewise ``ema/NAME``, for each
        buffer of the state dict, ``optimizer_step`` (the number of updates applied, int64 scalar) and ``loss_scale``
        (float32, (2,): the scale of fp16 and the good steps since it changed; zeros elsewhere). The same for every
        engine, stage and world size.
        """

    def state(self, keys: Container[str]) -> dict[str, Tensor]:
        """Collective. Copies on the CPU of what this rank asks for, which may differ by rank. Between two updates."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Collective. Every rank passes the whole state, as ``state`` returned it. ConfigError if it does not fit.

        Tensors are looked up one at a time and not kept: the mapping may read each from a file.
        """

    def averaged(self) -> AbstractContextManager[None]:
        """Collective, to enter and to leave. Within it ``forward`` computes with the moving average of weights and
        buffers, which there has to be; afterwards, also after Stopped, everything is as before, bit for bit."""
