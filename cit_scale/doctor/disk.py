"""The disk where runs are to lie: can it be written, does it have locks and room, and how fast is it?"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cit_scale.doctor.findings import Asked, Finding, failed, ok
from cit_scale.errors import one_line
from cit_scale.files import sync

WHOLE_BYTES, QUICK_BYTES = 2**29, 2**25
LITTLE_ROOM = 10e9  # five checkpoints of CiT-B
CHECKPOINT_BYTES = 1503e6  # of CiT-B (docs/measurements/checkpoints.md)
SLOW_BYTES_PER_S = 50e6  # half a minute for that
NAME_ANOTHER = "name a writable folder by --runs_dir, here and for runs"
MAKE_ROOM = "make room there, or name another disk by --runs_dir, here and for runs"
WAYS_OUT = {
    errno.ENOSPC: MAKE_ROOM,
    errno.EDQUOT: MAKE_ROOM,
    errno.EFBIG: "files may not be so long (ulimit -f): raise that, here and for runs",
    errno.EMFILE: "too few files may be open (ulimit -n): raise that, here and for runs",
}


def check(asked: Asked) -> Finding:
    """Write a file as checkpoints are written: to a temporary name, synchronised, renamed."""
    wanted = Path(os.path.expanduser(asked.runs_dir)).absolute()
    folder = existing(wanted)
    name = f"{folder}" if folder == wanted else f"{folder} ({wanted} is not there yet)"
    try:
        rate, lock_problem = write(folder, QUICK_BYTES if asked.quick else WHOLE_BYTES)
    except OSError as error:
        return failed(f"{name} cannot be written: {one_line(error)}", WAYS_OUT.get(error.errno or 0, NAME_ANOTHER))
    # So little says more of how long a disk takes to answer than of its speed.
    return judge(name, rate, shutil.disk_usage(folder).free, lock_problem, is_timed=not asked.quick)


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there, if only as a link that leads nowhere."""
    return next(each for each in (folder, *folder.parents) if os.path.lexists(each))


def write(folder: Path, size: int) -> tuple[float, str | None]:
    """Bytes per second, and why there are no locks; None: there are. Raises OSError."""
    with scratch_folder(folder) as scratch:
        partial, whole = scratch / "partial", scratch / "whole"
        block = os.urandom(2**22)  # not zeros, which some disks do not store
        start = time.perf_counter()
        with partial.open("wb") as file:
            for _ in range(size // len(block)):
                file.write(block)
        sync(partial)
        partial.rename(whole)
        sync(whole.parent)
        seconds = time.perf_counter() - start
        try:
            with whole.open("r+b") as file:  # NFS gives no exclusive lock on what is open for reading alone
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return size / seconds, None
        except OSError as error:
            return size / seconds, one_line(error)


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder that is removed afterwards, also where SIGTERM ends the check at any moment. Raises OSError."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        folder = tempfile.mkdtemp(prefix=".cit_scale_doctor_", dir=parent)
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            yield Path(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def judge(folder: str, bytes_per_s: float, free: float, lock_problem: str | None, *, is_timed: bool = True) -> Finding:
    """folder: its name. free: bytes that are left. is_timed: enough was written to say how fast the disk is."""
    says = f"{folder}: {free / 1e9:.0f} GB free"
    if is_timed:
        says += f", {bytes_per_s / 1e6:.0f} MB/s: {CHECKPOINT_BYTES / bytes_per_s:.1f} s for a checkpoint of CiT-B"
    advice = []
    if lock_problem is not None:
        advice.append(f"no locks ({lock_problem}): two jobs could write one run; mount it with locks")
    if free < LITTLE_ROOM:
        advice.append(MAKE_ROOM)
    if is_timed and bytes_per_s < SLOW_BYTES_PER_S:
        advice.append("slow: name another disk by --runs_dir, or raise train.save_every_steps")
    figures = {"write_mb_per_s": bytes_per_s / 1e6} if is_timed else {}
    if advice:
        return Finding("warning", says, "; ".join(advice), {}, figures)
    return ok(says, figures=figures)
