"""What this machine gives a process: Python, cores, memory, shared memory, open files."""

from __future__ import annotations

import os
import platform
import resource
import shutil
from pathlib import Path

import psutil

from cit_scale.doctor.findings import Asked, Finding

# DeepSpeed, DALI and PyTorch take one or two GiB in each rank before anything is computed.
FEW_GIB = 4.0
# NCCL, and workers that share tensors, lie there. Docker gives 64 MiB unless it is told otherwise.
SHARED = Path("/dev/shm")
SMALL_SHARED_GIB = 1.0
FEW_FILES = 1024
GIB = 2**30


def check(asked: Asked) -> Finding:
    """What there is, and what is little."""
    shared = shutil.disk_usage(SHARED).total / GIB if SHARED.is_dir() else 0.0
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return judge(len(os.sched_getaffinity(0)), memory_bytes(Path("/")) / GIB, shared, files)


def judge(cores: int, memory_gib: float, shared_gib: float, files: int) -> Finding:
    """cores: that this process may use. memory_gib: that it may use. shared_gib: of /dev/shm. files: open at once."""
    python, limit = platform.python_version(), "any number of" if files == resource.RLIM_INFINITY else str(files)
    says = (
        f"Python {python}, {platform.machine()}, {cores} cores, {memory_gib:.1f} GiB, "
        f"{SHARED} {shared_gib:.1f} GiB, {limit} open files"
    )
    facts = {"python": python, "processor": platform.machine(), "cores": str(cores)}
    figures = {"memory_gib": memory_gib, "shared_gib": shared_gib}
    advice = []
    if memory_gib < FEW_GIB:
        advice.append(f"below {FEW_GIB:g} GiB even a small run may be killed: give the job more memory")
    if shared_gib < SMALL_SHARED_GIB:
        advice.append(f"NCCL and other processes share tensors in {SHARED}: in Docker --shm-size=8g or --ipc=host")
    if files != resource.RLIM_INFINITY and files < FEW_FILES:
        advice.append(f"ulimit -n {FEW_FILES} or more, for data sets of many files")
    return Finding("warning" if advice else "ok", says, "; ".join(advice), facts, figures)


def memory_bytes(root: Path) -> int:
    """Memory that this process may use: the machine's, or less where a control group, as of Slurm or Docker, limits it.

    root: the folder in which proc and sys lie.
    """
    limits = [psutil.virtual_memory().total]
    try:
        own = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        own = []
    for line in own:
        _, controllers, name = line.split(":", 2)
        # Version 2 has one tree for all that is limited; version 1 has one for memory.
        tree = "sys/fs/cgroup" if not controllers else "sys/fs/cgroup/memory" if controllers == "memory" else None
        if tree is None:
            continue
        folder = Path(name.lstrip("/"))
        for group in (folder, *folder.parents):
            for file in ("memory.max", "memory.limit_in_bytes"):
                try:
                    limits.append(int((root / tree / group / file).read_text()))
                except (OSError, ValueError):  # not there, or "max"
                    continue
    return min(limits)
