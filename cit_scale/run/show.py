"""The commands ``runs list`` and ``runs show``: print all runs as a table, or one run in detail; as text or JSON.

Run folders are read, never written. This module does not call Slurm: launchers/runs.py does, and passes the states of
its jobs through ``StatesOf``.
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
from cit_scale.errors import RunError, Stopped, error_line, exit_code_of
from cit_scale.run.folders import RunFolder, as_dict, dig, find_runs, is_number, number
from cit_scale.settings import listed_settings
from cit_scale.text import ExampleParser

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

AddCommand = Callable[..., argparse.ArgumentParser]


@dataclass(frozen=True)
class State:
    """State of a run.

    word: a job state of Slurm in lower case, or one of running, finished, failed, stopped, not started.
    held_by: what runs the job while it waits or trains: "slurm", "submitit" or "a process"; None if nothing does.
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
"""Returns the state of each run, in the order given."""


def state_in_folder(run: RunFolder) -> State:
    """State of a run according to its folder alone. A job that waits in Slurm's queue is not visible there."""
    # The order matters: attempts.jsonl still has the failure when the run trains again.
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
    """Exit code of the newest start if it failed; None if it ended well, was stopped or cancelled, or is unknown."""
    end = run.attempts[-1] if run.attempts else {}
    exit_code = end.get("exit_code")
    # If a start is newer than the last line of attempts.jsonl, that line is not about it.
    started_since = run.starts and run.starts[-1]["time"] > (number(end.get("time")) or 0.0)
    # 128 + signal: a signal that arrived before the trainer was imported ended the process.
    stopped = exit_code in (0, Stopped.exit_code, 128 + signal.SIGUSR1, 128 + signal.SIGUSR2)
    cancelled = str(end.get("decision")).startswith("cancelled")
    return None if started_since or stopped or cancelled else exit_code


def summarize(run: RunFolder, state: State) -> dict[str, Any]:
    """Returns a row of ``runs list``.

    phase: name of the teacher that is being trained; empty for the student. step, total_steps, images_per_s, loss and
    left_s (seconds) are those of the phase; top1 (percent) is the student's.
    """
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
    """Returns everything that ``runs show`` prints, as JSON values."""
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
# Commands


def list_runs(runs_dir: Path, states_of: StatesOf, *, set_aside: bool, as_json: bool) -> int:
    """Print a row for each run. set_aside: include runs that --fresh has renamed. Returns the exit code."""
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
    """Print everything known about one run. Returns the exit code."""
    about = run_record(run, *states_of([run]))
    if as_json:
        print(json.dumps(about, indent=2))
    else:
        console().print(*(table for table in tables_of(run, about) if table.row_count), sep="\n")
    return 0


def states_in_folders(runs: Sequence[RunFolder]) -> list[State]:
    """Returns the state of each run without calling Slurm. Prints which jobs may be waiting in its queue."""
    states = [state_in_folder(run) for run in runs]
    waiting = [
        run.job.job_id
        for run, state in zip(runs, states, strict=True)
        if run.job and run.job.cluster == "slurm" and state.word in ("not started", "stopped")
    ]
    if waiting:
        say(f"jobs {', '.join(waiting)} may be waiting in Slurm's queue: python launchers/runs.py shows their state")
    return states


def new_parser(prog: str, examples: Sequence[str], description: str) -> tuple[argparse.ArgumentParser, AddCommand]:
    """Returns a parser of commands on run folders, and a function that adds a command to the parser."""
    parser = ExampleParser(prog=prog, examples=examples, description=description)
    # Options of all commands; as a parent parser's they are given after the name of the command.
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--runs-dir", "--runs_dir", type=Path, default=Path("runs"), help="folder of all runs (default: runs)"
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=argparse.ArgumentParser
    )

    def add(name: str, text: str, *, takes_name: bool) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, parents=[shared], allow_abbrev=False)
        if takes_name:
            command.add_argument("name", metavar="NAME", help="name of a run, or path of its folder")
        return command

    return parser, add


def add_looking(add: AddCommand) -> argparse.ArgumentParser:
    """Add the commands ``list`` and ``show``, which only read. Returns the parser of ``list``."""
    listing = add("list", "print a row for each run", takes_name=False)
    listing.add_argument("--all", action="store_true", help="include runs that --fresh has set aside")
    showing = add("show", "print everything known about one run", takes_name=True)
    for command in (listing, showing):
        command.add_argument("--json", action="store_true", help="print JSON")
    return listing


