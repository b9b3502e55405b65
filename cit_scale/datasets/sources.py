"""Opens data sets. A source maps an index to an encoded image, and knows all labels, heights and widths beforehand.

Heights and widths are those of the upright image (EXIF orientation applied), as the decoder returns it. Crops are drawn
from them before anything is decoded. They are read once, together with names and labels, and kept in the cache folder.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from cit_scale.config import NO_DATA, DataConfig
from cit_scale.data.order import permutation
from cit_scale.datasets.encoded import limit_pixels
from cit_scale.datasets.folders import DELIMITERS, ImageFolder, Manifest, is_folder, is_shown
from cit_scale.datasets.idx import labels_beside, read_idx
from cit_scale.datasets.index import cache_folder, cache_path, hints_for, printable, shorten
from cit_scale.datasets.labels import alike
from cit_scale.datasets.pixels import FIRST, LATEST, Pixels
from cit_scale.datasets.shards import (
    INDEX,
    SETTINGS,
    TarShards,
    common_folder,
    open_foreign_shards,
    open_packed,
    tar_files,
    tars_named,
    write_shards,
)
from cit_scale.errors import ConfigError, MissingInputError, os_error

HOLDOUT_TAG = 0x401D  # keeps the seed of the held-out part apart from all other seeds


class Source(Protocol):
    """The interface of a data set of N encoded images. All arrays are (N,) int64; heights and widths are in pixels."""

    classes: tuple[str, ...]
    labels: np.ndarray
    heights: np.ndarray
    widths: np.ndarray

    rejects: Mapping[int, str]
    """Index -> reason of each image known to be unusable. Such an image keeps its index; its height and width are 0."""

    notes: tuple[str, ...]
    """What is to be said of the data set, a line each."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """Return the encoded image. Thread-safe, and safe in a forked process. Raises OSError, BadImageError."""

    def key(self, index: int) -> bytes:
        """Return the image's name inside the data set, usually CLASS/FILE; independent of the data set's location."""

    def name(self, index: int) -> str:
        """Return the image's path, for messages."""

    def stamps(self) -> np.ndarray:
        """What changes when an image's file is written, (N, 3) int64: its size, and two times in nanoseconds."""

    @property
    def fingerprint(self) -> str:
        """A digest, equal for two sources with the same classes, keys, labels and sizes in the same order."""


class Subset:
    """A source of some images of another: image i is `source`'s image indices[i]. indices: (N,) int64."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source = source
        self.indices = indices
        self.classes = source.classes
        self.notes = source.notes
        self.labels = source.labels[indices]
        self.heights = source.heights[indices]
        self.widths = source.widths[indices]
        # The rejects under their new indices.
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

    def stamps(self) -> np.ndarray:
        return self.source.stamps()[self.indices]

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.source.fingerprint.encode() + self.indices.astype("<i8").tobytes()).hexdigest()


class Renumbered(Subset):
    """A source with the classes of another, of which it has some: all its images, with their labels among these."""

    def __init__(self, source: Source, classes: tuple[str, ...]) -> None:
        super().__init__(source, np.arange(len(source)))
        number = {name: place for place, name in enumerate(classes)}
        self.labels = np.array([number[name] for name in source.classes], np.int64)[source.labels]
        self.classes = classes

    @cached_property
    def fingerprint(self) -> str:
        classes = os.fsencode("\n".join(self.classes))
        return hashlib.sha256(self.source.fingerprint.encode() + b"\0" + classes).hexdigest()


# --- Data sets of arrays, converted once to PNG in tar shards ---


def digits(cache_dir: Path, pixels: Pixels = LATEST) -> TarShards:
    """Return scikit-learn's handwritten digits: 1,797 grey images of 8 x 8 pixels in ten classes."""
    folder = cache_dir / "digits-v3"  # "digits" and "digits-v2" have an index of former formats
    if not (folder / INDEX).exists():
        from sklearn.datasets import load_digits  # takes a second, and only the first run needs it

        data = load_digits()
        grey = np.rint(data.images * (255 / 16)).astype(np.uint8)  # scikit-learn stores 0 to 16
        _convert(folder, [str(name) for name in data.target_names], grey, data.target)
    return open_packed(folder, cache_dir, pixels)


def idx_images(images: Path, labels: Path, cache_dir: Path, pixels: Pixels = LATEST) -> TarShards:
    """Return a data set from a pair of idx files, grey images and their labels; the classes are the labels' numbers.

    Raises ConfigError for files that are damaged, empty, or do not belong together.
    """
    # Size and time of both files are part of the folder's name, so changed files are converted again.
    stats = [part for path in (images, labels) for part in (path.stat().st_size, path.stat().st_mtime_ns)]
    folder = cache_path(cache_dir, "idx", images.resolve(), labels.resolve(), *stats).with_suffix("")
    if not (folder / INDEX).exists():
        grey, numbers = read_idx(images, 3), read_idx(labels, 1)
        if len(grey) != len(numbers) or not grey.size:
            raise ConfigError(
                f"{images} has {len(grey)} images of {grey.shape[1]} x {grey.shape[2]} pixels and {labels} "
                f"{len(numbers)} labels; give two files that belong together and are not empty"
            )
        classes, label_of = np.unique(numbers, return_inverse=True)
        _convert(folder, list(map(str, classes)), grey, label_of)
    return open_packed(folder, cache_dir, pixels)


