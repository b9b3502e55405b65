"""Exclusive lock on a run folder: only one job at a time trains in it."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cit_scale.distributed.stop import StopRequest
from cit_scale.distributed.watchdog import Patience
from cit_scale.distributed.world import World, broadcast
from cit_scale.errors import CannotWriteError, RefusedError, Stopped, os_error

WAIT_S = 90


@contextmanager
def exclusive(run_dir: Path, world: World, stop: StopRequest, wait_s: float = WAIT_S) -> Iterator[None]:
    """Collective. Hold an exclusive lock on ``run_dir`` until the context ends or the process dies.

    Rank 0 takes the lock. If another job holds it, rank 0 waits up to ``wait_s`` seconds: a job that was asked to stop
    may still be writing its last checkpoint when its successor starts.

    Raises on every rank: RefusedError, which names the holder, if the lock is still held after ``wait_s``; Stopped if a
    stop is requested during the wait; CannotWriteError or TransientError if the lock file cannot be opened.
    """
    # The lock file lies beside the run folder, not in it: --fresh renames the folder and must not take the lock along.
    path = run_dir.with_name(f".{run_dir.name}.lock")
    descriptor = None
    refusal = None
    if world.is_main:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            refusal = _acquire(descriptor, run_dir, stop, wait_s)
        except OSError as error:
            message = f"{run_dir} cannot be written ({error}); give another --runs_dir"
            refusal = os_error(error, message, lasting=CannotWriteError)
    # The other ranks wait in this broadcast while rank 0 waits for the lock, and raise the same exception as rank 0.
    refusal = broadcast(world, refusal)
    try:
        if refusal is not None:
            raise refusal
        yield
    finally:
        if descriptor is not None:
            # Closing the file releases the lock. So does the end of the process, by whatever signal.
            os.close(descriptor)


def _acquire(descriptor: int, run_dir: Path, stop: StopRequest, wait_s: float) -> Exception | None:
    """On rank 0. Take the lock. Returns None, or the exception to raise on every rank."""
    patience = Patience(wait_s)  # counts running time only: a suspended job does not lose its wait
    announced = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode() or "unknown"
            if stop.requested:
                return Stopped(0, stop.signum)
            if patience.is_over():
                return RefusedError(
                    f"{run_dir} is in use by process {holder}; wait for it, stop it, or give this run another --name"
                )
            if not announced:
                print(f"waiting for process {holder}, which holds {run_dir}; at most {wait_s:g} s", flush=True)
                announced = True
            time.sleep(0.2)
        else:
            # The content only names the holder, for the messages above and for ``cit-scale runs``; flock is the lock.
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
            return None
