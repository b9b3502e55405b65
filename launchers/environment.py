"""The environment variables that a launcher was started with. Imported first, before an import can add others."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

# On a login node without GPUs some imports set variables, such as DeepSpeed's choice of an accelerator. sbatch would
# pass these variables on to nodes that have GPUs.
STARTED_WITH = frozenset(os.environ)

# What srun obeys or a rank believes, and another job, its ranks or its launcher may have left here.
STALE = re.compile(
    r"SLURM_(ARRAY_\w+|RESTART_COUNT|STEP\w+|PROCID|LOCALID|NODEID|GTIDS|N?TASKS\w*|NPROCS|CPUS_PER_\w+|CPU_BIND\w*|"
    r"MEM_PER_\w+|MEM_BIND\w*|GRES|GPUS\w*|GPU_BIND|GPU_FREQ|CPU_FREQ_REQ|THREADS_PER_CORE|HINT|TRES_PER_TASK|TRES_BIND|"
    r"HET_\w+|\w+_HET_GROUP_\d+|CONSTRAINT|RESV_PORTS|TIMELIMIT|DISTRIBUTION|HOSTFILE|RELATIVE|OVERCOMMIT|EXACT|"
    r"EXCLUSIVE|OVERLAP)"
    r"|SRUN_\w+|SUBMITIT_LOCAL_\w+|TORCHELASTIC_\w+|RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|LOCAL_SIZE"
    r"|CIT_(JOB_ID|RESTARTS|HOSTS|GPUS_PER_NODE)"
)

# sbatch obeys its own variables before the lines of a script, and passes on those of the job that it is called in.
# SLURM_CONF and its like say where Slurm is.
OF_SLURM = re.compile(r"SLURM_(?!(CONF|CONF_SERVER|CLUSTERS|JWT|DEBUG_FLAGS)$)\w+")
CONTRADICTING = re.compile(
    r"SBATCH_(JOB_NAME|ARRAY_INX|OUTPUT|ERROR|INPUT|SIGNAL|REQUEUE|NO_REQUEUE|OPEN_MODE|WAIT|DISTRIBUTION|OVERCOMMIT|"
    r"GRES|GPUS\w*|CPUS_PER_GPU|MEM_PER_\w+|PARTITION|ACCOUNT|QOS|CONSTRAINT|TIMELIMIT)"
)


@contextlib.contextmanager
def own_environment() -> Iterator[None]:
    """Inside the with block, hide the variables that were added since this process started, those of a job that it runs
    in, and those that sbatch would obey although they contradict the batch script or stand in it.
    """
    hidden = os.environ.keys() - STARTED_WITH
    hidden |= {name for name in os.environ if any(each.fullmatch(name) for each in (STALE, OF_SLURM, CONTRADICTING))}
    kept = {name: os.environ.pop(name) for name in hidden}
    try:
        yield
    finally:
        os.environ.update(kept)
