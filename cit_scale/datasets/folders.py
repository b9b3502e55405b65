"""Images in files of their own: a folder with a sub-folder per class, or a table of paths and labels."""

from __future__ import annotations

import csv
import errno
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
    measure_image,
    number_classes,
    printable,
    read_image_headers,
    shorten,
)
from cit_scale.errors import BadImageError, ConfigError

CLOCK_TICK_S = 0.02  # two changes of a folder closer than this may bear the same time
DELIMITERS = {".csv": ",", ".tsv": "\t"}


class _ImageFiles(Indexed):
    """Image files by their paths relative to `folder`."""

    def __init__(self, folder: Path, columns: Columns) -> None:
        super().__init__(columns)
        self.folder = folder

    def read(self, index: int) -> bytes:
        return _read_file(self.folder, self._names[index])

    def name(self, index: int) -> str:
        return printable(os.path.join(os.fsencode(self.folder), self._names[index]))


class ImageFolder(_ImageFiles):
    """A folder with one sub-folder of images per class; the classes are the sub-folders' names in sorted order.

    The index is kept at `index_path` and is good for as long as no folder in it has changed, by its time, and no file
    that could not be read has become readable. So opening asks for some thousand folders' times and not for a million
    files'; the price is that a file overwritten in place goes unnoticed here, and is noticed, where its size in pixels
    has changed, when it is decoded. Deleting `index_path` makes the index anew.

    Raises ConfigError for a folder that is no data set, or has a class without a readable image.
    """

    def __init__(self, folder: Path, cache_dir: Path) -> None:
        # With the folder's time in its name, machines that have other images at the same path can share a cache.
        self.index_path = cache_path(cache_dir, "folder", folder.resolve(), folder.stat().st_mtime_ns)

        def is_valid(columns: Columns) -> bool:
            with ThreadPoolExecutor(THREADS) as threads:
                times = threads.map(lambda name: _folder_time(folder, name), columns["folders"])
                return list(times) == columns["times"].tolist() and not _any_readable(folder, columns)

        super().__init__(folder, cached(self.index_path, lambda: _index_folder(folder, self.index_path), is_valid))


class Manifest(_ImageFiles):
    """A table of paths and labels: a .csv or .tsv file with two columns. The classes are the labels in sorted order,
    by number where all are numbers.

    Paths are relative to the file's folder. The first line is a header if what it names in its first column neither is
    a file nor has an image's extension. Cells are quoted as Python's csv module reads them. The index is kept at
    `index_path` until the table changes or a file that was missing appears; as with ImageFolder, files that are
    overwritten in place go unnoticed.

    Raises ConfigError for lines that cannot be understood, and for a class without a readable image.
    """

    def __init__(self, path: Path, cache_dir: Path) -> None:
        stat = path.stat()
        self.index_path = cache_path(cache_dir, "manifest", path.resolve(), stat.st_size, stat.st_mtime_ns)

        def build() -> Columns:
            names, texts = _read_manifest(path)
            classes, labels = number_classes(texts)

            def read(index: int, size: int) -> bytes:
                return _read_file(path.parent, names[index], size)

            return read_image_headers(classes, names, labels, read, path, self.index_path)

        columns = cached(self.index_path, build, lambda columns: not _any_readable(path.parent, columns))
        super().__init__(path.parent, columns)


def _read_file(folder: Path, name: bytes, size: int = -1) -> bytes:
    """Raises BadImageError for a path that no file can have, and for what is no file: a pipe would be waited for."""
    try:
        descriptor = os.open(os.path.join(folder, os.fsdecode(name)), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError:
        raise BadImageError("a path with a null byte") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO):
            raise BadImageError(str(error.strerror)) from None
        raise
    with open(descriptor, "rb", buffering=0) as file:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise BadImageError("a folder" if stat.S_ISDIR(mode) else "not a file")
        return file.read(size)


def _folder_time(folder: Path, name: bytes) -> int | None:
    """When a folder was last changed, in nanoseconds; None for one that has gone."""
    try:
        return os.stat(os.path.join(os.fsencode(folder), name)).st_mtime_ns
    except FileNotFoundError:
        return None


def _any_readable(folder: Path, columns: Columns) -> bool:
    """Whether one of the images that were unusable no longer is."""
    names = columns["names"]

    def is_readable(index: int) -> bool:
        try:
            measure_image(lambda index, size: _read_file(folder, names[index], size), index)
        except UNUSABLE:
            return False
        return True

    with ThreadPoolExecutor(THREADS) as threads:
        return any(threads.map(is_readable, columns["rejects"].tolist()))


def _index_folder(folder: Path, index_path: Path) -> Columns:
    times: list[tuple[bytes, int]] = []
    found = find_files(folder, EXTENSIONS, "images", lambda inside: times.append(_settled_time(folder, inside)))
    classes = list(found)
    images = [[os.fsencode(name) for name in names] for names in found.values()]
    names = [name for found in images for name in found]
    labels = np.repeat(np.arange(len(classes)), [len(found) for found in images])

    def read(index: int, size: int) -> bytes:
        return _read_file(folder, names[index], size)

    return {
        **read_image_headers(classes, names, labels, read, folder, index_path),
        "folders": Texts.of([name for name, _ in times]),
        "times": np.array([time_ns for _, time_ns in times]),
    }


def find_files(
    folder: Path, extensions: Collection[str], what: str, enter: Callable[[str], None] = lambda inside: None
) -> dict[str, list[str]]:
    """By class, in sorted order: the files with these extensions in a folder of class folders, and below, by their
    paths relative to `folder`. enter: called with each folder's relative path before its names are read.

    Raises ConfigError where there are no classes, a class without `what`, or links in a circle.
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
            if entry.is_symlink() and Path(entry.path).parent.resolve().is_relative_to(Path(entry.path).resolve()):
                raise ConfigError(f"{printable(entry.path)} is a link to a folder that it stands in; remove it")
            yield from _find_inside(folder, f"{inside}/{entry.name}", extensions, enter)
        elif os.path.splitext(entry.name)[1].lower() in extensions:
            yield f"{inside}/{entry.name}"


def _entries(folder: Path, inside: str, enter: Callable[[str], None]) -> list[os.DirEntry[str]]:
    """What is shown in folder/inside, in sorted order."""
    enter(inside)
    return sorted(filter(is_shown, os.scandir(folder / inside)), key=lambda entry: entry.name)


def _settled_time(folder: Path, inside: str) -> tuple[bytes, int | None]:
    """A folder's name and time, at a moment after which every change shows in the time."""
    name = os.fsencode(inside)
    time_ns = _folder_time(folder, name)
    if time_ns is not None and 0 <= time.time_ns() - time_ns < CLOCK_TICK_S * 1e9:
        time.sleep(CLOCK_TICK_S)
        time_ns = _folder_time(folder, name)
    return name, time_ns


def is_folder(entry: os.DirEntry[str]) -> bool:
    """A link that leads nowhere is none; what it is called says whether it counts as a broken image."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_shown(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".")  # not .git, .ipynb_checkpoints, or the ._ files that some systems leave


def _read_manifest(path: Path) -> tuple[list[bytes], list[str]]:
    """Paths and labels. Raises ConfigError with the numbers of the lines that cannot be understood."""
    names: list[bytes] = []
    texts: list[str] = []
    mistakes: list[str] = []
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
