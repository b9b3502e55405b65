"""Decide what becomes of a Slurm job whose ranks have ended: done, given up, or requeued.

slurm/env.sh runs this script at the end of each batch script, on the job's first node:

    python launchers/requeue.py --exit-code 75 --max-restarts 3 -- ARGUMENTS OF train.py

- Stopped on request (a time limit ahead, a preemption): requeued, however often, but given up at the tenth stop
  without one more step.
- A failure that another try may cure: requeued, at most ``--max-restarts`` times in a row without a new checkpoint.
  A node that failed the check at the start is excluded from then on.
- A failure that would happen again (a wrong setting, missing data, divergence, a full disk, ranks that srun refuses to
  start): given up.
- Cancelled by a user: stays cancelled.

Each end is a line of ``attempts.jsonl`` in the run folder; the line of a failure holds the last lines of the log.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # Run by path, Python searches this file's folder for imports; the package lies one folder higher.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import glob
import json
import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum

from cit_scale import cli
from cit_scale.distributed import slurm_job
from cit_scale.errors import (
    BadDataError,
    CannotWriteError,
    ConfigError,
    DivergedError,
    MissingInputError,
    RefusedError,
    Stopped,
)
from cit_scale.run.folders import parse_lines, read_text
from cit_scale.run_folder import ATTEMPTS, CHECKPOINTS, saved_steps, unfit_nodes
from cit_scale.text import outlive_readers
from launchers.slurm import (
    BUSY,
    PAUSES_S,
    SlurmError,
    ask_job_record,
    exclude_nodes,
    job_id_of,
    parse_seconds,
    requeue_job,
)

MAX_STOPS = 10
LAST_LINES = 100  # of each log; a traceback through torch takes forty

DONE = 0
# Exit codes after which the same command would end the same way until a user changes something.
HOPELESS = {
    error.exit_code
    for error in (ConfigError, MissingInputError, BadDataError, DivergedError, CannotWriteError, RefusedError)
}
# Exit codes of a stop on request. A rank that is signalled before it has installed its handlers dies of the signal; it
# has trained no step by then.
STOPPED = {Stopped.exit_code, 128 + signal.SIGUSR1, 128 + signal.SIGUSR2}

# What srun says where it starts no rank because of what it was asked for, not because of the state of things.
REFUSED = re.compile(
    r"^srun: (?:error: (?:Unable to create step for job|Invalid |No directives to start)|fatal:|unrecognized option|"
    r"invalid option).*",
    re.MULTILINE,
)
PASSING = re.compile(
    rf"{BUSY.pattern}|completing or completed|Required node not available|Requested nodes are busy|credential|"
    "Unspecified error|Zero Bytes|backup",
    re.IGNORECASE,
)


# States of a job whose end is its script's.
ON_ITS_NODES = {"RUNNING", "STOPPED", "SIGNALING", "RESIZING", "STAGE_OUT"}


@dataclass(frozen=True)
class Attempt:
    """One end of a job: a line of attempts.jsonl.

    steps: from ``steps_saved``. fate: name of a Fate. unfit: from ``unfit_nodes``. decision: from ``decide``.
    """

    time: float
    job_id: str
    restart: int
    exit_code: int
    steps: int
    fate: str
    nodes: list[str]
    unfit: dict[str, str]
    decision: str
    last_lines: list[str] = field(default_factory=list)


class Fate(Enum):
    """What Slurm will do with the job whose batch script is about to end."""

    LEAVES = "it ends with its script"
    LIMIT = "its time is up"
    REQUEUED = "it is in the queue again"
    PREEMPTED = "another job gets its nodes, and Slurm does not requeue it by itself"
    CANCELLED = "somebody has cancelled it"
    UNKNOWN = "Slurm does not answer"


def read_fate(job: Mapping[str, str], restart: int) -> Fate:
    """Read the fate from the job's record, taken while the batch script still runs. restart: number of this start.

    Slurm sets the state to COMPLETING for a time limit, a preemption, a requeue and a cancellation alike, so the count
    of restarts and the times tell these apart.
    """
    if int(job["Restarts"]) > restart:
        return Fate.REQUEUED
    if job["JobState"] in ON_ITS_NODES:
        return Fate.LEAVES
    # The time of an earlier preemption may still be there. "None" and "Unknown" are no times.
    preempted, started = job.get("PreemptTime", "None"), job.get("StartTime", "Unknown")
    if preempted[0].isdigit() and started[0].isdigit() and preempted >= started:
        return Fate.PREEMPTED
    limit_s, run_s = parse_seconds(job["TimeLimit"]), parse_seconds(job["RunTime"])
    return Fate.LIMIT if limit_s is not None and run_s is not None and run_s >= limit_s else Fate.CANCELLED


def decide(
    exit_code: int,
    fate: Fate,
    steps: int,
    earlier: Sequence[tuple[int, int]],
    max_restarts: int,
    refused: str | None = None,
) -> tuple[bool, str]:
    """Whether to requeue the job, and why.

    steps: from ``steps_saved``. earlier: from ``earlier_ends``. refused: from ``find_refusal``.
    """
    if exit_code == DONE:
        return False, "done"
    if fate is Fate.CANCELLED:
        return False, "cancelled; the same command continues"
    if fate is Fate.REQUEUED:
        return True, "requeued by Slurm"
    if fate is Fate.PREEMPTED:
        return True, "preempted, goes on as soon as Slurm has nodes for it"
    here = [code for code, steps_then in earlier if steps_then == steps]
    if exit_code in STOPPED:
        stops = 1 + sum(code in STOPPED for code in here)
        if stops >= MAX_STOPS:
            return (
                False,
                f"stopped {stops} times without one more step: given up; is the signal earlier than the start?",
            )
        return True, "stopped on request, goes on as soon as Slurm has nodes for it"
    if exit_code in HOPELESS:
        return False, f"exit code {exit_code}: another try would end the same way"
    if refused is not None:
        return False, f"no rank was started, and another try would end the same way: {refused}"
    # Only failures at the same number of steps count: a job that makes progress may fail any number of times.
    failures = 1 + sum(has_failed(code) for code in here)
    count = f"exit code {exit_code}, failure {failures} in a row without progress, of at most {max_restarts}"
    if failures > max_restarts:
        return False, f"{count}: given up; the same command tries again"
    return True, f"{count}: tries again"


def has_failed(exit_code: int) -> bool:
    """Whether the ranks ended neither well nor on request."""
    return exit_code != DONE and exit_code not in STOPPED


def steps_saved(run_dir: Path) -> int:
    """Sum of the newest checkpoints' steps over a run and its teachers' runs. It grows with any progress."""
    return sum(max(saved_steps(folder), default=0) for folder in run_dir.rglob(CHECKPOINTS))


def earlier_ends(run_dir: Path, job_id: str) -> list[tuple[int, int]]:
    """(exit code, steps) of the job's earlier ends, in order, without those that Slurm caused by taking its nodes."""
    lines = [line for line in parse_lines(read_text(run_dir / ATTEMPTS)) if line.get("job_id") == job_id]
    # A rank killed by a preemption does not count as a failure.
    own = [line for line in lines if line.get("fate") not in (Fate.REQUEUED.name, Fate.PREEMPTED.name)]
    ends = [(line.get("exit_code"), line.get("steps", 0)) for line in own]
    return [(code, steps) for code, steps in ends if isinstance(code, int)]


