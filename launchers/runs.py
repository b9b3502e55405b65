"""List, show, follow, cancel and resume runs, from their run folders and from Slurm."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # Run by path, Python searches this file's folder for imports; the package lies one folder higher.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import os
import shlex
import subprocess
import time
from collections.abc import Sequence

from cit_scale.errors import ConfigError, MissingInputError, RefusedError
from cit_scale.report.runs import add_html, list_or_write, with_list
from cit_scale.run.folders import RunFolder, find_run
from cit_scale.run.show import add_looking, new_parser, reporting, say, show_run
from cit_scale.text import outlive_readers
from launchers.local_jobs import cancel_local_job
from launchers.slurm import cancel_slurm_job
from launchers.state import answer_for, state_now, state_of, states_of

SUBMIT = Path(__file__).resolve().with_name("submit.py")

EXAMPLES = (
    "python launchers/runs.py list            every run: its state, step, speed, accuracy and time left",
    "python launchers/runs.py show NAME       one of them: starts, ends, checkpoints, results",
    "python launchers/runs.py logs NAME -f    what its newest job prints",
    "python launchers/runs.py cancel NAME     it saves, leaves, and is not queued again",
    "python launchers/runs.py resume NAME     it is submitted once more, and goes on",
)
DESCRIPTION = (
    "List, show, follow, cancel and resume runs, from their run folders, which are read and never written, and from "
    "Slurm: one squeue answers for all runs. Without Slurm the folders alone tell the states."
)

ASK_SLURM_EVERY_S = 15
SAVING_S = 120
LAST_LOOK_S = 2  # tail polls every second on file systems without inotify

# ---------------------------------------------------------------------------------------------------------------------
# The commands. Each returns an exit code of cit_scale/errors.py.


def logs(run: RunFolder, *, last: int, keep_on: bool) -> int:
    """Print the last lines of the newest log. keep_on: go on until the run has ended."""
    path = run.log
    if path is None:
        raise MissingInputError(
            f"no log of {run.name} is known: it was not started by sbatch or launchers/submit.py, so its output went "
            "where it was started"
        )
    if not keep_on and not path.is_file():
        raise MissingInputError(f"{path}, the log of {run.name}, is not there; -f waits for it")
    say(f"{path}:")
    tail = ["tail", "-n", str(last), str(path)]
    if not keep_on:
        subprocess.run(tail)
        return 0
    with subprocess.Popen([*tail, "-F", f"--pid={os.getpid()}"]) as following:
        try:
            while not has_ended(run):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    following.wait(ASK_SLURM_EVERY_S)
                    return 0  # tail has ended: its reader is gone
            time.sleep(LAST_LOOK_S)
            say(f"{run.name} does not run any more")
        except KeyboardInterrupt:
            pass
        finally:
            following.terminate()
    return 0


def has_ended(run: RunFolder) -> bool:
    """Whether the run has ended by now; False while Slurm does not answer."""
    now = RunFolder(run.name, run.folder)
    slurm = answer_for([now])
    return slurm is not None and not state_of(now, slurm).is_active


def cancel(run: RunFolder, *, now: bool) -> int:
    """End the run's job for good. now: without time to save."""
    state, job = state_now(run), run.job
    if not state.is_active:
        print(f"{run.name} is {state}: there is nothing to cancel")
        return 0
    if job is not None and state.held_by == "slurm":
        cancel_slurm_job(job.job_id, now=now)
    elif job is not None and state.held_by == "submitit":
        cancel_local_job(job, now=now)
    else:
        raise ConfigError(f"{run.name} is {state}, and was not submitted: press Ctrl-C where it was started")
    waits = state.word in ("pending", "configuring", "requeued", "requeue_hold", "special_exit")
    if waits:
        done = "is out of the queue"
    elif state.word == "suspended":  # Slurm kills it as it stands
        done = "is ended without saving, because it was suspended"
    else:
        done = "is ended" if now else "is asked to save and leave"
    print(f"job {job.job_id} of {run.name} {done}, and does not come back")
    return 0


def resume(run: RunFolder) -> int:
    """Submit the run again with the options and in the folder of its last submission."""
    state, deadline = state_now(run), time.monotonic() + SAVING_S
    while state.word == "completing" and time.monotonic() < deadline:  # cancelled a moment ago and still saving
        time.sleep(1)
        state = state_now(RunFolder(run.name, run.folder))
    if state.is_active:
        raise RefusedError(f"{run.name} is {state}: it goes on as it is")
    if run.is_finished:
        print(f"{run.name} is finished")
        return 0
    job = next((job for job in reversed(run.jobs) if job.command is not None), None)
    if job is None or job.command is None:
        started = "the sbatch command" if run.job else "the command, such as deepspeed cit_scale/train.py,"
        raise ConfigError(f"{run.name} was not queued by launchers/submit.py; {started} that started it continues it")
    if job.cwd and not job.cwd.is_dir():
        raise MissingInputError(f"{job.cwd}, where {run.name} was submitted, is not there any more")
    there = f"cd {shlex.quote(str(job.cwd))} && " if job.cwd else ""
    print(f"{there}python {SUBMIT} {shlex.join(job.command)}", flush=True)
    return subprocess.run([sys.executable, SUBMIT, *job.command], cwd=job.cwd).returncode


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser, add = new_parser("runs.py", EXAMPLES, DESCRIPTION)
    add_html(add_looking(add))
    logs = add("logs", "the end of its newest log", takes_name=True)
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the run ends")
    logs.add_argument("-n", "--lines", type=int, default=50, metavar="N", help="begin N lines before the end; 50")
    cancel = add("cancel", "end its job for good; what was reached is saved", takes_name=True)
    cancel.add_argument("--now", action="store_true", help="do not wait for it to save")
    add("resume", "submit it once more, as launchers/submit.py did last", takes_name=True)
    return parser.parse_args(with_list(argv))


def main(argv: Sequence[str] | None = None) -> int:
    asked = parse_arguments(argv)
    return reporting(lambda: act(asked))


def act(asked: argparse.Namespace) -> int:
    if asked.command == "list":
        return list_or_write(asked, states_of)
    run = find_run(asked.runs_dir, asked.name)
    match asked.command:
        case "show":
            return show_run(run, states_of, as_json=asked.json)
        case "logs":
            return logs(run, last=asked.lines, keep_on=asked.follow)
        case "cancel":
            return cancel(run, now=asked.now)
        case _:
            return resume(run)


if __name__ == "__main__":
    outlive_readers(and_full_disks=False)  # the output is the result, but its reader may leave early
    raise SystemExit(main())
