"""What stands in the run folders, for a person or a program to read: every run in a row, or all of one.

Run folders are read, never written. Whoever asks Slurm, too, says what it knows by the states that are given here.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cit_scale.config import RunConfig
from cit_scale.errors import RunError, Stopped, exit_code_of
from cit_scale.run.folders import RunFolder, as_dict, dig, find_run, find_runs, is_number, number
from cit_scale.settings import listed_settings
from cit_scale.text import ExampleParser

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

EXAMPLES = (
    "cit-scale runs list         every run: its state, step, speed, accuracy and time left",
    "cit-scale runs show NAME    one of them: starts, ends, checkpoints, results",
)

AddCommand = Callable[..., argparse.ArgumentParser]


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


StatesOf = Callable[[Sequence[RunFolder]], list[State]]
"""Says how each of some runs is."""


def state_in_folder(run: RunFolder) -> State:
    """As far as the run's folder tells, which knows nothing of a job that waits."""
    if run.is_finished:
        return State("finished")
    if process := run.holder:
        return State("running", f"process {process}", "a process")
    if failed := exit_code_of_failure(run):
        return State("failed", f"exit code {failed}")
    if not run.starts:
        return State("not started")
    steps = run.current.checkpoints
    return State("stopped", f"at step {steps[-1]}" if steps else "before its first checkpoint")


def exit_code_of_failure(run: RunFolder) -> int | None:
    """What the newest start ended with, if attempts.jsonl has it, and it is neither well nor by request."""
    end = run.attempts[-1] if run.attempts else {}
    exit_code = end.get("exit_code")
    started_since = run.starts and run.starts[-1]["time"] > (number(end.get("time")) or 0.0)
    stopped = exit_code in (0, Stopped.exit_code, 128 + signal.SIGUSR1, 128 + signal.SIGUSR2)
    cancelled = str(end.get("decision")).startswith("cancelled")
    return None if started_since or stopped or cancelled else exit_code


def summarize(run: RunFolder, state: State) -> dict[str, Any]:
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


def run_record(run: RunFolder, state: State) -> dict[str, Any]:
    """All that ``show`` tells."""
    phase = run.current
    models = [f"{name}: {dig(teacher, 'model')}" for name, teacher in as_dict(phase.config.get("teachers")).items()]
    config = {name: dig(phase.config, *name.split(".")) for name in listed_settings(RunConfig)}
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
# The commands


def list_runs(runs_dir: Path, states_of: StatesOf, *, set_aside: bool, as_json: bool) -> int:
    """Print a row for each run. set_aside: also those that --fresh has set aside. Returns the exit code."""
    runs = find_runs(runs_dir, set_aside=set_aside)
    rows = [summarize(run, state) for run, state in zip(runs, states_of(runs), strict=True)]
    if as_json:
        print(json.dumps(rows, indent=2))
    elif rows:
        console().print(table_of(rows))
    else:
        print(f"no runs in {runs_dir}")
    return 0


def show_run(run: RunFolder, states_of: StatesOf, *, as_json: bool) -> int:
    """Print all that is known of one run. Returns the exit code."""
    about = run_record(run, *states_of([run]))
    if as_json:
        print(json.dumps(about, indent=2))
    else:
        console().print(*(table for table in tables_of(run, about) if table.row_count), sep="\n")
    return 0


def states_in_folders(runs: Sequence[RunFolder]) -> list[State]:
    """Of each run. A line names the jobs that only Slurm could tell of."""
    states = [state_in_folder(run) for run in runs]
    waiting = [
        run.job.job_id
        for run, state in zip(runs, states, strict=True)
        if run.job and run.job.cluster == "slurm" and state.word in ("not started", "stopped")
    ]
    if waiting:
        say(f"Slurm is not asked for jobs {', '.join(waiting)}, which may wait: python launchers/runs.py does that")
    return states


def new_parser(prog: str, examples: Sequence[str], description: str) -> tuple[argparse.ArgumentParser, AddCommand]:
    """A parser of commands on run folders, and what adds one to it."""
    parser = ExampleParser(prog=prog, examples=examples, description=description)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--runs-dir", "--runs_dir", type=Path, default=Path("runs"), help="where the run folders stand; runs"
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=argparse.ArgumentParser
    )

    def add(name: str, text: str, *, takes_name: bool) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, parents=[shared], allow_abbrev=False)
        if takes_name:
            command.add_argument("name", metavar="NAME", help="of a run, or the path of its folder")
        return command

    return parser, add


def add_looking(add: AddCommand) -> None:
    """The two commands that only look."""
    listing = add("list", "every run in a row", takes_name=False)
    listing.add_argument("--all", action="store_true", help="also runs that --fresh has set aside")
    showing = add("show", "all that is known of one run", takes_name=True)
    for command in (listing, showing):
        command.add_argument("--json", action="store_true", help="for programs")


def main(argv: Sequence[str] | None = None) -> int:
    parser, add = new_parser(
        "cit-scale runs",
        EXAMPLES,
        "What stands in run folders, which are read and never written. On a cluster, python launchers/runs.py asks "
        "Slurm, too, and cancels and resumes.",
    )
    add_looking(add)
    asked = parser.parse_args(argv)

    def run() -> int:
        if asked.command == "list":
            return list_runs(asked.runs_dir, states_in_folders, set_aside=asked.all, as_json=asked.json)
        return show_run(find_run(asked.runs_dir, asked.name), states_in_folders, as_json=asked.json)

    return reporting(run)


def reporting(command: Callable[[], int]) -> int:
    """Call it, and see that what it prints arrives. Returns its exit code, or that of its error, which is one line."""
    try:
        exit_code = command()
        sys.stdout.flush()
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return exit_code_of(error)
    return exit_code


# ---------------------------------------------------------------------------------------------------------------------
# What is shown


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def console() -> Console:
    """Names are names: nothing in them is markup. In a file or a pipe every row has one line."""
    from rich.console import Console  # here: --help does without it

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


def tables_of(run: RunFolder, about: Mapping[str, Any]) -> Iterator[Table]:
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
    yield new_table(
        ("the last lines then",), ((line,) for line in (last_words if isinstance(last_words, list) else ()))
    )
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
    import rich.box
    from rich.table import Table

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
    try:
        return "" if not number(seconds) else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):  # a number that is no time
        return as_cell(seconds)
