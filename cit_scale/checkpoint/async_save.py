"""Asynchronous checkpoints: training stops only for a copy of the state, and a thread of each rank writes the copy.

Decides when a checkpoint is due (by steps or by minutes), and reports what each one cost.
"""

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

RETRY_S = 60.0  # after a checkpoint that could not be written


@dataclass(frozen=True)
class Pending:
    """A checkpoint that is being written.

    stall_s: seconds for which training waited. written: result of the writing thread, (bytes, seconds), or its
    exception.
    """

    step: int
    stall_s: float
    written: Future[tuple[int, float]]


class AsyncCheckpointer:
    """Saves an engine's state in a run folder while training continues. Collective to build.

    ``save`` copies the state to the CPU, and a thread of each rank writes the copy. The threads call collectives
    through a process group of their own (``World.with_own_group``). A checkpoint that cannot be written does not end
    the run: the reason is logged, training continues, and another checkpoint is due after RETRY_S seconds.
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
        """Collective.

        step: number of updates done; this state needs no checkpoint, because it was loaded or is the initial one.
        say: called with one line if a checkpoint could not be written.
        report: called with the step of each committed checkpoint and its costs: save_stall_s, save_write_s, save_bytes.
        """
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
        """Whether a checkpoint is due after update ``step`` by the number of steps; the same on every rank."""
        return step != self._saved_step and any(step % steps == 0 for steps in self._every_steps)

    @property
    def is_overdue(self) -> bool:
        """Whether a checkpoint is due by this rank's clock.

        The clocks of two ranks differ, so the caller must agree on one rank's answer before calling ``save``.
        """
        return time.monotonic() >= self._due_s

    @property
    def has_failed(self) -> bool:
        """Whether this rank's thread has failed, so that ``settle`` must be called.

        The ranks see a failure at different times, so the caller must agree on it before calling ``settle``.
        """
        pending = self._pending
        return pending is not None and pending.written.done() and pending.written.exception() is not None

    def save(self, step: int, meta: Mapping[str, Any]) -> None:
        """Collective. Copy the state after update ``step`` and start to write it. Does nothing if the step is saved.

        meta: contents of meta.json; only rank 0's is written. Waits for the previous checkpoint, and raises what
        ``settle`` raises about it.
        """
        if step == self._saved_step:
            return
        started = time.perf_counter()
        # One checkpoint is written at a time. The wait for the previous one counts as a stall.
        self.settle()
        # Copies on the CPU: the next update changes the module while the thread writes.
        state = self._engine.state(self._shares[self._world.rank])
        self._saved_step = step
        self._due_s = time.monotonic() + self._every_s
        self._pending = Pending(step, time.perf_counter() - started, Future())
        # A daemon thread: a rank that exits with an error must not wait for collectives with ranks that have left.
        threading.Thread(
            target=self._write, args=(self._pending, state, meta), name=f"checkpoint of step {step}", daemon=True
        ).start()

    def _write(self, pending: Pending, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """In the writing thread. Collective over the writing threads."""
        started = time.perf_counter()
        try:
            written = checkpoint.save(
                self._run_dir, pending.step, state, self._shares, meta, self._writers, self._retention
            )
        except Exception as error:  # ``settle`` raises it in the training thread
            pending.written.set_exception(error)
        else:
            pending.written.set_result((written, time.perf_counter() - started))

    def settle(self, *, insist: bool = False) -> None:
        """Collective. Wait until the checkpoint that is being written is committed, and report its costs.

        If the checkpoint could not be written, the reason is passed to ``say`` and a checkpoint is due again within
        RETRY_S; with ``insist`` the CannotWriteError or TransientError is raised instead. Always raises DivergedError
        for a state that is not finite, and RefusedError if another run writes to the folder.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            written_bytes, write_s = pending.written.result()
        except (CannotWriteError, TransientError) as error:
            if insist:
                raise
            # The same step may be saved again.
            self._saved_step = None
            self._due_s = time.monotonic() + RETRY_S
            self._say(f"{error}; training goes on, and tries again in {RETRY_S:.0f} s at the latest")
        else:
            costs = {"save_stall_s": pending.stall_s, "save_write_s": write_s, "save_bytes": written_bytes}
            self._report(pending.step, costs)
