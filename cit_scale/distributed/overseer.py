"""Watchdog process: ends a rank that makes no progress. Started by ``watchdog.Watchdog``, one for each rank.

The process counts only time in which both the rank and the process itself ran: a tick in which either was paused
(SIGSTOP, Ctrl-Z, ``docker pause``, Slurm's suspend) does not count. A timer inside the rank would expire as soon as the
rank wakes.

Imports the standard library only, so that the process starts fast and stays small.
"""

import contextlib
import os
import select
import signal
import struct
import sys
import threading
import time

# Signals to the rank. The rank handles both in C functions, which run even if its interpreter is blocked.
WRITE_STACKS = signal.SIGRTMAX
# The handler is the C library's _exit, called with the signal's number, so the rank's exit code is 14 (errors.HUNG).
END = signal.SIGALRM

# The rank reports progress as the seconds that it may take until the next report. Reports of one size, each written at
# once: whatever is read is whole reports.
REPORT = struct.Struct("<d")
# Stands in the message for the seconds that went by.
SECONDS = "{seconds}"

# A time-out is divided into this many ticks, so that a pause adds at most one tick to the count.
MOST_TICKS = 20
LONGEST_TICK_S = 1.0
# The error message follows the stacks by this much, so that it is the last thing on the terminal.
ANNOUNCE_S = 1.0
# From the stacks to the end of the rank. The first rank to exit makes the launcher end the others, which need this time
# to write their own stacks.
GRACE_S = 3.0


def main() -> None:
    """Watch a rank until it exits. The rank reports progress by writing a REPORT to this process's stdin.

    Arguments in sys.argv: the time-out in seconds until the first report, the rank's process id, the message for stderr
    (may be empty).
    """
    timeout_s, rank, message = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    # A signal that asks the rank to stop often goes to its whole process group. The rank may then save for long and
    # still needs its watchdog, so this process ignores the signal and ends when the rank ends.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    waited_s = 0.0
    while os.getppid() == rank:  # another parent process means that the rank has ended
        began = time.monotonic()
        tick_s = min(LONGEST_TICK_S, timeout_s / MOST_TICKS)
        reported_s = next_timeout(tick_s)
        if reported_s is not None:
            timeout_s, waited_s = reported_s, 0.0
        elif not is_paused(rank):
            # A tick that took longer than two ticks means that this process itself was paused; count two at most.
            waited_s += min(time.monotonic() - began, 2 * tick_s)
        if waited_s >= timeout_s:
            said = message.replace(SECONDS, f"{timeout_s:g}")
            timeout_s, waited_s = end(rank, said) or timeout_s, 0.0


class NoMoreProgressError(Exception):
    """The end of stdin: the rank has exited, or leaves with an error."""


def next_timeout(within_s: float) -> float | None:
    """Wait up to ``within_s`` seconds for a report on stdin. Returns the time-out in the last one; None without any.
    Raises NoMoreProgressError.
    """
    ready, _, _ = select.select([0], [], [], within_s)
    if not ready:
        return None
    reports = os.read(0, REPORT.size << 13)
    if not reports:
        raise NoMoreProgressError
    (timeout_s,) = REPORT.unpack(reports[-REPORT.size :])
    return float(timeout_s)


def is_paused(pid: int) -> bool:
    """Whether a process is stopped or traced by a debugger."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # See proc(5): the state letter follows the program's name, which is in parentheses and may contain some.
            return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except OSError:
        return False


def end(rank: int, message: str) -> float | None:
    """Make the rank write its stacks, print ``message``, and end the rank. If the rank makes progress before, returns
    the time-out that it reports.
    """
    send(rank, WRITE_STACKS)
    # Another rank that hangs may end first, which fails the collective in which this one waits: it has hung, too.
    with contextlib.suppress(NoMoreProgressError):
        if (timeout_s := next_timeout(ANNOUNCE_S)) is not None:
            return timeout_s
        if message:
            # In a thread, because a write to a full pipe that nobody reads blocks, and the rank must end all the same.
            threading.Thread(target=say, args=(message,), daemon=True).start()
        if (timeout_s := next_timeout(GRACE_S - ANNOUNCE_S)) is not None:
            return timeout_s
    send(rank, END)
    time.sleep(GRACE_S)
    send(rank, signal.SIGKILL)  # the rank is still alive, so it blocks or ignores END
    return None


def say(message: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"error: {message}\n".encode())


def send(rank: int, signum: int) -> None:
    if os.getppid() != rank:
        raise SystemExit(0)  # the rank has ended; its process id may already belong to another process
    os.kill(rank, signum)


if __name__ == "__main__":
    with contextlib.suppress(NoMoreProgressError):
        main()
