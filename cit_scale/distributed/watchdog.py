"""Ends a run that hangs, with the stacks of every rank on disk, whatever it hangs in.

A collective that a rank never joins, a kernel that never returns, a C function that sleeps with the interpreter's lock
held: none of them lets Python code run. So another process, ``overseer``, waits for signs of progress, and what it
sends then is answered in C. A pause of the whole run, by SIGSTOP or a suspended job, is no hang.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

from cit_scale.distributed import overseer
from cit_scale.errors import HUNG


class Watchdog:
    """``progress`` has to be called at least every ``timeout_s`` seconds, or the process writes its stacks and leaves.

    stacks: the file that the stacks of all threads are written to, and none is left by a run that did not hang; None
    for stderr. message: the line on stderr that says what happened; None on all ranks but one. Seconds in which this
    process does not run do not count. timeout_s=0 switches all of it off. One at a time in a process; main thread only.
    """

    def __init__(self, timeout_s: float, stacks: Path | None, message: str | None) -> None:
        self._timeout_s = timeout_s
        self._message = message or ""
        self._path = stacks
        self._overseer: subprocess.Popen[bytes] | None = None
        if not timeout_s:
            return
        self._stacks: IO[str] = sys.__stderr__
        if stacks is not None:
            stacks.parent.mkdir(parents=True, exist_ok=True)
            self._stacks = stacks.open("a")
        faulthandler.register(overseer.WRITE_STACKS, file=self._stacks)
        # The C library's own _exit is the handler: it takes the signal's number for the exit code.
        assert overseer.END == HUNG
        libc = ctypes.CDLL(None)
        libc.signal.restype = ctypes.c_void_p
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        previous = libc.signal(overseer.END, ctypes.cast(libc._exit, ctypes.c_void_p))
        self._restore = lambda: libc.signal(overseer.END, previous)
        self._closed = threading.Event()
        self._taker = threading.Thread(target=self._take_signals, daemon=True, name="watchdog")
        signal.pthread_sigmask(signal.SIG_BLOCK, {overseer.WRITE_STACKS})
        self._taker.start()
        self._start()

    def _take_signals(self) -> None:
        # The order to write stacks comes to this thread: it would break off what the main thread sleeps in.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {overseer.WRITE_STACKS})
        self._closed.wait()

    def _start(self) -> None:
        # Isolated and without site-packages, it is up in 20 ms and takes 10 MB.
        program = [sys.executable, "-I", "-S", overseer.__file__]
        arguments = [str(self._timeout_s), str(os.getpid()), self._message]
        self._overseer = subprocess.Popen([*program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        os.set_blocking(self._overseer.stdin.fileno(), False)

    def progress(self) -> None:
        """Something was achieved: count from here."""
        if self._overseer is None:
            return
        try:
            os.write(self._overseer.stdin.fileno(), b".")
        except BlockingIOError:
            pass  # it does not run just now, and will find enough when it does
        except BrokenPipeError:  # somebody has killed it
            self._overseer.wait()
            with contextlib.suppress(OSError):  # no room for another process just now: the next progress tries again
                self._start()

    def close(self) -> None:
        """Disarm. What follows may take as long as it likes."""
        if self._overseer is None:
            return
        self._overseer.kill()
        self._overseer.wait()  # from here on no signal of its comes
        with contextlib.suppress(OSError):
            self._overseer.stdin.close()
        self._overseer = None
        self._closed.set()
        self._taker.join()
        faulthandler.unregister(overseer.WRITE_STACKS)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {overseer.WRITE_STACKS})
        self._restore()
        if self._path is not None:
            self._stacks.close()
            with contextlib.suppress(OSError):  # the folder may be gone, which others have said, and better
                if not self._path.stat().st_size:
                    self._path.unlink()


class Patience:
    """Seconds of waiting, of which only those count in which this process ran. To be asked every few moments."""

    LONGEST_LOOK_S = 5.0
    """Between two questions; more than that, and the process was paused."""

    def __init__(self, seconds: float) -> None:
        self._left_s = seconds
        self._asked = time.monotonic()

    def is_over(self) -> bool:
        now = time.monotonic()
        self._left_s -= min(now - self._asked, self.LONGEST_LOOK_S)
        self._asked = now
        return self._left_s <= 0
