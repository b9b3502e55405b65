"""The process beside a rank that ends it if it hangs; started by ``watchdog.Watchdog``. Imports as little as it can.

It lives in time that passes for itself and for the rank: a tick in which either did not run, as under SIGSTOP, Ctrl-Z,
``docker pause`` or Slurm's suspend, does not count. A timer in the rank would go off the moment it wakes.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time

# Sent to the rank: its handlers are C functions, which run whatever its interpreter does.
WRITE_STACKS = signal.SIGRTMAX
END = signal.SIGALRM  # its handler is _exit, which takes the signal's number, 14, for the exit code

MOST_TICKS = 20  # of a time-out; a pause costs at most one
LONGEST_TICK_S = 1.0
ANNOUNCE_S = 1.0  # after the stacks: what a terminal shows last is what happened
GRACE_S = 3.0  # between stacks and end: the first rank to leave must not break the others off before they have written


def main() -> None:
    """Arguments: seconds without progress, the rank's process id, the line to print. Progress is a byte on stdin."""
    timeout_s, rank, message = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    tick_s = min(LONGEST_TICK_S, timeout_s / MOST_TICKS)
    # What stops the rank reaches its whole process group, and the rank may have much to save; this ends with it.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    waited_s = 0.0
    while os.getppid() == rank:
        began = time.monotonic()
        if has_progressed(tick_s):
            waited_s = 0.0
        elif not is_paused(rank):
            waited_s += min(time.monotonic() - began, 2 * tick_s)
        if waited_s >= timeout_s:
            end(rank, message)
            waited_s = 0.0


def has_progressed(within_s: float) -> bool:
    """Wait for a byte. Ends this process when there can be none: the rank has ended, or wants no more of this."""
    ready, _, _ = select.select([0], [], [], within_s)
    if ready and not os.read(0, 1 << 16):
        raise SystemExit(0)
    return bool(ready)


def is_paused(pid: int) -> bool:
    """Whether a process is stopped, or in a debugger's hands."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except OSError:
        return False


def end(rank: int, message: str) -> None:
    """Have the rank write its stacks, say what happened, and end it, unless it goes on in the last moment."""
    send(rank, WRITE_STACKS)
    if has_progressed(ANNOUNCE_S):
        return
    if message:
        # From a thread: nobody may read it, or not just now, and the end must not wait for that.
        threading.Thread(target=say, args=(message,), daemon=True).start()
    if has_progressed(GRACE_S - ANNOUNCE_S):
        return
    send(rank, END)
    time.sleep(GRACE_S)
    send(rank, signal.SIGKILL)  # it is still there, and blocks the other one


def say(message: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"error: {message}\n".encode())


def send(rank: int, signum: int) -> None:
    if os.getppid() != rank:
        raise SystemExit(0)  # it has ended, and its number may be another's
    os.kill(rank, signum)


if __name__ == "__main__":
    main()
