"""Reads the Slurm job of this process from the variables that slurm/env.sh sets.

They say what Slurm itself says of the job. Slurm's own variables may be those of another job, from within which this
one was queued: sbatch passes them on.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any


def job_id(env: Mapping[str, str]) -> str | None:
    """The job id for scontrol and squeue: ARRAY_TASK for a task of a job array. None outside of a job."""
    return env.get("CIT_JOB_ID", env.get("SLURM_JOB_ID"))


def node_name(env: Mapping[str, str]) -> str:
    """Slurm's name for this node, by which Slurm can exclude it; the host name outside Slurm."""
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def restart_count(env: Mapping[str, str]) -> int:
    """How often Slurm has requeued the job before this start; 0 for the first start."""
    return int(env.get("CIT_RESTARTS", env.get("SLURM_RESTART_COUNT", 0)))


def promised_gpus(env: Mapping[str, str]) -> int:
    """How many GPUs Slurm gives the job on each node."""
    return int(env.get("CIT_GPUS_PER_NODE", env.get("SLURM_GPUS_ON_NODE", 0)))


def job_record(env: Mapping[str, str]) -> dict[str, Any] | None:
    """The job's entry in env.json: job id, restart count, nodes in the order of their ranks, log file.

    Returns None outside of a job.
    """
    if job_id(env) is None:
        return None
    return {
        "job_id": job_id(env),
        "restart": restart_count(env),
        "nodes": env.get("CIT_HOSTS", "").split(),
        "log": env.get("CIT_LOG"),
    }