def _convert(folder: Path, classes: Sequence[str], grey: np.ndarray, labels: np.ndarray) -> None:
    """Write arrays as shards into the cache. grey: (N, H, W) uint8. labels: (N,). Raises ConfigError and its kin."""
    try:
        write_shards(folder, classes, _pngs(grey, labels))
    except OSError as error:
        message = f"{folder.parent} cannot be written ({error.strerror}); name another folder by --data.cache_dir"
        raise os_error(error, message, lasting=ConfigError) from error


def _pngs(grey: np.ndarray, labels: np.ndarray) -> Iterator[tuple[str, int, bytes]]:
    """Yield the rows that `write_shards` takes. grey: (N, H, W) uint8. labels: (N,)."""
    for index, (image, label) in enumerate(zip(grey, labels, strict=True)):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        yield f"{index:04d}.png", int(label), buffer.getvalue()


# --- Opening a data set by its path or name ---

BUILT_IN = {"digits": digits}
BUILT_IN_PREFIX = "builtin:"

# Of parts of a data set: train, val2017, test_set. The first group says which part.
SPLIT_NAME = re.compile(
    r"(train|val|dev|eval|test)(ing|id|idation|uation|val)?([-_ .]?(sets?|data|images|splits?|\d+))?", re.I
)


def open_sources(data: DataConfig, pixels: Pixels = LATEST) -> tuple[Source, Source]:
    """Open the training source and the evaluation source.

    Without `data.eval`, the share `data.holdout` of every class is held out for evaluation. The choice is a function of
    the class's label, its number of images and the share alone, so it is the same in every run.
    Caches appear in `data.cache_dir` by rename. Let one process open the sources first; the others then read its cache.

    Raises ConfigError, or its subclass MissingInputError for a path that does not exist.
    """
    if data.train is None:
        raise ConfigError(NO_DATA)
    if data.eval is None and not 0 < data.holdout < 1:
        raise ConfigError(f"data.holdout={data.holdout} is not between 0 and 1; use 0.2, or set data.eval to a folder")
    limit_pixels(data.max_pixels)
    cache_dir = cache_folder(data.cache_dir)
    opening = partial(open_source, pixels=pixels, split_names=data.split_names, label_key=data.label_key)
    train = opening(data.train, cache_dir, "data.train")
    if data.eval is None:
        return _hold_out(train, data.holdout)
    evaluation = opening(data.eval, cache_dir, "data.eval")
    if train.classes == evaluation.classes:
        return train, evaluation
    missing, extra = set(train.classes) - set(evaluation.classes), set(evaluation.classes) - set(train.classes)
    if extra:
        raise ConfigError(
            f"data.train={data.train!r} and data.eval={data.eval!r} differ in their classes: only in train: "
            f"{_names(missing)}; only in eval: {_names(extra)}; name them alike"
        )
    renumbered = Renumbered(evaluation, train.classes)
    if missing:
        note = f"data.eval={data.eval} has no images of {len(missing)} of {len(train.classes)} classes: "
        renumbered.notes = (*renumbered.notes, note + _names(missing))
    return train, renumbered


def open_source(
    where: str,
    cache_dir: Path,
    option: str,
    pixels: Pixels = LATEST,
    *,
    split_names: bool = True,
    label_key: str | None = None,
) -> Source:
    """Open a data set by its path or built-in name. A path that exists goes before a name.

    option: the setting that `where` comes from, for messages. split_names: whether classes may be called as parts of a
    data set are. label_key: as of ``open_foreign_shards``.

    Raises ConfigError for a path that is not a data set, and MissingInputError for one that does not exist.
    """
    if not where:
        raise ConfigError(f"{option} is empty; give a folder of images, or another data set")
    source = _open(where, cache_dir, option, pixels, split_names, label_key)
    source.notes = (*source.notes, *alike(source.classes))
    if where in BUILT_IN and built_in_name(where, pixels) is None:
        named = f"{option}={where} is {Path(where).resolve()} here; {BUILT_IN_PREFIX}{where} is the built-in data set"
        source.notes = (*source.notes, named)
    return source


