"""Reads the Slurm job of this process from the variables that srun and slurm/env.sh set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def job_id(env: Mapping[str, str]) -> str | None:
    """The job id for scontrol and squeue. None outside of a job.

    For a task of a job array the id is ARRAY_TASK, which names this task and no other task of the array.
    """
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID")


def restart_count(env: Mapping[str, str]) -> int:
    """How often Slurm has requeued the job before this start; 0 for the first start."""
    return int(env.get("SLURM_RESTART_COUNT", 0))


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
