"""The commands ``cit-scale pack`` and ``cit-scale video``: their options and defaults. What they do is imported when
they do it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from cit_scale.config import DataConfig
from cit_scale.datasets.defaults import FRAME_QUALITY, PACK_QUALITY, SHARD_MIB
from cit_scale.text import ExampleParser

CORES = len(os.sched_getaffinity(0))


def pack(argv: Sequence[str] | None = None) -> int:
    """Run ``cit-scale pack``. Returns its exit code."""
    arguments = pack_parser().parse_args(argv)
    from cit_scale.datasets.pack import run

    return run(arguments)


def video(argv: Sequence[str] | None = None) -> int:
    """Run ``cit-scale video``. Returns its exit code."""
    arguments = video_parser().parse_args(argv)
    from cit_scale.datasets.video import run

    return run(arguments)


def pack_parser() -> argparse.ArgumentParser:
    parser = ExampleParser(
        prog="cit-scale pack",
        examples=(
            "cit-scale pack photos packed",
            "cit-scale pack /data/imagenet/train /fast/imagenet500 --shorter-side 500",
            "cit-scale train --data.train packed",
        ),
        description="Any data set to tar shards with an index: every image is checked by decoding it, and scaled down "
        "if wanted. A few large files are read faster than a million small ones, above all over a network. Whatever "
        "interrupts it, the same command continues after the last whole shard.",
        epilog="exit status: 0; 2 for a mistake, 1 where a disk fails, 130 on Ctrl-C",
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="what --data.train takes: a folder, shards, a table, an idx file, digits")
    add("out", metavar="OUT", help="the folder of the shards: new, or one that was begun before")
    add("--shorter-side", "--shorter_side", type=int, metavar="N", help="scale larger images down to it, in pixels")
    add(
        "--quality",
        type=int,
        default=PACK_QUALITY,
        metavar="N",
        help="JPEG quality, 1 to 100, of scaled images; %(default)s",
    )
    add_shard_size(parser)
    add(
        "--workers",
        type=int,
        default=CORES,
        metavar="N",
        help="threads that decode; one for each core",
    )
    add(
        "--cache-dir",
        "--cache_dir",
        default=DataConfig().cache_dir,
        metavar="DIR",
        help="where the index of SOURCE is kept; %(default)s",
    )
    return parser


def video_parser() -> argparse.ArgumentParser:
    parser = ExampleParser(
        prog="cit-scale video",
        examples=(
            "cit-scale video clips frames --fps 1",
            "cit-scale video clips shards --count 16 --shorter-side 256 --shards",
            "cit-scale train --data.train frames",
        ),
        description="Class folders of videos to class folders of frames, or to shards: clips/cat/a.mp4 becomes "
        "frames/cat/a.mp4/000000.jpg and so on. A video's frames appear together, once all of it has been decoded; a "
        "broken one is skipped and listed in OUT/rejected.tsv. The same command goes on where it was stopped.",
        epilog="exit status: 0; 1 without frames or where a disk fails, 2 for a mistake, 128 + signal if stopped",
    )
    add = parser.add_argument
    add("videos", type=Path, metavar="VIDEOS", help="a folder with one sub-folder of videos per class")
    add("out", type=Path, metavar="OUT", help="the folder to write: new, or of this command before")
    which = parser.add_argument_group("which frames, one of").add_mutually_exclusive_group(required=True)
    which.add_argument("--fps", type=float, metavar="N", help="so many a second, from the first frame on")
    which.add_argument("--count", type=int, metavar="N", help="so many of each video, evenly spread")
    which.add_argument("--scene", type=float, metavar="CHANGE", help="the first, and each after a cut; 0.3 finds most")
    add("--shorter-side", "--shorter_side", type=int, metavar="N", help="shrink larger frames to it, in pixels")
    add(
        "--quality",
        type=int,
        default=FRAME_QUALITY,
        metavar="N",
        help="of the JPEGs, 2 (no loss to be seen) to 31 (coarse); %(default)s",
    )
    add("--hwaccel", metavar="NAME", help="decode with cuda, vaapi, ..., or auto: what works here; the CPU without it")
    add(
        "--workers",
        type=int,
        default=CORES,
        metavar="N",
        help="videos at once; one for each core",
    )
    add("--shards", action="store_true", help="write tar shards in the place of a folder")
    add_shard_size(parser)
    return parser


def add_shard_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard-mib",
        "--shard_mib",
        type=int,
        default=SHARD_MIB,
        metavar="N",
        help="size of a shard in MiB; %(default)s",
    )
