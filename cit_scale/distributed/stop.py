"""The one owner of the signal: remembers that the run was asked to stop, so that it can stop between two steps."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import psutil


class StopRequest:
    """Catches what asks a job to stop while used as a context manager: Ctrl-C, kill, and the signals by which
    schedulers announce the end of an allocation.

    The deepspeed launcher answers a Ctrl-C, which the terminal has sent to everybody, by a SIGTERM of its own; that is
    the same request again. A second Ctrl-C is a person who will not wait, and interrupts at once, but not within
    ``shielded``, where what was reached is being brought to safety.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.signum: int | None = None
        self._shielded = False
        self._previous: dict[int, Any] = {}
        self._launcher = Launcher.above()

    @property
    def requested(self) -> bool:
        if self.signum is None and self._launcher is not None and self._launcher.is_gone():
            self.signum = signal.SIGTERM
        return self.signum is not None

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """Let no signal interrupt what happens in here; it has to look at ``requested`` itself."""
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
            signal.signal(signum, handler)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self.signum == signum == signal.SIGINT and not self._shielded:
            raise KeyboardInterrupt
        self.signum = self.signum or signum


class Launcher:
    """The ``deepspeed`` command two processes above, which a user kills to stop the run.

    On one machine it dies without passing the signal on, and everything below it would train on, unseen.
    """

    def __init__(self, node_launcher: psutil.Process) -> None:
        self._node_launcher = node_launcher
        self._command_pid = node_launcher.ppid()

    @classmethod
    def above(cls) -> Launcher | None:
        """The launcher of this process, if it was started by one."""
        try:
            parent = psutil.Process(os.getppid())
            return cls(parent) if "deepspeed.launcher.launch" in parent.cmdline() else None
        except psutil.Error:
            return None

    def is_gone(self) -> bool:
        """Whether the command has ended: its child then belongs to another process.

        It may have ended before this process was ready to look. The child's new parent is of another session, unlike
        the command, which is of the child's own unless the child leads one.
        """
        try:
            parent, session = self._node_launcher.ppid(), os.getsid(self._node_launcher.pid)
            is_adopted = session != self._node_launcher.pid and (parent == 0 or os.getsid(parent) != session)
            return parent != self._command_pid or is_adopted
        except (psutil.NoSuchProcess, ProcessLookupError):
            return True
