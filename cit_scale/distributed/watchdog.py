"""Ends a run that hangs, with the stacks of every rank on disk, whatever it hangs in.

A collective that a rank never joins, a kernel that never returns, a C function that sleeps with the interpreter's lock
held: none of them lets Python code run, so what must happen then is armed before, in C. Each sign of progress arms it
anew, which costs tens of microseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

from cit_scale.errors import HUNG

ANNOUNCE_S = 1
GRACE_S = 3  # between stacks and exit: the first rank to leave must not break the others off before they have written


class Watchdog:
    """``progress`` has to be called at least every ``timeout_s`` seconds, or the process writes its stacks and leaves.

    stacks: the file that the stacks of all threads are written to; none is left by a run that did not hang.
    message: the line on stderr that says what happened; None on all ranks but one. It needs the interpreter's lock, so
    it fails where that is what hangs; stacks and exit code HUNG do not.
    timeout_s=0 switches all of it off. One at a time in a process; main thread only.
    """

    def __init__(self, timeout_s: float, stacks: Path, message: str | None) -> None:
        self._timeout_s = timeout_s
        self._message = message
        self._path = stacks
        self._stacks: TextIO | None = None
        if not timeout_s:
            return
        stacks.parent.mkdir(parents=True, exist_ok=True)
        self._stacks = stacks.open("a")
        # The C library's own _exit is the handler: it takes the signal's number for the exit code, and SIGALRM's is 14.
        assert signal.SIGALRM == HUNG
        libc = ctypes.CDLL(None)
        libc.signal.restype = ctypes.c_void_p
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        self._previous = libc.signal(signal.SIGALRM, ctypes.cast(libc._exit, ctypes.c_void_p))
        self._restore = lambda: libc.signal(signal.SIGALRM, self._previous)
        self._deadline = time.monotonic() + timeout_s
        self._closed = threading.Event()
        if message is not None:
            threading.Thread(target=self._announce, daemon=True, name="watchdog").start()
        self.progress()

    def progress(self) -> None:
        """Something was achieved: count from here."""
        if self._stacks is None:
            return
        self._deadline = time.monotonic() + self._timeout_s
        faulthandler.dump_traceback_later(self._timeout_s, file=self._stacks)
        signal.setitimer(signal.ITIMER_REAL, self._timeout_s + GRACE_S)

    def close(self) -> None:
        """Disarm. What follows may take as long as it likes."""
        if self._stacks is None:
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        self._closed.set()
        self._restore()
        self._stacks.close()
        with contextlib.suppress(OSError):  # the folder may be gone, which others have said, and better
            if not self._path.stat().st_size:
                self._path.unlink()
        self._stacks = None

    def _announce(self) -> None:
        # Later than the stacks: faulthandler walks the frames of all threads, and crashes over one that runs meanwhile.
        while not self._closed.wait(max(0.1, self._deadline + ANNOUNCE_S - time.monotonic())):
            if time.monotonic() >= self._deadline + ANNOUNCE_S:
                print(f"error: {self._message}", file=sys.stderr, flush=True)
                return