def find_refusal(log: Path, begin: int) -> str | None:
    """Srun's line if it refused to start the ranks. begin: where in the batch script's log this start's lines begin."""
    try:
        with log.open("rb") as file:
            file.seek(begin)
            said = file.read().decode(errors="replace")
    except OSError:
        return None
    found = (match[0] for match in REFUSED.finditer(said))
    return next((line for line in found if not PASSING.search(line)), None)


def last_lines(log: Path) -> list[str]:
    """The end of a batch script's log; for a job of submitit the ends of all ranks' logs, in order of rank."""
    logs = log.parent.glob(glob.escape(log.name).replace("_0_log", "_*_log"))
    by_rank = sorted(logs, key=lambda path: (len(path.name), path.name))
    return [line for path in by_rank for line in read_text(path).splitlines()[-LAST_LINES:]]


def say(job_id: str, message: str) -> None:
    """Print a line to the job's log."""
    print(f"job {job_id}: {message}", flush=True)


def find_run_dir(train_argv: Sequence[str]) -> Path | None:
    """The run folder; None for arguments that train.py refuses.

    A recipe on a disk that fails is read again for a minute. Raises the last OSError.
    """
    pauses = iter(PAUSES_S)
    while True:
        try:
            return cli.parse_arguments(train_argv).config.run_dir
        except (ConfigError, SystemExit):
            return None
        except OSError:
            pause_s = next(pauses, None)
            if pause_s is None:
                raise
            time.sleep(pause_s)


