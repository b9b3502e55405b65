"""Where images come from: an index -> encoded bytes, with label, height and width known beforehand.

Heights and widths are those of the upright image (EXIF orientation applied), as the decoder delivers it; the crops are
drawn from them before anything is decoded.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
import uuid
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from PIL import Image

from cit_scale.config import ConfigError, DataConfig
from cit_scale.data.order import permutation
from cit_scale.files import sync

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"}  # what DALI decodes
INDEX = "index.npz"
HOLDOUT_TAG = 0x401D  # keeps the seed of the held-out part apart from every other


class Source(Protocol):
    """N encoded images. All arrays are (N,) int64; heights and widths are in pixels."""

    classes: tuple[str, ...]
    labels: np.ndarray
    heights: np.ndarray
    widths: np.ndarray

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The encoded image. Safe to call from several threads."""

    def name(self, index: int) -> str:
        """Where the image stands, for messages."""

    @property
    def fingerprint(self) -> str:
        """Equal for two sources that hold the same names, labels and sizes in the same order."""


class ImageFolder:
    """A folder with one sub-folder of images per class; the classes are the sub-folders' names in sorted order.

    Image sizes are read from the file headers once and kept in `cache_dir`, under a name made of the folder's path and
    of every file's name, size and time. Raises ConfigError for a folder that is no data set.
    """

    def __init__(self, folder: Path, cache_dir: Path) -> None:
        self.folder = folder
        self.classes = tuple(sorted(entry.name for entry in os.scandir(folder) if _is_shown(entry) and entry.is_dir()))
        if not self.classes:
            raise ConfigError(f"{folder} has no sub-folders; it needs one sub-folder of images per class")
        files = [list(_find_images(folder, name)) for name in self.classes]
        empty = [name for name, found in zip(self.classes, files, strict=True) if not found]
        if empty:
            raise ConfigError(
                f"{folder} has no images for {len(empty)} of {len(self.classes)} classes: {_shorten(empty)}; "
                f"add images ({' '.join(sorted(EXTENSIONS))}) or remove these folders"
            )
        listing = [file for found in files for file in found]
        self._names = [name for name, _ in listing]
        self.labels = np.repeat(np.arange(len(self.classes)), [len(found) for found in files])
        self.heights, self.widths = self._cached_sizes(listing, cache_dir)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> bytes:
        return (self.folder / self._names[index]).read_bytes()

    def name(self, index: int) -> str:
        return str(self.folder / self._names[index])

    @cached_property
    def fingerprint(self) -> str:
        return _fingerprint(self.classes, self._names, self.labels, self.heights, self.widths)

    def _cached_sizes(
        self, listing: list[tuple[str, os.stat_result]], cache_dir: Path
    ) -> tuple[np.ndarray, np.ndarray]:
        """heights and widths, from the cache or else from the headers."""
        digest = hashlib.sha256(os.fsencode(self.folder.resolve()))
        for name, stat in listing:
            digest.update(os.fsencode(f"\n{name}\0{stat.st_size}\0{stat.st_mtime_ns}"))
        cached = cache_dir / f"sizes-{digest.hexdigest()[:32]}.npz"
        if not cached.exists():
            heights, widths = self._read_sizes()
            cache_dir.mkdir(parents=True, exist_ok=True)
            partial = cache_dir / f".{uuid.uuid4().hex}.npz"
            np.savez(partial, heights=heights, widths=widths)
            sync(partial)
            partial.rename(cached)  # two ranks that do this at once replace each other's equal file
        with np.load(cached) as sizes:
            return sizes["heights"], sizes["widths"]

    def _read_sizes(self) -> tuple[np.ndarray, np.ndarray]:
        def size_or_reason(name: str) -> tuple[int, int] | str:
            try:
                return image_size(self.folder / name)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                return f"{self.folder / name} ({error})"

        with ThreadPoolExecutor() as threads:
            sizes = list(threads.map(size_or_reason, self._names))
        bad = [size for size in sizes if isinstance(size, str)]
        if bad:
            raise ConfigError(
                f"{len(bad)} of {len(sizes)} files in {self.folder} cannot be read as images: {_shorten(bad)}; "
                f"repair or remove them"
            )
        heights, widths = np.array(sizes, np.int64).T
        return heights, widths


