"""What Slurm says of jobs, and how they are cancelled."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Collection
from dataclasses import dataclass

from cit_scale.errors import ConfigError

STOPPED_STATES = {"CANCELLED", "COMPLETED", "PREEMPTED", "REVOKED", "TIMEOUT"}
FAILED_STATES = {"BOOT_FAIL", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"}

SLURM_PATIENCE_S = 30


@dataclass(frozen=True)
class SlurmJob:
    """state: Slurm's word in capitals. reason: why it waits, or ended as it did."""

    state: str
    nodes: str = ""
    reason: str = ""

    @property
    def is_active(self) -> bool:
        """Whether it waits, trains or is on its way between those: whatever is no end."""
        return self.state not in STOPPED_STATES | FAILED_STATES


def ask_slurm(job_ids: Collection[str]) -> dict[str, SlurmJob] | None:
    """What Slurm knows of these jobs; nothing where there is no Slurm, None if it does not answer."""
    # One that is no id, out of a damaged file, would cost the answer for all others.
    job_ids = [job_id for job_id in job_ids if re.fullmatch(r"\d+(_\d+)?", job_id)]
    if not job_ids or not shutil.which("squeue"):
        return {}
    asked = f"--jobs={','.join(job_ids)}"
    answer = _slurm("squeue", "--noheader", "--array", "--states=all", "--format=%i|%A|%T|%N|%r", asked)
    # That is what it says when it has forgotten the only job it is asked for. Of several it lists those it knows.
    if answer.returncode and "Invalid job id" not in answer.stderr:
        return None
    jobs = parse_jobs(answer.stdout)
    if forgotten := [job_id for job_id in job_ids if job_id not in jobs]:
        # A cluster without accounting answers with an error and nothing else.
        answer = _slurm("sacct", "-X", "-n", "-P", "-o", "JobID,JobIDRaw,State,NodeList", "-j", ",".join(forgotten))
        jobs |= parse_jobs(answer.stdout)
    return jobs


def parse_jobs(text: str) -> dict[str, SlurmJob]:
    """Jobs by each of their ids. text: what squeue or sacct prints for ``ask_slurm``.

    A task of an array has two ids: 12_3, by which it was submitted, and one of its own, which it sees itself.
    """
    jobs = {}
    for fields in (line.split("|", 4) for line in text.splitlines()):
        if len(fields) >= 4:
            # sacct says "CANCELLED by 1000", and "None assigned" of a job that never had a node.
            job_id, raw_id, state, *rest = fields
            rest = ["" if field in ("None", "None assigned") else field for field in rest]
            jobs[job_id] = jobs[raw_id] = SlurmJob(state.partition(" ")[0], *rest)
    return jobs


def cancel_slurm_job(job_id: str, *, now: bool) -> None:
    """Have the job ended for good, waiting or not. now: without time to save."""
    if now:
        # Not KILL: whatever else it is told, scancel makes that its own sequence of TERM, some patience, and KILL. HUP
        # goes to the ranks, which do not catch it, and spares the batch script, which has yet to note how they ended.
        _slurm("scancel", "--signal=HUP", job_id)  # refused for a job that has not started, which is as well
    answer = _slurm("scancel", job_id)
    if answer.returncode:
        raise ConfigError(f"job {job_id} was not cancelled: {' '.join(answer.stderr.split())}")


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SLURM_PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
