"""Any data set to tar shards with an index: every image checked by decoding it, and scaled down if wanted.

A few large files are read faster than a million small ones, above all over a network. Whatever interrupts it, the same
command continues after the last whole shard and comes to the same bytes.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import json
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from cit_scale.datasets.defaults import PACK_QUALITY, SHARD_MIB
from cit_scale.datasets.encoded import EXTENSIONS, decode
from cit_scale.datasets.index import Columns, Texts, concatenate, load, printable, save, shorten
from cit_scale.datasets.progress import ProgressBar
from cit_scale.datasets.shards import INDEX, SETTINGS, Row, ShardWriter, shard_name, write_index
from cit_scale.datasets.sources import BUILT_IN, Source, open_source
from cit_scale.errors import BadImageError, ConfigError
from cit_scale.files import changed, sync, write_text

REJECTED = "rejected.tsv"
MIB = 1 << 20
AHEAD = 8  # images per worker that are prepared before their turn, so that a slow one does not stop the others
LONGEST_JPEG = 65_500  # pixels, of libjpeg
DEFAULTS = {"shard_mib": SHARD_MIB, "shorter_side": None, "quality": PACK_QUALITY}

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Summary:
    """What came of it. Counts and sizes are of the whole set; seconds and images_per_s are of this call."""

    images: int
    shards: int
    rejected: int
    mib_before: float
    mib_after: float
    seconds: float
    images_per_s: float
    empty_classes: tuple[str, ...]
    """Classes whose every image was rejected."""


class Prepared(NamedTuple):
    """What a worker makes of an image: a row for the shard, or the reason why there is none."""

    index: int
    size_before: int = 0
    row: Row | None = None
    reason: str = ""


def pack(
    source: Source,
    out: Path,
    *,
    shard_mib: int = SHARD_MIB,
    workers: int,
    shorter_side: int | None = None,
    quality: int = PACK_QUALITY,
) -> Summary:
    """Write the images of `source`, in its order, to the shards of `out`, or go on where an earlier call stopped.

    `out` is a data set once all is written. Images that cannot be decoded, and those that the source knows to be
    unusable, are left out and listed in its rejected.tsv.
    Those whose shorter side is longer than `shorter_side` pixels are scaled down to it and encoded as JPEG; all others
    keep their bytes. How many workers there are changes nothing but the time.

    Raises ConfigError for an `out` that holds something else, and OSError where reading or writing fails.
    """
    started_s = time.monotonic()
    for name, value in {"shard_mib": shard_mib, "workers": workers, "shorter_side": shorter_side}.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} must be 1 or more")
    if not 1 <= quality <= 100:
        raise ConfigError(f"quality={quality} must be from 1 to 100; 90 is usual")

    def prepare(index: int) -> Prepared:
        return _prepare(source, index, shorter_side, quality)

    settings = {
        "source": source.fingerprint,
        "shard_mib": shard_mib,
        "shorter_side": shorter_side,
        "quality": quality,
    }
    with _claimed(out, settings):
        first = len(source)
        if not (out / INDEX).exists():
            parts = _committed_parts(out)
            first = _end(parts)
            _write_missing(parts, source, out, prepare, workers, shard_mib * MIB)
            _finish(out, source, parts)
        for leftover in (*out.glob("*.part.npz"), *out.glob(".*.partial")):
            leftover.unlink()
        return _summarise(out, len(source) - first, time.monotonic() - started_s)


@contextmanager
def _claimed(out: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Hold `out` against other processes; refuse what was not begun with these settings."""
    if out.exists() and not (out.is_dir() and ((out / SETTINGS).exists() or not any(out.iterdir()))):
        raise ConfigError(f"{printable(out)} holds something else; give a folder that is new or empty")
    out.mkdir(parents=True, exist_ok=True)
    with (out / SETTINGS).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is packing to {printable(out)}; wait for it or stop it") from None
        if (out / INDEX).exists() or _part_path(out, 0).exists():
            file.seek(0)
            changes = changed(json.load(file), settings, DEFAULTS)
            if changes:
                raise ConfigError(
                    f"{printable(out)} was begun with another source or other settings ({'; '.join(changes)}); "
                    f"give those again, or another folder, or delete this one"
                )
        else:
            file.truncate(0)
            json.dump(settings, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
            sync(out)
        yield


# --- Shard by shard ---


def _part_path(out: Path, number: int) -> Path:
    """The index of one shard, until there is one of all. Once it is there, the shard counts."""
    return out / f"{number:06d}.part.npz"


def _committed_parts(out: Path) -> list[Columns]:
    parts: list[Columns] = []
    while (path := _part_path(out, len(parts))).exists():
        parts.append(load(path))
    return parts


def _end(parts: Sequence[Columns]) -> int:
    """How many images of the source are done."""
    return int(parts[-1]["ends"][0]) if parts else 0


def _write_missing(
    parts: list[Columns],
    source: Source,
    out: Path,
    prepare: Callable[[int], Prepared],
    workers: int,
    shard_bytes: int,
) -> None:
    """Write the shards that come after `parts`, and append to it what is in each."""
    threads = ThreadPoolExecutor(workers)
    first = _end(parts)
    try:
        with ProgressBar(f"packing {printable(out)}", len(source), done=first) as progress:
            prepared = _in_order(threads, prepare, range(first, len(source)), AHEAD * workers)
            while _end(parts) < len(source):
                number = len(parts)
                with ShardWriter(out / shard_name(number), source.classes) as shard:
                    part = _fill(shard, prepared, shard_bytes, progress)
                save(_part_path(out, number), part)
                parts.append(part)
    finally:
        threads.shutdown(cancel_futures=True)


def _in_order(
    threads: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """function(item) for each item, at most `ahead` of them before they are asked for."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(threads.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _fill(shard: ShardWriter, prepared: Iterator[Prepared], shard_bytes: int, progress: ProgressBar) -> Columns:
    """Write the next images until the shard is as large as it should be, and commit it."""
    sizes_before: list[int] = []
    rejects: dict[int, str] = {}
    for image in prepared:
        if image.row is None:
            rejects[image.index] = image.reason
        else:
            shard.add(image.row)
            sizes_before.append(image.size_before)
        progress.advance()
        end = image.index + 1
        if shard.size >= shard_bytes:
            break
    return {
        **shard.commit(),
        "sizes_before": np.array(sizes_before, np.int64),
        "rejects": np.array(list(rejects), np.int64),
        "reasons": Texts.of([reason.encode() for reason in rejects.values()]),
        "ends": np.array([end]),
    }


def _prepare(source: Source, index: int, shorter_side: int | None, quality: int) -> Prepared:
    if index in source.rejects:
        return Prepared(index, reason=source.rejects[index])
    key = source.key(index)
    before = data = source.read(index)  # a file that was there and is gone says something of the disk, not of the image
    try:
        image = decode(data)
        suffix = os.path.splitext(os.fsdecode(key))[1].lower()
        if shorter_side is not None and min(image.size) > shorter_side:
            image = _scale_down(image, shorter_side)
            data, suffix = _to_jpeg(image, quality), ".jpg"
    except BadImageError as error:
        return Prepared(index, reason=str(error))
    if suffix not in EXTENSIONS:
        suffix = ".jpg"  # for readers that choose by it; all decoders go by the content
    row = Row(index, key, suffix, int(source.labels[index]), image.height, image.width, data)
    return Prepared(index, len(before), row)


def _scale_down(image: Image.Image, shorter_side: int) -> Image.Image:
    """By Lanczos' filter, which averages over all pixels that become one, as bicubic does, and keeps more detail.

    What a 224-pixel crop then shows was nearer to the crop of the original in each of 24 comparisons on photographs.
    """
    size = [round(side * shorter_side / min(image.size)) for side in image.size]
    return image.resize(size, Image.Resampling.LANCZOS)


def _to_jpeg(image: Image.Image, quality: int) -> bytes:
    if max(image.size) > LONGEST_JPEG:
        raise BadImageError(f"{image.width} x {image.height} pixels do not fit into a JPEG")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


# --- The end ---


def _finish(out: Path, source: Source, parts: Sequence[Columns]) -> None:
    whole = concatenate(parts)
    rejects = zip(whole["rejects"].tolist(), whole["reasons"], strict=True)
    write_text(
        out / REJECTED, "".join(f"{printable(source.key(index))}\t{reason.decode()}\n" for index, reason in rejects)
    )
    if not len(whole["labels"]):
        raise ConfigError(f"none of {len(source)} images can be decoded; {printable(out / REJECTED)} says why")
    write_index(out, source.classes, [part for part in parts if len(part["labels"])])


def _summarise(out: Path, images_done: int, seconds: float) -> Summary:
    index = load(out / INDEX)
    per_class = np.bincount(index["labels"], minlength=len(index["classes"]))
    shards = [out / os.fsdecode(name) for name in index["shard_names"]]
    return Summary(
        images=len(index["labels"]),
        shards=len(shards),
        rejected=(out / REJECTED).read_bytes().count(b"\n"),
        mib_before=int(index["sizes_before"].sum()) / MIB,
        mib_after=sum(path.stat().st_size for path in shards) / MIB,
        seconds=seconds,
        images_per_s=images_done / seconds,
        empty_classes=tuple(printable(index["classes"][label]) for label in np.flatnonzero(per_class == 0)),
    )


# --- The command ---


def run(arguments: argparse.Namespace) -> int:
    """Pack and report. arguments: as ``commands.pack_parser`` parses them.

    Returns the exit code: 0, 2 for a mistake of the user's, 1 where reading or writing fails, 130 on Ctrl-C.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to fail
    out = Path(arguments.out).expanduser()
    goes_on = f"what is whole in {printable(out)} stays, and the same command continues there"
    warnings.filterwarnings("ignore", module="PIL")  # what matters of an image is in the reasons
    try:
        folder = Path(arguments.source).expanduser()
        if arguments.source not in BUILT_IN and folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"OUT={printable(out)} is inside SOURCE={printable(folder)}; give a folder elsewhere")
        source = open_source(arguments.source, Path(arguments.cache_dir).expanduser(), "SOURCE")
        summary = pack(
            source,
            out,
            shard_mib=arguments.shard_mib,
            workers=arguments.workers,
            shorter_side=arguments.shorter_side,
            quality=arguments.quality,
        )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; {goes_on}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped; {goes_on}", file=sys.stderr)
        return 130
    _print_summary(summary, out)
    return 0


def _print_summary(summary: Summary, out: Path) -> None:
    print(f"images    {summary.images}")
    print(f"shards    {summary.shards}, {summary.mib_before:.1f} MiB of images in {summary.mib_after:.1f} MiB")
    print(f"rejected  {summary.rejected}{f', listed in {printable(out / REJECTED)}' if summary.rejected else ''}")
    done = f"{summary.images_per_s:.0f} images/s, {summary.seconds:.1f} s" if summary.images_per_s else "all was there"
    print(f"speed     {done}")
    print(f"data set  {printable(out)}")
    if summary.empty_classes:
        print(f"no image is left of {len(summary.empty_classes)} classes: {shorten(summary.empty_classes)}")
