"""What lies where in a run folder, for those who write it and for those who only look. Imports nothing heavy."""

from __future__ import annotations

import re
from pathlib import Path

CONFIG = "config.yaml"
ENVIRONMENT = "env.json"  # a list: one entry per start
METRICS = "metrics.jsonl"
RESULTS = "results.json"
CHECKPOINTS = "ckpt"
TEACHERS = "teachers"  # their runs
SUBMISSIONS = "job.json"  # a list: what launchers/submit.py has queued
ATTEMPTS = "attempts.jsonl"  # how each Slurm job ended, from launchers/requeue.py
UNFIT_NODES = "unfit_nodes.jsonl"  # from the check at the start

# Folders of a run in which no other runs are to be found.
INSIDE = {TEACHERS, CHECKPOINTS, "tensorboard", "bad_steps", "slurm"}


def step_path(checkpoints: Path, step: int) -> Path:
    """The folder of a checkpoint."""
    return checkpoints / f"step_{step:06d}"


def saved_steps(checkpoints: Path) -> list[int]:
    """Steps of the complete checkpoints in no order."""
    if not checkpoints.is_dir():
        return []
    matches = (re.fullmatch(r"step_(\d{6,})", path.name) for path in checkpoints.iterdir())
    return [int(match[1]) for match in matches if match]
