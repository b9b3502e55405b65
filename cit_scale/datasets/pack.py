"""Packs any data set into tar shards with an index. Every image is decoded as a check, and scaled down on request.

A few large files are read faster than a million small ones, above all over a network. After any interruption the same
command continues behind the last complete shard, and the result has the same bytes as without the interruption.
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
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from cit_scale.datasets.defaults import PACK_QUALITY, SHARD_MIB
from cit_scale.datasets.encoded import EXTENSIONS, VERSION, decode, limit_pixels
from cit_scale.datasets.index import Columns, Texts, cache_folder, concatenate, load, printable, save, shorten
from cit_scale.datasets.progress import ProgressBar
from cit_scale.datasets.shards import INDEX, PIXELS, SETTINGS, Row, ShardWriter, shard_name, write_index
from cit_scale.datasets.sources import Source, built_in_name, open_source
from cit_scale.errors import BadImageError, ConfigError, error_line
from cit_scale.files import changed, sync, write_text
from cit_scale.text import escape_unencodable

REJECTED = "rejected.tsv"
README = "README.md"
# The Hugging Face library `datasets` would take pack.json for the data, as files of JSON go before tar files.
README_TEXT = """---
configs:
- config_name: default
  data_files: "*.tar"
---
{count} images in {classes} classes, in the WebDataset layout; classes.txt has the classes' names. Packed by CiT-Scale.
"""
MIB = 1 << 20
PREFETCH = 8  # images per worker prepared ahead of the writer, so that one slow image does not stall the others
LONGEST_JPEG = 65_500  # pixels a side; libjpeg's limit
# What a setting was for a folder that was begun by a version without that setting.
DEFAULTS = {"shard_mib": SHARD_MIB, "shorter_side": None, "quality": PACK_QUALITY}

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Summary:
    """The result of `pack`. Counts and sizes describe the whole data set; seconds and images_per_s only this call."""

    images: int
    shards: int
    rejected: int
    mib_before: float
    mib_after: float
    seconds: float
    images_per_s: float
    empty_classes: tuple[str, ...]
    """Classes without an image left, because all were rejected."""


@dataclass(frozen=True)
class Prepared:
    """An image after a worker has checked it: a row for the shard, or the reason why it is rejected.

    size_before: bytes of the image in the source.
    """

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
    """Write the images of `source`, in its order, to shards in `out`, or continue where an earlier call stopped.

    `out` becomes a data set when everything is written. Images that cannot be decoded, and those that the source lists
    as rejects, are left out and listed in out/rejected.tsv.

    shard_mib: a shard is closed when it has reached this size. workers: threads; they change the time, not the result.
    shorter_side: images with a longer shorter side, in pixels, are scaled down to it and encoded as JPEG of `quality`;
    all other images keep their bytes. None: all keep them.

    Raises ConfigError for a value out of range, for an `out` with other content or other settings, while another
    process packs to it, and when no image can be decoded; OSError where reading or writing fails.
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
        "source": source.fingerprint,  # of its content, not its path: a data set may be moved
        "shard_mib": shard_mib,
        "shorter_side": shorter_side,
        "quality": quality,
    }
    with _claimed(out, settings) as pixels:
        first = len(source)  # nothing to do if the index is there
        if not (out / INDEX).exists():
            parts = _committed_parts(out)
            first = _end(parts)
            _write_missing(parts, source, out, prepare, workers, shard_mib * MIB)
            _finish(out, source, parts, pixels)
        # Only now: until the index exists, the parts are all that says which shards are complete.
        for leftover in (*out.glob("*.part.npz"), *out.glob(".*.partial")):
            leftover.unlink()
        return _summarise(out, len(source) - first, time.monotonic() - started_s)


