"""The index of a data set: names, labels and image sizes as columns of numbers and texts, kept in one .npz file.

Nothing in the file is pickled, so loading it executes no code. The file appears by rename, so a reader, also on another
machine, finds a complete file or none.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shlex
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from cit_scale.config import DataConfig
from cit_scale.datasets.encoded import most_pixels
from cit_scale.datasets.pixels import Pixels
from cit_scale.datasets.progress import ProgressBar
from cit_scale.errors import BadImageError, ConfigError
from cit_scale.files import sync

NOTES = "notes"  # texts of an index: what is to be said of files that are passed over

FORMAT = 2  # of the file; an index of another format is refused, not converted
THREADS = 32  # more than cores: they hide the latency of a network file system
CHUNK = 256  # images that a thread measures per task

# Errors of a single file, not of the machine: that image is rejected and the others are used. Any other OSError is
# raised, as a disk that fails for a moment must not make images disappear from the data set.
UNUSABLE = (BadImageError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class Texts:
    """A sequence of N byte strings in one block: a million names take two arrays instead of a million objects.

    block: uint8, the texts, each followed by a newline. ends: (N,) int64, the position of the newline behind each text.
    """

    def __init__(self, block: np.ndarray, ends: np.ndarray) -> None:
        self.block = block
        self.ends = ends

    @classmethod
    def of(cls, texts: Sequence[bytes]) -> Texts:
        """Pack byte strings. They may contain newlines themselves: only `ends` says where a text ends."""
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        block = b"\n".join([*texts, b""])
        return cls(np.frombuffer(block, np.uint8), np.cumsum(lengths + 1) - 1)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        start = self.ends[index - 1] + 1 if index else 0
        return self.block[start : self.ends[index]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        return map(self.__getitem__, range(len(self)))


@dataclass(frozen=True)
class Columns:
    """The columns of an index by name: numbers, mostly one for each image, and texts."""

    numbers: Mapping[str, np.ndarray] = field(default_factory=dict)
    texts: Mapping[str, Texts] = field(default_factory=dict)

    def __or__(self, other: Columns) -> Columns:
        return Columns({**self.numbers, **other.numbers}, {**self.texts, **other.texts})


def concatenate(parts: Sequence[Columns]) -> Columns:
    """Join the rows of all parts. Every part has the same columns."""
    return Columns(
        numbers={name: np.concatenate([part.numbers[name] for part in parts]) for name in parts[0].numbers},
        texts={name: _concatenate_texts([part.texts[name] for part in parts]) for name in parts[0].texts},
    )


def _concatenate_texts(parts: Sequence[Texts]) -> Texts:
    starts = np.cumsum([0, *(len(part.block) for part in parts)])  # of each part's block in the joined one
    ends = [part.ends + start for part, start in zip(parts, starts, strict=False)]
    return Texts(np.concatenate([part.block for part in parts]), np.concatenate(ends))


# --- Saving, loading, caching ---


def save(path: Path, columns: Columns) -> None:
    """Write columns to `path`: the file is replaced completely or left as it was. Raises OSError."""
    arrays = {"format": np.array(FORMAT), **columns.numbers}
    for name, texts in columns.texts.items():
        arrays |= {name: texts.block, f"{name}.ends": texts.ends}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        sync(partial)
        partial.rename(path)  # two processes may do this at the same time: they replace each other's equal file
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path) -> Columns:
    """Read the columns that `save` wrote. Raises ConfigError for a damaged file and for one of another version."""
    try:
        with np.load(path) as file:  # refuses pickled objects unless told otherwise
            arrays = dict(file)
        if (found := int(arrays.pop("format"))) != FORMAT:
            raise ValueError(f"format {found} instead of {FORMAT}")
        ends = {name.removesuffix(".ends"): arrays.pop(name) for name in list(arrays) if name.endswith(".ends")}
        texts = {name: Texts(arrays.pop(name), text_ends) for name, text_ends in ends.items()}
        return Columns(arrays, texts)
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"{path} is damaged or from another version ({error}); delete it to make it anew") from error


def cached(path: Path, build: Callable[[], Columns], is_valid: Callable[[Columns], bool]) -> Columns:
    """Load the columns at `path` if the file exists and `is_valid(columns)`; otherwise build, save and return them.

    Where they cannot be saved a note says so, and they are built again next time.
    """
    try:
        if path.exists() and is_valid(columns := load(path)):
            return columns
    except PermissionError:  # the folder of another user
        pass
    columns = build()
    try:
        save(path, columns)
    except OSError as error:
        note = (
            f"the index cannot be kept in {printable(path.parent)} ({error.strerror}) and is made again at each start; "
            "name another folder by --data.cache_dir"
        )
        notes = Texts.of([*columns.texts.get(NOTES, ()), note.encode()])
        return columns | Columns(texts={NOTES: notes})
    return columns


def cache_folder(name: str) -> Path:
    """The folder of data.cache_dir. Raises ConfigError where it lies in the home of a user who has none."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"data.cache_dir={name} lies in your home, and there is none; name another folder by --data.cache_dir"
        ) from None


