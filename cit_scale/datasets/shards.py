"""Tar shards in the WebDataset layout: NAME.jpg beside NAME.cls, which holds the label.

A reader of ours goes by an index of where each image's bytes begin, so any image is one read away. Nothing is ever
extracted: the name of a member decides no path.
"""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import tarfile
import uuid
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from cit_scale.datasets.encoded import EXTENSIONS, read_size
from cit_scale.datasets.index import (
    THREADS,
    Columns,
    Indexed,
    Texts,
    cache_path,
    cached,
    concatenate,
    load,
    number_classes,
    printable,
    read_image_headers,
    reason_text,
    save,
    shorten,
)
from cit_scale.datasets.progress import ProgressBar
from cit_scale.errors import ConfigError
from cit_scale.files import sync

INDEX = "index.npz"  # comes last: a folder that has it is whole
SETTINGS = "pack.json"  # a folder that has it and no index is being packed
CLASSES = "classes.txt"
KEY = re.compile(r"((?:.*/)?[^./]+)(\.[^/]*)", re.DOTALL)  # WebDataset's: a key ends at the first dot of the last part
LABEL = ".cls"
PLACE = ("shards", "offsets", "sizes")  # the columns that say where an image's bytes are
OPEN_SHARDS = 256  # of each set at once; Linux gives a process 1024 files unless told otherwise


# --- Writing ---


class Row(NamedTuple):
    """One image for a shard. index: its number among all. height, width: of the upright image, in pixels."""

    index: int
    name: bytes
    suffix: str
    label: int
    height: int
    width: int
    data: bytes