@contextmanager
def _claimed(out: Path, settings: Mapping[str, Any]) -> Iterator[int]:
    """Lock `out` against other processes, and write the settings to it or compare them with those it was begun with.
    Yields the version of pixels with which it was begun.

    Raises ConfigError for a folder with other content, a locked one, and one that was begun with other settings.
    """
    if out.exists() and not (out.is_dir() and ((out / SETTINGS).exists() or not any(out.iterdir()))):
        raise ConfigError(f"{printable(out)} holds something else; give a folder that is new or empty")
    out.mkdir(parents=True, exist_ok=True)
    with (out / SETTINGS).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is packing to {printable(out)}; wait for it or stop it") from None
        # Before the first shard is complete, other settings lose no work and simply replace the old ones.
        if (out / INDEX).exists() or _part_path(out, 0).exists():
            file.seek(0)
            begun = json.load(file)
            pixels = begun.pop(PIXELS, 1)
            changes = changed(begun, settings, DEFAULTS)
            if changes:
                raise ConfigError(
                    f"{printable(out)} was begun with another source or other settings ({'; '.join(changes)}); "
                    f"give those again, or another folder, or delete this one"
                )
        else:
            file.truncate(0)
            pixels = VERSION
            json.dump({**settings, PIXELS: pixels}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
            sync(out)
        yield pixels


# --- Writing shards ---


def _part_path(out: Path, number: int) -> Path:
    """Return the path of one shard's index. A shard counts as complete once this file exists."""
    return out / f"{number:06d}.part.npz"


def _committed_parts(out: Path) -> list[Columns]:
    """Load the indices of the complete shards, from number 0 to the first that is missing."""
    parts: list[Columns] = []
    while (path := _part_path(out, len(parts))).exists():
        parts.append(load(path))
    return parts


def _end(parts: Sequence[Columns]) -> int:
    """Return how many images of the source the parts cover, rejected images included."""
    return int(parts[-1].numbers["ends"][0]) if parts else 0


def _write_missing(
    parts: list[Columns],
    source: Source,
    out: Path,
    prepare: Callable[[int], Prepared],
    workers: int,
    shard_bytes: int,
) -> None:
    """Write the shards that are missing after `parts`, and append the columns of each to `parts`."""
    threads = ThreadPoolExecutor(workers)
    first = _end(parts)
    try:
        with ProgressBar(f"packing {printable(out)}", len(source), done=first) as progress:
            prepared = _in_order(threads, prepare, range(first, len(source)), PREFETCH * workers)
            while _end(parts) < len(source):
                number = len(parts)
                with ShardWriter(out / shard_name(number), source.classes) as shard:
                    part = _fill(shard, prepared, shard_bytes, progress)
                save(_part_path(out, number), part)  # after the shard itself: this file declares it complete
                parts.append(part)
    finally:
        threads.shutdown(cancel_futures=True)  # otherwise an error would wait for all images prepared ahead


def _in_order(
    threads: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], prefetch: int
) -> Iterator[Result]:
    """Yield function(item) for each item in order, computed by the threads at most `prefetch` items in advance.

    Executor.map would submit all items at once, and keep the results of a whole data set in memory.
    """
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(threads.submit(function, item))
        if len(waiting) > prefetch:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _fill(shard: ShardWriter, prepared: Iterator[Prepared], shard_bytes: int, progress: ProgressBar) -> Columns:
    """Write the next images until the shard has reached `shard_bytes`, and commit it. Returns the shard's columns."""
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
        # A shard ends behind an image, so its content depends on the images only, not on workers or interruptions.
        if shard.size >= shard_bytes:
            break
    return shard.commit() | Columns(
        numbers={
            "sizes_before": np.array(sizes_before, np.int64),
            "rejects": np.array(list(rejects), np.int64),
            "ends": np.array([end]),
        },
        texts={"reasons": Texts.of([reason.encode() for reason in rejects.values()])},
    )


def _prepare(source: Source, index: int, shorter_side: int | None, quality: int) -> Prepared:
    """Read, check and scale one image. Raises OSError where the source cannot be read."""
    if index in source.rejects:
        return Prepared(index, reason=source.rejects[index])
    key = source.key(index)
    # Outside the try block: a file that was indexed and cannot be read now is a fault of the disk, not a bad image.
    before = data = source.read(index)
    try:
        image = decode(data)
        suffix = os.path.splitext(os.fsdecode(key))[1].lower()
        if shorter_side is not None and min(image.size) > shorter_side:
            image = _scale_down(image, shorter_side)
            data, suffix = _to_jpeg(image, quality), ".jpg"
    except BadImageError as error:
        return Prepared(index, reason=str(error))
    if suffix not in EXTENSIONS:
        suffix = ".jpg"  # some readers select members by suffix; decoders look at the content anyway
    row = Row(index, key, suffix, int(source.labels[index]), image.height, image.width, data)
    return Prepared(index, len(before), row)


def _scale_down(image: Image.Image, shorter_side: int) -> Image.Image:
    """Scale an image so that its shorter side has `shorter_side` pixels, with the Lanczos filter.

    Like bicubic, PIL's Lanczos averages over all source pixels of a target pixel, and it keeps more detail: in each of
    24 comparisons on photographs, a 224-pixel crop of the result was nearer to the same crop of the original.
    """
    size = [round(side * shorter_side / min(image.size)) for side in image.size]
    return image.resize(size, Image.Resampling.LANCZOS)


def _to_jpeg(image: Image.Image, quality: int) -> bytes:
    """Encode an image. Raises BadImageError for one that is too long for a JPEG."""
    if max(image.size) > LONGEST_JPEG:
        raise BadImageError(f"{image.width} x {image.height} pixels do not fit into a JPEG")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


