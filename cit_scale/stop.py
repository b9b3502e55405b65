"""The one owner of the signal: remembers that the run was asked to stop, so that it can stop between two steps."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class Stopped(Exception):  # noqa: N818  an outcome, not an error
    """The run saved its state and left because it was asked to. signum: the signal; None on a rank that got none."""

    def __init__(self, step: int, signum: int | None) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step
        self.signum = signum


class StopRequest:
    """Catches SIGINT and SIGTERM while used as a context manager.

    The deepspeed launcher answers a Ctrl-C, which the terminal has sent to everybody, by a SIGTERM of its own; that is
    the same request again. A second Ctrl-C is a person who will not wait: it interrupts at once.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signum is not None

    def __enter__(self) -> StopRequest:
        self._previous = {signum: signal.signal(signum, self._remember) for signum in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self.signum == signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = self.signum or signum
