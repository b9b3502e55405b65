"""What a run says of itself: JSON lines, TensorBoard curves, progress on a terminal, plain lines in a log file."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from cit_scale.distributed.world import World, sum_over_ranks
from cit_scale.files import write_text
from cit_scale.run_folder import METRICS


class RunningMeans:
    """Means over steps and ranks of device scalars, read from the device only when drained."""

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


class StepClock:
    """Training throughput, from turn to turn of the training loop.

    A turn holds one step and all that goes with it, the wait for the slowest rank and for the next batch among them;
    only what is ``excluded``, evaluation and saving, does not count. A pause of the process does: it cannot be told
    from a slow step. The first turns of a process pay for compilation and warm-up and are not counted.
    """

    WARMUP_TURNS = 5

    def __init__(self) -> None:
        self.turns = 0
        """Whole turns of this process, all of them."""

        self._began: float | None = None
        self._aside_s = 0.0
        self._counted = [0, 0.0]  # turns, and their seconds, since the process began
        self._reported = [0, 0.0]  # as they were at the last ``interval``

    def turn(self) -> float:
        """A turn begins, and the one before ends. Returns the seconds of that; 0.0 for the first."""
        now = time.perf_counter()
        turn_s = 0.0
        if self._began is not None:
            turn_s = now - self._began - self._aside_s
            self.turns += 1
            if self.turns > self.WARMUP_TURNS:
                self._counted = [self._counted[0] + 1, self._counted[1] + turn_s]
        self._began, self._aside_s = now, 0.0
        return turn_s

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """What happens within is no training."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._aside_s += time.perf_counter() - began

    def interval_images_per_s(self, global_batch_size: int) -> float | None:
        """Of the whole job, since the last call; None where no turn counts."""
        turns, seconds = (now - then for now, then in zip(self._counted, self._reported, strict=True))
        self._reported = self._counted
        return turns * global_batch_size / seconds if seconds else None

    def mean_images_per_s(self, global_batch_size: int) -> float | None:
        """Of the whole job, since the process began; None where no turn counts."""
        turns, seconds = self._counted
        return turns * global_batch_size / seconds if seconds else None


class RunLog:
    """Rank 0 writes ``metrics.jsonl`` and TensorBoard events and shows progress; on other ranks nothing happens.

    A file that cannot be written is no reason to stop training: it says so once, keeps the lines, and tries again.
    """

    def __init__(self, run_dir: Path, world: World, *, title: str, step: int, total_steps: int) -> None:
        """step: where the run resumes; lines that a stopped process wrote past it are dropped: they come again."""
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
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[latest]}"),
                console=self._console,
            )
            self._task = self._progress.add_task(title, total=total_steps, completed=step, latest="")
            self._progress.start()

    def advance(self, step: int) -> None:
        if self._is_main and self._progress:
            self._progress.update(self._task, completed=step)

    def record(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """One JSON line, one point on each curve, and what is shown."""
        if not self._is_main:
            return
        self.note(step, values)
        shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items() if v is not None)
        if self._progress:
            self._progress.update(self._task, latest=shown)
        else:
            self._console.print(f"{self._title}  step {step}/{self._total_steps}  {shown}", soft_wrap=True)

    def note(self, step: int, values: Mapping[str, Any]) -> None:
        """One JSON line, and a point on a curve for each number in it."""
        if not self._is_main:
            return
        # JSON has no NaN: a reader in another language must not stumble over the one line that matters most.
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
        # Opened anew each time: a disk that was full or gone for a while is written to again when it is back.
        before = self._path.stat().st_size if self._path.exists() else 0
        try:
            append(self._path, "".join(self._unwritten))
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self._path, before)  # no half line, which would come again whole
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
    """Leave only the lines up to ``step`` in metrics.jsonl, and nothing that is no line of ours, or half of one."""
    kept = []
    if path.exists() and step:
        for line in path.read_text(errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
    write_text(path, "".join(kept))