class ShardWriter:
    """One shard while it is written; used as a context manager. It appears when it is committed, or not at all."""

    def __init__(self, path: Path, classes: Sequence[str]) -> None:
        self.path = path
        self._classes = classes
        self._partial = path.with_name(f".{path.name}.partial")
        self._tar = tarfile.open(self._partial, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115  closed on leaving
        self._rows: list[tuple[bytes, int, int, int, int, int]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # a full disk refuses the last bytes once more
            self._tar.fileobj.close()
        self._partial.unlink(missing_ok=True)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._tar.offset

    def add(self, row: Row) -> None:
        key = member_key(self._classes[row.label], row.name, row.index)
        self._add_member(key + row.suffix, row.data)
        offset = self.size - -(-len(row.data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE  # the data ends in padding
        self._rows.append((row.name, row.label, row.height, row.width, offset, len(row.data)))
        self._add_member(key + LABEL, str(row.label).encode())

    def commit(self) -> Columns:
        """Make the shard appear; the index of what is in it. Without images there is no shard, and an empty index."""
        self._tar.close()
        if self._rows:
            sync(self._partial)
            self._partial.rename(self.path)
            sync(self.path.parent)
        numbers = np.array([numbers for _, *numbers in self._rows], np.int64).reshape(-1, 5)
        columns = zip(("labels", "heights", "widths", "offsets", "sizes"), numbers.T, strict=True)
        return {"names": Texts.of([name for name, *_ in self._rows]), **dict(columns)}

    def _add_member(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))


def member_key(class_name: str, name: bytes, index: int) -> str:
    """A member's name before its suffix: legible, safe to extract anywhere, and unique in the data set by its index."""
    stem = os.path.splitext(os.path.basename(os.fsdecode(name)))[0]
    return f"{_safe(class_name)}/{_safe(stem)}-{index:08d}"


def shard_name(number: int) -> str:
    return f"{number:06d}.tar"


def write_index(folder: Path, classes: Sequence[str], parts: Sequence[Columns]) -> None:
    """Make the shards of `folder`, numbered from 0 and each described by one of `parts`, a data set."""
    (folder / CLASSES).write_text("".join(f"{printable(name)}\n" for name in classes), encoding="utf-8")
    sync(folder / CLASSES)
    columns = {
        **concatenate(parts),
        "shards": np.repeat(np.arange(len(parts)), [len(part["labels"]) for part in parts]),
        "shard_names": Texts.of([shard_name(number).encode() for number in range(len(parts))]),
        "classes": Texts.of([os.fsencode(name) for name in classes]),
        "rejects": np.array([], np.int64),
        "reasons": Texts.of([]),
    }
    save(folder / INDEX, columns)


def write_shards(
    folder: Path, classes: Sequence[str], images: Iterable[tuple[str, int, bytes]], images_per_shard: int = 10_000
) -> None:
    """Write images, each (name with extension, label, encoded bytes), as the shards of `folder`.

    The folder appears whole or not at all. If another process makes it appear first, that one stays.
    """
    partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.partial"
    partial.mkdir(parents=True)
    rows = _rows(images)
    parts = []
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
        except OSError:
            if not (folder / INDEX).exists():
                raise
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _rows(images: Iterable[tuple[str, int, bytes]]) -> Iterator[Row]:
    for index, (name, label, data) in enumerate(images):
        yield Row(index, os.fsencode(name), Path(name).suffix, label, *read_size(io.BytesIO(data)), data)


def _safe(text: str) -> str:
    """Letters, digits, - and _ only; 60 of them leave room for the rest in the 255 bytes of a file name."""
    return re.sub(r"[^\w-]+", "_", text)[:60].strip("_-") or "x"


# --- Reading ---


class TarShards(Indexed):
    """Tar shards with an index, so that any image is one read away and a shuffle is one over all of them.

    Raises ConfigError when a shard is shorter than the index says.
    """

    def __init__(self, folder: Path, columns: Columns | None = None) -> None:
        """columns: the index, where it is not in the folder itself."""
        columns = load(folder / INDEX) if columns is None else columns
        super().__init__(columns)
        self._shards, self._offsets, self._sizes = (columns[name] for name in PLACE)
        self._paths = [folder / os.fsdecode(name) for name in columns["shard_names"]]
        self._open = lru_cache(OPEN_SHARDS)(_OpenFile)
        ends = np.zeros(len(self._paths), np.int64)
        np.maximum.at(ends, self._shards, self._offsets + self._sizes)
        for path, end in zip(self._paths, ends, strict=True):
            size = path.stat().st_size if path.exists() else 0
            if size < end:
                raise ConfigError(
                    f"{printable(path)} has {size} bytes, its index expects {end}; "
                    f"delete {printable(folder)} and write it again"
                )

    def read(self, index: int) -> bytes:
        return self._open(self._paths[self._shards[index]]).read(int(self._offsets[index]), int(self._sizes[index]))

    def name(self, index: int) -> str:
        return f"{printable(self._paths[self._shards[index]])}:{printable(self._names[index])}"


class _OpenFile:
    """A file that closes when nobody uses it any more: a thread may still read what a cache has let go."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        parts = []
        while size:
            part = os.pread(self._descriptor, size, offset)
            if not part:
                raise OSError(errno.EIO, "the file ends too early", str(self._path))
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return b"".join(parts)


# --- Other people's shards ---


def open_foreign_shards(folder: Path, cache_dir: Path) -> TarShards:
    """The *.tar files of a folder, in WebDataset's layout and without an index: they are looked through once.

    An image is a regular file with an image's extension. Its label is what NAME.cls beside it holds, a number or a
    class's name. The classes are the lines of classes.txt in the folder, which numbers count from 0; without that file
    they are the labels in sorted order. The index is kept in `cache_dir` until a name, size or time of a file changes.

    Raises ConfigError for a file that is no whole tar file, and for images without a label.
    """
    paths = tar_files(folder)
    classes_file = folder / CLASSES
    files = [*paths, classes_file] if classes_file.exists() else paths
    stats = [part for path in files for part in (path.name, path.stat().st_size, path.stat().st_mtime_ns)]
    index_path = cache_path(cache_dir, "shards", folder.resolve(), *stats)

    def build() -> Columns:
        names, texts, places = _scan_shards(paths)
        if classes_file.exists():
            classes = tuple(filter(None, classes_file.read_text("utf-8-sig", "surrogateescape").split("\n")))
            labels = _labels_by_file(classes_file, classes, texts)
        else:
            classes, labels = number_classes(texts)
        open_file = lru_cache(OPEN_SHARDS)(_OpenFile)

        def read(index: int, size: int) -> bytes:
            shard, offset, whole = places[index].tolist()
            return open_file(paths[shard]).read(offset, whole if size < 0 else min(size, whole))

        return {
            **read_image_headers(classes, names, labels, read, folder, index_path),
            **dict(zip(PLACE, places.T, strict=True)),
            "shard_names": Texts.of([os.fsencode(path.name) for path in paths]),
        }

    return TarShards(folder, cached(index_path, build, lambda columns: True))


def tar_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def _scan_shards(paths: Sequence[Path]) -> tuple[list[bytes], list[str], np.ndarray]:
    """Names, texts of the labels, and (N, 3) shards, offsets and sizes of all images in some tar files."""
    names: list[bytes] = []
    texts: list[str] = []
    places: list[tuple[int, int, int]] = []
    title = f"looking through {printable(paths[0].parent)}"
    with ProgressBar(title, len(paths), "shards") as progress, ThreadPoolExecutor(THREADS) as threads:
        for shard, found in enumerate(threads.map(_scan_shard, paths)):
            for name, offset, size, text in found:
                names.append(name)
                texts.append(text)
                places.append((shard, offset, size))
            progress.advance()
    if not names:
        raise ConfigError(
            f"{printable(paths[0].parent)} has {len(paths)} tar files and no images in them; an image is called "
            f"NAME.jpg ({' '.join(sorted(EXTENSIONS))}) with no other dot, its label NAME{LABEL}"
        )
    return names, texts, np.array(places, np.int64)


def _scan_shard(path: Path) -> list[tuple[bytes, int, int, str]]:
    """The images in a tar file: name, offset, size and the text of the label."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.size < 0:
                    raise tarfile.ReadError(f"a member of {member.size} bytes")
                key, suffix = split_key(member.name)
                if not member.isreg() or member.issparse():
                    continue
                if suffix in EXTENSIONS:
                    if key in images:
                        raise ConfigError(
                            f"{printable(path)} has two images of one name, {printable(images[key].name)} and "
                            f"{printable(member.name)}; leave one of them out"
                        )
                    images[key] = member
                elif suffix == LABEL:
                    labels[key] = tar.extractfile(member).read(1 << 10).decode("utf-8", "surrogateescape").strip()
            # tarfile takes a header that it cannot read for the end.
            if any(os.pread(tar.fileobj.fileno(), tarfile.BLOCKSIZE, tar.offset)):
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
    except tarfile.TarError as error:
        raise ConfigError(
            f"{printable(path)} is not a whole, uncompressed tar file ({reason_text(error)}); restore or remove it"
        ) from error
    unlabelled = [printable(image.name) for key, image in images.items() if not labels.get(key)]
    if unlabelled:
        raise ConfigError(
            f"{printable(path)} has {len(unlabelled)} of {len(images)} images without a label: {shorten(unlabelled)}; "
            f"write each label, a number or a class's name, beside its image as NAME{LABEL}"
        )
    return [(os.fsencode(image.name), image.offset_data, image.size, labels[key]) for key, image in images.items()]


def split_key(name: str) -> tuple[str, str]:
    """A member's key and its suffix in small letters. Both are empty where WebDataset sees none."""
    found = KEY.fullmatch(name)
    return (found[1], found[2].lower()) if found else ("", "")


def _labels_by_file(classes_file: Path, classes: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """Labels as numbers of lines, if all of them can be; else as names."""
    by_number = {str(number): number for number in range(len(classes))}
    by_name = {name: number for number, name in enumerate(classes)}
    known = by_number if set(texts) <= by_number.keys() else by_name
    unknown = sorted(set(texts) - known.keys())
    if unknown:
        raise ConfigError(
            f"{printable(classes_file)} has {len(classes)} classes and not these labels: "
            f"{shorten([printable(text) for text in unknown])}; add them, or remove the file to go by the labels alone"
        )
    return np.array([known[text] for text in texts], np.int64)
