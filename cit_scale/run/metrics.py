"""Metrics and progress of a run: JSON lines, TensorBoard curves, a bar on a terminal, lines in a log file."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from cit_scale.distributed.world import World, gather, sum_over_ranks
from cit_scale.files import write_text
from cit_scale.run_folder import METRICS

T = TypeVar("T")

# What metrics.jsonl says of time, memory and disk. All else is learned: two runs of the same have it to the bit.
COSTS = {"images_per_s", "step_ms", "data_share", "memory_gib", "mfu", "goodput"}
COSTS |= {"save_stall_s", "save_write_s", "save_bytes"}  # of a checkpoint

# Seconds of steps from which the time left is estimated: rich's own 30 hold no two steps of a slow run.
SPEED_PERIOD_S = 600.0


class RunningMeans:
    """Means of scalars over steps and ranks. Sums stay on the device until ``drain``: adding does not wait for it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """values: scalars; the same names at every call and on every rank."""
        for name, value in values.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def drain(self, world: World) -> dict[str, float]:
        """Collective. The means since the last call."""
        if not self._count:
            return {}
        sums = torch.stack(list(self._sums.values())).cpu()
        means = sum_over_ranks(world, sums) / (self._count * world.world_size)
        named = dict(zip(self._sums, means.tolist(), strict=True))
        self._sums, self._count = {}, 0
        return named


@dataclass(frozen=True)
class Counted:
    """Turns, their seconds, and how many of these were spent waiting for data."""

    turns: int = 0
    seconds: float = 0.0
    waiting_s: float = 0.0

    def __add__(self, other: Counted) -> Counted:
        return Counted(self.turns + other.turns, self.seconds + other.seconds, self.waiting_s + other.waiting_s)

    def __sub__(self, other: Counted) -> Counted:
        return Counted(self.turns - other.turns, self.seconds - other.seconds, self.waiting_s - other.waiting_s)


class StepClock:
    """What a training step costs, measured from one turn of the training loop to the next.

    A turn is one step with everything around it, including the wait for the next batch and for the slowest rank; only
    evaluation and saving are ``excluded``. A pause of the process counts: it looks like a slow step. The first turns of
    a process include compilation and warm-up and do not count.
    """

    WARMUP_TURNS = 5

    def __init__(self, global_batch_size: int) -> None:
        self.turns = 0
        """Turns since the process began, including the first ones."""

        self._global_batch_size = global_batch_size
        self._began: float | None = None
        self._excluded_s = 0.0
        self._waiting_s = 0.0
        self._counted = Counted()  # since the process began
        self._reported = Counted()  # as it was at the last interval

    def turn(self) -> float:
        """End a turn and begin the next. Returns the seconds of the turn that ended; 0.0 at the first call."""
        now = time.perf_counter()
        turn_s = 0.0
        if self._began is not None:
            turn_s = now - self._began - self._excluded_s
            self.turns += 1
            if self.turns > self.WARMUP_TURNS:
                self._counted += Counted(1, turn_s, self._waiting_s)
        self._began, self._excluded_s, self._waiting_s = now, 0.0, 0.0
        return turn_s

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Time spent within does not count."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._excluded_s += time.perf_counter() - began

    def waiting_for(self, batches: Generator[T, None, None]) -> Generator[T, None, None]:
        """The same batches. The time until each one is there counts as waiting for data."""
        with contextlib.closing(batches):
            while True:
                began = time.perf_counter()
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                self._waiting_s += time.perf_counter() - began
                yield batch

    def interval_costs(self, world: World) -> dict[str, float | None]:
        """Collective. What a step cost since the last call.

        images_per_s: of the whole job. step_ms: milliseconds a step. data_share: the part of that, from 0 to 1, in
        which a rank waited for its data; of the rank that waited longest. A GPU may still compute meanwhile. These
        three are None where no turn counts. memory_gib: the most that tensors took on a GPU, at any time since the last
        call, of the GPU where it was most; on GPUs only.
        """
        interval, self._reported = self._counted - self._reported, self._counted
        measured = gather(world, (interval.waiting_s, _peak_memory_gib(world.device)))
        costs: dict[str, float | None] = dict.fromkeys(("images_per_s", "step_ms", "data_share"))
        if interval.seconds:
            costs = {
                "images_per_s": interval.turns * self._global_batch_size / interval.seconds,
                "step_ms": 1000 * interval.seconds / interval.turns,
                "data_share": min(1.0, max(waiting_s for waiting_s, _ in measured) / interval.seconds),
            }
        if world.device.type == "cuda":
            costs["memory_gib"] = max(memory for _, memory in measured)
        return costs

    def mean_images_per_s(self) -> float | None:
        """Of the whole job, since the process began; None where no turn counts."""
        counted = self._counted
        return counted.turns * self._global_batch_size / counted.seconds if counted.seconds else None