class TarShards:
    """Tar shards in the WebDataset layout (NAME.png beside NAME.cls) with an index, so that any image is one read away.

    Raises ConfigError when a shard is shorter than the index says.
    """

    def __init__(self, folder: Path) -> None:
        with np.load(folder / INDEX) as index:
            self.classes = tuple(os.fsdecode(name) for name in index["classes"])
            self.labels, self.heights, self.widths = index["labels"], index["heights"], index["widths"]
            self._names, self._offsets, self._sizes = index["names"], index["offsets"], index["sizes"]
            self._shards, shard_names = index["shards"], index["shard_names"]
        self._paths = [folder / os.fsdecode(name) for name in shard_names]
        ends = np.zeros(len(self._paths), np.int64)
        np.maximum.at(ends, self._shards, self._offsets + self._sizes)
        for path, end in zip(self._paths, ends, strict=True):
            size = path.stat().st_size if path.exists() else 0
            if size < end:
                raise ConfigError(
                    f"{path} has {size} bytes, its index expects {end}; delete {folder} and write it again"
                )
        self._files = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in self._paths]
        weakref.finalize(self, _close, self._files)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> bytes:
        return os.pread(self._files[self._shards[index]], self._sizes[index], self._offsets[index])

    def name(self, index: int) -> str:
        return f"{self._paths[self._shards[index]]}:{os.fsdecode(self._names[index])}"

    @cached_property
    def fingerprint(self) -> str:
        names = (os.fsdecode(name) for name in self._names)
        return _fingerprint(self.classes, names, self.labels, self.heights, self.widths)


class Subset:
    """The images of `source` at `indices`, (N,)."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source = source
        self.indices = indices
        self.classes = source.classes
        self.labels = source.labels[indices]
        self.heights = source.heights[indices]
        self.widths = source.widths[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> bytes:
        return self.source.read(self.indices[index])

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.source.fingerprint.encode() + self.indices.astype("<i8").tobytes()).hexdigest()


def write_shards(
    folder: Path, classes: Sequence[str], images: Iterable[tuple[str, int, bytes]], images_per_shard: int = 1000
) -> None:
    """Write images, each (name with extension, label, encoded bytes), as the `TarShards` of `folder`.

    The folder appears whole or not at all. If another process makes it appear first, that one stays.
    """
    partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.partial"
    partial.mkdir(parents=True)
    try:
        _write_shards(partial, classes, iter(images), images_per_shard)
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / INDEX).exists():
                raise
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_shards(
    folder: Path, classes: Sequence[str], images: Iterator[tuple[str, int, bytes]], images_per_shard: int
) -> None:
    shard_names: list[str] = []
    rows: list[tuple[str, int, int, int, int, int, int]] = []
    while chunk := list(islice(images, images_per_shard)):
        shard_names.append(f"{len(shard_names):06d}.tar")
        with tarfile.open(folder / shard_names[-1], "w") as tar:
            for name, label, data in chunk:
                _add_member(tar, name, data)
                offset = tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE  # the data ends in padding
                height, width = image_size(io.BytesIO(data))
                rows.append((name, len(shard_names) - 1, offset, len(data), label, height, width))
                _add_member(tar, Path(name).with_suffix(".cls").as_posix(), str(label).encode())
        sync(folder / shard_names[-1])
    if not rows:
        raise ValueError(f"no images to write to {folder}; give at least one")
    names, *numbers = zip(*rows, strict=True)
    columns = dict(zip(("shards", "offsets", "sizes", "labels", "heights", "widths"), np.array(numbers), strict=True))
    for key, texts in {"classes": classes, "names": names, "shard_names": shard_names}.items():
        columns[key] = np.array([os.fsencode(text) for text in texts])  # numpy would take four bytes a character
    np.savez(folder / INDEX, **columns)
    sync(folder / INDEX)
    sync(folder)


def digits(cache_dir: Path) -> TarShards:
    """scikit-learn's handwritten digits: 1,797 grey images of 8 x 8 pixels in ten classes, as PNG in tar shards."""
    folder = cache_dir / "digits-v1"
    if not (folder / INDEX).exists():
        from sklearn.datasets import load_digits  # a second's import that only the first run needs

        data = load_digits()
        pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)  # stored as 0..16
        images = (
            (f"{index:04d}.png", int(label), _png(image))
            for index, (image, label) in enumerate(zip(pixels, data.target, strict=True))
        )
        write_shards(folder, [str(name) for name in data.target_names], images, images_per_shard=500)
    return TarShards(folder)


