"""When a checkpoint is made, and that training hardly waits for it: a copy between two steps, written meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cit_scale.checkpoint import store as checkpoint
from cit_scale.checkpoint.layout import share_out
from cit_scale.checkpoint.store import Retention
from cit_scale.config import TrainConfig
from cit_scale.distributed.world import World
from cit_scale.engines.base import Engine
from cit_scale.errors import CannotWriteError, TransientError

RETRY_S = 60.0


@dataclass(frozen=True)
class Pending:
    """A checkpoint that is being written. stall_s: how long training stood for it. written: its bytes and seconds."""

    step: int
    stall_s: float
    written: Future[tuple[int, float]]


class AsyncCheckpointer:
    """Saves an engine's state in a run folder. Collective to build.

    A thread of each rank writes the copy. The threads agree among themselves through a process group of their own
    (``World.with_own_group``). A checkpoint that cannot be written does not end the run: training goes on, logs the
    reason, and tries again after RETRY_S seconds.
    """

    def __init__(
        self,
        engine: Engine,
        run_dir: Path,
        train: TrainConfig,
        world: World,
        *,
        step: int,
        say: Callable[[str], None],
        report: Callable[[int, Mapping[str, float]], None],
    ) -> None:
        """step: where the run stands, which is saved or the beginning. say: gets what went wrong, in a line.
        report: gets each checkpoint's step and what it cost."""
        self._engine = engine
        self._run_dir = run_dir
        self._every_steps = [steps for steps in (train.save_every_steps, train.keep_every_steps) if steps]
        self._every_s = train.save_every_minutes * 60 or float("inf")
        self._retention = Retention(train.keep_last, train.keep_every_steps, train.keep_best)
        self._world = world
        self._writers = world.with_own_group()
        self._shares = share_out(engine.state_shapes(), world.world_size)
        self._say = say
        self._report = report
        self._saved_step: int | None = step
        self._due_s = time.monotonic() + self._every_s
        self._pending: Pending | None = None

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after update ``step``, by this rank's clock: the ranks have to agree on it."""
        by_step = any(step % steps == 0 for steps in self._every_steps)
        return step != self._saved_step and (by_step or time.monotonic() >= self._due_s)

    @property
    def has_failed(self) -> bool:
        """Whether ``settle`` has to be called. The ranks see it at different times and have to agree on it."""
        pending = self._pending
        return pending is not None and pending.written.done() and pending.written.exception() is not None

    def save(self, step: int, meta: Mapping[str, Any]) -> None:
        """Collective. Copy the state after update ``step``, if it is not saved yet, and begin to write it.

        meta: rank 0's counts. Raises what ``settle`` raises, about the checkpoint before.
        """
        if step == self._saved_step:
            return
        started = time.perf_counter()
        self.settle()
        state = self._engine.state(self._shares[self._world.rank])
        self._saved_step = step
        self._due_s = time.monotonic() + self._every_s
        self._pending = Pending(step, time.perf_counter() - started, Future())
        # A daemon: a rank that goes down does not wait for the ranks that it was writing with.
        threading.Thread(
            target=self._write, args=(self._pending, state, meta), name=f"checkpoint of step {step}", daemon=True
        ).start()

    def _write(self, pending: Pending, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        started = time.perf_counter()
        try:
            written = checkpoint.save(
                self._run_dir, pending.step, state, self._shares, meta, self._writers, self._retention
            )
        except Exception as error:  # raised again by the thread that trains
            pending.written.set_exception(error)
        else:
            pending.written.set_result((written, time.perf_counter() - started))

    def settle(self, *, insist: bool = False) -> None:
        """Collective. Wait until what was begun is committed, and report what it cost.

        A checkpoint that could not be written is announced and due again; with ``insist`` the error is raised.
        Raises DivergedError for a state that is not finite, and RefusedError where another run writes to the folder.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            written_bytes, write_s = pending.written.result()
        except (CannotWriteError, TransientError) as error:
            if insist:
                raise
            self._saved_step = None
            self._due_s = time.monotonic() + RETRY_S
            self._say(f"{error}; training goes on, and tries again in {RETRY_S:.0f} s at the latest")
        else:
            costs = {"save_stall_s": pending.stall_s, "save_write_s": write_s, "save_bytes": written_bytes}
            self._report(pending.step, costs)
