"""Bad steps: updates that were skipped because loss or gradient was not finite.

Finds the loss terms, ranks and images behind a bad step, and ends the run after train.max_bad_steps of them in a row.
"""

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
    """One micro-step of one rank. terms: names of its non-finite loss terms. samples: indices of its images."""

    rank: int
    micro_step: int
    terms: list[str]
    samples: list[int]


@dataclass(frozen=True)
class BadStep:
    """Report on a skipped step.

    culprits: the micro-steps with a non-finite loss. If every loss is finite and only the gradient is not, all
    micro-steps of all ranks with empty ``terms``: gradients are summed over ranks before they are checked, so the rank
    is unknown.
    loss_scale: the factor of the loss under fp16; 1 at other precisions.
    """

    step: int
    grad_norm: float
    loss_scale: float
    culprits: list[Culprit]

    @property
    def is_scaling(self) -> bool:
        """Whether the step only lowers the loss scale of fp16: the gradient overflowed, the loss is finite.

        Such steps are normal while the scale is found, and do not count as bad until the scale is 1.
        """
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
        """The report as JSON values, for metrics.jsonl and step.json."""
        # grad_norm as text: JSON has no nan or inf.
        return {
            "skipped": str(self),
            "grad_norm": str(self.grad_norm),
            "culprits": [vars(culprit) for culprit in self.culprits],
        }


def find_culprits(
    step: int, result: StepResult, terms: Sequence[LossTerms], samples: Sequence[Tensor], world: World
) -> BadStep:
    """Collective. Find the micro-steps that made a step non-finite. Returns the same report on every rank.

    result: of the skipped step. terms, samples: one entry per micro-step of this rank; samples holds (B,) indices.
    """
    # Called for skipped steps only: the device synchronization of isfinite() below stays out of the step path.
    mine = []
    for micro_step, (loss, indices) in enumerate(zip(terms, samples, strict=True)):
        named = {"loss_label": loss.label, **{f"loss_{name}": term for name, term in loss.distillation.items()}}
        bad = [name for name, term in {**named, "loss": loss.total}.items() if not term.isfinite()]
        mine.append(Culprit(world.rank, micro_step, bad, indices.tolist()))
    everyone = [culprit for rank in gather(world, mine) for culprit in rank]
    # If every loss is finite, only the gradient overflowed, and any micro-step may be the cause.
    culprits = [culprit for culprit in everyone if culprit.terms] or everyone
    return BadStep(step, result.grad_norm, result.loss_scale, culprits)


class BadSteps:
    """Counts bad steps and ends the run after ``most`` of them in a row.

    The counts are part of the training progress and thus of the checkpoints: a run that stops between two bad steps and
    resumes counts on.
    """

    def __init__(self, progress: TrainingProgress, run_dir: Path, most: int, world: World) -> None:
        self._progress = progress
        self._folder = run_dir / FOLDER
        self._most = most
        self._world = world
        self._last: BadStep | None = None
        if progress.bad_in_a_row >= most:
            # The checkpoint is from a run that gave up; a user who resumes it wants another try, so count from 0.
            progress.bad_in_a_row = 0

    @property
    def too_many(self) -> bool:
        """Whether the last ``most`` steps were bad; equal on every rank."""
        return self._last is not None and self._progress.bad_in_a_row >= self._most

    @property
    def at_limit(self) -> bool:
        """Whether one more bad step ends the run."""
        return self._progress.bad_in_a_row + 1 >= self._most

    @property
    def last_step(self) -> int:
        """The last bad step. There has to be one."""
        assert self._last is not None
        return self._last.step

    def count_good(self) -> None:
        """Record a step with finite loss and gradient."""
        self._progress.bad_in_a_row = 0

    def count(self, bad: BadStep, log: RunLog) -> None:
        """Record a skipped step, log it and print it."""
        log.note(bad.step, bad.record())
        if bad.is_scaling:  # logged, but not counted
            log.say(f"step {bad.step} was skipped: {bad}")
            return
        progress = self._progress
        progress.bad_steps += 1
        progress.bad_in_a_row += 1
        self._last = bad
        counts = f"{progress.bad_in_a_row} in a row, {progress.bad_steps} in all"
        log.say(f"step {bad.step} was skipped and changed nothing: {bad}; {counts}")

    def give_up(self, batches: Iterable[MixedBatch]) -> None:
        """Write the last bad step's images and targets, one file per rank, then raise DivergedError on every rank.

        batches: the micro-batches of that step on this rank, after mixing.
        """
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
        number = self._progress.bad_in_a_row
        raise DivergedError(
            f"{f'{number} steps in a row were' if number > 1 else 'one step was'} not finite, the last is step "
            f"{self._last.step}: {self._last}; train.max_bad_steps={self._most} is reached; its images and targets are "
            f"in {folder}, the state before it is the newest checkpoint: continue with a lower optim.lr and "
            "--override-resume"
        )
