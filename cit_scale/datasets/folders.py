"""Data sets with one file per image: a folder with one sub-folder per class, or a table of paths and labels."""

from __future__ import annotations

import csv
import errno
import functools
import io
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cit_scale.datasets.encoded import refuse_too_many_bytes
from cit_scale.datasets.index import (
    NOTES,
    THREADS,
    UNUSABLE,
    Columns,
    Indexed,
    Texts,
    cache_path,
    cached,
    hints_for,
    notes_of,
    number_classes,
    printable,
    read_image_headers,
    shorten,
    stamps_of,
)
from cit_scale.datasets.labels import label_text, read_text
from cit_scale.datasets.pixels import FIRST, LATEST, Pixels
from cit_scale.errors import BadImageError, ConfigError

MOST_TRIED = 100  # images, or folders, to find out what a table means
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

    def stamps(self) -> np.ndarray:
        return stamps_of([os.path.join(os.fsencode(self.folder), name) for name in self._names])


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
            names, texts, notes = _read_manifest(path, pixels)
            classes, labels = number_classes(texts, pixels)

            def read(index: int, start: int, size: int) -> bytes:
                return _read_file(path.parent, names[index], start, size)

            said = Columns(texts={NOTES: Texts.of([note.encode() for note in notes])})
            return read_image_headers(classes, names, labels, read, path, self.index_path, pixels) | said

        columns = cached(self.index_path, build, lambda columns: not _any_readable(path.parent, columns, pixels))
        super().__init__(path.parent, columns)


def _read_file(folder: Path, name: bytes, start: int = 0, size: int = -1) -> bytes:
    """Return `size` bytes of folder/name from `start` on; of its end for a negative start, all of them for size -1.

    Raises BadImageError for an impossible path and for anything but a regular file, and OSError where reading fails.
    """
    descriptor = open_without_waiting(os.path.join(folder, os.fsdecode(name)))
    with open(descriptor, "rb", buffering=0) as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise BadImageError("a folder" if stat.S_ISDIR(about.st_mode) else "not a file")
        if size < 0:
            refuse_too_many_bytes(about.st_size)
        if start:
            file.seek(max(start, -about.st_size), os.SEEK_SET if start > 0 else os.SEEK_END)
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
    passed = Counter[str]()

    def enter(inside: str) -> None:
        times.append(_settled_time(folder, inside))

    found = find_files(
        folder, pixels.extensions, "images", enter, skipped=pixels.skipped, passed=passed, once=pixels is not FIRST
    )
    classes = pixels.sorted_folders(found)
    images = [[os.fsencode(name) for name in found[each]] for each in classes]
    names = [name for found in images for name in found]
    labels = np.repeat(np.arange(len(classes)), [len(found) for found in images])

    def read(index: int, start: int, size: int) -> bytes:
        return _read_file(folder, names[index], start, size)

    notes = [note.encode() for note in notes_of(passed, folder)]
    return read_image_headers(classes, names, labels, read, folder, index_path, pixels) | Columns(
        numbers={"times": np.array([time_ns for _, time_ns in times])},
        texts={
            "folders": Texts.of([name for name, _ in times]),
            NOTES: Texts.of(notes),
        },
    )


def find_files(
    folder: Path,
    extensions: Collection[str],
    what: str,
    enter: Callable[[str], None] = lambda inside: None,
    *,
    skipped: Collection[str] = (),
    passed: Counter[str] | None = None,
    once: bool = True,
) -> dict[str, list[str]]:
    """Find the files with these extensions in a folder of class folders, at any depth below a class folder.

    extensions: in lower case, with the dot. what: the word for them in messages, as "images". enter: called with
    the relative path of each folder before the folder is listed. skipped: names of folders that do not count. passed:
    counts the other files, by extension. once: a folder that several links of a class lead to counts once.
    Returns class -> paths relative to `folder`, both in sorted order.
    Raises ConfigError where there are no class folders, a class has no such file, or a link leads in a circle.
    """
    passed = Counter() if passed is None else passed
    classes = []
    batches = ""
    for entry in _entries(folder, "", enter):
        if not is_folder(entry):
            passed[_extension(entry.name)] += 1
            if entry.name.startswith(("data_batch_", "batches.meta")):
                batches = (
                    "; write the images of CIFAR's batches to a folder for each class first: torchvision reads them"
                )
        elif entry.name not in skipped:
            classes.append(entry.name)
    if not classes:
        hints = "".join(f"; {hint}" for hint in hints_for(passed)) + batches
        raise ConfigError(f"{printable(folder)} has no sub-folders; it needs one sub-folder of {what} per class{hints}")
    found = {name: list(_find_inside(folder, name, extensions, enter, skipped, passed, once)) for name in classes}
    empty = [printable(name) for name in classes if not found[name]]
    if empty:
        raise ConfigError(
            f"{printable(folder)} has no {what} for {len(empty)} of {len(classes)} classes: {shorten(empty)}; "
            f"add {what} ({shorten(sorted(extensions), 4)}) or remove these folders"
            f"{''.join(f'; {note}' for note in (*notes_of(passed, folder), *hints_for(passed)))}"
        )
    return found


