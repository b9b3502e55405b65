"""Names of the files and folders in a run folder. Imports the standard library only.

The launchers read run folders on login nodes, where importing torch takes seconds.
"""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

CONFIG = "config.yaml"
ENVIRONMENT = "env.json"  # a list: one entry per start
METRICS = "metrics.jsonl"
RESULTS = "results.json"
CONTENTS = "contents.npz"  # hashes of all images, of a run with data.verify
NETWORKS = "networks.json"  # the weights that the run was given, with their hashes, and its teachers' accuracy
DESCRIPTION = "config.json"  # what timm says of weights beside them: the model, its classes, what images it takes
STUDENT = "student.safetensors"
STUDENT_EMA = "student_ema.safetensors"
STUDENT_BEST = "student_best.safetensors"  # of the checkpoint that was best in evaluation
STUDENT_EMA_BEST = "student_ema_best.safetensors"
CARD = "README.md"  # the model card
REPORT = "report.html"  # what cit-scale report writes
CHECKPOINTS = "ckpt"
META = "meta.json"  # of a checkpoint: the run's progress and its inputs
STREAM = "stream"  # key of the stream's versions, in results and in META
TEACHERS = "teachers"  # one run folder per teacher that this run trains
SUBMISSIONS = "job.json"  # a list: one entry per job that launchers/submit.py has queued
ATTEMPTS = "attempts.jsonl"  # how each Slurm job ended; written by launchers/requeue.py
BAD_IMAGES = "bad_images.tsv"  # names of images that could not be used, with the reasons
UNFIT_NODES = "unfit_nodes.jsonl"  # nodes that failed the preflight check, with the reasons

# Folders that belong to a run itself. A search for runs skips them, and --name refuses them as parts of a name.
INSIDE = {TEACHERS, CHECKPOINTS, "tensorboard", "bad_steps", "slurm"}


def is_current_report(run_dir: Path) -> bool:
    """Whether the run has a report that is no older than its results."""
    with contextlib.suppress(OSError):
        return (run_dir / REPORT).stat().st_mtime >= (run_dir / RESULTS).stat().st_mtime
    return False


def step_path(checkpoints: Path, step: int) -> Path:
    """Path of the checkpoint after update ``step``. checkpoints: the folder ckpt/ of a run."""
    return checkpoints / f"step_{step:06d}"


def saved_steps(checkpoints: Path) -> list[int]:
    """Returns the steps of all complete checkpoints, in no particular order; empty if the folder does not exist."""
    if not checkpoints.is_dir():
        return []
    # Other names, such as step_000123.partial, are not complete checkpoints (checkpoint/store.py).
    matches = (re.fullmatch(r"step_(\d{6,})", path.name) for path in checkpoints.iterdir())
    return [int(match[1]) for match in matches if match]


def last_saved(run_dir: Path) -> float:
    """When the newest checkpoint of a run or of its teachers' was written, in seconds since 1970; 0 without one."""
    with contextlib.suppress(OSError):
        saved = (step_path(folder, step) for folder in run_dir.rglob(CHECKPOINTS) for step in saved_steps(folder))
        return max((path.stat().st_mtime for path in saved), default=0.0)
    return 0.0


def unfit_nodes(run_dir: Path, job_id: str | None = None, since: float = 0.0) -> dict[str, str]:
    """Reasons by node, for the nodes that failed the preflight check.

    job_id: at this job's starts alone. since: and after this time, in seconds since 1970.
    """
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in (run_dir / UNFIT_NODES).read_text(errors="replace").splitlines():
            # A line may be cut short, or no note.
            with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError):
                note = json.loads(line)
                if job_id in (None, note.get("job_id")) and (not since or note["time"] >= since):
                    found[str(note["node"])] = str(note.get("reason"))
    return found


def newest_note(run_dir: Path) -> tuple[dict[str, Any], bool]:
    """What a run has noted of its inputs, and whether in its results: otherwise in META of the newest checkpoint.

    Empty where there is neither. Files that are damaged, or of an earlier version, are passed over.
    """
    steps = sorted(saved_steps(run_dir / CHECKPOINTS), reverse=True)
    for note in (run_dir / RESULTS, *(step_path(run_dir / CHECKPOINTS, step) / META for step in steps)):
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(note.read_text())
            if isinstance(content, dict) and isinstance(content.get("inputs"), dict):
                return content, note.name == RESULTS
    return {}, False
