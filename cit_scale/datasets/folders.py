"""Data sets with one file per image: a folder with one sub-folder per class, or a table of paths and labels."""

from __future__ import annotations

import csv
import errno
import functools
import os
import stat
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from cit_scale.datasets.encoded import EXTENSIONS
from cit_scale.datasets.index import (
    THREADS,
    UNUSABLE,
    Columns,
    Indexed,
    Texts,
    cache_path,
    cached,
    number_classes,
    printable,
    read_image_headers,
    shorten,
)
from cit_scale.datasets.pixels import LATEST, Pixels
from cit_scale.errors import BadImageError, ConfigError

CLOCK_TICK_S = 0.02  # two changes of a folder within this time may leave the same modification time
DELIMITERS = {".csv": ",", ".tsv": "\t"}


class _ImageFiles(Indexed):
    """Image files, addressed by their paths relative to `folder`."""

    def __init__(self, folder: Path, columns: Columns) -> None:
        super().__init__(columns)
        self.folder = folder

    def read(self, index: int) -> bytes:
        return _read_file(self.folder, self._names[index])

    def name(self, index: int) -> str:
        return printable(os.path.join(os.fsencode(self.folder), self._names[index]))


class ImageFolder(_ImageFiles):
    """A folder with one sub-folder of images per class; the classes are the sub-folders' names in sorted order.

    The index is cached at `index_path`. It is reused while the modification times of all folders are unchanged and no
    file that could not be read has become readable. Opening therefore checks a few thousand folders instead of a
    million files. The price: a file overwritten in place is not noticed here, but only when it is decoded, and only if
    its size in pixels has changed. Delete `index_path` to rebuild the index.

    Raises ConfigError for a folder without class folders, or with a class without a readable image.
    """

    def __init__(self, folder: Path, cache_dir: Path, pixels: Pixels = LATEST) -> None:
        # The folder's time is part of the name, so that machines with different images at the same path can share a
        # cache folder.
        self.index_path = cache_path(cache_dir, "folder", folder.resolve(), folder.stat().st_mtime_ns, pixels=pixels)

        def is_valid(columns: Columns) -> bool:
            with ThreadPoolExecutor(THREADS) as threads:
                times = threads.map(lambda name: _folder_time_now(folder, name), columns.texts["folders"])
                return list(times) == columns.numbers["times"].tolist() and not _any_readable(folder, columns, pixels)

        def build() -> Columns:
            return _index_folder(folder, self.index_path, pixels)

        super().__init__(folder, cached(self.index_path, build, is_valid))


class Manifest(_ImageFiles):
    """A table of paths and labels: a .csv or .tsv file with two columns. The classes are the labels in sorted order,
    in numeric order if all labels are numbers.

    Paths are relative to the table's folder. The first line is skipped as a header if its first column neither names an
    existing file nor has an image's extension. Quoting follows Python's csv module. The index is cached at `index_path`
    until the table changes or an unreadable file becomes readable; as with ImageFolder, files that are overwritten in
    place are not noticed.

    Raises ConfigError for lines that cannot be parsed, and for a class without a readable image.
    """

    def __init__(self, path: Path, cache_dir: Path, pixels: Pixels = LATEST) -> None:
        stat = path.stat()
        key = path.resolve(), stat.st_size, stat.st_mtime_ns
        self.index_path = cache_path(cache_dir, "manifest", *key, pixels=pixels)

        def build() -> Columns:
            names, texts = _read_manifest(path)
            classes, labels = number_classes(texts)

            def read(index: int, start: int, size: int) -> bytes:
                return _read_file(path.parent, names[index], start, size)

            return read_image_headers(classes, names, labels, read, path, self.index_path, pixels)

        columns = cached(self.index_path, build, lambda columns: not _any_readable(path.parent, columns, pixels))
        super().__init__(path.parent, columns)


def _read_file(folder: Path, name: bytes, start: int = 0, size: int = -1) -> bytes:
    """Return `size` bytes of folder/name from `start` on; of its end for a negative start, all of them for size -1.

    Raises BadImageError for an impossible path and for anything but a regular file, and OSError where reading fails.
    """
    descriptor = open_without_waiting(os.path.join(folder, os.fsdecode(name)))
    with open(descriptor, "rb", buffering=0) as file:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise BadImageError("a folder" if stat.S_ISDIR(mode) else "not a file")
        if start:
            file.seek(max(start, -os.fstat(descriptor).st_size), os.SEEK_SET if start > 0 else os.SEEK_END)
        return file.read(size)


def open_without_waiting(path: str) -> int:
    """Return a descriptor for reading a path, which may turn out to be no regular file.

    Raises BadImageError for an impossible path, and OSError.
    """
    # O_NONBLOCK: opening a named pipe would otherwise wait for a writer. Regular files ignore the flag.
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError:
        raise BadImageError("a path with a null byte") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO):
            raise BadImageError(str(error.strerror)) from None
        raise


def _folder_time(folder: Path, name: bytes) -> int:
    """Return the modification time of folder/name in nanoseconds. Raises FileNotFoundError."""
    return os.stat(os.path.join(os.fsencode(folder), name)).st_mtime_ns


def _folder_time_now(folder: Path, name: bytes) -> int | None:
    """Return what `_folder_time` does; None if the folder no longer exists."""
    try:
        return _folder_time(folder, name)
    except FileNotFoundError:
        return None


