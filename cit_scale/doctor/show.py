"""The table of the doctor, what is wrong and what to do, and the same as JSON."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cit_scale.distributed.slurm_job import node_name
from cit_scale.doctor.examine import Examined, examine
from cit_scale.doctor.findings import Asked
from cit_scale.errors import UnfitNodeError
from cit_scale.files import write_text
from cit_scale.run.show import reporting

STYLES = {"ok": "green", "n/a": "dim", "warning": "yellow", "failed": "bold red"}


def run(arguments: argparse.Namespace) -> int:
    """Examine this machine and print what was found. Returns the exit code."""
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:  # as under nohup
            signal.signal(signum, _leave)
    return reporting(lambda: _run(arguments))


def _leave(signum: int, frame: object) -> None:
    """Leave as an exception does, so that the process of a check is ended and its files are removed."""
    raise SystemExit(128 + signum)


def _run(arguments: argparse.Namespace) -> int:
    examined = []
    for each in examine(Asked(arguments.quick, arguments.runs_dir)):
        examined.append(each)
        if sys.stderr.isatty():
            print(f"{each.finding.status:>7} {each.name}, {each.seconds:.1f} s", file=sys.stderr, flush=True)
    if arguments.json:
        print(json.dumps(as_record(examined, quick=arguments.quick), indent=2), flush=True)
    else:
        show(examined, quick=arguments.quick)
    return exit_code(each.finding.status for each in examined)


def write_record(folder: Path, runs_dir: Path, *, quick: bool) -> None:
    """Examine this machine and write what was found, under the node's name: after each check, as the next may hang."""
    examined: list[Examined] = []

    def write(*, is_whole: bool) -> None:
        record = {**as_record(examined, quick=quick), "whole": is_whole}
        write_text(folder / f"{node_name(os.environ)}.json", json.dumps(record, indent=2) + "\n")

    for each in examine(Asked(quick, runs_dir)):
        examined.append(each)
        write(is_whole=False)
    write(is_whole=True)


def exit_code(statuses: Iterable[str]) -> int:
    return UnfitNodeError.exit_code if "failed" in statuses else 0


def as_record(examined: Sequence[Examined], *, quick: bool) -> dict[str, Any]:
    """What scripts read, and what is compared between nodes. fit: as far as was looked."""
    checks: list[dict[str, Any]] = [
        {
            "name": each.name,
            "status": each.finding.status,
            "says": each.finding.says,
            "advice": each.finding.advice,
            "facts": dict(each.finding.facts),
            "figures": dict(each.finding.figures),
            "seconds": round(each.seconds, 2),
            "printed": each.printed,
        }
        for each in examined
    ]
    is_fit = exit_code(each["status"] for each in checks) == 0
    return {"host": socket.gethostname(), "quick": quick, "fit": is_fit, "checks": checks}


def show(examined: Sequence[Examined], *, quick: bool = False) -> None:
    """Print the table, and below it each check that failed or warns, with the way out."""
    console = Console(highlight=False)
    table = Table(title=f"{socket.gethostname()}, {sum(each.seconds for each in examined):.0f} s", title_justify="left")
    table.add_column("check")
    table.add_column("")
    table.add_column("s", justify="right")
    table.add_column("what was found", overflow="fold")
    for each in examined:
        status = each.finding.status
        table.add_row(each.name, Text(status, STYLES[status]), f"{each.seconds:.1f}", Text(each.finding.says))
    console.print(table)
    wrong = [each for each in examined if each.finding.advice]
    for each in wrong:
        console.print(f"{each.finding.status}: {each.name}: {each.finding.says}", markup=False, soft_wrap=True)
        console.print(f"  what to do: {each.finding.advice}", markup=False, soft_wrap=True)
        if each.printed:
            console.print("  its last lines:", markup=False)
            console.print("\n".join(f"    {line}" for line in each.printed.splitlines()), markup=False, soft_wrap=True)
    is_fit = exit_code(each.finding.status for each in examined) == 0
    fit = "nothing wrong in what --quick looks at" if quick else "fit to train"
    console.print(fit if is_fit else "not fit to train: see what failed above", soft_wrap=True)
