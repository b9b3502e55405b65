"""The command ``cit-scale export``: entry point, options and defaults. As in `cit_scale.inference.commands`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cit_scale.inference.commands import MODEL_HELP, add_threads
from cit_scale.inference.defaults import PRECISIONS, SUFFIXES
from cit_scale.text import ExampleParser, positive


def export(argv: Sequence[str] | None = None) -> int:
    """Run ``cit-scale export``. argv: the arguments after the command's name; None: those of the process.

    Returns an exit code of ``errors``.
    """
    arguments = export_parser().parse_args(argv)
    from cit_scale.export.write import run

    return run(arguments)


def export_parser() -> argparse.ArgumentParser:
    """Return the parser of ``cit-scale export``."""
    parser = ExampleParser(
        prog="cit-scale export",
        examples=(
            "cit-scale export runs/pets --to onnx",
            "cit-scale export runs/pets --to onnx --precision int8 --any-size --out pets.onnx",
            "cit-scale export runs/pets --to timm --out pets",
        ),
        description="Writes a file for deployment, and measures it beside the student before it gets its name: a file "
        "that is worse is not kept.",
        epilog="exit status: 0 success, 2 wrong option, 3 missing model or images, 6 full disk, 7 the file is worse",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help=MODEL_HELP.replace(" an exported file,", ""))
    add("--to", required=True, choices=tuple(SUFFIXES), help="the format")
    add("--out", metavar="FILE", help="default: in the run folder, student.onnx and so on")
    add("--precision", choices=PRECISIONS, default="float32", help="of an ONNX file (default float32)")
    add("--any-size", action="store_true", help="ONNX: decoded images of any size go in, one at a time")
    add("--data", metavar="DATA", help="labelled images to measure on; default: the run's evaluation set")
    add("--calibration", metavar="DATA", help="images for int8; default: the run's training set")
    add("--calibration-images", type=positive, default=256, metavar="N", help="how many of them (default 256)")
    add("--allow-loss", action="store_true", help="keep a file that is worse than the student")
    add_threads(parser)
    return parser
