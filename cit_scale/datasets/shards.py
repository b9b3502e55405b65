"""Writes and reads tar shards in the WebDataset layout: an image NAME.jpg beside its label in NAME.cls.

Reading goes by an index of the offset and size of each image in its shard, so an image costs one read. Members are
never extracted: a name such as ../../x in a foreign tar file cannot lead to a path.
"""

from __future__ import annotations

import errno
import glob
import io
import itertools
import json
import os
import re
import shutil
import tarfile
import uuid
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np

from cit_scale.datasets.encoded import VERSION, most_pixels, read_size, refuse_too_many_bytes
from cit_scale.datasets.index import (
    NOTES,
    THREADS,
    Columns,
    Indexed,
    Texts,
    cache_path,
    cached,
    concatenate,
    hints_for,
    load,
    notes_of,
    number_classes,
    printable,
    read_image_headers,
    reason_text,
    save,
    shorten,
    stamps_of,
)
from cit_scale.datasets.labels import label_text, labels_by_file, read_classes
from cit_scale.datasets.pixels import FIRST, LATEST, Pixels
from cit_scale.datasets.progress import ProgressBar
from cit_scale.datasets.tars import followed, tar_members
from cit_scale.errors import BadImageError, ConfigError, MissingInputError
from cit_scale.files import sync

INDEX = "index.npz"  # written last: a folder with an index is complete
SETTINGS = "pack.json"  # a folder with settings and without an index is still being packed
CLASSES = "classes.txt"
# WebDataset's rule: the key ends at the first dot of the last part of the path.
KEY = re.compile(r"((?:.*/)?[^./]+)(\.[^/]*)", re.DOTALL)
LABEL, JSON = ".cls", ".json"
MOST_LABEL_BYTES = 1 << 20  # a .json of img2dataset holds captions, EXIF and more
PLACE = ("shards", "offsets", "sizes")  # columns of numbers: number of the shard, first byte in it, number of bytes
PIXELS = "pixels"  # column of one number: the version of pixels by which images were measured; 1 where it is missing
MOST_SHARDS = 1_000_000  # that a pattern names

# In place of an image's size in a tar file, where it has no bytes that lie together, and why.
IN_PIECES, NOWHERE = -1, -2
UNREADABLE = {
    IN_PIECES: "in pieces (sparse) inside the tar file",
    NOWHERE: "no plain file, nor a link to one inside the tar file",
}

OPEN_SHARDS = 256  # files that a data set keeps open; a process on Linux may open 1024 by default


# --- Writing ---


@dataclass(frozen=True)
class Row:
    """One image for a shard.

    index: its number in the data set. name: its key in the source. suffix: the extension with its dot. label: the
    number of its class. height, width: of the upright image, in pixels. data: the encoded image.
    """

    index: int
    name: bytes
    suffix: str
    label: int
    height: int
    width: int
    data: bytes


