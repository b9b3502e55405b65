"""The command ``cit-scale report``: entry point, options and defaults. As in `cit_scale.inference.commands`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cit_scale.inference.commands import add_threads
from cit_scale.text import ExampleParser, positive


def report(argv: Sequence[str] | None = None) -> int:
    """Run ``cit-scale report``. argv: the arguments after the command's name; None: those of the process.

    Returns an exit code of ``errors``.
    """
    arguments = report_parser().parse_args(argv)
    from cit_scale.report.write import run

    return run(arguments)


def report_parser() -> argparse.ArgumentParser:
    """Return the parser of ``cit-scale report``."""
    parser = ExampleParser(
        prog="cit-scale report",
        examples=(
            "cit-scale report runs/pets                    runs/pets/report.html",
            "cit-scale report runs/pets --data photos --out photos.html",
            "cit-scale report runs/pets/student_best.safetensors --out best.html",
        ),
        description="Writes one page about a run: its curves, where its student fails, what each token looks at, what "
        "the teachers' advice did. The page needs no network. A run that still goes on has one, too.",
        epilog="exit status: 0 success, 2 wrong option, 3 missing run or images, 4 no usable image, 6 full disk",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="a run folder, or a file of weights in it")
    add("--data", metavar="DATA", help="labelled images, as data.eval takes them; default: those of the run")
    add("--only-known", action="store_true", help="leave out images of classes that the student does not know")
    add("--out", metavar="FILE", help="default: report.html in the run folder")
    add("--batch-size", type=positive, metavar="N", help="images at once on each rank; default: by the device")
    add_threads(parser)
    return parser
