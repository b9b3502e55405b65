"""Handles the signals that ask a run to stop: the handler only sets a flag, and training stops between two steps.

A collective save inside a signal handler would deadlock: a signal reaches one rank, or all ranks at different points.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import psutil


class StopRequest:
    """Context manager that catches Ctrl-C, kill, and the signals with which a scheduler announces a time limit.

    The first signal is remembered in ``signum``; ``requested`` is then true. A second Ctrl-C raises KeyboardInterrupt
    at once, except within ``shielded``, where the state is being saved. A SIGTERM after a Ctrl-C counts as the same
    request: on Ctrl-C the terminal signals all processes, and the deepspeed launcher then sends its ranks a SIGTERM of
    its own.

    ends_process: the process ends after this context, which takes seconds in which it ignores the signals: they would
    end it with a code of their own, on a rank, too, that stops because another was asked. Otherwise the handlers are
    given back.
    """

    # Slurm sends USR2 before a time limit (--signal=USR2@300 in slurm/*.sh); so does submitit's local executor.
    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self, *, ends_process: bool = False) -> None:
        self.signum: int | None = None
        self._ends_process = ends_process
        self._shielded = False
        self._previous: dict[int, Any] = {}
        self._launcher = Launcher.above()

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop, by a signal or by the end of its launcher. The ranks have to agree."""
        # On one machine a launcher that is killed passes nothing on to its ranks: its end counts as a SIGTERM.
        if self.signum is None and self._launcher is not None and self._launcher.is_gone():
            self.signum = signal.SIGTERM
        return self.signum is not None

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """No signal interrupts the code in this context, not even a second Ctrl-C; ``requested`` still becomes true."""
        self._shielded = True
        try:
            yield
        finally:
            self._shielded = False

    def __enter__(self) -> StopRequest:
        self._previous = {signum: signal.signal(signum, self._remember) for signum in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, signal.SIG_IGN if self._ends_process else handler)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self.signum == signum == signal.SIGINT and not self._shielded:
            raise KeyboardInterrupt
        # Keep the first signal: after Ctrl-C and the launcher's SIGTERM, the next Ctrl-C still counts as the second.
        self.signum = self.signum or signum


class Launcher:
    """The ``deepspeed`` command, two processes above a rank: command, launcher of the node, rank.

    A user kills the command to stop the run. On one machine it dies without passing the signal on, and its ranks would
    continue to train unnoticed.
    """

    def __init__(self, node_launcher: psutil.Process) -> None:
        self._node_launcher = node_launcher
        self._command_pid = node_launcher.ppid()

    @classmethod
    def above(cls) -> Launcher | None:
        """The launcher of this process; None if the deepspeed command did not start it."""
        try:
            parent = psutil.Process(os.getppid())
            return cls(parent) if "deepspeed.launcher.launch" in parent.cmdline() else None
        except psutil.Error:
            return None

    def is_gone(self) -> bool:
        """Whether the ``deepspeed`` command has ended, or the launcher of this node."""
        # A process whose parent ends gets another parent. The command may have ended before this rank first looked, so
        # compare sessions, too: the command is in the session of the node's launcher (unless the launcher leads a
        # session of its own), and the new parent is not.
        try:
            parent, session = self._node_launcher.ppid(), os.getsid(self._node_launcher.pid)
            is_adopted = session != self._node_launcher.pid and (parent == 0 or os.getsid(parent) != session)
            return parent != self._command_pid or is_adopted
        except (psutil.NoSuchProcess, ProcessLookupError):
            return True