# --- Finishing ---


def _finish(out: Path, source: Source, parts: Sequence[Columns], pixels: int) -> None:
    """Write rejected.tsv and README.md, then the index, which makes the folder a data set.

    pixels: as of ``write_index``.

    Raises ConfigError when no image is left.
    """
    whole = concatenate(parts)
    rejects = zip(whole.numbers["rejects"].tolist(), whole.texts["reasons"], strict=True)
    write_text(
        out / REJECTED, "".join(f"{printable(source.key(index))}\t{reason.decode()}\n" for index, reason in rejects)
    )
    if not len(whole.numbers["labels"]):
        raise ConfigError(f"none of {len(source)} images can be decoded; {printable(out / REJECTED)} says why")
    count, classes = len(whole.numbers["labels"]), len(source.classes)
    write_text(out / README, README_TEXT.format(count=count, classes=classes))
    # A part without images has no shard. It can only be the last: a shard ends behind an image that fills it.
    write_index(out, source.classes, [part for part in parts if len(part.numbers["labels"])], pixels)


def _summarise(out: Path, images_done: int, seconds: float) -> Summary:
    """Collect the summary from the files in `out`. images_done, seconds: of this call."""
    index = load(out / INDEX)
    labels, classes = index.numbers["labels"], index.texts["classes"]
    per_class = np.bincount(labels, minlength=len(classes))
    shards = [out / os.fsdecode(name) for name in index.texts["shard_names"]]
    return Summary(
        images=len(labels),
        shards=len(shards),
        rejected=(out / REJECTED).read_bytes().count(b"\n"),
        mib_before=int(index.numbers["sizes_before"].sum()) / MIB,
        mib_after=sum(path.stat().st_size for path in shards) / MIB,
        seconds=seconds,
        images_per_s=images_done / seconds,
        empty_classes=tuple(printable(classes[int(label)]) for label in np.flatnonzero(per_class == 0)),
    )


# --- Command line ---


def run(arguments: argparse.Namespace) -> int:
    """Pack a data set and print a summary. arguments: as parsed by ``commands.pack_parser``.

    Returns the exit code: 0 success, 1 reading or writing failed, 2 wrong option or data set, 130 Ctrl-C.
    """
    escape_unencodable()  # a name that the terminal cannot encode must not end the command
    out = Path(arguments.out).expanduser()
    goes_on = f"complete shards in {printable(out)} are kept, and the same command continues there"
    warnings.filterwarnings("ignore", module="PIL")  # rejected.tsv has the reason for each bad image
    try:
        # Shards inside SOURCE would be taken for a class of it.
        folder = Path(arguments.source).expanduser()
        if (
            built_in_name(arguments.source) is None
            and folder.is_dir()
            and out.resolve().is_relative_to(folder.resolve())
        ):
            raise ConfigError(f"OUT={printable(out)} is inside SOURCE={printable(folder)}; give a folder elsewhere")
        if arguments.max_pixels < 1:
            raise ConfigError(f"max_pixels={arguments.max_pixels} must be 1 or more")
        limit_pixels(arguments.max_pixels)
        cache_dir = cache_folder(arguments.cache_dir)
        naming = {"split_names": arguments.split_names, "label_key": arguments.label_key}
        source = open_source(arguments.source, cache_dir, "SOURCE", **naming)
        for note in source.notes:
            print(note, file=sys.stderr)
        summary = pack(
            source,
            out,
            shard_mib=arguments.shard_mib,
            workers=arguments.workers,
            shorter_side=arguments.shorter_side,
            quality=arguments.quality,
        )
    except ConfigError as error:
        print(f"error: {error_line(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error_line(error)}; {goes_on}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped; {goes_on}", file=sys.stderr)
        return 130
    _print_summary(summary, out)
    return 0


def _print_summary(summary: Summary, out: Path) -> None:
    """Print the summary on stdout, a line for each kind of figure."""
    print(f"images    {summary.images}")
    print(f"shards    {summary.shards}, {summary.mib_before:.1f} MiB of images in {summary.mib_after:.1f} MiB")
    print(f"rejected  {summary.rejected}{f', listed in {printable(out / REJECTED)}' if summary.rejected else ''}")
    done = (
        f"{summary.images_per_s:.0f} images/s, {summary.seconds:.1f} s" if summary.images_per_s else "nothing to pack"
    )
    print(f"speed     {done}")
    print(f"data set  {printable(out)}")
    if summary.empty_classes:
        print(f"no image is left of {len(summary.empty_classes)} classes: {shorten(summary.empty_classes)}")
