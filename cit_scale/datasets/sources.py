"""Where images come from: an index -> encoded bytes, with label, height and width known beforehand.

Heights and widths are those of the upright image (EXIF orientation applied), as the decoder delivers it; the crops are
drawn from them before anything is decoded. They are read once, with everything else that is known of a data set, and
kept in the cache folder.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from cit_scale.config import DataConfig
from cit_scale.data.order import permutation
from cit_scale.datasets.folders import DELIMITERS, ImageFolder, Manifest, is_folder, is_shown
from cit_scale.datasets.idx import labels_beside, read_idx
from cit_scale.datasets.index import cache_path, printable, shorten
from cit_scale.datasets.shards import INDEX, SETTINGS, TarShards, open_foreign_shards, tar_files, write_shards
from cit_scale.errors import ConfigError, MissingInputError

HOLDOUT_TAG = 0x401D  # keeps the seed of the held-out part apart from every other


class Source(Protocol):
    """N encoded images. All arrays are (N,) int64; heights and widths are in pixels."""

    classes: tuple[str, ...]
    labels: np.ndarray
    heights: np.ndarray
    widths: np.ndarray

    rejects: Mapping[int, str]
    """Index -> reason of the images already known to be unusable. They keep their place; height and width are 0."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The encoded image. Safe to call from several threads, and in a forked process. Raises OSError."""

    def key(self, index: int) -> bytes:
        """What the image is called inside the data set, wherever that stands; usually CLASS/FILE."""

    def name(self, index: int) -> str:
        """Where the image stands, for messages."""

    @property
    def fingerprint(self) -> str:
        """Equal for two sources that hold the same keys, labels and sizes in the same order."""


class Subset:
    """The images of `source` at `indices`, (N,)."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source = source
        self.indices = indices
        self.classes = source.classes
        self.labels = source.labels[indices]
        self.heights = source.heights[indices]
        self.widths = source.widths[indices]
        places = np.flatnonzero(np.isin(indices, list(source.rejects)))
        self.rejects: Mapping[int, str] = {int(place): source.rejects[int(indices[place])] for place in places}

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> bytes:
        return self.source.read(self.indices[index])

    def key(self, index: int) -> bytes:
        return self.source.key(self.indices[index])

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.source.fingerprint.encode() + self.indices.astype("<i8").tobytes()).hexdigest()


# --- Arrays, kept as PNG in tar shards ---


def digits(cache_dir: Path) -> TarShards:
    """scikit-learn's handwritten digits: 1,797 grey images of 8 x 8 pixels in ten classes."""
    folder = cache_dir / "digits-v2"
    if not (folder / INDEX).exists():
        from sklearn.datasets import load_digits  # a second's import that only the first run needs

        data = load_digits()
        pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)  # stored as 0..16
        write_shards(folder, [str(name) for name in data.target_names], _pngs(pixels, data.target))
    return TarShards(folder)


def idx_images(images: Path, labels: Path, cache_dir: Path) -> TarShards:
    """Grey images and their labels from a pair of idx files; the classes are the labels' numbers.

    Raises ConfigError for files that are damaged or do not belong together.
    """
    stats = [part for path in (images, labels) for part in (path.stat().st_size, path.stat().st_mtime_ns)]
    folder = cache_path(cache_dir, "idx", images.resolve(), labels.resolve(), *stats).with_suffix("")
    if not (folder / INDEX).exists():
        pixels, numbers = read_idx(images, 3), read_idx(labels, 1)
        if len(pixels) != len(numbers) or not pixels.size:
            raise ConfigError(
                f"{images} has {len(pixels)} images of {pixels.shape[1]} x {pixels.shape[2]} pixels and {labels} "
                f"{len(numbers)} labels; give two files that belong together and are not empty"
            )
        classes, label_of = np.unique(numbers, return_inverse=True)
        write_shards(folder, list(map(str, classes)), _pngs(pixels, label_of))
    return TarShards(folder)


def _pngs(pixels: np.ndarray, labels: np.ndarray) -> Iterator[tuple[str, int, bytes]]:
    """What `write_shards` takes, from images (N, H, W) and labels (N,)."""
    for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        yield f"{index:04d}.png", int(label), buffer.getvalue()


# --- Opening ---

BUILT_IN = {"digits": digits}


def open_sources(data: DataConfig) -> tuple[Source, Source]:
    """The training and the evaluation source. Raises ConfigError for what cannot be trained on.

    Without `data.eval`, the part `data.holdout` of every class is held out for evaluation, by a permutation that never
    changes. Caches appear in `data.cache_dir` by rename: let one process come first, and the others find them.
    """
    if data.eval is None and not 0 < data.holdout < 1:
        raise ConfigError(f"data.holdout={data.holdout} is not between 0 and 1; use 0.2, or set data.eval to a folder")
    cache_dir = Path(data.cache_dir).expanduser()
    train = open_source(data.train, cache_dir, "data.train")
    if data.eval is None:
        return _hold_out(train, data.holdout)
    evaluation = open_source(data.eval, cache_dir, "data.eval")
    if train.classes != evaluation.classes:
        missing, extra = set(train.classes) - set(evaluation.classes), set(evaluation.classes) - set(train.classes)
        raise ConfigError(
            f"data.train={data.train!r} and data.eval={data.eval!r} differ in their classes or in the order of them: "
            f"only in train: {_names(missing)}; only in eval: {_names(extra)}; name them alike"
        )
    return train, evaluation


def open_source(where: str, cache_dir: Path, option: str) -> Source:
    """A data set by its place or its name. Raises ConfigError, naming the option that gave it."""
    if where in BUILT_IN:
        return BUILT_IN[where](cache_dir)
    path = Path(where).expanduser()
    if path.is_dir():
        return _open_folder(path, cache_dir)
    if path.is_file() and path.suffix.lower() in DELIMITERS:
        return Manifest(path, cache_dir)
    if path.is_file() and (labels := labels_beside(path)):
        return idx_images(path, labels, cache_dir)
    kind = ConfigError if path.exists() else MissingInputError
    raise kind(
        f"{option}={where!r} {'is no data set' if path.exists() else 'does not exist'}; give a folder with one "
        f"sub-folder of images per class, a folder of tar shards, a table of paths and labels (.csv or .tsv), the "
        f"images of a pair of idx files, or one of {', '.join(map(repr, BUILT_IN))}"
    )


def _open_folder(folder: Path, cache_dir: Path) -> Source:
    if (folder / INDEX).exists():
        return TarShards(folder)
    if (folder / SETTINGS).exists():
        raise ConfigError(
            f"{folder} is not packed to the end; give the command that packs it again, which continues, "
            f"or delete the folder"
        )
    has_folders = any(is_folder(entry) for entry in os.scandir(folder) if is_shown(entry))
    if tar_files(folder) and not has_folders:
        return open_foreign_shards(folder, cache_dir)
    return ImageFolder(folder, cache_dir)


def _names(classes: Iterable[str]) -> str:
    return shorten([printable(name) for name in sorted(classes)])


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
