"""What stands in the run folders, and what Slurm says of their jobs.

    python launchers/runs.py list               every run: its state, step, speed, accuracy and the time left
    python launchers/runs.py show NAME          one of them: starts, ends, checkpoints, results
    python launchers/runs.py logs NAME -f       what its newest job prints
    python launchers/runs.py cancel NAME        it saves, leaves, and is not queued again
    python launchers/runs.py resume NAME        it is submitted once more, and goes on

Run folders are read, never written. One squeue answers for all runs; where there is no Slurm, the folders do.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # Run by path, Python looks for imports beside this file; the package stands one folder higher.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table

from cit_scale.errors import ConfigError, MissingInputError, RefusedError, RunError, Stopped
from launchers.folders import Run, as_dict, dig, find_run, find_runs, is_number, number
from launchers.jobs import FAILED_STATES, SlurmJob, ask_slurm, cancel_local_job, cancel_slurm_job, find_controller

SUBMIT = Path(__file__).resolve().with_name("submit.py")

ASK_SLURM_EVERY_S = 15
SAVING_S = 120
LAST_LOOK_S = 2  # tail looks every second, where the file system does not tell it

# The settings that tell one run from another.
HIGHLIGHTS = (
    "student.name",
    "data.train",
    "data.image_size",
    "train.epochs",
    "train.global_batch_size",
    "optim.lr",
    "seed",
    "engine.name",
    "engine.ds_config",
    "engine.precision",
)


# ---------------------------------------------------------------------------------------------------------------------
# How a run is


@dataclass(frozen=True)
class State:
    """word: Slurm's, or one of running, finished, failed, stopped, not started.

    held_by: slurm, submitit or a process that somebody started, while it waits or trains.
    """

    word: str
    detail: str = ""
    held_by: str | None = None

    @property
    def is_active(self) -> bool:
        return self.held_by is not None

    def __str__(self) -> str:
        return f"{self.word} ({self.detail})" if self.detail else self.word


def state_of(run: Run, slurm: Mapping[str, SlurmJob]) -> State:
    """From its newest job, while that waits or is at work, otherwise from what stands in its folder."""
    job = run.job
    known = slurm.get(job.job_id) if job and job.cluster == "slurm" else None
    if known and known.is_active:
        return State(known.state.lower(), known.nodes or known.reason, "slurm")
    if job and job.cluster == "local" and find_controller(job):
        return State("running", f"process {job.job_id}", "submitit")
    if run.is_finished:
        return State("finished")
    if process := run.holder:
        return State("running", f"process {process}", "a process")
    if failed := exit_code_of_failure(run):
        return State("failed", f"exit code {failed}")
    if known and known.state in FAILED_STATES:
        return State("failed", known.state.lower())
    if not run.starts:
        return State("not started", known.state.lower() if known else "")
    steps = run.current.checkpoints
    return State("stopped", f"at step {steps[-1]}" if steps else "before its first checkpoint")


def exit_code_of_failure(run: Run) -> int | None:
    """What the newest start ended with, if attempts.jsonl has it, and it is neither well nor by request."""
    end = run.attempts[-1] if run.attempts else {}
    exit_code = end.get("exit_code")
    started_since = run.starts and run.starts[-1]["time"] > (number(end.get("time")) or 0.0)
    stopped = exit_code in (0, Stopped.exit_code, 128 + signal.SIGUSR1, 128 + signal.SIGUSR2)
    cancelled = str(end.get("decision")).startswith("cancelled")
    return None if started_since or stopped or cancelled else exit_code


def state_now(run: Run) -> State:
    """For those who act on it. Raises ConfigError if Slurm has to be asked and does not answer."""
    slurm = answer_for([run])
    if slurm is None:
        raise ConfigError(f"whether {run.name} runs cannot be told before Slurm answers; try again")
    return state_of(run, slurm)


def states_of(runs: Sequence[Run]) -> list[State]:
    """For those who look. Where Slurm does not answer, a line says so."""
    slurm = answer_for(runs)
    if slurm is None:
        say("Slurm does not answer: what is known is what stands in the run folders")
    return [state_of(run, slurm or {}) for run in runs]


def answer_for(runs: Sequence[Run]) -> dict[str, SlurmJob] | None:
    """What Slurm says of the runs' newest jobs, in one question; None if it does not answer."""
    return ask_slurm(sorted({run.job.job_id for run in runs if run.job and run.job.cluster == "slurm"}))


def summarize(run: Run, state: State) -> dict[str, Any]:
    """A row of ``list``. phase: the teacher that is trained, if one is; steps, speed, loss and time left are its."""
    phase, job = run.current, run.job
    return {
        "name": run.name,
        "job_id": job.job_id if job else None,
        "cluster": job.cluster if job else None,
        "state": state.word,
        "detail": state.detail,
        "phase": phase.name,
        "step": phase.step,
        "total_steps": phase.total_steps,
        "images_per_s": phase.images_per_s,
        "loss": phase.metrics.get("loss"),
        "top1": run.student.top1,
        "left_s": phase.left_s if state.is_active else None,
    }


