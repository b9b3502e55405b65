"""Progress of a long job on stderr: a bar on a terminal, a line every 30 s in a file, nothing for a short job."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SHORT_S = 3.0  # a job that ends sooner prints nothing
LINE_EVERY_S = 30.0


class ProgressBar:
    """Shows a count of `unit`s up to `total` on stderr, while used as a context manager. Not thread-safe.

    done: units that an earlier call has finished; they count for the progress, but not for the rate.
    """

    def __init__(self, title: str, total: int, unit: str = "images", done: int = 0) -> None:
        self.done = self._first = done
        self._title = title
        self._total = total
        self._unit = unit
        self._console = Console(stderr=True, highlight=False)
        self._bar: Bar | None = None
        self._started_s = time.monotonic()
        self._next_s = self._started_s + SHORT_S

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int = 1) -> None:
        """Add `count` finished units, and show them if the job is a long one."""
        self.done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
        elif (now_s := time.monotonic()) >= self._next_s:
            if self._console.is_terminal:
                self._start_bar()
            else:
                self._next_s = now_s + LINE_EVERY_S
                per_s = (self.done - self._first) / (now_s - self._started_s)
                line = f"{self._title}  {self.done}/{self._total} {self._unit}  {per_s:.0f} {self._unit}/s"
                self._console.print(line, markup=False, soft_wrap=True)

    def _start_bar(self) -> None:
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(self._unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task(self._title, total=self._total, completed=self.done)
        self._bar.start()
