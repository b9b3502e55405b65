"""Everything an update changes, in one portable form for every engine, stage and world size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from cit_scale.errors import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")


class Layout(Protocol):
    """How the module's parameters lie in the tensors that this rank's AdamW updates.

    shapes: each parameter's own shape by name. pieces: those tensors, float32; a piece may hold one parameter, several,
    or a part of each.
    """

    shapes: dict[str, torch.Size]
    pieces: list[Tensor]

    def assemble(self, pieces: Sequence[Tensor]) -> Iterable[tuple[str, Tensor]]:
        """Collective. From every rank's tensors, shaped like its ``pieces``, each parameter's whole tensor by name."""

    def cut(self, whole: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """From whole tensors by name, this rank's part, shaped like its ``pieces``. The inverse of ``assemble``."""

    def publish(self) -> None:
        """Collective. ``pieces`` were written from outside; make the module compute with them."""


class WholeParameters:
    """The layout of an engine that shards nothing: AdamW updates the module's own parameters."""

    def __init__(self, module: nn.Module) -> None:
        parameters = dict(module.named_parameters())
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self.pieces: list[Tensor] = list(parameters.values())

    def assemble(self, pieces: Sequence[Tensor]) -> Iterable[tuple[str, Tensor]]:
        return zip(self.shapes, pieces, strict=True)

    def cut(self, whole: Mapping[str, Tensor]) -> Iterator[Tensor]:
        return (whole[name] for name in self.shapes)

    def publish(self) -> None:
        pass


class TrainingState:
    """Weights, AdamW's moments and step count, the moving average of the weights, buffers.

    Moments and average stay in pieces, beside the weights they belong to; only ``whole`` puts them together.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.AdamW, layout: Layout, ema_decay: float | None
    ) -> None:
        self._optimizer = optimizer
        self._layout = layout
        self._ema_decay = ema_decay
        self._average = [piece.detach().clone() for piece in layout.pieces] if ema_decay is not None else None
        persistent = module.state_dict().keys()
        self._buffers = {name: buffer for name, buffer in module.named_buffers() if name in persistent}
        self._buffers_before = [buffer.clone() for buffer in self._buffers.values()]
        # Averaged weights want averaged BatchNorm statistics; counters are taken as they are.
        self._averaged_buffers = {
            name: buffer.clone() for name, buffer in self._buffers.items() if ema_decay is not None
        }
        self._create_moments()

    def _create_moments(self) -> None:
        """As AdamW does it at its first step, so that there is a place to load into."""
        fused = self._optimizer.defaults["fused"]
        for piece in self._layout.pieces:
            step = torch.zeros((), dtype=torch.float32, device=piece.device if fused else "cpu")
            moments = {key: torch.zeros_like(piece) for key in MOMENTS}
            self._optimizer.state[piece] = {"step": step, **moments}

    @torch.no_grad()
    def accept(self) -> None:
        """An update was applied: the moving average follows, the buffers stand."""
        if self._average is not None:
            # average = decay * average + (1 - decay) * weight
            torch._foreach_lerp_(self._average, self._layout.pieces, 1 - self._ema_decay)
        for name, average in self._averaged_buffers.items():
            if average.is_floating_point():
                average.lerp_(self._buffers[name], 1 - self._ema_decay)
            else:
                average.copy_(self._buffers[name])
        self._keep_buffers()

    @torch.no_grad()
    def reject(self) -> None:
        """An update was skipped: the buffers, BatchNorm's statistics, go back to before its forward passes."""
        if self._buffers:
            torch._foreach_copy_(list(self._buffers.values()), self._buffers_before)

    def whole(self, is_main: bool) -> dict[str, Tensor]:
        """Collective. The state as ``Engine.state`` describes it, on the rank that is main; elsewhere empty."""
        state = {
            f"{kind}/{name}": _copy_to_cpu(tensor)
            for kind, pieces in self._kinds().items()
            for name, tensor in self._layout.assemble(pieces)
            if is_main
        }
        if is_main:
            state |= {f"{kind}/{name}": _copy_to_cpu(buffer) for kind, name, buffer in self._whole_buffers()}
            step = self._optimizer.state[self._layout.pieces[0]]["step"]  # the same for every piece
            state["optimizer_step"] = torch.tensor(int(step))
        return state

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Collective. Take over what ``whole`` returned. If it does not fit, ConfigError, and nothing is changed."""
        self._check(state)
        for kind, pieces in self._kinds().items():
            whole = {name: state[f"{kind}/{name}"] for name in self._layout.shapes}
            for piece, part in zip(pieces, self._layout.cut(whole), strict=True):
                piece.copy_(part)
        for piece in self._layout.pieces:
            self._optimizer.state[piece]["step"].copy_(state["optimizer_step"])
        for kind, name, buffer in self._whole_buffers():
            buffer.copy_(state[f"{kind}/{name}"])
        self._keep_buffers()
        self._layout.publish()

    def _keep_buffers(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._buffers_before, list(self._buffers.values()))

    def _whole_buffers(self) -> Iterator[tuple[str, str, Tensor]]:
        """Kind, name and tensor of what no engine cuts: the buffers, and their moving averages."""
        for kind, buffers in {"buffer": self._buffers, "ema": self._averaged_buffers}.items():
            for name, buffer in buffers.items():
                yield kind, name, buffer

    def _kinds(self) -> dict[str, list[Tensor]]:
        """What there is of each parameter, in pieces."""
        pieces = self._layout.pieces
        kinds = {"weight": pieces, **{key: [self._optimizer.state[piece][key] for piece in pieces] for key in MOMENTS}}
        if self._average is not None:
            kinds["ema"] = self._average
        return kinds

    def _check(self, state: Mapping[str, Tensor]) -> None:
        here = {f"{kind}/{name}": shape for kind in self._kinds() for name, shape in self._layout.shapes.items()}
        here |= {f"{kind}/{name}": buffer.shape for kind, name, buffer in self._whole_buffers()}
        here["optimizer_step"] = torch.Size()
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
                "continue with the configuration that it was saved with"
            )


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().to("cpu", copy=True)