def describe(run: Run, state: State) -> dict[str, Any]:
    """All that ``show`` tells."""
    phase = run.current
    models = [f"{name}: {dig(teacher, 'model')}" for name, teacher in as_dict(phase.config.get("teachers")).items()]
    config = {name: dig(phase.config, *name.split(".")) for name in HIGHLIGHTS}
    config["teachers"] = ", ".join(models) or None
    return {
        **summarize(run, state),
        "folder": str(run.folder),
        "log": str(run.log) if run.log else None,
        "goodput": phase.goodput,
        "bad_images": phase.bad_images,
        "bad_steps": phase.bad_steps,
        "config": {name: value for name, value in config.items() if value is not None},
        "starts": run.starts,
        "attempts": run.attempts,
        "unfit_nodes": run.unfit_nodes,
        "checkpoints": [
            {"phase": each.name, "step": step, "top1": each.scores.get(step)}
            for each in run.phases
            for step in each.checkpoints
        ],
        "results": run.student.results or None,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The commands. Each returns an exit code; cit_scale/errors.py has their list.


def list_runs(runs_dir: Path, *, set_aside: bool, as_json: bool) -> int:
    runs = find_runs(runs_dir, set_aside=set_aside)
    rows = [summarize(run, state) for run, state in zip(runs, states_of(runs), strict=True)]
    if as_json:
        print(json.dumps(rows, indent=2))
    elif rows:
        console().print(table_of(rows))
    else:
        print(f"no runs in {runs_dir}")
    return 0


def show(run: Run, *, as_json: bool) -> int:
    about = describe(run, *states_of([run]))
    if as_json:
        print(json.dumps(about, indent=2))
    else:
        console().print(*(table for table in tables_of(run, about) if table.row_count), sep="\n")
    return 0


def logs(run: Run, *, last: int, keep_on: bool) -> int:
    path = run.log
    if path is None:
        raise MissingInputError(
            f"no log of {run.name} is known of: it was not started by sbatch or launchers/submit.py, and what it "
            "prints stands where it was started"
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
                    return 0  # whoever reads this has seen enough
            time.sleep(LAST_LOOK_S)
            say(f"{run.name} does not run any more")
        except KeyboardInterrupt:
            pass
        finally:
            following.terminate()
    return 0


def has_ended(run: Run) -> bool:
    """As it is now. While Slurm does not answer, nothing has."""
    now = Run(run.name, run.folder)
    slurm = answer_for([now])
    return slurm is not None and not state_of(now, slurm).is_active


def cancel(run: Run, *, now: bool) -> int:
    state, job = state_now(run), run.job
    if not state.is_active:
        print(f"{run.name} is {state}: there is nothing to cancel")
        return 0
    if state.held_by == "slurm":
        cancel_slurm_job(job.job_id, now=now)
    elif state.held_by == "submitit":
        cancel_local_job(job, now=now)
    else:
        raise ConfigError(f"{run.name} is {state}, and was not submitted: press Ctrl-C where it was started")
    done = "is ended" if now else "is asked to save and leave"
    print(f"job {job.job_id} of {run.name} {done}, and does not come back")
    return 0


def resume(run: Run) -> int:
    state, deadline = state_now(run), time.monotonic() + SAVING_S
    while state.word == "completing" and time.monotonic() < deadline:  # cancelled a moment ago, and still saving
        time.sleep(1)
        state = state_now(Run(run.name, run.folder))
    if state.is_active:
        raise RefusedError(f"{run.name} is {state}: it goes on as it is")
    if run.is_finished:
        print(f"{run.name} is finished")
        return 0
    job = next((job for job in reversed(run.jobs) if job.command is not None), None)
    if job is None:
        started = "the sbatch command" if run.job else "the command, such as deepspeed cit_scale/train.py,"
        raise ConfigError(f"{run.name} was not queued by launchers/submit.py; {started} that started it continues it")
    if job.cwd and not job.cwd.is_dir():
        raise MissingInputError(f"{job.cwd}, where {run.name} was submitted, is not there any more")
    there = f"cd {shlex.quote(str(job.cwd))} && " if job.cwd else ""
    print(f"{there}python {SUBMIT} {shlex.join(job.command)}", flush=True)
    return subprocess.run([sys.executable, SUBMIT, *job.command], cwd=job.cwd).returncode


# ---------------------------------------------------------------------------------------------------------------------
# What is shown


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def console() -> Console:
    """Names are names: nothing in them is markup. In a file or a pipe every row has one line."""
    width = None if sys.stdout.isatty() else 240
    return Console(markup=False, highlight=False, emoji=False, width=width)


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    cells = [cells_of(row) for row in rows]
    names = list(cells[0])
    return new_table(names, (row.values() for row in cells), right=names[3:])


def cells_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """By the names of their columns."""
    return {
        "run": row["name"],
        "job": row["job_id"],
        "state": State(row["state"], row["detail"]),
        "step": steps_of(row),
        "images/s": as_figure(row["images_per_s"], ".0f"),
        "loss": as_figure(row["loss"], ".4f"),
        "top-1 %": as_figure(row["top1"], ".2f"),
        "left": as_time(row["left_s"]),
    }


def tables_of(run: Run, about: Mapping[str, Any]) -> Iterator[Table]:
    facts = {
        **cells_of(about),
        "goodput": as_figure(about["goodput"], ".1%"),
        "bad images": about["bad_images"],
        "bad steps": about["bad_steps"],
        "folder": about["folder"],
        "log": about["log"],
        **about["config"],
    }
    yield new_table(("", ""), ((name, value) for name, value in facts.items() if value not in (None, "")))
    starts = (
        (
            as_date(start["time"]),
            start["phase"] or "student",
            start.get("step"),
            start.get("world_size"),
            dig(start, "slurm", "job_id"),
            dig(start, "slurm", "restart"),
            dig(start, "slurm", "nodes") or start.get("host"),
            start.get("commit"),
        )
        for start in run.starts
    )
    yield new_table(("started", "what", "at step", "ranks", "job", "restart", "where", "commit"), starts)
    ends = (
        (as_date(end.get("time")), *(end.get(name) for name in ("job_id", "restart", "exit_code", "decision")))
        for end in run.attempts
    )
    yield new_table(("ended", "job", "restart", "exit code", "what became of it"), ends)
    last_words = run.attempts[-1].get("last_lines") if run.attempts else None
    yield new_table(("the last lines then",), ((line,) for line in last_words or ()))
    yield new_table(("unfit node", "why"), run.unfit_nodes.items())
    saved = ((each.name or "student", ", ".join(map(str, each.checkpoints))) for each in run.phases if each.checkpoints)
    yield new_table(("checkpoints of", "after steps"), saved)
    names = ("network", "top-1 %", "top-5 %")
    yield new_table(names, results_rows(run.student.results), right=names[1:])


def results_rows(results: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name, teacher in as_dict(results.get("teachers")).items():
        top1, top5 = dig(teacher, "top1"), dig(teacher, "top5")
        yield f"teacher {name} ({dig(teacher, 'model')})", as_figure(top1, ".2f"), as_figure(top5, ".2f")
    for student, accuracy in as_dict(results.get("accuracy")).items():
        for head, top1 in as_dict(dig(accuracy, "top1")).items():
            yield f"{student}, {head}", as_figure(top1, ".2f"), as_figure(dig(accuracy, "top5", head), ".2f")


def new_table(names: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[str] = ()) -> Table:
    table = Table(show_header=any(names), box=rich.box.SIMPLE, show_edge=False, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(as_cell, row))
    return table


def as_cell(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def steps_of(row: Mapping[str, Any]) -> str:
    if row["step"] is None:
        return row["phase"]
    return f"{row['phase']} {row['step']}/{'?' if row['total_steps'] is None else row['total_steps']}".strip()


def as_figure(value: Any, form: str) -> str:
    """A number in this form; what else may stand there, such as the text nan, as it is."""
    return format(value, form) if is_number(value) else as_cell(value)


def as_time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes = round(seconds / 60)
    hours, days = minutes // 60, minutes // 1440
    if days:
        return f"{days} d {hours % 24} h"
    return f"{hours} h {minutes % 60:02d} min" if hours else f"{minutes} min"


def as_date(seconds: Any) -> str:
    return "" if not number(seconds) else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


# ---------------------------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="runs.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--runs-dir", "--runs_dir", type=Path, default=Path("runs"), help="where the run folders stand; runs"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    added = {
        name: commands.add_parser(name, help=text, description=text, parents=[shared], allow_abbrev=False)
        for name, text in {
            "list": "every run in a row",
            "show": "all that is known of one run",
            "logs": "the end of its newest log",
            "cancel": "end its job for good; what was reached is saved",
            "resume": "submit it once more, as launchers/submit.py did last",
        }.items()
    }
    for name in ("show", "logs", "cancel", "resume"):
        added[name].add_argument("name", metavar="NAME", help="of a run, or the path of its folder")
    for name in ("list", "show"):
        added[name].add_argument("--json", action="store_true", help="for programs")
    added["list"].add_argument("--all", action="store_true", help="also runs that --fresh has set aside")
    added["logs"].add_argument("-f", "--follow", action="store_true", help="go on until the run ends")
    added["logs"].add_argument(
        "-n", "--lines", type=int, default=50, metavar="N", help="begin N lines before the end; 50"
    )
    added["cancel"].add_argument("--now", action="store_true", help="do not wait for it to save")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    asked = parse_arguments(argv)
    try:
        if asked.command == "list":
            return list_runs(asked.runs_dir, set_aside=asked.all, as_json=asked.json)
        run = find_run(asked.runs_dir, asked.name)
        match asked.command:
            case "show":
                return show(run, as_json=asked.json)
            case "logs":
                return logs(run, last=asked.lines, keep_on=asked.follow)
            case "cancel":
                return cancel(run, now=asked.now)
            case _:
                return resume(run)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except BrokenPipeError:  # whoever reads this has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    raise SystemExit(main())