def main(argv: Sequence[str] | None = None, env: Mapping[str, str] = os.environ) -> int:
    """Record how the ranks ended; requeue the job or not. Returns 0, or 1 where Slurm refused or did not answer."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--exit-code", type=int, required=True, help="exit code of srun")
    parser.add_argument("--max-restarts", type=int, default=3, help="failures in a row without progress")
    parser.add_argument("train", nargs="*", metavar="ARGUMENT", help="the arguments of train.py, after --")
    asked = parser.parse_args(argv)
    job_id, restart = slurm_job.job_id(env), slurm_job.restart_count(env)
    if job_id is None:
        parser.error("SLURM_JOB_ID is not set; slurm/env.sh runs this command at the end of a Slurm job")
    run_dir = None
    try:
        run_dir = find_run_dir(asked.train)
        if run_dir is None:  # the ranks have said why
            return 0
    except OSError as error:
        say(job_id, f"the recipe cannot be read, so the run folder is not known: {error}")

    job, fate = {}, Fate.UNKNOWN
    try:
        job = ask_job_record(job_id)
        job_id = job_id_of(job)  # where env.sh was not told it, the number of an array's first task is the array's
        if "CIT_RESTARTS" not in env and job["JobState"] in ON_ITS_NODES:  # SLURM_RESTART_COUNT may be another job's
            restart = int(job["Restarts"])
        fate = read_fate(job, restart)
    except SlurmError as error:
        say(job_id, str(error))
    except ValueError as error:  # after a jump of the clock Slurm prints RunTime=INVALID
        say(job_id, f"scontrol show job {job_id} cannot be read: {error}")
    unfit, steps = {}, 0
    # Where the run folder cannot be read or written, assume the worst: every earlier start ended like this one, without
    # progress.
    worst = earlier = [(asked.exit_code, steps)] * restart
    try:
        if run_dir is not None:
            unfit, steps, earlier = unfit_nodes(run_dir, job_id), steps_saved(run_dir), earlier_ends(run_dir, job_id)
    except OSError as error:  # the disk that ended the ranks may fail here, too
        say(job_id, f"{run_dir} cannot be read: {error}")
    log = Path(env["CIT_LOG"]) if has_failed(asked.exit_code) and "CIT_LOG" in env else None
    refused = find_refusal(log, int(env.get("CIT_LOG_BEGIN", 0))) if log else None
    again, reason = decide(asked.exit_code, fate, steps, earlier, asked.max_restarts, refused)
    attempt = Attempt(
        time=time.time(),
        job_id=job_id,
        restart=restart,
        exit_code=asked.exit_code,
        steps=steps,
        fate=fate.name,
        nodes=env.get("CIT_HOSTS", "").split(),
        unfit=unfit,
        decision=reason,
        last_lines=last_lines(log) if log else [],
    )
    if run_dir is not None:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            with (run_dir / ATTEMPTS).open("a") as file:
                file.write(json.dumps(asdict(attempt)) + "\n")
        except OSError as error:
            say(job_id, f"{run_dir / ATTEMPTS} cannot be written: {error}")
            again, reason = decide(asked.exit_code, fate, 0, worst, asked.max_restarts, refused)
    say(job_id, reason)
    if not again:
        return 0
    try:
        if fate is not Fate.REQUEUED:
            requeue_job(job_id)  # from now on Slurm may end this process with the job
    except SlurmError as error:
        say(job_id, f"it ends here, and the same command continues: {error}")
        return 1
    try:
        if newly := exclude_nodes(job_id, job, list(unfit)):
            say(job_id, f"left out from now on: {', '.join(newly)}")
    except SlurmError as error:
        say(job_id, f"unfit nodes are not left out: {error}")
        return 1
    return 0


if __name__ == "__main__":
    outlive_readers()  # a log on a full disk must not keep the job from being requeued
    raise SystemExit(main())
