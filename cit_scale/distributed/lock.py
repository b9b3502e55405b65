"""One job at a time in a run folder."""

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
    """Collective. Hold the run folder against other jobs, for as long as the context lasts or the process lives.

    A job that was asked to stop may still be writing its last checkpoint when its successor starts, so a held folder is
    waited for. Raises RefusedError, naming the holder, where it stays held, and Stopped when asked to stop meanwhile.
    """
    # Beside the folder and not in it, so that setting the folder aside does not take the lock along.
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
    refusal = broadcast(world, refusal)
    try:
        if refusal is not None:
            raise refusal
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)  # which releases the lock, as the end of the process does


def _acquire(descriptor: int, run_dir: Path, stop: StopRequest, wait_s: float) -> Exception | None:
    """Take the lock, or say why not."""
    patience = Patience(wait_s)
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
                print(f"waiting for process {holder}, which still works in {run_dir}", flush=True)
                announced = True
            time.sleep(0.2)
        else:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
            return None