def _find_inside(
    folder: Path,
    inside: str,
    extensions: Collection[str],
    enter: Callable[[str], None],
    skipped: Collection[str],
    passed: Counter[str],
    once: bool,
) -> Iterator[str]:
    """Not recursive: folders may lie deeper in each other than functions can."""
    entered = [(inside, *_open(folder, inside, enter))]
    around = {entered[0][2]}
    seen = set(around)
    while entered:
        inside, entries, identity = entered[-1]
        entry = next(entries, None)
        if entry is None:
            entered.pop()
            around.discard(identity)
        elif is_folder(entry):
            if entry.name in skipped:
                continue
            deeper = f"{inside}/{entry.name}"
            entries, identity = _open(folder, deeper, enter)
            if identity in around:
                raise ConfigError(f"{shown_path(entry.path)} is a link to a folder that contains the link; remove it")
            if once and identity in seen:
                continue
            seen.add(identity)
            around.add(identity)
            entered.append((deeper, entries, identity))
        elif _extension(entry.name) in extensions:
            yield f"{inside}/{entry.name}"
        else:
            passed[_extension(entry.name)] += 1


def _open(
    folder: Path, inside: str, enter: Callable[[str], None]
) -> tuple[Iterator[os.DirEntry[str]], tuple[int, int]]:
    """The entries of folder/inside, and by what it is known, whatever links lead to it. As ``_entries``."""
    entries = _entries(folder, inside, enter)
    about = os.stat(folder / inside)
    return iter(entries), (about.st_dev, about.st_ino)


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _entries(folder: Path, inside: str, enter: Callable[[str], None]) -> list[os.DirEntry[str]]:
    """Return the entries of folder/inside that are not hidden, sorted by name. Raises ConfigError if it is too deep."""
    try:
        enter(inside)
        return sorted(filter(is_shown, os.scandir(folder / inside)), key=lambda entry: entry.name)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise ConfigError(
            f"{shown_path(folder / inside)} is longer than a path may be; move the folder up, or remove it"
        ) from None


def shown_path(path: str | Path, most: int = 200) -> str:
    """A path for a message; of a long one the beginning and the end."""
    text = printable(path)
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


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


def _read_manifest(path: Path, pixels: Pixels) -> tuple[list[bytes], list[str], list[str]]:
    """Return the paths and the labels of a table, and what is to be said of it.

    Raises ConfigError with the numbers of all lines that are wrong.
    """
    table = _Table(path, pixels)
    rows = list(table.rows() if pixels is FIRST else table.distinct_rows())
    if table.mistakes:
        raise ConfigError(f"{printable(path)} cannot be understood: {shorten(table.mistakes)}{table.hint}")
    if not rows:
        raise ConfigError(f"{printable(path)} names no images; write a path and a label on each line")
    if pixels is not FIRST:
        _refuse_missing(path, rows[:MOST_TRIED])
    notes = [f"{printable(path)} names {table.repeated} images again, which count once"] if table.repeated else []
    return [os.fsencode(row.name) for row in rows], [row.label for row in rows], notes


class _Row(NamedTuple):
    line: int
    name: str
    label: str


