"""Ends a run that hangs and writes the stacks of every rank to disk.

No Python code runs while a rank waits in a collective that another rank never joins, in a kernel that never returns, or
in a C function that holds the interpreter's lock. The watchdog is therefore another process, ``overseer``, and the rank
handles its signals in C. A pause of the whole run (SIGSTOP, a suspended job) does not count as a hang.
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
from collections.abc import Callable
from pathlib import Path
from typing import IO, Self

from cit_scale.distributed import overseer
from cit_scale.errors import HUNG

# A step that hangs costs all GPUs of a run until it is noticed. One that is ended too early costs what was trained
# since the last checkpoint, and maybe the run: where a disk is away, the next starts fail, too. So the limit of a step
# is far from what steps take, and lies between half of the time-out and all of it.

# The first steps of a process compile, tune kernels, record CUDA graphs and fill caches: they have the whole time-out,
# and do not count as slow.
WARMUP_STEPS = 20
# A later step may still compile for another shape, which takes minutes, or wait for a disk: a file system whose server
# fails over holds all its readers for up to fifteen minutes (Lustre's recovery window), and recovers.
SHORTEST_LIMIT_S = 900.0
# Whoever gives a longer time-out expects longer waits.
SHORTEST_SHARE = 0.5
# Where a step takes a minute, another may take several: other work on the machine, images of other sizes. A stall that
# passed raises the limit, too.
SLOWEST_TIMES = 20


def step_limit(timeout_s: float, slowest_s: float | None) -> float:
    """Seconds that a step may take. slowest_s: the slowest step so far; None while the first ones do not count."""
    if slowest_s is None:
        return timeout_s
    return min(timeout_s, max(SHORTEST_LIMIT_S, SHORTEST_SHARE * timeout_s, SLOWEST_TIMES * slowest_s))


class Watchdog:
    """Ends this process with exit code 14 if ``progress`` is not called for ``timeout_s`` seconds of running time.

    timeout_s: seconds; time in which the process is paused does not count. 0 switches the watchdog off.
    stacks: file for the stacks of all threads; ``close`` removes it if it is empty. None writes to stderr.
    message: the line to print on stderr before the end, with the seconds in the place of ``overseer.SECONDS``; None, on
    all ranks but one, prints nothing.

    From ``begin_step`` to the next ``progress`` the limit is that of ``step_limit``, by what the steps so far took.

    A process has one watchdog at a time and creates it in the main thread. A context manager: an error that leaves the
    context while the process is being ended for a hang ends it with exit code 14, too.
    """

    def __init__(self, timeout_s: float, stacks: Path | None, message: str | None) -> None:
        self._timeout_s = timeout_s
        self._message = message or ""
        self._path = stacks
        self._overseer: subprocess.Popen[bytes] | None = None
        self._pipe: IO[bytes]  # to the overseer, where there is one
        self._step_began: float | None = None  # by the monotonic clock; None between two steps
        self._steps = 0
        self._slowest_s: float | None = None
        if not timeout_s:
            return
        # None for a stream that was closed when the process started; outlive_readers replaces sys.stderr then.
        self._stacks: IO[str] = sys.__stderr__ or sys.stderr
        if stacks is not None:
            stacks.parent.mkdir(parents=True, exist_ok=True)
            self._stacks = stacks.open("a")
        faulthandler.register(overseer.WRITE_STACKS, file=self._stacks)
        self._restore = _exit_on_end()
        self._closed = threading.Event()
        self._taker = threading.Thread(target=self._take_signals, daemon=True, name="watchdog")
        # Blocked in the main thread, and with it in all threads that start later; _take_signals unblocks it for itself.
        signal.pthread_sigmask(signal.SIG_BLOCK, {overseer.WRITE_STACKS})
        self._taker.start()
        self._start()

    def _take_signals(self) -> None:
        # This thread receives WRITE_STACKS. Delivered to the main thread, the signal would interrupt the sleep or
        # system call whose stack is to be written.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {overseer.WRITE_STACKS})
        self._closed.wait()

    def _start(self) -> None:
        # -I -S: without user settings and site-packages the interpreter starts in 20 ms and takes 10 MB.
        program = [sys.executable, "-I", "-S", overseer.__file__]
        arguments = [str(self._timeout_s), str(os.getpid()), self._message]
        started = subprocess.Popen([*program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert started.stdin is not None  # because of PIPE
        self._overseer, self._pipe = started, started.stdin
        # A full pipe must not stop training, for instance while the overseer is paused.
        os.set_blocking(self._pipe.fileno(), False)

    def begin_step(self) -> None:
        """Restart the count for one training step, which the next ``progress`` ends."""
        self._step_began = time.monotonic()
        self._report(step_limit(self._timeout_s, self._slowest_s))

    def progress(self) -> None:
        """Restart the count of ``timeout_s``. Called after every step or part of the preparation."""
        if self._step_began is not None:
            step_s, self._step_began = time.monotonic() - self._step_began, None
            self._steps += 1
            if self._steps > WARMUP_STEPS:
                self._slowest_s = max(step_s, self._slowest_s or 0.0)
        self._report(self._timeout_s)

    def _report(self, timeout_s: float) -> None:
        if self._overseer is None:
            return
        try:
            os.write(self._pipe.fileno(), overseer.REPORT.pack(timeout_s))
        except BlockingIOError:
            pass  # the overseer is paused and the pipe is full: it reads progress enough when it runs again
        except BrokenPipeError:  # the overseer was killed: start another one
            self._overseer.wait()
            with contextlib.suppress(OSError):  # the system cannot start a process now; the next call tries again
                self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is not None and self._overseer is not None:
            # The overseer ends at the end of its input, or, where it is ending this process, does so at once.
            with contextlib.suppress(OSError):
                self._pipe.close()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it is paused
                self._overseer.wait(overseer.GRACE_S)
        self.close()

    def close(self) -> None:
        """End the overseer and restore the signal handlers. Code after this call has no time limit."""
        if self._overseer is None:
            return
        self._overseer.kill()
        self._overseer.wait()  # it sends no signal from here on, so the handlers below can be removed
        with contextlib.suppress(OSError):
            self._pipe.close()
        self._overseer = None
        self._closed.set()
        self._taker.join()
        faulthandler.unregister(overseer.WRITE_STACKS)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {overseer.WRITE_STACKS})
        self._restore()
        if self._path is not None:
            self._stacks.close()
            with contextlib.suppress(OSError):  # the folder is gone; the code that writes to it reports that
                if not self._path.stat().st_size:
                    self._path.unlink()


def _exit_on_end() -> Callable[[], object]:
    """Make the signal END end this process at once, with exit code HUNG. Returns what undoes that."""
    # The handler is the C library's _exit, called with the signal's number: END's number must be the exit code HUNG. A
    # handler written in Python would not run while the interpreter is blocked.
    assert overseer.END == HUNG
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    previous = libc.signal(overseer.END, ctypes.cast(libc._exit, ctypes.c_void_p))
    return lambda: libc.signal(overseer.END, previous)


def end_within(seconds: int) -> None:
    """End this process in ``seconds``, with exit code 14, if it has not ended by itself until then.

    For a process whose end may hang: in the interpreter's, or in that of a library, where no Python code runs.
    """
    assert overseer.END == signal.SIGALRM
    _exit_on_end()
    signal.alarm(seconds)


class Patience:
    """A time limit that counts only time in which this process ran.

    Call ``is_over`` at least every LONGEST_LOOK_S seconds: a longer interval between two calls counts as a pause.
    """

    LONGEST_LOOK_S = 5.0
    """Seconds counted at most between two calls of ``is_over``."""

    def __init__(self, seconds: float) -> None:
        self._left_s = seconds
        self._asked = time.monotonic()

    def is_over(self) -> bool:
        """Whether the seconds are used up. Subtracts the time since the last call."""
        now = time.monotonic()
        self._left_s -= min(now - self._asked, self.LONGEST_LOOK_S)
        self._asked = now
        return self._left_s <= 0
