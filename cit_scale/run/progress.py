"""The state of a run that is not tensors: what a checkpoint's meta.json holds, and how a run goes on from it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cit_scale.data.order import Cursor
from cit_scale.errors import RefusedError
from cit_scale.optim import learning_rate
from cit_scale.run.setup import PreparedRun
from cit_scale.run_folder import STREAM
from cit_scale.settings import changed_settings, to_dict


@dataclass
class TrainingProgress:
    """step: updates done, including skipped ones. evaluated: whether the student was evaluated after this step.
    bad_steps, bad_in_a_row: number of steps whose gradient was not finite. useful_s: seconds spent in steps that count;
    the steps that a killed process made after its last checkpoint do not."""

    step: int = 0
    evaluated: bool = False
    bad_steps: int = 0
    bad_in_a_row: int = 0
    useful_s: float = 0.0

    def advance(self) -> None:
        """Count one more step. The student has not been evaluated after it."""
        self.step += 1
        self.evaluated = False


def checkpoint_meta(progress: TrainingProgress, prepared: PreparedRun, inputs: Mapping[str, str]) -> dict[str, Any]:
    """The content of a checkpoint's meta.json. inputs: fingerprints of data and teachers, by name."""
    config, step = prepared.config, progress.step
    return {
        **dataclasses.asdict(progress),
        "cursor": dataclasses.asdict(Cursor.at_step(step, len(prepared.train_set), config.train.global_batch_size)),
        "lr": learning_rate(step, config.optim, config.peak_lr, prepared.steps_per_epoch, config.train.epochs),
        "world_size": prepared.world.world_size,
        # Every step begins by seeding all generators of a rank, so these seeds are the whole state of the generators.
        "rng": [step_seed(config.seed, step, rank) for rank in range(prepared.world.world_size)],
        "inputs": dict(inputs),
        STREAM: dataclasses.asdict(prepared.versions),
        "config": to_dict(config),
    }


def restore(
    meta: Mapping[str, Any], prepared: PreparedRun, inputs: Mapping[str, str], *, override: bool
) -> tuple[TrainingProgress, list[str]]:
    """The progress in a checkpoint's ``meta``, and the settings and inputs that differ from the checkpoint's.

    Raises RefusedError with these differences, unless ``override`` is set.
    """
    # What an earlier version did not write is at its default; inputs that it did not record are not compared.
    known = [field.name for field in dataclasses.fields(TrainingProgress) if field.name in meta]
    saved = TrainingProgress(**{name: meta[name] for name in known})
    now = checkpoint_meta(saved, prepared, inputs)
    changed = [
        f"{name}: {noted} -> {inputs.get(name)}"
        for name, noted in meta.get("inputs", {}).items()
        if noted != inputs.get(name)
    ]
    changed += changed_settings(meta.get("config", {}), prepared.config)
    same_ranks = meta.get("world_size") == now["world_size"]
    if same_ranks and meta.get("rng", now["rng"]) != now["rng"] and not changed:
        changed.append("the random numbers that follow from the seed: another version of NumPy draws them")
    if any(now["cursor"].get(key) != place for key, place in meta.get("cursor", {}).items()) and not changed:
        changed.append(f"the place in the data: {meta.get('cursor')} -> {now['cursor']}")
    if changed and not override:
        raise RefusedError(
            f"{prepared.config.run_dir} was trained up to step {saved.step} with something else "
            f"({'; '.join(changed)}); bring that back, give this run another --name, start over with --fresh, or "
            "insist with --override-resume"
        )
    return saved, changed


def step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make all random numbers of a model, such as drop path's, a function of the step: no state has to be saved."""
    drawn = step_seed(seed, step, rank)
    random.seed(drawn)
    np.random.seed(drawn & 0xFFFFFFFF)
    torch.manual_seed(drawn)