def _any_readable(folder: Path, columns: Columns, pixels: Pixels) -> bool:
    """Whether one of the images listed as unusable can be read now."""
    names = columns.texts["names"]

    def is_readable(index: int) -> bool:
        try:
            pixels.measure(functools.partial(_read_file, folder, names[index]))
        except UNUSABLE:
            return False
        return True

    with ThreadPoolExecutor(THREADS) as threads:
        return any(threads.map(is_readable, columns.numbers["rejects"].tolist()))


def _index_folder(folder: Path, index_path: Path, pixels: Pixels) -> Columns:
    """Return the columns of `read_image_headers` and the name and modification time of every folder."""
    times: list[tuple[bytes, int]] = []
    found = find_files(folder, EXTENSIONS, "images", lambda inside: times.append(_settled_time(folder, inside)))
    classes = list(found)
    images = [[os.fsencode(name) for name in names] for names in found.values()]
    names = [name for found in images for name in found]
    labels = np.repeat(np.arange(len(classes)), [len(found) for found in images])

    def read(index: int, start: int, size: int) -> bytes:
        return _read_file(folder, names[index], start, size)

    return read_image_headers(classes, names, labels, read, folder, index_path, pixels) | Columns(
        numbers={"times": np.array([time_ns for _, time_ns in times])},
        texts={"folders": Texts.of([name for name, _ in times])},
    )


def find_files(
    folder: Path, extensions: Collection[str], what: str, enter: Callable[[str], None] = lambda inside: None
) -> dict[str, list[str]]:
    """Find the files with these extensions in a folder of class folders, at any depth below a class folder.

    extensions: in lower case, with the dot. what: the word for them in messages, as "images". enter: called with
    the relative path of each folder before the folder is listed.
    Returns class -> paths relative to `folder`, both in sorted order.
    Raises ConfigError where there are no class folders, a class has no such file, or a link leads in a circle.
    """
    classes = [entry.name for entry in _entries(folder, "", enter) if is_folder(entry)]
    if not classes:
        raise ConfigError(f"{printable(folder)} has no sub-folders; it needs one sub-folder of {what} per class")
    found = {name: list(_find_inside(folder, name, extensions, enter)) for name in classes}
    empty = [printable(name) for name in classes if not found[name]]
    if empty:
        raise ConfigError(
            f"{printable(folder)} has no {what} for {len(empty)} of {len(classes)} classes: {shorten(empty)}; "
            f"add {what} ({' '.join(sorted(extensions))}) or remove these folders"
        )
    return found


def _find_inside(folder: Path, inside: str, extensions: Collection[str], enter: Callable[[str], None]) -> Iterator[str]:
    for entry in _entries(folder, inside, enter):
        if is_folder(entry):
            # A link to one of its own parents would be followed for ever.
            if entry.is_symlink() and Path(entry.path).parent.resolve().is_relative_to(Path(entry.path).resolve()):
                raise ConfigError(f"{printable(entry.path)} is a link to a folder that contains the link; remove it")
            yield from _find_inside(folder, f"{inside}/{entry.name}", extensions, enter)
        elif os.path.splitext(entry.name)[1].lower() in extensions:
            yield f"{inside}/{entry.name}"


def _entries(folder: Path, inside: str, enter: Callable[[str], None]) -> list[os.DirEntry[str]]:
    """Return the entries of folder/inside that are not hidden, sorted by name."""
    enter(inside)
    return sorted(filter(is_shown, os.scandir(folder / inside)), key=lambda entry: entry.name)


def _settled_time(folder: Path, inside: str) -> tuple[bytes, int]:
    """Return a folder's name and modification time, read so late that every later change gets another time.

    Raises FileNotFoundError for a folder that no longer exists.
    """
    name = os.fsencode(inside)
    time_ns = _folder_time(folder, name)
    # Changed just now: a file added within the same clock tick would leave the time as it is, and the index stale.
    if 0 <= time.time_ns() - time_ns < CLOCK_TICK_S * 1e9:
        time.sleep(CLOCK_TICK_S)
        time_ns = _folder_time(folder, name)
    return name, time_ns


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one. A dangling link is none: by its name it may be a broken image."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_shown(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is not hidden: .git, .ipynb_checkpoints and the ._ files of some systems are no data."""
    return not entry.name.startswith(".")


def _read_manifest(path: Path) -> tuple[list[bytes], list[str]]:
    """Return the paths and the labels of a table. Raises ConfigError with the numbers of all lines that are wrong."""
    names: list[bytes] = []
    texts: list[str] = []
    mistakes: list[str] = []
    # utf-8-sig drops a byte order mark; surrogateescape keeps file names that are not UTF-8.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, delimiter=DELIMITERS[path.suffix.lower()], strict=True)
        is_first = True
        try:
            for row in rows:
                if not row:
                    continue
                if len(row) != 2:
                    mistakes.append(
                        f"line {rows.line_num} has {len(row)} columns instead of 2, path and label, with "
                        f"{'a comma' if rows.dialect.delimiter == ',' else 'a tab'} between them"
                    )
                elif not all(row):
                    mistakes.append(f"line {rows.line_num} has no {'label' if row[0] else 'path'}")
                elif not (is_first and _is_header(path.parent, row[0])):
                    names.append(os.fsencode(row[0]))
                    texts.append(row[1])
                is_first = False
        except csv.Error as error:
            mistakes.append(f"line {rows.line_num}: {error}")
    if mistakes:
        raise ConfigError(f"{printable(path)} cannot be understood: {shorten(mistakes)}")
    if not names:
        raise ConfigError(f"{printable(path)} names no images; write a path and a label on each line")
    return names, texts


def _is_header(folder: Path, cell: str) -> bool:
    return os.path.splitext(cell)[1].lower() not in EXTENSIONS and not os.path.isfile(folder / cell)