def cache_path(cache_dir: Path, kind: str, *key: str | bytes | int | Path, pixels: Pixels | None = None) -> Path:
    """Return a path in `cache_dir` that differs for every `kind` and `key`, version of pixels and limit of pixels."""
    if pixels is not None and pixels.version > 1:
        kind = f"{kind}-{pixels.version}"
    if pixels is not None and most_pixels() != DataConfig.max_pixels:
        kind = f"{kind}-{most_pixels():.0f}"
    digest = hashlib.sha256(b"\0".join(os.fsencode(str(part)) if not isinstance(part, bytes) else part for part in key))
    return cache_dir / f"{kind}-{digest.hexdigest()[:24]}.npz"


# --- The columns of a data set ---


def number_classes(texts: Iterable[str], pixels: Pixels) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the distinct texts as classes, as ``pixels`` orders them, and the class of each text, (N,) int64."""
    # Numbered in the order of appearance first: `texts` may be a million long and is read only once.
    seen: dict[str, int] = {}
    order_seen = np.array([seen.setdefault(text, len(seen)) for text in texts], np.int64)
    classes = pixels.sorted_classes(seen)
    label_of = np.empty(len(seen), np.int64)
    label_of[[seen[name] for name in classes]] = np.arange(len(seen))
    return tuple(classes), label_of[order_seen]


def read_image_headers(
    classes: Sequence[str],
    names: Sequence[bytes],
    labels: np.ndarray,
    read: Callable[[int, int, int], bytes],
    where: Path,
    index_path: Path,
    pixels: Pixels,
) -> Columns:
    """Return the columns of a data set; image sizes and rejects come from the images' headers, read in parallel.

    classes: K names. names, labels: of the N images. read(index, start, size): as ``encoded.measure`` takes it, of an
    image. where, index_path: for messages. pixels: how they are measured. A rejected image keeps its row, with height
    and width 0.
    Raises ConfigError for a class that has images, and none that can be read.
    """
    count = len(names)
    heights, widths = np.zeros((2, count), np.int64)
    rejects: dict[int, str] = {}

    # The threads write to disjoint ranges of `heights` and `widths`, so no lock is needed.
    def measure(start: int) -> dict[int, str]:
        bad = {}
        for index in range(start, min(start + CHUNK, count)):
            try:
                heights[index], widths[index] = pixels.measure(functools.partial(read, index))
            except UNUSABLE as error:
                bad[index] = reason_text(error)
        return bad

    title = f"indexing {printable(where)} into {printable(index_path)}"
    with ProgressBar(title, count) as progress, ThreadPoolExecutor(THREADS) as threads:
        for bad in threads.map(measure, range(0, count, CHUNK)):
            rejects |= bad
            progress.advance(min(CHUNK, count - progress.done))

    num_readable = np.bincount(labels[heights > 0], minlength=len(classes))
    is_lost = (num_readable == 0) & (np.bincount(labels, minlength=len(classes)) > 0)
    if is_lost.any():
        missing = [printable(name) for name, lost in zip(classes, is_lost, strict=True) if lost]
        unreadable = [
            f"{printable(names[index])} ({reason})"
            for index, reason in rejects.items()
            if not num_readable[labels[index]]
        ]
        raise ConfigError(
            f"{printable(where)} has no readable image for {len(missing)} of {len(classes)} classes: "
            f"{shorten(missing)}; rejected: {shorten(unreadable)}; repair or remove them"
        )
    return Columns(
        numbers={
            "labels": labels,
            "heights": heights,
            "widths": widths,
            "rejects": np.array(list(rejects), np.int64),
        },
        texts={
            "classes": Texts.of([os.fsencode(name) for name in classes]),
            "names": Texts.of(names),
            "reasons": Texts.of([reason.encode() for reason in rejects.values()]),
        },
    )


def stamps_of(paths: Sequence[str | bytes | Path]) -> np.ndarray:
    """Size in bytes, and times of the last change of content and of anything, in nanoseconds, (N, 3) int64.

    Zeros for a file that is not there.
    """

    def stamp(path: str | bytes | Path) -> tuple[int, int, int]:
        try:
            about = os.stat(path)
        except (OSError, ValueError):
            return 0, 0, 0
        return about.st_size, about.st_mtime_ns, about.st_ctime_ns

    with ThreadPoolExecutor(THREADS) as threads:
        return np.array(list(threads.map(stamp, paths, chunksize=CHUNK)), np.int64).reshape(-1, 3)


def fingerprint(classes: Sequence[str], names: Texts, *numbers: np.ndarray) -> str:
    """Return a SHA-256 in hexadecimal of the classes, names and columns of numbers, the same on every machine."""
    digest = hashlib.sha256(os.fsencode("\n".join(classes)) + b"\0")
    digest.update(names.block.data)
    for column in numbers:
        digest.update(column.astype("<i8").tobytes())  # one width and byte order, whatever the column has
    return digest.hexdigest()


# Images that no library here reads, and what makes them into ones that can be read.
CONVERTERS = {".heic": "heif-convert", ".heif": "heif-convert", ".jxl": "djxl"}


# Data sets in other forms, and the way out.
HINTS = {
    ".tar": "tar shards in several folders are named by a pattern, as --data.train 'DIR/*/*.tar'",
    ".tgz": "images cannot be read at random from compressed tar files; unpack them with gunzip",
    ".gz": "images cannot be read at random from compressed tar files; unpack them with gunzip",
    ".zst": "images cannot be read at random from compressed tar files; unpack them with zstd -d",
    ".zip": "a zip file has to be unpacked first",
    ".parquet": "the images of a Parquet file have to be written to a folder for each class first",
    ".tfrecord": "the images of a TFRecord file have to be written to a folder for each class first",
}


def hints_for(extensions: Iterable[str]) -> list[str]:
    """What a refusal says of files that are no images, each hint once."""
    return list(dict.fromkeys(HINTS[each] for each in sorted(extensions) if each in HINTS))


def notes_of(passed: Mapping[str, int], where: Path, *, inside_tars: bool = False) -> list[str]:
    """What is to be said of files that are passed over. passed: their number, by extension."""
    if not passed:
        return []
    named = [f"{number} {printable(kind)[:40] or 'without extension'}" for kind, number in sorted(passed.items())]
    notes = [f"{sum(passed.values())} files in {printable(where)} are no images here: {shorten(named, 8)}"]
    for extension in sorted(CONVERTERS.keys() & passed.keys()):
        folder = shlex.quote(printable(where))
        command = f"find {folder} -iname '*{extension}' -exec {CONVERTERS[extension]} {{}} {{}}.jpg ';'"
        where_to = "unpack the tar files, then " if inside_tars else ""
        notes.append(f"{extension} images have to be converted first: {where_to}{command}")
    return notes


class Indexed:
    """The part of a `Source` that the index answers; subclasses add `read` and `name`."""

    def __init__(self, columns: Columns) -> None:
        self.classes = tuple(os.fsdecode(name) for name in columns.texts["classes"])
        self.labels, self.heights, self.widths = (columns.numbers[name] for name in ("labels", "heights", "widths"))
        rejects = zip(columns.numbers["rejects"], columns.texts["reasons"], strict=True)
        self.rejects: Mapping[int, str] = {int(index): reason.decode() for index, reason in rejects}
        self.notes = tuple(note.decode() for note in columns.texts.get(NOTES, ()))
        self._names = columns.texts["names"]

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> bytes:
        return self._names[index]

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.classes, self._names, self.labels, self.heights, self.widths)


# --- Text for messages ---


def reason_text(error: Exception) -> str:
    """Return the reason of an error in one line, without the file's name."""
    return printable(error.strerror or str(error)) if isinstance(error, OSError) else printable(error)


def printable(name: object) -> str:
    """Return a name in one printable line: control characters, line separators and bytes that are not UTF-8 escaped."""
    raw = name if isinstance(name, bytes) else os.fsencode(str(name))
    text = raw.decode("utf-8", "backslashreplace")
    return re.sub(r"[\0-\x1f\x7f-\x9f\u2028\u2029]", _escape, text)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def shorten(names: Sequence[str], most: int = 5) -> str:
    """Join the first `most` names with commas and say how many more there are; ``none`` for no names."""
    shown = ", ".join(names[:most]) or "none"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
