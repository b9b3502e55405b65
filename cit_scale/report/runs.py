"""The command ``cit-scale runs``: run folders as a table, as JSON, or as a page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cit_scale.errors import ConfigError
from cit_scale.run.folders import find_run
from cit_scale.run.show import (
    StatesOf,
    add_looking,
    list_runs,
    new_parser,
    reporting,
    show_run,
    states_in_folders,
)

EXAMPLES = (
    "cit-scale runs list         every run: its state, step, speed, accuracy and time left",
    "cit-scale runs --html       the same as a page, runs/index.html, with links to the runs' reports",
    "cit-scale runs show NAME    one run: starts, ends, checkpoints, results",
)


def main(argv: Sequence[str] | None = None) -> int:
    """``cit-scale runs``. Returns the exit code."""
    parser, add = new_parser(
        "cit-scale runs",
        EXAMPLES,
        "Show run folders, which are read and never written. On a cluster, python launchers/runs.py also asks Slurm, "
        "and cancels and resumes runs.",
    )
    add_html(add_looking(add))
    asked = parser.parse_args(with_list(argv))

    def run() -> int:
        if asked.command == "list":
            return list_or_write(asked, states_in_folders)
        return show_run(find_run(asked.runs_dir, asked.name), states_in_folders, as_json=asked.json)

    return reporting(run)


def with_list(argv: Sequence[str] | None) -> list[str]:
    """The arguments, None for those of the process, with the command ``list`` where --html stands in its place."""
    given = list(sys.argv[1:] if argv is None else argv)
    return ["list", *given] if given and given[0].split("=")[0] == "--html" else given


def add_html(listing: argparse.ArgumentParser) -> None:
    """Add the option --html to the command ``list``."""
    listing.add_argument(
        "--html", nargs="?", const="", metavar="FILE", help="write a page instead (default: index.html beside the runs)"
    )


def list_or_write(asked: argparse.Namespace, states_of: StatesOf) -> int:
    """Run the command ``list``, with or without --html. Returns the exit code."""
    if asked.html is not None and asked.json:
        raise ConfigError("--html writes a page and --json prints JSON; give one of them")
    if asked.html is None:
        return list_runs(asked.runs_dir, states_of, set_aside=asked.all, as_json=asked.json)
    from cit_scale.report.index import write_index

    print(write_index(asked.runs_dir, states_of, asked.html, set_aside=asked.all))
    return 0
