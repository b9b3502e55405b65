"""Everything an update changes, in one layout for every engine, stage and world size."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from cit_scale.engines.loss_scale import LossScale
from cit_scale.errors import ConfigError, Stopped

MOMENTS = ("exp_avg", "exp_avg_sq")


class ParameterPlacement(Protocol):
    """How the module's parameters lie in the tensors that this rank's AdamW updates.

    shapes: each parameter's own shape by name. pieces: those tensors, float32; a piece may hold one parameter, several,
    or a part of each.
    """

    shapes: dict[str, torch.Size]
    pieces: list[Tensor]

    def assemble(self, pieces: Sequence[Tensor]) -> Iterable[tuple[str, Tensor]]:
        """Collective. From every rank's tensors, shaped like its ``pieces``, each parameter's whole tensor by name."""

    def cut(self, whole: Callable[[str], Tensor]) -> Iterator[Tensor]:
        """From whole tensors, looked up by name, this rank's part, shaped like its ``pieces``, one after the other.

        The inverse of ``assemble``."""

    def publish(self) -> None:
        """Collective. ``pieces`` were written from outside; make the module compute with them."""


class WholeParameters:
    """The placement of an engine that shards nothing: AdamW updates the module's own parameters."""

    def __init__(self, module: nn.Module) -> None:
        parameters = dict(module.named_parameters())
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self.pieces: list[Tensor] = list(parameters.values())

    def assemble(self, pieces: Sequence[Tensor]) -> Iterable[tuple[str, Tensor]]:
        return zip(self.shapes, pieces, strict=True)

    def cut(self, whole: Callable[[str], Tensor]) -> Iterator[Tensor]:
        return (whole(name) for name in self.shapes)

    def publish(self) -> None:
        pass


