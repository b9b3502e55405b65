"""The commands ``cit-scale evaluate`` and ``cit-scale predict``: entry points, options and defaults.

The modules that do the work are imported inside the entry points, after the options have been parsed: ``--help`` and a
mistyped option are answered without importing torch.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from cit_scale.inference.defaults import FORMATS, FRAMES_PER_S, JUDGES
from cit_scale.text import ExampleParser, positive

CORES = len(os.sched_getaffinity(0))  # that this process may use, not all cores of the machine

MODEL_HELP = "a run folder, weights, an exported file, hf-hub:OWNER/NAME, a model of timm's"


def evaluate(argv: Sequence[str] | None = None) -> int:
    """Run ``cit-scale evaluate``. argv: the arguments after the command's name; None: those of the process.

    Returns an exit code of ``errors``.
    """
    arguments = evaluate_parser().parse_args(argv)
    from cit_scale.inference.evaluate import run

    return run(arguments)


def predict(argv: Sequence[str] | None = None) -> int:
    """Run ``cit-scale predict``, likewise."""
    arguments = predict_parser().parse_args(argv)
    from cit_scale.inference.predict import run

    return run(arguments)


def evaluate_parser() -> argparse.ArgumentParser:
    """Return the parser of ``cit-scale evaluate``."""
    parser = _parser(
        "evaluate",
        (
            "cit-scale evaluate runs/pets                       on the run's own evaluation set",
            "cit-scale evaluate runs/pets/student.onnx --data photos --json scores.json",
            "cit-scale evaluate hf-hub:timm/resnet18.a1_in1k --data imagenet-a --judge a",
        ),
        "Scores a classifier on labelled images: top-1, top-5, the mean over classes, negative log-likelihood, "
        "calibration error (ECE, 15 bins) and the temperature that mends it.",
    )
    add = parser.add_argument
    add("--data", metavar="DATA", help="labelled images, as data.eval takes them; default: those of the run")
    add("--judge", choices=JUDGES, help="ImageNet's other judges: which labels and classes --data has")
    add("--only-known", action="store_true", help="leave out images of classes that the model does not know")
    add("--json", metavar="FILE", help="write all numbers there, too; -: to the screen, and no table")
    return parser


def predict_parser() -> argparse.ArgumentParser:
    """Return the parser of ``cit-scale predict``."""
    parser = _parser(
        "predict",
        (
            "cit-scale predict runs/pets a.jpg b.png",
            "cit-scale predict runs/pets photos clips/a.mp4 shard.tar --out answers.csv --top 3",
            "find photos -name '*.jpg' | cit-scale predict runs/pets/student.onnx - --format jsonl",
            "torchrun --nproc-per-node 8 -m cit_scale predict runs/pets photos --out answers.parquet",
        ),
        "Says which class each image is of: a row for each, in the order given. An image that cannot be used is a row "
        "with a reason.",
    )
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGES", help="files, folders, tar shards, videos; -: a list on standard input")
    add("--out", metavar="FILE", help=".csv, .jsonl, .parquet or .txt; default: the screen")
    add("--format", choices=FORMATS, help="default: by the name of FILE, text on the screen")
    add("--top", type=positive, default=1, metavar="K", help="classes with their probabilities (default 1)")
    add("--heads", action="store_true", help="also what each head says, and how far they disagree, 0 to 1")
    add("--temperature", type=float, default=1.0, metavar="T", help="divide logits by it, as evaluate finds it")
    add("--fps", type=float, default=FRAMES_PER_S, metavar="N", help="frames a second of a video (default 1)")
    return parser


def _parser(verb: str, examples: Sequence[str], description: str) -> argparse.ArgumentParser:
    parser = ExampleParser(
        prog=f"cit-scale {verb}",
        examples=examples,
        description=description,
        epilog="exit status: 0 success, 2 wrong option, 3 missing model or images, 4 no usable image, 6 full disk, "
        "7 a model that would run code",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="images at once on each rank; default: by the device"
    )
    add_threads(parser)
    return parser


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Add the option --threads."""
    parser.add_argument(
        "--threads", type=positive, default=CORES, metavar="N", help="that read and decode images (default: the cores)"
    )
