"""Reads run folders; never writes them.

A missing or damaged file counts as empty, so that ``runs list`` and ``runs show`` still show the rest of a run.
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
    BAD_IMAGES,
    CHECKPOINTS,
    CONFIG,
    ENVIRONMENT,
    INSIDE,
    METRICS,
    RESULTS,
    SUBMISSIONS,
    TEACHERS,
    saved_steps,
    step_path,
    unfit_nodes,
)

# Read from the end of metrics.jsonl: enough to contain a loss and a speed among the lines on checkpoints and bad steps.
METRICS_BYTES = 64 * 1024


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@dataclass(frozen=True)
class Job:
    """A job that trains or trained a run, as submitted by launchers/submit.py or as seen by the run itself.

    submitted: seconds since 1970; for a job that the run saw, the time of that start. command, cwd: the command line of
    submit.py and its working directory; None if the job was not submitted by submit.py.
    """

    job_id: str
    cluster: str
    submitted: float
    log: Path | None
    command: list[str] | None = None
    cwd: Path | None = None


@dataclass(frozen=True)
class Phase:
    """One training of a run: a teacher, named teachers/NAME, or the student, whose name is empty.

    Every property is None or empty if the files do not tell.
    """

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
        """Entries of env.json, one per start, each with the name of this phase added."""
        notes = as_dicts(read_json(self.folder / ENVIRONMENT))
        return [{**note, "phase": self.name, "time": number(note.get("time")) or 0.0} for note in notes]

    @property
    def last_start(self) -> dict[str, Any]:
        return self.starts[-1] if self.starts else {}

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """The latest value of each key in metrics.jsonl, and the highest step."""
        lines = parse_lines(read_text(self.folder / METRICS, METRICS_BYTES))
        values = {name: value for line in lines for name, value in line.items() if value is not None}
        return {**values, "step": max(numbers(line.get("step") for line in lines), default=None)}

    @cached_property
    def checkpoints(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        with contextlib.suppress(OSError):
            return sorted(saved_steps(self.folder / CHECKPOINTS))
        return []

    @cached_property
    def scores(self) -> dict[int, float]:
        """Step to top-1 accuracy in percent, for the steps that were evaluated."""
        scores = as_dict(read_json(self.folder / CHECKPOINTS / "scores.json")).items()
        return dict(sorted((int(step), top1) for step, top1 in scores if step.isdecimal() and is_number(top1)))

    @property
    def step(self) -> int | None:
        """The highest step that any file mentions, whether or not a checkpoint of it exists."""
        steps = [self.metrics["step"], self.last_start.get("step"), self.results.get("steps"), *self.checkpoints]
        return as_int(max(numbers(steps), default=None))

    @property
    def total_steps(self) -> int | None:
        return as_int(number(self.last_start.get("total_steps"), self.results.get("steps")))

    @property
    def images_per_s(self) -> float | None:
        return number(self.results.get("images_per_s"), self.metrics.get("images_per_s"))

    @property
    def goodput(self) -> float | None:
        return number(self.results.get("goodput"), self.metrics.get("goodput"))

    @property
    def top1(self) -> float | None:
        """The student's top-1 accuracy in percent, heads averaged: the final one, else that of the last evaluation."""
        # Without an average of several heads take the class head, and without logged values the scores.
        finished = as_dict(dig(self.results, "accuracy", "student", "top1"))
        measured = [self.metrics.get("top1_average"), self.metrics.get("top1_cls"), *reversed(self.scores.values())]
        return number(finished.get("average"), finished.get("cls"), *measured)

    @property
    def left_s(self) -> float | None:
        """Seconds that the remaining steps take at the present speed."""
        batch, speed = number(dig(self.config, "train", "global_batch_size")), self.images_per_s
        if batch is None or not speed or self.step is None or self.total_steps is None:
            return None
        return max(self.total_steps - self.step, 0) * batch / speed

    @property
    def bad_images(self) -> int:
        return read_text(self.folder / BAD_IMAGES).count("\n")

    @property
    def bad_steps(self) -> int | None:
        """Number of bad steps according to results.json, else to the newest checkpoint."""
        if self.results or not self.checkpoints:
            return self.results.get("bad_steps")
        newest = step_path(self.folder / CHECKPOINTS, self.checkpoints[-1])
        return as_dict(read_json(newest / "meta.json")).get("bad_steps")