class ShardWriter:
    """Writes one shard, as a context manager. The file appears at `path` when `commit` is called, or not at all.

    classes: the names of all classes, which become folders inside the tar file.
    """

    def __init__(self, path: Path, classes: Sequence[str]) -> None:
        self.path = path
        self._classes = classes
        self._partial = path.with_name(f".{path.name}.partial")
        self._tar = tarfile.open(self._partial, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115  closed on leaving
        self._rows: list[tuple[bytes, int, int, int, int, int]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Close the file and not the TarFile, which would write an end marker. On a full disk closing fails once more;
        # the error that led here is the one to report.
        with suppress(OSError):
            self._tar.fileobj.close()
        self._partial.unlink(missing_ok=True)

    @property
    def size(self) -> int:
        """Bytes of the tar file written so far."""
        return self._tar.offset

    def add(self, row: Row) -> None:
        """Append an image and its label."""
        key = member_key(self._classes[row.label], row.name, row.index)
        self._add_member(key + row.suffix, row.data)
        # tarfile has padded the data to whole blocks; step back over them to where the data begins.
        offset = self.size - -(-len(row.data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        self._rows.append((row.name, row.label, row.height, row.width, offset, len(row.data)))
        self._add_member(key + LABEL, str(row.label).encode())

    def commit(self) -> Columns:
        """Finish the shard, rename it to `path`, and return the columns of its images.

        Without images no file appears, and the columns are empty.
        """
        self._tar.close()
        if self._rows:
            sync(self._partial)  # before the rename: after a power cut the name must not lead to an incomplete file
            self._partial.rename(self.path)
            sync(self.path.parent)
        numbers = np.array([numbers for _, *numbers in self._rows], np.int64).reshape(-1, 5)
        columns = zip(("labels", "heights", "widths", "offsets", "sizes"), numbers.T, strict=True)
        return Columns(dict(columns), {"names": Texts.of([name for name, *_ in self._rows])})

    def _add_member(self, name: str, data: bytes) -> None:
        # TarInfo's defaults (time 0, owner 0) stay: the same images make the same bytes at any time, for any user.
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))


def member_key(class_name: str, name: bytes, index: int) -> str:
    """Return a member's name without its suffix, CLASS/STEM-INDEX: legible, safe to extract on any file system, unique.

    index: the image's number in the data set, which makes the name unique.
    """
    stem = os.path.splitext(os.path.basename(os.fsdecode(name)))[0]
    return f"{_safe(class_name)}/{_safe(stem)}-{index:08d}"


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"{number:06d}.tar"


def write_index(folder: Path, classes: Sequence[str], parts: Sequence[Columns], pixels: int = VERSION) -> None:
    """Write classes.txt and the index of the shards in `folder`, which makes the folder a complete data set.

    parts: the columns of each shard, in the order of their numbers from 0. pixels: the version that has measured them.
    """
    (folder / CLASSES).write_text("".join(f"{printable(name)}\n" for name in classes), encoding="utf-8")
    sync(folder / CLASSES)
    columns = Columns(
        numbers={
            "shards": np.repeat(np.arange(len(parts)), [len(part.numbers["labels"]) for part in parts]),
            "rejects": np.array([], np.int64),
            PIXELS: np.array([pixels]),
        },
        texts={
            "shard_names": Texts.of([shard_name(number).encode() for number in range(len(parts))]),
            "classes": Texts.of([os.fsencode(name) for name in classes]),
            "reasons": Texts.of([]),
        },
    )
    save(folder / INDEX, concatenate(parts) | columns)


def write_shards(
    folder: Path, classes: Sequence[str], images: Iterable[tuple[str, int, bytes]], images_per_shard: int = 10_000
) -> None:
    """Write images as a new folder of shards with an index.

    images: (name with extension, label, encoded bytes) each.
    The folder appears completely or not at all. If another process creates it meanwhile, its folder is kept.
    Raises ValueError for no images.
    """
    partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.partial"
    partial.mkdir(parents=True)
    rows = _rows(images)
    parts: list[Columns] = []
    try:
        while chunk := list(islice(rows, images_per_shard)):
            with ShardWriter(partial / shard_name(len(parts)), classes) as shard:
                for row in chunk:
                    shard.add(row)
                parts.append(shard.commit())
        if not parts:
            raise ValueError(f"no images to write to {folder}; give at least one")
        write_index(partial, classes, parts)
        try:
            partial.rename(folder)
        except OSError:  # not an error if another process has finished the same folder
            if not (folder / INDEX).exists():
                raise
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _rows(images: Iterable[tuple[str, int, bytes]]) -> Iterator[Row]:
    """Number the images and read their sizes."""
    for index, (name, label, data) in enumerate(images):
        yield Row(index, os.fsencode(name), Path(name).suffix, label, *read_size(io.BytesIO(data)), data)


def _safe(text: str) -> str:
    """Replace everything but letters, digits, - and _ by _, and keep at most 60 characters; ``x`` where none are left.

    60 characters leave room for the rest of the name within the 255 bytes of a file name.
    """
    return re.sub(r"[^\w-]+", "_", text)[:60].strip("_-") or "x"


# --- Reading ---


class TarShards(Indexed):
    """A data set of tar shards with an index: an image costs one read, so a shuffle can cover all shards.

    Raises ConfigError when a shard is missing or shorter than the index says.
    """

    def __init__(self, folder: Path, columns: Columns | None = None) -> None:
        """columns: the index; None: read it from the folder."""
        columns = load(folder / INDEX) if columns is None else columns
        super().__init__(columns)
        self._places = _Places(folder, columns)
        # Compare the length of each shard with the end of its last image: a shard cut short is found now and not in
        # the middle of an epoch.
        for path, end in zip(self._places.paths, self._places.ends(), strict=True):
            size = path.stat().st_size if path.exists() else 0
            if size < end:
                raise ConfigError(
                    f"{printable(path)} has {size} bytes, its index expects {end}; "
                    f"delete {printable(folder)} and write it again"
                )

    def read(self, index: int) -> bytes:
        return self._places.read(index)

    def stamps(self) -> np.ndarray:
        return stamps_of(self._places.paths)[self._places.shards]

    def name(self, index: int) -> str:
        return f"{printable(self._places.path(index))}:{printable(self._names[index])}"


class _Places:
    """Where images lie in the shards of a folder. columns: those of PLACE, and the names of the shards."""

    def __init__(self, folder: Path, columns: Columns) -> None:
        self.shards, self._offsets, self._sizes = (columns.numbers[name] for name in PLACE)
        self.paths = [folder / os.fsdecode(name) for name in columns.texts["shard_names"]]
        self._open = lru_cache(OPEN_SHARDS)(_OpenFile)

    def path(self, index: int) -> Path:
        return self.paths[self.shards[index]]

    def ends(self) -> np.ndarray:
        """Of each shard, the end of its last image."""
        ends = np.zeros(len(self.paths), np.int64)
        np.maximum.at(ends, self.shards, self._offsets + self._sizes)
        return ends

    def read(self, index: int, start: int = 0, size: int = -1) -> bytes:
        """Return an image, or a part of it as ``encoded.measure`` asks for it."""
        whole = int(self._sizes[index])
        if whole in UNREADABLE:
            raise BadImageError(UNREADABLE[whole])
        first = max(whole + start, 0) if start < 0 else start
        count = whole - first if size < 0 else min(size, whole - first)
        refuse_too_many_bytes(count)
        return self._open(self.path(index)).read(int(self._offsets[index]) + first, count)


class _OpenFile:
    """A file opened for reading, closed when its last user lets go of it.

    The cache may drop a file that another thread is still reading, so the cache must not close files itself.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on. Raises OSError where the file ends before."""
        parts = []
        while size:  # pread may return fewer bytes than were asked for
            # pread keeps no position in the file: threads and forked processes can share the descriptor.
            part = os.pread(self._descriptor, size, offset)
            if not part:
                raise OSError(errno.EIO, "the file ends too early", str(self._path))
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return b"".join(parts)


def open_packed(folder: Path, cache_dir: Path, pixels: Pixels = LATEST) -> TarShards:
    """Open a folder of shards with an index. If its images were measured by another version of pixels, or some are
    too large, they are measured again, once: the result is kept in `cache_dir`.
    """
    written = load(folder / INDEX)
    shards = TarShards(folder, written)
    is_measured = written.numbers.get(PIXELS, [1])[0] == pixels.version
    if is_measured and (shards.heights * shards.widths <= most_pixels()).all():
        return shards
    stat = (folder / INDEX).stat()
    key = folder.resolve(), stat.st_size, stat.st_mtime_ns
    index_path = cache_path(cache_dir, "packed", *key, pixels=pixels)

    def build() -> Columns:
        names, labels, read = list(written.texts["names"]), written.numbers["labels"], shards._places.read
        return written | read_image_headers(shards.classes, names, labels, read, folder, index_path, pixels)

    return TarShards(folder, cached(index_path, build, lambda columns: True))


# --- Shards without an index ---


def tars_named(where: str) -> list[Path]:
    """The tar files that a path or a pattern names, as a-{000..123}.tar or shards/*.tar; empty for another path."""
    if not where.endswith(".tar") and not where.endswith("}"):
        return []
    names = [str(Path(each).expanduser()) for each in _expanded(where)]
    found = {each: _matching(each) for each in names}
    missing = [printable(each) for each, paths in found.items() if not paths]
    if len(missing) < len(found) and missing:
        raise MissingInputError(f"{len(missing)} of {len(names)} shards do not exist: {shorten(missing)}")
    paths = dict.fromkeys(Path(name) for paths in found.values() for name in paths)
    return [path for path in paths if path.is_file() and path.suffix == ".tar"]


def _matching(pattern: str) -> list[str]:
    """What a pattern names: itself where that exists, and folders as they are called where these exist."""
    if os.path.exists(pattern):
        return [pattern]
    folder, name = os.path.split(pattern)
    return sorted(glob.glob(os.path.join(glob.escape(folder), name) if os.path.isdir(folder) else pattern))


def _expanded(pattern: str) -> list[str]:
    """The names that braces stand for: {000..123} with as many digits, {a,b}. As in bash.

    Raises ConfigError for more than MOST_SHARDS.
    """
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    behind = _expanded(pattern[found.end() :])
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        is_padded = any(len(each) > 1 and each[0] == "0" for each in numbers.groups())
        width = max(map(len, numbers.groups())) if is_padded else 1
        step = 1 if last >= first else -1
        parts: Sequence[str | int] = range(first, last + step, step)
    elif "," in found[1]:
        parts, width = found[1].split(","), 0
    else:
        parts, width = [found[0]], 0
    if len(parts) * len(behind) > MOST_SHARDS:
        raise ConfigError(f"{printable(pattern)} names more than {MOST_SHARDS} shards")
    before = pattern[: found.start()]
    return [f"{before}{str(part).zfill(width)}{rest}" for part in parts for rest in behind]


def common_folder(paths: Sequence[Path]) -> Path:
    """The folder in which all these files lie, at some depth."""
    return Path(os.path.commonpath([path.parent.absolute() for path in paths]))


def open_foreign_shards(
    folder: Path,
    cache_dir: Path,
    pixels: Pixels = LATEST,
    paths: Sequence[Path] | None = None,
    label_key: str | None = None,
) -> TarShards:
    """Open tar files in WebDataset's layout that have no index: scan them once and cache an index.

    folder: with the files. paths: of those that count, at any depth in the folder; None: its *.tar.

    An image is a member with an image's extension. Its label is the content of NAME.cls beside it, or what NAME.json
    has under ``label_key``: a number or the name of a class. If the folder has a classes.txt, its lines are the
    classes, and numbers count them from 0; otherwise the classes are the labels in sorted order. The index is kept in
    `cache_dir` until the name, size or modification time of a file changes.

    Raises ConfigError for a file that is not a complete, uncompressed tar file, for images without a label, and for
    labels that classes.txt does not have.
    """
    paths = tar_files(folder) if paths is None else [path.absolute() for path in paths]
    if pixels is not FIRST:  # links to the same file
        paths = list({path.resolve(): path for path in reversed(paths)}.values())[::-1]
    names = [os.path.relpath(path, folder) for path in paths]
    parents = [folder] if pixels is FIRST else dict.fromkeys([folder, *(path.parent for path in paths)])
    files = [*paths, *(parent / CLASSES for parent in parents if (parent / CLASSES).exists())]
    stats: list[str | int] = [] if label_key is None else [f"labels by {label_key}"]
    for path in files:
        stats += [os.path.relpath(path, folder), path.stat().st_size, path.stat().st_mtime_ns]
    index_path = cache_path(cache_dir, "shards", folder.resolve(), *stats, pixels=pixels)

    def build() -> Columns:
        images, texts, places, notes = _scan_shards(folder, paths, pixels, label_key)
        classes, labels, unused = _classes(folder, paths, places[:, 0], texts, pixels)
        if unused:
            notes.append(
                f"{CLASSES} in {printable(folder)} names {len(unused)} classes without images: {shorten(unused)}"
            )
        shards = {
            "shard_names": Texts.of([os.fsencode(name) for name in names]),
            NOTES: Texts.of([note.encode() for note in notes]),
        }
        placed = Columns(dict(zip(PLACE, places.T, strict=True)), shards)
        read = _Places(folder, placed).read
        return placed | read_image_headers(classes, images, labels, read, folder, index_path, pixels)

    return TarShards(folder, cached(index_path, build, lambda columns: True))


def _classes(
    folder: Path, paths: Sequence[Path], shards: np.ndarray, texts: Sequence[str], pixels: Pixels
) -> tuple[tuple[str, ...], np.ndarray, list[str]]:
    """Return the classes, the class of each image, (N,) int64, and the classes without images, for a message.

    folder: whose classes.txt counts for all images; without one, that beside an image's shard counts for the image, and
    without any the labels do. shards: (N,), each image's place in ``paths``. texts: its label.
    """
    common = folder / CLASSES
    is_common = common.exists()
    if pixels is FIRST:
        if not is_common:
            return *number_classes(texts, pixels), []
        classes = tuple(filter(None, common.read_text("utf-8-sig", "surrogateescape").split("\n")))
        return classes, labels_by_file(common, classes, texts), []
    shards_of: dict[Path, list[int]] = {}
    for number, path in enumerate(paths):
        shards_of.setdefault(common if is_common else path.parent / CLASSES, []).append(number)
    named = np.array(texts, object)
    lists = []
    for file, numbers in shards_of.items():
        if file.exists():
            classes = read_classes(file)
            here = np.flatnonzero(np.isin(shards, numbers))
            named[here] = np.array(classes, object)[labels_by_file(file, classes, named[here].tolist())]
            lists.append(classes)
    if not lists:
        return *number_classes(texts, pixels), []
    # The order of the file, where there is one for all.
    are_one = len(set(lists)) == 1 and len(lists) == len(shards_of)
    classes = lists[0] if are_one else number_classes([*itertools.chain(*lists), *named], pixels)[0]
    number_of = {name: number for number, name in enumerate(classes)}
    labels = np.array([number_of[name] for name in named], np.int64)
    return classes, labels, [printable(classes[label]) for label in sorted({*range(len(classes))} - {*labels.tolist()})]


def tar_files(folder: Path) -> list[Path]:
    """Return the *.tar files of a folder in sorted order, without hidden ones."""
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def _scan_shards(
    folder: Path, paths: Sequence[Path], pixels: Pixels, label_key: str | None
) -> tuple[list[bytes], list[str], np.ndarray, list[str]]:
    """Find the N images in the tar files. Returns their names, their labels as text, the columns of PLACE, (N, 3), and
    what is to be said of members that are passed over.

    Raises ConfigError where there is no image.
    """
    names: list[bytes] = []
    passed = Counter[str]()
    texts: list[str] = []
    places: list[tuple[int, int, int]] = []
    title = f"scanning {printable(folder)}"
    scan = partial(_scan_shard, pixels=pixels, label_key=label_key)
    with ProgressBar(title, len(paths), "shards") as progress, ThreadPoolExecutor(THREADS) as threads:
        for shard, (found, others) in enumerate(threads.map(scan, paths)):
            for name, offset, size, text in found:
                names.append(name)
                texts.append(text)
                places.append((shard, offset, size))
            passed += others
            progress.advance()
    if not names:
        raise ConfigError(
            f"{printable(folder)} has {len(paths)} tar files and no images in them; an image is called "
            f"NAME.jpg ({shorten(sorted(pixels.extensions), 8)}), its label NAME{LABEL}"
            f"{''.join(f'; {note}' for note in (*notes_of(passed, folder, inside_tars=True), *hints_for(passed)))}"
        )
    return names, texts, np.array(places, np.int64), notes_of(passed, folder, inside_tars=True)


def _scan_shard(
    path: Path, pixels: Pixels, label_key: str | None
) -> tuple[list[tuple[bytes, int, int, str]], Counter[str]]:
    """Find the images in a tar file. Returns (name, offset, size, text of the label) of each, and the number of members
    that are passed over, by extension.

    Links are followed inside the file. The size of an image that cannot be read is one of UNREADABLE. label_key: of the
    label in the .json beside each image; None: it is in its .cls.
    Raises ConfigError for a file that is damaged or compressed, two images of one key, and images without a label.
    """
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, tuple[str, str]] = {}  # of each key, and the member that says so
    passed = Counter[str]()
    holds_label = LABEL if label_key is None else JSON
    keys: Sequence[str] = ()  # of a .json that is passed over
    try:
        # "r:" refuses compressed files, in which offsets would be useless.
        with path.open("rb") as file, tarfile.open(path, "r:", file) as tar:
            members = [*tar_members(tar, demand_end=pixels is not FIRST)]
            if pixels is FIRST:
                members = [member for member in members if member.isreg() and not member.issparse()]
            by_name = {os.path.normpath(member.name): member for member in members}
            for member in members:
                if _is_skipped(member.name, pixels):
                    continue
                key, suffix = split_key(member.name) if pixels is FIRST else image_key(member.name, pixels)
                if suffix in pixels.extensions:
                    if key in images:
                        raise ConfigError(
                            f"{printable(path)} has two images of one name, {printable(images[key].name)} and "
                            f"{printable(member.name)}; leave one of them out"
                        )
                    images[key] = member
                elif suffix == holds_label:
                    data = _start_of(tar, followed(member, by_name))
                    if label_key is None:
                        text = data.decode("utf-8", "surrogateescape")
                    else:
                        text = _json_label(data, label_key, member, path)
                    where = f"{printable(path)}: {printable(member.name)}"
                    label = text.strip() if pixels is FIRST else label_text(text, where)
                    other, name = labels.setdefault(key, (label, member.name))
                    if label != other and pixels is not FIRST:
                        raise ConfigError(
                            f"{where} says {printable(label)}, and {printable(name)} {printable(other)} of the same "
                            "image; leave one of them out"
                        )
                    labels[key] = label, member.name
                else:
                    if suffix == JSON and not keys:
                        keys = _json_keys(_start_of(tar, followed(member, by_name)))
                    passed[os.path.splitext(member.name)[1].lower()] += 1
    except tarfile.TarError as error:
        raise ConfigError(
            f"{printable(path)} is not a whole, uncompressed tar file ({reason_text(error)}); restore or remove it"
        ) from error
    unlabelled = [key for key in images if not labels.get(key, ("", ""))[0]]
    for key in [key for key in unlabelled if "." in os.path.basename(key)]:
        # Of several images of one sample, as in NAME.left.jpg, none has the sample's label to itself.
        passed[split_key(images.pop(key).name)[1]] += 1
        unlabelled.remove(key)
    if unlabelled:
        names = [printable(images[key].name) for key in unlabelled]
        hint = ""
        if keys:
            hint = f"; its .json files have {shorten(keys, 8)}: name the label's by data.label_key (pack: --label-key)"
        elif not labels and all(os.path.dirname(os.path.normpath(images[key].name)) for key in unlabelled):
            hint = "; or, if its folders are the classes, unpack it and give the folder"
        raise ConfigError(
            f"{printable(path)} has {len(unlabelled)} of {len(images)} images without a label: {shorten(names)}; "
            f"write each label, a number or a class's name, beside its image as NAME{holds_label}{hint}"
        )
    return [(os.fsencode(each.name), *_place(each, by_name), labels[key][0]) for key, each in images.items()], passed


def _is_skipped(name: str, pixels: Pixels) -> bool:
    """Whether a member lies in a folder that does not count, or is hidden, as in class folders."""
    parts = name.removeprefix("./").split("/")
    return pixels is not FIRST and any(part.startswith(".") or part in pixels.skipped for part in parts if part != "..")


def _place(member: tarfile.TarInfo, by_name: Mapping[str, tarfile.TarInfo]) -> tuple[int, int]:
    """Offset and size of an image, or 0 and why it cannot be read."""
    found = followed(member, by_name)
    if found is None:
        return 0, NOWHERE
    return (0, IN_PIECES) if found.issparse() else (found.offset_data, found.size)


def _start_of(tar: tarfile.TarFile, member: tarfile.TarInfo | None) -> bytes:
    content = None if member is None else tar.extractfile(member)
    return b"" if content is None else content.read(MOST_LABEL_BYTES)


def _json_keys(data: bytes) -> list[str]:
    """The keys of a .json, for a message."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return []
    return [printable(key) for key in found] if isinstance(found, dict) else []


def _json_label(data: bytes, label_key: str, member: tarfile.TarInfo, path: Path) -> str:
    """The label in a .json. Raises ConfigError where there is none."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{printable(path)}: {printable(member.name)} is no JSON ({reason_text(error)})") from None
    label = found.get(label_key) if isinstance(found, dict) else None
    if isinstance(label, float) and label.is_integer():  # as pandas writes whole numbers beside missing ones
        label = int(label)
    if isinstance(label, bool) or not isinstance(label, str | int) or not str(label).strip():
        raise ConfigError(
            f"{printable(path)}: {printable(member.name)} has no text or number called {printable(label_key)}, by "
            f"data.label_key; it has {shorten(_json_keys(data), 8)}"
        )
    return str(label)


def image_key(name: str, pixels: Pixels) -> tuple[str, str]:
    """As ``split_key``, but where this finds no image or label, at the last dot: the key of a.b.jpg is a.b."""
    name = os.path.normpath(name)  # ./a.jpg is a.jpg
    key, suffix = split_key(name)
    stem, last = os.path.splitext(name)
    if _counts(suffix, pixels) or not _counts(last.lower(), pixels):
        return key, suffix
    return stem, last.lower()


def _counts(suffix: str, pixels: Pixels) -> bool:
    return suffix in (LABEL, JSON) or suffix in pixels.extensions


def split_key(name: str) -> tuple[str, str]:
    """Split a member's name into key and lower-case suffix by WebDataset's rule. Both are empty if it has no key."""
    found = KEY.fullmatch(name)
    return (found[1], found[2].lower()) if found else ("", "")
