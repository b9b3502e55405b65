"""The commands ``cit-scale pack`` and ``cit-scale video``: entry points, options and defaults.

The modules that do the work are imported inside the entry points, after the options have been parsed: ``--help`` and a
mistyped option are answered without importing NumPy, PIL or ffmpeg-python.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from cit_scale.config import DataConfig
from cit_scale.datasets.defaults import FRAME_QUALITY, PACK_QUALITY, SHARD_MIB
from cit_scale.text import ExampleParser

CORES = len(os.sched_getaffinity(0))  # that this process may use, not all cores of the machine


def pack(argv: Sequence[str] | None = None) -> int:
    """Run ``cit-scale pack``. argv: the arguments after the command's name; None: those of the process.

    Returns the exit code, see `cit_scale.datasets.pack.run`.
    """
    arguments = pack_parser().parse_args(argv)
    from cit_scale.datasets.pack import run

    return run(arguments)


def video(argv: Sequence[str] | None = None) -> int:
    """Run ``cit-scale video``. argv: the arguments after the command's name; None: those of the process.

    Returns the exit code, see `cit_scale.datasets.video.run`.
    """
    arguments = video_parser().parse_args(argv)
    from cit_scale.datasets.video import run

    return run(arguments)


def pack_parser() -> argparse.ArgumentParser:
    """Return the parser of ``cit-scale pack``."""
    parser = ExampleParser(
        prog="cit-scale pack",
        examples=(
            "cit-scale pack photos packed",
            "cit-scale pack /data/imagenet/train /fast/imagenet500 --shorter-side 500",
            "cit-scale train --data.train packed",
        ),
        description="Packs any data set into tar shards with an index. Every image is decoded as a check, and scaled "
        "down with --shorter-side. A few large files are read faster than a million small ones, above all over a "
        "network. After any interruption the same command continues behind the last complete shard.",
        epilog="exit status: 0 success, 1 failed disk, 2 wrong option or data set, 130 Ctrl-C",
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a data set, as in --data.train: a folder, shards, table, idx file")
    add("out", metavar="OUT", help="folder for the shards: new, or from an earlier run of this command")
    add("--shorter-side", "--shorter_side", type=int, metavar="N", help="scale larger images down to N pixels")
    add("--split-names", action="store_true", help="classes may be called train, val, valid or test")
    add("--label-key", "--label_key", metavar="KEY", help="of tar shards with .json files: the key of the label")
    add(
        "--max-pixels",
        "--max_pixels",
        type=int,
        default=DataConfig().max_pixels,
        metavar="N",
        help="reject images of more pixels; %(default)s",
    )
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
        help="decoding threads; one per core",
    )
    add(
        "--cache-dir",
        "--cache_dir",
        default=DataConfig().cache_dir,
        metavar="DIR",
        help="folder for the index of SOURCE; %(default)s",
    )
    return parser


def video_parser() -> argparse.ArgumentParser:
    """Return the parser of ``cit-scale video``."""
    parser = ExampleParser(
        prog="cit-scale video",
        examples=(
            "cit-scale video clips frames --fps 1",
            "cit-scale video clips shards --count 16 --shorter-side 256 --shards",
            "cit-scale train --data.train frames",
        ),
        description="Takes frames from class folders of videos, into class folders of images or into shards: "
        "clips/cat/a.mp4 becomes frames/cat/a.mp4/000000.jpg and so on. The frames of a video appear together, once "
        "the whole video has been decoded; a broken video is skipped and listed in OUT/rejected.tsv. The same command "
        "continues where it was stopped.",
        epilog="exit status: 0 success, 1 no frames or failed disk, 2 wrong option or folder, 128 + signal if stopped",
    )
    add = parser.add_argument
    add("videos", type=Path, metavar="VIDEOS", help="a folder with one sub-folder of videos per class")
    add("out", type=Path, metavar="OUT", help="folder to write: new, or from an earlier run of this command")
    which = parser.add_argument_group("which frames, exactly one of").add_mutually_exclusive_group(required=True)
    which.add_argument("--fps", type=float, metavar="N", help="N frames per second, from the first frame on")
    which.add_argument("--count", type=int, metavar="N", help="N frames of each video, evenly spread")
    which.add_argument("--scene", type=float, metavar="CHANGE", help="the first frame, and one per cut; 0.3 finds most")
    add("--shorter-side", "--shorter_side", type=int, metavar="N", help="scale larger frames down to N pixels")
    add(
        "--quality",
        type=int,
        default=FRAME_QUALITY,
        metavar="N",
        help="ffmpeg's JPEG quality, 2 (no visible loss) to 31 (coarse); %(default)s",
    )
    add("--hwaccel", metavar="NAME", help="decode with cuda, vaapi, ..., or auto (first that works); default: CPU")
    add(
        "--workers",
        type=int,
        default=CORES,
        metavar="N",
        help="videos decoded at once; one per core",
    )
    add("--shards", action="store_true", help="write tar shards instead of class folders")
    add_shard_size(parser)
    return parser


def add_shard_size(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--shard-mib``, which both commands have."""
    parser.add_argument(
        "--shard-mib",
        "--shard_mib",
        type=int,
        default=SHARD_MIB,
        metavar="N",
        help="size of a shard in MiB; %(default)s",
    )
