"""Steps that were not finite: what it was, on which ranks, with which images; and past a limit, the end of the run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cit_scale.batch import LossTerms, MixedBatch
from cit_scale.checkpoint.store import write_tensors
from cit_scale.distributed.world import World, gather
from cit_scale.engines.base import StepResult
from cit_scale.errors import DivergedError
from cit_scale.run.metrics import RunLog
from cit_scale.run.progress import TrainingProgress

FOLDER = "bad_steps"


@dataclass(frozen=True)
class Culprit:
    """One micro-step of one rank. terms: of its loss, those that are not finite. samples: its images' indices."""

    rank: int
    micro_step: int
    terms: list[str]
    samples: list[int]


@dataclass(frozen=True)
class BadStep:
    """What is known of a skipped step.

    culprits: the micro-steps whose loss is not finite; where every loss is and only the gradient is not, all of them,
    without terms: gradients are summed over ranks before anybody looks at them.
    """

    step: int
    grad_norm: float
    loss_scale: float
    culprits: list[Culprit]

    @property
    def is_scaling(self) -> bool:
        """Whether it is only how fp16 finds the scale of its loss: the gradient overflowed, the loss did not."""
        return not self._has_bad_loss and self.loss_scale > 1

    @property
    def _has_bad_loss(self) -> bool:
        return any(culprit.terms for culprit in self.culprits)

    def __str__(self) -> str:
        if self.is_scaling:
            return f"fp16 gradients overflowed at a loss scale of {self.loss_scale:g}, which is halved"
        first = self.culprits[0]
        terms = ", ".join(first.terms) if self._has_bad_loss else "the gradient, though not the loss, is"
        shown = ", ".join(map(str, first.samples[:8])) + (", ..." if len(first.samples) > 8 else "")
        ranks = sorted({culprit.rank for culprit in self.culprits})
        return (
            f"{terms} not finite on rank{'s' if len(ranks) > 1 else ''} "
            f"{', '.join(map(str, ranks))}; micro-step {first.micro_step} of rank {first.rank} has samples {shown}"
        )

    def record(self) -> dict[str, Any]:
        """For a line of metrics.jsonl, or a file."""
        return {
            "skipped": str(self),
            "grad_norm": str(self.grad_norm),
            "culprits": [vars(culprit) for culprit in self.culprits],
        }


def find_culprits(
    step: int, result: StepResult, terms: Sequence[LossTerms], samples: Sequence[Tensor], world: World
) -> BadStep:
    """Collective. Who spoiled a skipped step. terms, samples: of each micro-step of this rank."""
    mine = []
    for micro_step, (loss, indices) in enumerate(zip(terms, samples, strict=True)):
        named = {"loss_label": loss.label, **{f"loss_{name}": term for name, term in loss.distillation.items()}}
        bad = [name for name, term in {**named, "loss": loss.total}.items() if not term.isfinite()]
        mine.append(Culprit(world.rank, micro_step, bad, indices.tolist()))
    everyone = [culprit for rank in gather(world, mine) for culprit in rank]
    culprits = [culprit for culprit in everyone if culprit.terms] or everyone
    return BadStep(step, result.grad_norm, result.loss_scale, culprits)


class BadSteps:
    """Counts them, in the run's progress, so that a stop in the midst of some changes nothing."""

    def __init__(self, progress: TrainingProgress, run_dir: Path, most: int, world: World) -> None:
        self._progress = progress
        self._folder = run_dir / FOLDER
        self._most = most
        self._world = world
        self._last: BadStep | None = None
        if progress.bad_in_a_row >= most:
            progress.bad_in_a_row = 0  # the run gave up there, and somebody wants it to try again

    @property
    def too_many(self) -> bool:
        return self._last is not None and self._progress.bad_in_a_row >= self._most

    def count_good(self) -> None:
        self._progress.bad_in_a_row = 0

    def count(self, bad: BadStep, log: RunLog) -> None:
        """Count a skipped step and tell of it."""
        log.note(bad.step, bad.record())
        if bad.is_scaling:
            log.say(f"step {bad.step} was skipped: {bad}")
            return
        progress = self._progress
        progress.bad_steps += 1
        progress.bad_in_a_row += 1
        self._last = bad
        counts = f"{progress.bad_in_a_row} in a row, {progress.bad_steps} in all"
        log.say(f"step {bad.step} was skipped and changed nothing: {bad}; {counts}")

    def give_up(self, batches: Iterable[MixedBatch]) -> None:
        """Raise DivergedError, after each rank has written what the last bad step saw. batches: of its micro-steps."""
        assert self._last is not None
        folder = self._folder / f"step_{self._last.step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{name}_{micro_step}": tensor.contiguous().cpu()
            for micro_step, batch in enumerate(batches)
            for name, tensor in {"images": batch.images, "targets": batch.targets}.items()
        }
        write_tensors(tensors, folder / f"rank_{self._world.rank}.safetensors")
        if self._world.is_main:
            (folder / "step.json").write_text(json.dumps(self._last.record(), indent=1))
        raise DivergedError(
            f"{self._progress.bad_in_a_row} steps in a row were not finite, the last is step {self._last.step}: "
            f"{self._last}; its images and targets are in {folder}, the state before it is the newest checkpoint; "
            "look at them, or go on with a lower optim.lr and --override-resume"
        )
