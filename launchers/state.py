"""The state of a run: from Slurm or submitit while its newest job is active, otherwise from its run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cit_scale.errors import ConfigError
from cit_scale.run.folders import RunFolder
from cit_scale.run.show import State, say, state_in_folder
from launchers.local_jobs import find_controller
from launchers.slurm import FAILED_STATES, SlurmJob, ask_jobs


def state_of(run: RunFolder, slurm: Mapping[str, SlurmJob]) -> State:
    """The state of a run. slurm: jobs by id, as ``answer_for`` returns them."""
    job = run.job
    known = slurm.get(job.job_id) if job and job.cluster == "slurm" else None
    if known and known.is_active:
        return State(known.state.lower(), known.nodes or known.reason, "slurm")
    if job and job.cluster == "local" and find_controller(job):
        return State("running", f"process {job.job_id}", "submitit")
    state = state_in_folder(run)
    if known and state.word in ("not started", "stopped"):
        if known.state in FAILED_STATES:
            return State("failed", "" if known.state == "FAILED" else known.state.lower())
        if state.word == "not started":
            return State("not started", known.state.lower())
    return state


def state_now(run: RunFolder) -> State:
    """The state of a run, for a command that acts on it. Raises ConfigError if Slurm is needed and does not answer."""
    slurm = answer_for([run])
    if slurm is None:
        raise ConfigError(f"whether {run.name} runs cannot be told before Slurm answers; try again")
    return state_of(run, slurm)


def states_of(runs: Sequence[RunFolder]) -> list[State]:
    """The state of each run, for commands that show it. Says on stderr if Slurm does not answer."""
    slurm = answer_for(runs)
    if slurm is None:
        say("Slurm does not answer: states are from the run folders alone")
    return [state_of(run, slurm or {}) for run in runs]


def answer_for(runs: Sequence[RunFolder]) -> dict[str, SlurmJob] | None:
    """The runs' newest jobs by id, from one squeue for all of them; None if Slurm does not answer."""
    return ask_jobs(sorted({run.job.job_id for run in runs if run.job and run.job.cluster == "slurm"}))