class _Table:
    """A table as it is read. mistakes: a line for each. repeated: how many lines say again what others have said."""

    def __init__(self, path: Path, pixels: Pixels) -> None:
        self._path = path
        self._folder = path.parent
        self._pixels = pixels
        self.mistakes: list[str] = []
        self.hint = ""
        self.repeated = 0

    def rows(self) -> Iterator[_Row]:
        """The lines that name an image: all but a header, empty ones, and those with mistakes."""
        delimiter = DELIMITERS[self._path.suffix.lower()]
        if self._pixels is FIRST:
            # surrogateescape keeps file names that are not UTF-8.
            text = self._path.read_bytes().decode("utf-8-sig", "surrogateescape")
        else:
            text = read_text(self._path).rstrip("\x1a")  # which some programs write as the end of a file
            delimiter = _delimiter(text, delimiter)
        lines = csv.reader(
            io.StringIO(text, newline=""),
            delimiter=delimiter,
            strict=True,
            skipinitialspace=self._pixels is not FIRST and delimiter != "\t",
        )
        is_first = True
        try:
            for cells in lines:
                if not cells or (self._pixels is not FIRST and not any(map(str.strip, cells))):
                    continue
                if self._pixels is not FIRST and is_first and text.startswith("sep="):  # of a spreadsheet
                    text = ""
                    continue
                if len(cells) != 2:
                    between = {",": "a comma", "\t": "a tab"}.get(delimiter, repr(delimiter))
                    self.mistakes.append(
                        f"line {lines.line_num} has {len(cells)} columns instead of 2, path and label, with {between} "
                        "between them"
                    )
                elif row := self._row(lines.line_num, *cells, is_first=is_first):
                    yield row
                is_first = False
        except csv.Error as error:
            self.mistakes.append(f"line {lines.line_num}: {error}")

    def _row(self, line: int, name: str, label: str, *, is_first: bool) -> _Row | None:
        if self._pixels is not FIRST:
            name = _path_here(self._folder, name)
            try:
                label = label_text(label, f"line {line}")
            except ConfigError as error:
                self.mistakes.append(str(error))
                return None
        if not name or not label:
            self.mistakes.append(f"line {line} has no {'label' if name else 'path'}")
            return None
        return None if is_first and _is_header(self._folder, name, self._pixels) else _Row(line, name, label)

    def distinct_rows(self) -> Iterator[_Row]:
        """``rows`` without those that name the same image again, with the same label; others are mistakes."""
        first: dict[str, _Row] = {}
        folders: dict[str, str] = {}  # as they are reached, and where they lie

        def place(name: str) -> str:
            folder, base = os.path.split(os.path.join(self._folder, name))
            if folder not in folders:
                folders[folder] = os.path.realpath(folder)
            return os.path.join(folders[folder], base)

        for row in self.rows():
            met = first.setdefault(place(row.name), row)
            if met is row:
                yield row
            elif met.label == row.label:
                self.repeated += 1
            else:
                self.mistakes.append(
                    f"line {row.line} says {printable(row.label)} of {printable(row.name)}, and line {met.line} "
                    f"{printable(met.label)}"
                )
                if _are_swapped(self._folder, row):
                    self.hint = SWAPPED


SWAPPED = "; write the path first, then the label"


def _are_swapped(folder: Path, row: _Row) -> bool:
    return os.path.isfile(folder / row.label) and not os.path.lexists(folder / row.name)


def _refuse_missing(path: Path, rows: Sequence[_Row]) -> None:
    """Raise ConfigError if none of these files is there, but one with an extension, or in a folder beside the table."""
    folder = path.parent
    if any(os.path.lexists(folder / row.name) for row in rows):
        return
    if all(_are_swapped(folder, row) for row in rows):
        raise ConfigError(f"{printable(path)} names {printable(rows[0].name)}, which is not there{SWAPPED}")
    folders = ["", *sorted(entry.name for entry in os.scandir(folder) if is_shown(entry) and is_folder(entry))]
    for inside in folders[:MOST_TRIED]:
        for extension in ("", *sorted(LATEST.extensions)):
            found = os.path.join(inside, rows[0].name + extension)
            if os.path.isfile(folder / found):
                raise ConfigError(
                    f"{printable(path)} names {printable(rows[0].name)}, which is not there, and {printable(found)} "
                    "is; write paths as they are seen from the table's folder, with their extension"
                )


def _delimiter(text: str, usual: str) -> str:
    """The delimiter of a table by its first line: that of its suffix, unless another is plainly meant."""
    first = text.split("\n", 1)[0]
    if first.startswith("sep=") and len(first.strip()) == 5:
        return first[4]
    others = [each for each in (",", "\t", ";", "|") if each in first and usual not in first]
    return others[0] if others else usual


def _path_here(folder: Path, name: str) -> str:
    """A path as it was written; where it is not there, without blanks around it, or with slashes for Windows's."""
    if name != name.strip() and not os.path.lexists(folder / name):
        name = name.strip()
    with_slashes = name.replace("\\", "/")
    return with_slashes if with_slashes != name and not os.path.lexists(folder / name) else name


def _is_header(folder: Path, cell: str, pixels: Pixels) -> bool:
    return _extension(cell) not in pixels.extensions and not os.path.isfile(folder / cell)
