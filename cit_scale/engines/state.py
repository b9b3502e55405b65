"""Everything an update changes, in one layout for every engine, stage and world size."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

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


class MovingBuffers:
    """Buffers of one dtype that move in training, what they were after the last update, and their moving averages.

    The latter two lie in a row in one tensor each: a step takes a few launches, and not a few for each BatchNorm.
    """

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        """buffers: by name. They are refilled in place."""
        self._buffers = list(buffers.values())
        self._kept = self._in_a_row()
        self._average = self._kept.clone()
        shapes = [buffer.shape for buffer in self._buffers]
        sizes = [shape.numel() for shape in shapes]
        self._parts = [part.view(shape) for part, shape in zip(self._kept.split(sizes), shapes, strict=True)]
        parts = zip(buffers, self._average.split(sizes), shapes, strict=True)
        self.averages = {name: part.view(shape) for name, part, shape in parts}
        """By name, each in its buffer's shape. Written from outside they are written here."""

    @property
    def device(self) -> torch.device:
        return self._kept.device

    def _in_a_row(self) -> Tensor:
        return torch.cat([buffer.flatten() for buffer in self._buffers])

    def keep(self) -> None:
        """The buffers were written from outside, and stand."""
        torch._foreach_copy_(self._parts, self._buffers)

    def settle(self, found_inf: Tensor) -> None:
        """Keep what the buffers are now, or set them back to what was kept where ``found_inf`` is 1."""
        torch.where(found_inf.bool(), self._kept, self._in_a_row(), out=self._kept)
        torch._foreach_copy_(self._buffers, self._parts)

    def average_follows(self, weight: Tensor) -> None:
        """Move the averages towards the buffers; counters are taken as they are. weight: a float32 scalar."""
        if self._average.is_floating_point():
            self._average.lerp_(self._kept, weight.to(self._average.dtype))
        else:
            self._average.copy_(self._kept)


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
        self._loss_scale = loss_scale
        self._average = [piece.detach().clone() for piece in placement.pieces if ema_decay is not None]
        persistent = module.state_dict().keys()
        self._buffers = {name: buffer for name, buffer in module.named_buffers() if name in persistent}
        # Frozen weights, which are buffers too, never move.
        frozen: Container[str] = getattr(module, "frozen", ())
        by_dtype: dict[torch.dtype, dict[str, Tensor]] = {}
        for name, buffer in self._buffers.items():
            if name not in frozen:
                by_dtype.setdefault(buffer.dtype, {})[name] = buffer
        self._moving = [MovingBuffers(buffers) for buffers in by_dtype.values()]
        # Averaged weights want averaged BatchNorm statistics.
        self._averaged_buffers: dict[str, Tensor] = {}
        if ema_decay is not None:
            averages = {name: average for moving in self._moving for name, average in moving.averages.items()}
            self._averaged_buffers = {
                name: averages[name] if name in averages else buffer.clone() for name, buffer in self._buffers.items()
            }
        self._create_moments()

    def _create_moments(self) -> None:
        """As AdamW does it at its first step, so that there is a place to load into."""
        for piece in self._placement.pieces:
            step = torch.zeros((), dtype=torch.float32, device=piece.device)
            moments = {key: torch.zeros_like(piece) for key in MOMENTS}
            self._optimizer.state[piece] = {"step": step, **moments}

    @torch.no_grad()
    def follow(self, found_inf: Callable[[torch.device], Tensor]) -> None:
        """After an update. Applied: the moving average follows, and the buffers stand. Skipped: the average stands, and
        the buffers, BatchNorm's statistics, go back to before the forward passes.

        found_inf: gives 1 for an update that is skipped, otherwise 0, as a scalar on a device. The host does not learn
        which it was.
        """
        for moving in self._moving:
            moving.settle(found_inf(moving.device))
        if self._ema_decay is None:
            return
        pieces = [_local(piece) for piece in self._placement.pieces]
        # Two devices where the pieces are offloaded and the buffers are not.
        weights = {
            device: self._average_weight(found_inf(device))
            for device in {pieces[0].device, *(moving.device for moving in self._moving)}
        }
        _lerp([_local(average) for average in self._average], pieces, weights[pieces[0].device])
        for moving in self._moving:
            moving.average_follows(weights[moving.device])

    def _average_weight(self, found_inf: Tensor) -> Tensor:
        """The newest value's weight in the moving average, a float32 scalar beside ``found_inf``; 0 after a skipped
        update."""
        assert self._ema_decay is not None
        weight = torch.full_like(found_inf, 1 - self._ema_decay)
        if self._ema_warmup:
            # At update n of a warm-up at least 1 - (1 + n) / (10 + n), as TensorFlow's ExponentialMovingAverage has it.
            before = self._optimizer_step().to(weight.device, torch.float64, non_blocking=True) - 1
            weight = weight.double().fmax(1 - (1 + before) / (10 + before)).float()
        return weight * (1 - found_inf)

    def _optimizer_step(self) -> Tensor:
        """The number of updates applied, as AdamW counts them beside its pieces: the same for every piece."""
        return self._optimizer.state[self._placement.pieces[0]]["step"]

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
        self._loss_scale.load(state["loss_scale"])
        for key, buffer in self._whole_buffers().items():
            buffer.copy_(state[key])
        for moving in self._moving:
            moving.keep()
        self._placement.publish()

    def _whole_buffers(self) -> dict[str, Tensor]:
        """By key, what no engine cuts: the buffers, and their moving averages."""
        kinds = {"buffer": self._buffers, "ema": self._averaged_buffers}
        return {f"{kind}/{name}": buffer for kind, buffers in kinds.items() for name, buffer in buffers.items()}

    def _whole_tensors(self) -> dict[str, Tensor]:
        """By key, what every rank has whole: the buffers, and what is counted."""
        return {
            **self._whole_buffers(),
            "optimizer_step": self._optimizer_step().to("cpu", torch.int64),
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


def _local(tensor: Tensor) -> Tensor:
    """This rank's own part of a DTensor, in the same memory; another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _lerp(averages: list[Tensor], values: list[Tensor], weight: Tensor) -> None:
    """average = (1 - weight) * average + weight * value, in place. weight: a scalar on their device."""
    if weight.is_cuda:
        # torch._foreach_lerp_ takes a weight from the host only; a launch for each tensor would take milliseconds.
        steps = torch._foreach_sub(values, averages)
        torch._foreach_mul_(steps, weight)
        torch._foreach_add_(averages, steps)
    else:
        for average, value in zip(averages, values, strict=True):
            average.lerp_(value, weight)


def _saved(state: Mapping[str, Tensor], kind: str, name: str) -> Tensor:
    return state[f"{kind}/{name}"]


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().to("cpu", copy=True)