def _open(where: str, cache_dir: Path, option: str, pixels: Pixels, split_names: bool, label_key: str | None) -> Source:
    built_in, path = built_in_name(where, pixels), Path(where).expanduser()
    if built_in is not None:
        return BUILT_IN[built_in](cache_dir, pixels)
    if path.is_dir():
        if not split_names and pixels is not FIRST:
            refuse_split_names(path, option)
        return _open_folder(path, cache_dir, pixels, label_key)
    if shards := tars_named(where):
        return open_foreign_shards(common_folder(shards), cache_dir, pixels, shards, label_key)
    if path.is_file() and path.suffix.lower() in DELIMITERS:
        return Manifest(path, cache_dir, pixels)
    if path.is_file() and (labels := labels_beside(path)):
        return idx_images(path, labels, cache_dir, pixels)
    kind = ConfigError if path.exists() else MissingInputError
    raise kind(
        f"{option}={where!r} {'is no data set' if path.exists() else 'does not exist'}; give a folder with one "
        f"sub-folder of images per class, a folder of tar shards, a table of paths and labels (.csv or .tsv), the "
        f"images of a pair of idx files, or one of {', '.join(f'{BUILT_IN_PREFIX}{name}' for name in BUILT_IN)}"
        f"{''.join(f'; {hint}' for hint in hints_for([path.suffix.lower()]))}"
    )


def built_in_name(where: str, pixels: Pixels = LATEST) -> str | None:
    """The name of a built-in data set, as in builtin:digits, or alone where no path is called so; None for a path.

    In the first version of pixels a name was built in, whatever there was.
    """
    name = where.removeprefix(BUILT_IN_PREFIX)
    if name not in BUILT_IN:
        return None
    is_named = where.startswith(BUILT_IN_PREFIX) or pixels is FIRST
    return name if is_named or not Path(where).exists() else None


def refuse_split_names(folder: Path, option: str) -> None:
    """Raise ConfigError for a folder whose class folders are called as parts of a data set are."""
    if (folder / INDEX).exists():
        return
    names, where = _folders_in(folder), folder
    if len(names) == 1 and not SPLIT_NAME.fullmatch(names[0]):  # one folder further up
        where = folder / names[0]
        names = _folders_in(where)
    parts = [name for name in names if SPLIT_NAME.fullmatch(name)]
    if not parts or (where != folder and len(parts) < 2):
        return
    # For evaluation not the test set, by which nothing may be chosen, where there is another.
    by_use = sorted(parts, key=lambda name: ("train", "val", "dev", "eval", "test").index(_part(name)))
    way_out, insist = shlex.quote(str(where / by_use[0])), "--split-names"
    if option.startswith("data."):
        way_out, insist = f"--{option} {way_out}", "--data.split_names true"
    if option == "data.train" and _part(by_use[0]) == "train" and _part(by_use[-1]) != "train":
        evaluation = next(name for name in by_use if _part(name) != "train")
        way_out += f" --data.eval {shlex.quote(str(where / evaluation))}"
    raise ConfigError(
        f"{option}={printable(folder)} has folders called {shorten(parts)}, which look like parts of a data set, not "
        f"classes; give {printable(way_out)}, or say {insist} if they are classes"
    )


def _folders_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if is_shown(entry) and is_folder(entry))


def _part(name: str) -> str:
    found = SPLIT_NAME.fullmatch(name)
    assert found is not None
    return found[1].lower()


def _open_folder(folder: Path, cache_dir: Path, pixels: Pixels, label_key: str | None) -> Source:
    """Open a folder of packed shards, of tar files without an index, or of class folders."""
    if (folder / INDEX).exists():
        return open_packed(folder, cache_dir, pixels)
    if (folder / SETTINGS).exists():
        raise ConfigError(
            f"{folder} is not packed to the end; give the command that packs it again, which continues, "
            f"or delete the folder"
        )
    # Class folders take precedence over tar files that lie beside them.
    has_folders = any(is_folder(entry) for entry in os.scandir(folder) if is_shown(entry))
    if tar_files(folder) and not has_folders:
        return open_foreign_shards(folder, cache_dir, pixels, label_key=label_key)
    return ImageFolder(folder, cache_dir, pixels)


def _names(classes: Iterable[str]) -> str:
    return shorten([printable(name) for name in sorted(classes)])


def _hold_out(source: Source, share: float) -> tuple[Source, Source]:
    """Split every class by `share`. Returns the rest and the held-out part; each has at least one image of every class.

    Raises ConfigError for a class with fewer than two images.
    """
    held_out = []
    for label, name in enumerate(source.classes):
        members = np.flatnonzero(source.labels == label)
        if not len(members):  # named in classes.txt alone
            continue
        if len(members) < 2:
            raise ConfigError(
                f"class {name!r} has fewer than 2 images, so none can be held out; add images or set data.eval"
            )
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        held_out.append(members[permutation(len(members), HOLDOUT_TAG, label)[:count]])
    chosen = np.sort(np.concatenate(held_out))
    return Subset(source, np.setdiff1d(np.arange(len(source)), chosen)), Subset(source, chosen)
