"""What stands in run folders, which are read here and never written.

A file that is missing or damaged is as good as an empty one: the rest is shown.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from cit_scale.errors import MissingInputError
from cit_scale.run_folder import (
    ATTEMPTS,
    CHECKPOINTS,
    CONFIG,
    ENVIRONMENT,
    INSIDE,
    METRICS,
    RESULTS,
    SUBMISSIONS,
    TEACHERS,
    UNFIT_NODES,
    saved_steps,
    step_path,
)

METRICS_BYTES = 64 * 1024  # enough to meet a loss and a speed among what is noted of checkpoints and skipped steps


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@dataclass(frozen=True)
class Job:
    """What a run was submitted as, or found itself in. submitted: in seconds since 1970. command: of submit.py.

    cwd: where that was given.
    """

    job_id: str
    cluster: str
    submitted: float
    log: Path | None
    command: list[str] | None = None
    cwd: Path | None = None


@dataclass(frozen=True)
class Phase:
    """Something that is trained in a run: a teacher, teachers/NAME, or the student, whose name is empty."""

    name: str
    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_yaml(self.folder / CONFIG)

    @cached_property
    def results(self) -> dict[str, Any]:
        return as_dict(read_json(self.folder / RESULTS))

    @cached_property
    def starts(self) -> list[dict[str, Any]]:
        """Entries of env.json, each with the name of this phase."""
        notes = as_dicts(read_json(self.folder / ENVIRONMENT))
        return [{**note, "phase": self.name, "time": number(note.get("time")) or 0.0} for note in notes]

    @property
    def last_start(self) -> dict[str, Any]:
        return self.starts[-1] if self.starts else {}

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """The newest of each value, and the highest step."""
        lines = parse_lines(read_text(self.folder / METRICS, METRICS_BYTES))
        values = {name: value for line in lines for name, value in line.items() if value is not None}
        return {**values, "step": max(numbers(line.get("step") for line in lines), default=None)}

    @cached_property
    def checkpoints(self) -> list[int]:
        """The steps of those that are complete."""
        with contextlib.suppress(OSError):
            return sorted(saved_steps(self.folder / CHECKPOINTS))
        return []

    @cached_property
    def scores(self) -> dict[int, float]:
        """Top-1 in percent by step, as far as it was measured on the way."""
        scores = as_dict(read_json(self.folder / CHECKPOINTS / "scores.json")).items()
        return dict(sorted((int(step), top1) for step, top1 in scores if step.isdecimal() and is_number(top1)))

    @property
    def step(self) -> int | None:
        """The last one that is known of, saved or not."""
        steps = [self.metrics["step"], self.last_start.get("step"), self.results.get("steps"), *self.checkpoints]
        return max(numbers(steps), default=None)

    @property
    def total_steps(self) -> int | None:
        return number(self.last_start.get("total_steps"), self.results.get("steps"))

    @property
    def images_per_s(self) -> float | None:
        return number(self.results.get("images_per_s"), self.metrics.get("images_per_s"))

    @property
    def goodput(self) -> float | None:
        return number(self.results.get("goodput"), self.metrics.get("goodput"))

    @property
    def top1(self) -> float | None:
        """Of the student, its heads averaged: of the finished run, or of its last evaluation."""
        finished = as_dict(dig(self.results, "accuracy", "student", "top1"))
        measured = [self.metrics.get("top1_average"), self.metrics.get("top1_cls"), *reversed(self.scores.values())]
        return number(finished.get("average"), finished.get("cls"), *measured)

    @property
    def left_s(self) -> float | None:
        """How long the steps that are left take at the present speed."""
        batch, speed = number(dig(self.config, "train", "global_batch_size")), self.images_per_s
        if batch is None or not speed or self.step is None or self.total_steps is None:
            return None
        return max(self.total_steps - self.step, 0) * batch / speed

    @property
    def bad_images(self) -> int:
        return read_text(self.folder / "bad_images.tsv").count("\n")

    @property
    def bad_steps(self) -> int | None:
        """How many steps were not finite, as the results or the newest checkpoint have it."""
        if self.results or not self.checkpoints:
            return self.results.get("bad_steps")
        newest = step_path(self.folder / CHECKPOINTS, self.checkpoints[-1])
        return as_dict(read_json(newest / "meta.json")).get("bad_steps")


@dataclass(frozen=True)
class RunFolder:
    """A run folder. name: its path below the folder of all runs."""

    name: str
    folder: Path

    @cached_property
    def phases(self) -> list[Phase]:
        """The teachers that it trains, then the student."""
        configs = sorted(self.folder.glob(f"{TEACHERS}/*/{CONFIG}"))
        teachers = [Phase(f"{TEACHERS}/{path.parent.name}", path.parent) for path in configs]
        return [*teachers, Phase("", self.folder)]

    @property
    def student(self) -> Phase:
        return self.phases[-1]

    @cached_property
    def current(self) -> Phase:
        """What is trained, or was when the run was last seen."""
        *teachers, student = self.phases
        if student.starts or student.results or not teachers:
            return student
        return max(teachers, key=lambda phase: phase.last_start.get("time", 0.0))

    @property
    def is_finished(self) -> bool:
        return bool(self.student.results)

    @cached_property
    def starts(self) -> list[dict[str, Any]]:
        return sorted((start for phase in self.phases for start in phase.starts), key=lambda start: start["time"])

    @cached_property
    def attempts(self) -> list[dict[str, Any]]:
        return parse_lines(read_text(self.folder / ATTEMPTS))

    @cached_property
    def jobs(self) -> list[Job]:
        """The newest one last. A job that is queued again stands here once for each of its starts."""
        jobs = []
        for note in as_dicts(read_json(self.folder / SUBMISSIONS)):
            command, submitted = note.get("command"), number(note.get("submitted")) or 0.0
            command = [str(word) for word in command] if isinstance(command, list) else None
            log, cwd = as_path(note.get("log")), as_path(note.get("cwd"))
            jobs.append(Job(str(note.get("job_id")), str(note.get("cluster")), submitted, log, command, cwd))
        for start in self.starts:
            slurm = as_dict(start.get("slurm"))
            if "job_id" in slurm:
                jobs.append(Job(str(slurm["job_id"]), "slurm", start["time"], as_path(slurm.get("log"))))
        return sorted(jobs, key=lambda job: job.submitted)

    @property
    def job(self) -> Job | None:
        return self.jobs[-1] if self.jobs else None

    @property
    def log(self) -> Path | None:
        """The newest one."""
        return next((job.log for job in reversed(self.jobs) if job.log), None)

    @cached_property
    def unfit_nodes(self) -> dict[str, str]:
        """What was found at starts to be wrong with which node, by its name."""
        notes = parse_lines(read_text(self.folder / UNFIT_NODES))
        return {str(note.get("node")): str(note.get("reason")) for note in notes}

    @property
    def holder(self) -> str | None:
        """The process that works in the folder, as 'PID on HOST'; None if there is none that this host can tell."""
        # What cit_scale/distributed/lock.py locks. A shared lock lets others look at the same time, and lasts no longer
        # than that.
        path = self.folder.with_name(f".{self.folder.name}.lock")
        with contextlib.suppress(OSError), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read(200).decode(errors="replace") or "of unknown number"
        return None


def find_runs(runs_dir: Path, *, set_aside: bool = False) -> list[RunFolder]:
    """By name. set_aside: also those that --fresh has set aside. Raises MissingInputError without the folder."""
    if not runs_dir.is_dir():
        raise MissingInputError(f"there is no folder {runs_dir}; give --runs-dir where the run folders stand")
    runs = []
    for parent, names, _ in os.walk(runs_dir):
        folder = Path(parent)
        if folder != runs_dir and is_run(folder):
            runs.append(RunFolder(str(folder.relative_to(runs_dir)), folder))
            names[:] = [name for name in names if name not in INSIDE]
        names[:] = [name for name in names if set_aside or not is_set_aside(folder / name)]
    return sorted(runs, key=lambda run: run.name)


def runs_inside(folder: Path) -> list[Path]:
    """Folders of other runs below that of a run: 'pets/large' lies in 'pets'."""
    found = []
    for parent, names, _ in os.walk(folder):
        names[:] = [name for name in names if name not in INSIDE]
        runs = [name for name in names if is_run(Path(parent, name))]  # also those that only a link leads to
        found += [Path(parent, name) for name in runs]
        names[:] = [name for name in names if name not in runs]
    return sorted(found)


def is_run(folder: Path) -> bool:
    """Whether a run stands there. While its teachers are trained there is nothing of its own in it."""
    own = any(os.path.exists(folder / name) for name in (CONFIG, SUBMISSIONS))
    return own or any(folder.glob(f"{TEACHERS}/*/{CONFIG}"))


def is_set_aside(folder: Path) -> bool:
    """Whether it is NAME.1 or so, which NAME was before it was started afresh. A run may be called lr0.1, too."""
    name, _, ending = folder.name.rpartition(".")
    if not name or not ending.isdecimal() or not folder.with_name(name).is_dir():
        return False
    return Path(str(read_yaml(folder / CONFIG).get("name", name))).name != folder.name


def find_run(runs_dir: Path, name: str) -> RunFolder:
    """By its name, or by the path of its folder. Raises MissingInputError with the names that are known."""
    folder = Path(name) if Path(name).is_relative_to(runs_dir) else runs_dir / name
    if folder.is_relative_to(runs_dir) and folder != runs_dir and is_run(folder):
        return RunFolder(str(folder.relative_to(runs_dir)), folder)
    known = [run.name for run in find_runs(runs_dir)]
    near = difflib.get_close_matches(name, known)
    hint = f"did you mean {' or '.join(near)}?" if near else f"runs there: {', '.join(known) or 'none'}"
    raise MissingInputError(f"no run is called {name} in {runs_dir}; {hint}")


# ---------------------------------------------------------------------------------------------------------------------
# Files, and values out of those that anything may stand in


def read_text(path: Path, last_bytes: int | None = None) -> str:
    """What stands in a file, or at its end, however large it is; nothing if it cannot be read."""
    try:
        with path.open("rb") as file:
            if last_bytes is not None:
                file.seek(max(0, file.seek(0, os.SEEK_END) - last_bytes))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def read_json(path: Path) -> Any:
    return parse_json(read_text(path))


def read_yaml(path: Path) -> dict[str, Any]:
    safe_loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C takes a tenth of the time
    try:
        return as_dict(safe_loader(read_text(path)).get_single_data())
    except (ValueError, yaml.YAMLError):
        return {}


def parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def parse_lines(text: str) -> list[dict[str, Any]]:
    """Of JSON. Half a line, or what is none of ours, is passed over."""
    return as_dicts([parse_json(line) for line in text.splitlines()])


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def as_dicts(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def as_path(value: Any) -> Path | None:
    return Path(value) if isinstance(value, str) and value else None


def dig(tree: Any, *keys: str) -> Any:
    """tree[key][key]..., or None where there is no such thing."""
    for key in keys:
        tree = as_dict(tree).get(key)
    return tree


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def numbers(values: Iterable[Any]) -> list[float]:
    """Those that are."""
    return [value for value in values if is_number(value)]


def number(*values: Any) -> float | None:
    """The first that is one."""
    return next(iter(numbers(values)), None)