@dataclass(frozen=True)
class RunFolder:
    """A run folder. name: its path relative to the folder of all runs."""

    name: str
    folder: Path

    @cached_property
    def phases(self) -> list[Phase]:
        """The teachers that this run trains, then the student."""
        configs = sorted(self.folder.glob(f"{TEACHERS}/*/{CONFIG}"))
        teachers = [Phase(f"{TEACHERS}/{path.parent.name}", path.parent) for path in configs]
        return [*teachers, Phase("", self.folder)]

    @property
    def student(self) -> Phase:
        return self.phases[-1]

    @cached_property
    def current(self) -> Phase:
        """The phase that is being trained, or that was trained last."""
        # Teachers are trained before the student, so a student that has started is the current phase.
        *teachers, student = self.phases
        if student.starts or student.results or not teachers:
            return student
        return max(teachers, key=lambda phase: phase.last_start.get("time", 0.0))

    @property
    def is_finished(self) -> bool:
        return bool(self.student.results)

    @cached_property
    def starts(self) -> list[dict[str, Any]]:
        """Starts of all phases, oldest first."""
        return sorted((start for phase in self.phases for start in phase.starts), key=lambda start: start["time"])

    @cached_property
    def attempts(self) -> list[dict[str, Any]]:
        """Lines of attempts.jsonl, one per end of a Slurm job, oldest first."""
        return parse_lines(read_text(self.folder / ATTEMPTS))

    @cached_property
    def jobs(self) -> list[Job]:
        """Jobs of the run, newest last. A requeued job appears once for its submission and once for each start."""
        jobs = []
        # Every value is checked or converted: a damaged job.json must not keep the run from being shown.
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
        """Log file of the newest job that has one."""
        return next((job.log for job in reversed(self.jobs) if job.log), None)

    @cached_property
    def unfit_nodes(self) -> dict[str, str]:
        """Node name to the reason why a preflight check found the node unfit."""
        return unfit_nodes(self.folder)

    @property
    def holder(self) -> str | None:
        """The process that trains in the folder, as 'PID on HOST'; None if this host sees no lock on the folder."""
        # The file that cit_scale/distributed/lock.py locks exclusively. Test with a shared lock, so that several
        # readers can test at once, and release it at once by closing the file.
        # Of a link also what it leads to: the run may have been started by either name.
        for folder in (self.folder, Path(os.path.realpath(self.folder))):
            path = folder.with_name(f".{folder.name}.lock")
            with contextlib.suppress(OSError), path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return file.read(200).decode(errors="replace") or "of unknown number"
        return None


def find_runs(runs_dir: Path, *, set_aside: bool = False) -> list[RunFolder]:
    """Returns all runs below ``runs_dir``, sorted by name.

    set_aside: include runs that --fresh has renamed. Raises MissingInputError if ``runs_dir`` is not a folder.
    """
    if not runs_dir.is_dir():
        raise MissingInputError(f"--runs-dir={runs_dir} is not a folder; set it to the folder that holds the runs")
    runs = []
    for parent, names, _ in os.walk(runs_dir):
        folder = Path(parent)
        if folder != runs_dir and is_run(folder):
            runs.append(RunFolder(str(folder.relative_to(runs_dir)), folder))
            # os.walk descends only into the names that are left in the list.
            names[:] = [name for name in names if name not in INSIDE]
        names[:] = [name for name in names if set_aside or not is_set_aside(folder / name)]
    return sorted(runs, key=lambda run: run.name)