class TrainingState:
    """Weights, AdamW's moments and step count, the moving average of the weights, buffers, the loss scale.

    Moments and average stay in pieces, beside the weights they belong to; only ``copies`` puts them together.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.AdamW,
        placement: ParameterPlacement,
        ema_decay: float | None,
        loss_scale: LossScale,
        *,
        ema_warmup: bool = False,
    ) -> None:
        self._optimizer = optimizer
        self._placement = placement
        self._ema_decay = ema_decay
        self._ema_warmup = ema_warmup
        self._updates = 0  # that were applied, as AdamW counts them on the device
        self._loss_scale = loss_scale
        self._average = [piece.detach().clone() for piece in placement.pieces if ema_decay is not None]
        persistent = module.state_dict().keys()
        self._buffers = {name: buffer for name, buffer in module.named_buffers() if name in persistent}
        # What may have to go back: frozen weights, which are buffers too, never move.
        frozen: Container[str] = getattr(module, "frozen", ())
        self._moving = [buffer for name, buffer in self._buffers.items() if name not in frozen]
        self._buffers_before = [buffer.clone() for buffer in self._moving]
        # Averaged weights want averaged BatchNorm statistics; counters are taken as they are.
        self._averaged_buffers = {
            name: buffer.clone() for name, buffer in self._buffers.items() if ema_decay is not None
        }
        self._create_moments()

    def _create_moments(self) -> None:
        """As AdamW does it at its first step, so that there is a place to load into."""
        for piece in self._placement.pieces:
            step = torch.zeros((), dtype=torch.float32, device=piece.device)
            moments = {key: torch.zeros_like(piece) for key in MOMENTS}
            self._optimizer.state[piece] = {"step": step, **moments}

    @torch.no_grad()
    def accept(self) -> None:
        """An update was applied: the moving average follows, the buffers stand."""
        if self._ema_decay is not None:
            # At update n of a warm-up at most (1 + n) / (10 + n), as TensorFlow's ExponentialMovingAverage has it.
            warm = (1 + self._updates) / (10 + self._updates) if self._ema_warmup else 1.0
            self._follow(1 - min(self._ema_decay, warm))
        self._updates += 1
        self._keep_buffers()

    def _follow(self, weight: float) -> None:
        """Move the averages: average = (1 - weight) * average + weight * value."""
        torch._foreach_lerp_(self._average, self._placement.pieces, weight)
        for name, average in self._averaged_buffers.items():
            if average.is_floating_point():
                average.lerp_(self._buffers[name], weight)
            else:
                average.copy_(self._buffers[name])

    @torch.no_grad()
    def reject(self) -> None:
        """An update was skipped: the buffers, BatchNorm's statistics, go back to before its forward passes."""
        if self._moving:
            torch._foreach_copy_(self._moving, self._buffers_before)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Collective, to enter and to leave. Within it the module computes with the average."""
        if self._ema_decay is None:
            raise RuntimeError("there is no moving average of the weights; set optim.ema_decay")
        self._exchange()
        try:
            yield
        except Stopped:  # on all ranks
            self._exchange()
            raise
        # After any other exception, which may be of this rank alone, the others would not join in, and all is over.
        self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Collective. What is in the module goes to where its average lies, and the other way round, bit for bit."""
        pairs = list(zip(self._placement.pieces, self._average, strict=True))
        pairs += [(self._buffers[name], average) for name, average in self._averaged_buffers.items()]
        for here, there in pairs:
            kept = here.clone()
            here.copy_(there)
            there.copy_(kept)
        self._placement.publish()

    def shapes(self) -> dict[str, torch.Size]:
        """As ``Engine.state_shapes`` describes them."""
        shapes = {f"{kind}/{name}": shape for kind in self._kinds() for name, shape in self._placement.shapes.items()}
        return shapes | {key: tensor.shape for key, tensor in self._whole_tensors().items()}

    def copies(self, keys: Container[str]) -> dict[str, Tensor]:
        """Collective. The state as ``Engine.state`` describes it: every rank gathers everything, and keeps its keys."""
        copies = {
            f"{kind}/{name}": _copy_to_cpu(tensor)
            for kind, pieces in self._kinds().items()
            for name, tensor in self._placement.assemble(pieces)
            if f"{kind}/{name}" in keys
        }
        return copies | {key: _copy_to_cpu(tensor) for key, tensor in self._whole_tensors().items() if key in keys}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Collective. Take over what ``copies`` returned. If it does not fit, ConfigError, and nothing is changed."""
        self._check(state)
        for kind, pieces in self._kinds().items():
            parts = self._placement.cut(partial(_saved, state, kind))
            for piece, part in zip(pieces, parts, strict=True):
                piece.copy_(part)
        for piece in self._placement.pieces:
            self._optimizer.state[piece]["step"].copy_(state["optimizer_step"])
        self._updates = int(state["optimizer_step"])
        self._loss_scale.load(state["loss_scale"])
        for key, buffer in self._whole_buffers().items():
            buffer.copy_(state[key])
        self._keep_buffers()
        self._placement.publish()

    def _keep_buffers(self) -> None:
        if self._moving:
            torch._foreach_copy_(self._buffers_before, self._moving)

    def _whole_buffers(self) -> dict[str, Tensor]:
        """By key, what no engine cuts: the buffers, and their moving averages."""
        kinds = {"buffer": self._buffers, "ema": self._averaged_buffers}
        return {f"{kind}/{name}": buffer for kind, buffers in kinds.items() for name, buffer in buffers.items()}

    def _whole_tensors(self) -> dict[str, Tensor]:
        """By key, what every rank has whole: the buffers, and what is counted."""
        step = self._optimizer.state[self._placement.pieces[0]]["step"]  # the same for every piece
        return {
            **self._whole_buffers(),
            "optimizer_step": step.to("cpu", torch.int64),
            "loss_scale": self._loss_scale.to_tensor(),
        }

    def _kinds(self) -> dict[str, list[Tensor]]:
        """What there is of each parameter, in pieces."""
        pieces = self._placement.pieces
        kinds = {"weight": pieces, **{key: [self._optimizer.state[piece][key] for piece in pieces] for key in MOMENTS}}
        if self._ema_decay is not None:
            kinds["ema"] = self._average
        return kinds

    def _check(self, state: Mapping[str, Tensor]) -> None:
        here = self.shapes()
        problems = [f"{key} is missing" for key in here if key not in state]
        problems += [f"{key} is not known here" for key in state if key not in here]
        problems += [
            f"{key} is {tuple(state[key].shape)}, here {tuple(shape)}"
            for key, shape in here.items()
            if key in state and state[key].shape != shape
        ]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise ConfigError(
                f"the saved state does not fit this network and optimizer: {', '.join(problems[:3])}{more}; "
                "continue with the student, teachers, train.freeze and optim.ema_decay that it was saved with"
            )


def _saved(state: Mapping[str, Tensor], kind: str, name: str) -> Tensor:
    return state[f"{kind}/{name}"]


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().to("cpu", copy=True)