def reporting(command: Callable[[], int]) -> int:
    """Call ``command`` and flush its output. Returns the exit code; an error is printed as one line."""
    try:
        exit_code = command()
        # Flush here: on a full disk the output is lost, and the command must not return 0.
        sys.stdout.flush()
    except (RunError, OSError) as error:
        print(f"error: {error_line(error)}", file=sys.stderr, flush=True)
        return exit_code_of(error)
    return exit_code


# ---------------------------------------------------------------------------------------------------------------------
# Printing


def say(message: str) -> None:
    """Print to stderr: stdout is for the result, which may be JSON."""
    print(message, file=sys.stderr, flush=True)


def console() -> Console:
    """A console that prints names as they are, without markup, and one line per row if stdout is a file or a pipe."""
    from rich.console import Console  # imported here because --help must answer fast

    # rich takes 80 columns where there is no terminal, and would fold the rows.
    width = None if sys.stdout.isatty() else 240
    return Console(markup=False, highlight=False, emoji=False, width=width)


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The table of ``runs list``. rows: from ``summarize``."""
    cells = [cells_of(row) for row in rows]
    names = list(cells[0])
    # The first three columns hold text: run, job, state.
    return new_table(names, (row.values() for row in cells), right=names[3:])


def cells_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Column name to cell, for a row from ``summarize``."""
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
    """The tables of ``runs show``; some may have no rows. about: from ``run_record``."""
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
    # ``get``: env.json and attempts.jsonl of an older version may lack keys.
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
    yield new_table(("started", "phase", "at step", "ranks", "job", "restart", "nodes", "commit"), starts)
    ends = (
        (as_date(end.get("time")), *(end.get(name) for name in ("job_id", "restart", "exit_code", "decision")))
        for end in run.attempts
    )
    yield new_table(("ended", "job", "restart", "exit code", "decision"), ends)
    last_words = run.attempts[-1].get("last_lines") if run.attempts else None
    yield new_table(
        ("last lines of the log",), ((line,) for line in (last_words if isinstance(last_words, list) else ()))
    )
    yield new_table(("unfit node", "reason"), run.unfit_nodes.items())
    saved = ((each.name or "student", ", ".join(map(str, each.checkpoints))) for each in run.phases if each.checkpoints)
    yield new_table(("checkpoints of", "after steps"), saved)
    names = ("network", "top-1 %", "top-5 %")
    yield new_table(names, results_rows(run.student.results), right=names[1:])


def results_rows(results: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(network, top-1 %, top-5 %) of each teacher and each head of the student. results: contents of results.json."""
    for name, teacher in as_dict(results.get("teachers")).items():
        top1, top5 = dig(teacher, "top1"), dig(teacher, "top5")
        yield f"teacher {name} ({dig(teacher, 'model')})", as_figure(top1, ".2f"), as_figure(top5, ".2f")
    for student, accuracy in as_dict(results.get("accuracy")).items():
        for head, top1 in as_dict(dig(accuracy, "top1")).items():
            yield f"{student}, {head}", as_figure(top1, ".2f"), as_figure(dig(accuracy, "top5", head), ".2f")


def new_table(names: Sequence[str], rows: Iterable[Iterable[Any]], right: Sequence[str] = ()) -> Table:
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
    """Format a number with ``form``; any other value, such as the text "nan", stays as it is."""
    return format(value, form) if is_number(value) else as_cell(value)


def as_time(seconds: float | None) -> str:
    """A duration as "2 d 3 h", "3 h 05 min" or "5 min"; empty for None."""
    if seconds is None:
        return ""
    minutes = round(seconds / 60)
    hours, days = minutes // 60, minutes // 1440
    if days:
        return f"{days} d {hours % 24} h"
    return f"{hours} h {minutes % 60:02d} min" if hours else f"{minutes} min"


def as_date(seconds: Any) -> str:
    """Seconds since 1970 as local date and time."""
    try:
        return "" if not number(seconds) else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):  # a number outside the range of dates
        return as_cell(seconds)
