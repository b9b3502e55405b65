"""The command ``cit-scale doctor``: entry point and options. As in `cit_scale.inference.commands`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cit_scale.config import RunConfig
from cit_scale.text import ExampleParser


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``cit-scale doctor``. argv: the arguments after the command's name; None: those of the process.

    Returns 0, or 8 of ``errors`` where something is wrong with this machine.
    """
    arguments = doctor_parser().parse_args(argv)
    from cit_scale.doctor.show import run

    return run(arguments)


def doctor_parser() -> argparse.ArgumentParser:
    """Return the parser of ``cit-scale doctor``."""
    parser = ExampleParser(
        prog="cit-scale doctor",
        examples=(
            "cit-scale doctor              a minute without a GPU",
            "cit-scale doctor --quick      seconds: what is installed, seen and writable",
            "cit-scale doctor --json > machine.json",
        ),
        description="Tries on this machine what training needs, and says what is wrong and what to do. It writes "
        "nothing but a file in the folder of runs, which it removes, and what is built and kept for later runs.",
        epilog="exit status: 0 fit, also with warnings, 2 wrong option, 8 something is wrong. On a cluster: python "
        "launchers/submit.py --doctor --nodes N",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="only what answers in seconds")
    add("--json", action="store_true", help="print JSON")
    default = Path(RunConfig.runs_dir)
    add("--runs_dir", type=Path, metavar="DIR", default=default, help=f"where runs are to lie; default {default}")
    return parser