def _peak_memory_gib(device: torch.device) -> float:
    """The most that tensors took on this rank's GPU since the last call."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return peak


class RunLog:
    """Writes ``metrics.jsonl`` and TensorBoard events and shows progress, on rank 0; does nothing on other ranks.

    A file that cannot be written does not stop training: the log says so once, keeps the lines and tries again.
    """

    def __init__(self, run_dir: Path, world: World, *, title: str, step: int, total_steps: int) -> None:
        """step: where the run resumes. Lines of later steps, written before the run was stopped, are dropped."""
        self._is_main = world.is_main
        if not self._is_main:
            return
        self._console = Console(highlight=False)
        self._title = title
        self._total_steps = total_steps
        self._path = run_dir / METRICS
        self._unwritten: list[str] = []
        self._has_warned = False
        self._step = step
        self._are_lines_dropped = False
        self._try_to_write(self._write_lines)
        self._curves_dir = str(run_dir / "tensorboard")
        self._curves: SummaryWriter | None = None
        self._purge_step = step + 1 if step else None
        self._progress: Bar | None = None
        if self._console.is_terminal:
            self._progress = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),  # and no values beside it: rich would cut the time left for them
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
                speed_estimate_period=SPEED_PERIOD_S,
            )
            self._task = self._progress.add_task(title, total=total_steps, completed=step)
            self._progress.start()

    def advance(self, step: int) -> None:
        if self._is_main and self._progress:
            self._progress.update(self._task, completed=step)

    def record(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Write one JSON line and one point on each curve, and show the values."""
        if not self._is_main:
            return
        self.note(step, values)
        shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items() if v is not None)
        # On a terminal the line appears above the bar.
        self._console.print(f"{self._title}  step {step}/{self._total_steps}  {shown}", soft_wrap=True)

    def note(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one JSON line, and one point on the curve of each number in it."""
        if not self._is_main:
            return
        # JSON has no NaN: parsers in other languages would refuse the very line that shows the divergence.
        clean = {k: (v if not isinstance(v, float) or math.isfinite(v) else str(v)) for k, v in values.items()}
        self._unwritten.append(json.dumps({"step": step, **clean}) + "\n")
        self._try_to_write(self._write_lines)
        self._try_to_write(lambda: self._draw(step, values))

    def say(self, message: str) -> None:
        if self._is_main:
            self._console.print(f"{self._title}  {message}", soft_wrap=True)

    def close(self) -> None:
        if not self._is_main:
            return
        if self._progress:
            self._progress.stop()
        self._try_to_write(self._write_lines)
        if self._curves:
            self._try_to_write(self._curves.close)

    def _write_lines(self) -> None:
        if not self._are_lines_dropped:
            _drop_lines_past(self._path, self._step)
            self._are_lines_dropped = True
        # Opened at each write: a disk that was full or unmounted for a while is written to again.
        before = self._path.stat().st_size if self._path.exists() else 0
        try:
            append(self._path, "".join(self._unwritten))
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self._path, before)  # no half line: all of it is written again
            raise
        self._unwritten = []

    def _draw(self, step: int, values: Mapping[str, Any]) -> None:
        if self._curves is None:
            self._curves = SummaryWriter(self._curves_dir, purge_step=self._purge_step)
        try:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._curves.add_scalar(name, value, step)
        except BaseException:
            self._curves = None  # its thread has died of what it could not write
            raise

    def _try_to_write(self, function: Callable[[], None]) -> None:
        try:
            function()
        except OSError as error:
            if not self._has_warned:
                self.say(f"metrics cannot be written: {error}; training goes on, and the lines are tried again")
            self._has_warned = True


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def _drop_lines_past(path: Path, step: int) -> None:
    """Rewrite metrics.jsonl with the lines up to ``step``, without lines that are incomplete or not JSON."""
    kept = []
    if path.exists() and step:
        for line in path.read_text(errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
    write_text(path, "".join(kept))