BUILT_IN = {"digits": digits}


def open_sources(data: DataConfig) -> tuple[Source, Source]:
    """The training and the evaluation source. Raises ConfigError for what cannot be trained on.

    Without `data.eval`, the part `data.holdout` of every class is held out for evaluation, by a permutation that never
    changes. Caches appear in `data.cache_dir` by rename: let one process come first, and the others find them.
    """
    if data.eval is None and not 0 < data.holdout < 1:
        raise ConfigError(f"data.holdout={data.holdout} is not between 0 and 1; use 0.2, or set data.eval to a folder")
    train = _open(data, "train", data.train)
    if data.eval is None:
        return _hold_out(train, data.holdout)
    evaluation = _open(data, "eval", data.eval)
    if train.classes != evaluation.classes:
        missing, extra = set(train.classes) - set(evaluation.classes), set(evaluation.classes) - set(train.classes)
        raise ConfigError(
            f"data.train={data.train!r} and data.eval={data.eval!r} differ in their classes or in the order of them: "
            f"only in train: {_shorten(sorted(missing))}; only in eval: {_shorten(sorted(extra))}; name them alike"
        )
    return train, evaluation


def image_size(file: Path | IO[bytes]) -> tuple[int, int]:
    """Height and width of the upright image, from its header."""
    with Image.open(file) as image:
        width, height = image.size
        exif = Image.Exif()
        exif.load(image.info.get("exif", b""))
    lies_on_its_side = exif.get(0x0112, 1) in (5, 6, 7, 8)
    return (width, height) if lies_on_its_side else (height, width)


def _open(data: DataConfig, option: str, where: str) -> Source:
    cache_dir = Path(data.cache_dir).expanduser()
    if where in BUILT_IN:
        return BUILT_IN[where](cache_dir)
    folder = Path(where).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"data.{option}={where!r} is not a folder; give a folder with one sub-folder of images per class, "
            f"or one of {', '.join(map(repr, BUILT_IN))}"
        )
    return TarShards(folder) if (folder / INDEX).exists() else ImageFolder(folder, cache_dir)


def _hold_out(source: Source, share: float) -> tuple[Source, Source]:
    """The rest, and `share` of every class: at least one image, never all. Raises ConfigError where that cannot be."""
    held_out = []
    for label, name in enumerate(source.classes):
        members = np.flatnonzero(source.labels == label)
        if len(members) < 2:
            raise ConfigError(
                f"class {name!r} has fewer than 2 images, so none can be held out; add images or set data.eval"
            )
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        held_out.append(members[permutation(len(members), HOLDOUT_TAG, label)[:count]])
    chosen = np.sort(np.concatenate(held_out))
    return Subset(source, np.setdiff1d(np.arange(len(source)), chosen)), Subset(source, chosen)


def _is_shown(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".")  # not .git, .ipynb_checkpoints, or the ._ files that some systems leave


def _find_images(folder: Path, inside: str) -> Iterator[tuple[str, os.stat_result]]:
    """The images below folder/inside in sorted order: path relative to `folder`, and its stat."""
    for entry in sorted(filter(_is_shown, os.scandir(folder / inside)), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _find_images(folder, f"{inside}/{entry.name}")
        elif Path(entry.name).suffix.lower() in EXTENSIONS:
            yield f"{inside}/{entry.name}", entry.stat()


def _fingerprint(classes: Iterable[str], names: Iterable[str], *numbers: np.ndarray) -> str:
    digest = hashlib.sha256(os.fsencode("\n".join(classes)) + b"\0")
    for name in names:
        digest.update(os.fsencode(name) + b"\n")
    for column in numbers:
        digest.update(column.astype("<i8").tobytes())
    return digest.hexdigest()


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _shorten(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(names[:most]) or "none"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