def runs_inside(folder: Path) -> list[Path]:
    """Returns the folders of other runs inside a run's folder, sorted: 'pets/large' lies in 'pets'.

    --fresh on 'pets' would rename them along with it.
    """
    found = []
    for parent, names, _ in os.walk(folder):
        names[:] = [name for name in names if name not in INSIDE]
        # os.walk lists symbolic links to folders but does not follow them, so that a linked run is found here as well.
        runs = [name for name in names if is_run(Path(parent, name))]
        found += [Path(parent, name) for name in runs]
        names[:] = [name for name in names if name not in runs]
    return sorted(found)


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is a run folder."""
    # While the teachers are trained, a run started by hand has no file of its own, only its teachers' folders.
    own = any(os.path.exists(folder / name) for name in (CONFIG, SUBMISSIONS))
    return own or any(folder.glob(f"{TEACHERS}/*/{CONFIG}"))


def is_set_aside(folder: Path) -> bool:
    """Whether ``folder`` is NAME.1, NAME.2, ...: a run that --fresh has renamed to make way for a new NAME."""
    # A run may be called lr0.1 by its user: then its configuration has that name.
    name, _, ending = folder.name.rpartition(".")
    if not name or not ending.isdecimal() or not folder.with_name(name).is_dir():
        return False
    return Path(str(read_yaml(folder / CONFIG).get("name", name))).name != folder.name


def find_run(runs_dir: Path, name: str) -> RunFolder:
    """Find a run by its name or by the path of its folder. Raises MissingInputError with the nearest names."""
    folder = Path(name) if Path(name).is_relative_to(runs_dir) else runs_dir / name
    if folder.is_relative_to(runs_dir) and folder != runs_dir and is_run(folder):
        return RunFolder(str(folder.relative_to(runs_dir)), folder)
    known = [run.name for run in find_runs(runs_dir)]
    near = difflib.get_close_matches(name, known)
    hint = f"did you mean {' or '.join(near)}?" if near else f"runs there: {', '.join(known) or 'none'}"
    raise MissingInputError(f"{runs_dir} has no run named {name}; {hint}")


# ---------------------------------------------------------------------------------------------------------------------
# Reading files and values that may be damaged


def read_text(path: Path, last_bytes: int | None = None) -> str:
    """Returns the text of a file, or of its last ``last_bytes`` bytes; empty if the file cannot be read."""
    try:
        with path.open("rb") as file:
            if last_bytes is not None:
                file.seek(max(0, file.seek(0, os.SEEK_END) - last_bytes))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def read_json(path: Path) -> Any:
    """Parse a JSON file. Returns None if it is missing or damaged."""
    return parse_json(read_text(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """Parse a YAML file. Returns an empty dict if it is missing, damaged or not a mapping."""
    safe_loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the loader in C takes a tenth of the time
    try:
        return as_dict(safe_loader(read_text(path)).get_single_data())
    except (ValueError, RecursionError, yaml.YAMLError):
        return {}


def parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # lists in lists, by the thousand
        return None


def parse_lines(text: str) -> list[dict[str, Any]]:
    """Parse JSON lines. Skips lines that are cut short or are not a dict."""
    return as_dicts([parse_json(line) for line in text.splitlines()])


def as_dict(value: Any) -> dict[str, Any]:
    """Returns ``value`` if it is a dict, otherwise an empty dict."""
    return value if isinstance(value, dict) else {}


def as_dicts(value: Any) -> list[dict[str, Any]]:
    """Returns the dicts in a list; empty if ``value`` is not a list."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def as_path(value: Any) -> Path | None:
    return Path(value) if isinstance(value, str) and value else None


def as_int(value: float | None) -> int | None:
    return None if value is None else int(value)


def dig(tree: Any, *keys: str) -> Any:
    """Returns tree[key1][key2]..., or None if a key is missing."""
    for key in keys:
        tree = as_dict(tree).get(key)
    return tree


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite int or float, and one that a float can hold; a bool is not a number here."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def numbers(values: Iterable[Any]) -> list[float]:
    """Drop values that are not numbers."""
    return [value for value in values if is_number(value)]


def number(*values: Any) -> float | None:
    """Returns the first value that is a number, or None."""
    return next(iter(numbers(values)), None)
