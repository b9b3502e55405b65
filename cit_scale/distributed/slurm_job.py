"""The Slurm job that a process belongs to, as srun and slurm/env.sh describe it in its environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def job_id(env: Mapping[str, str]) -> str | None:
    """The id by which scontrol and squeue mean this job and no other of its array; None outside of a job."""
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID")


def restart_count(env: Mapping[str, str]) -> int:
    """How often the job has been requeued before this start of it."""
    return int(env.get("SLURM_RESTART_COUNT", 0))


def job_record(env: Mapping[str, str]) -> dict[str, Any] | None:
    """For the run folder: job, start, nodes in the order of their ranks, log. None outside of a job."""
    if job_id(env) is None:
        return None
    return {
        "job_id": job_id(env),
        "restart": restart_count(env),
        "nodes": env.get("CIT_HOSTS", "").split(),
        "log": env.get("CIT_LOG"),
    }
