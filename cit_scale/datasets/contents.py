"""Hashes of the images' bytes, for ``data.verify``: a file changed in place may leave names and sizes as they were.

They are kept beside the index, with size and times of each file, and only files whose size or times changed are read
again. Damage that a disk does without changing a time is therefore found where the cache is new, and not afterwards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from cit_scale.datasets.index import (
    CHUNK,
    THREADS,
    UNUSABLE,
    Columns,
    cache_path,
    load,
    printable,
    save,
)
from cit_scale.datasets.progress import ProgressBar
from cit_scale.datasets.sources import Source
from cit_scale.errors import ConfigError

HASH_BYTES = 16  # of each image


def image_hashes(source: Source, cache_dir: Path) -> np.ndarray:
    """Hash all images, in parallel. Returns (N, HASH_BYTES) uint8, zeros for an image that cannot be read.

    Raises OSError where the disk fails.
    """
    path = cache_path(cache_dir, "contents", source.fingerprint, source.name(0))
    stamps = source.stamps()
    hashes, is_new = np.zeros((len(source), HASH_BYTES), np.uint8), np.ones(len(source), bool)
    with suppress(OSError, ConfigError, KeyError):
        known = load(path).numbers
        if known["hashes"].shape == hashes.shape and known["stamps"].shape == stamps.shape:
            is_new = (known["stamps"] != stamps).any(axis=1)
            hashes = np.where(is_new[:, None], 0, known["hashes"]).astype(np.uint8)
    to_read = np.flatnonzero(is_new)

    # The threads write to disjoint rows, so no lock is needed.
    def work(chunk: np.ndarray) -> int:
        for index in chunk.tolist():
            with suppress(*UNUSABLE):
                digest = hashlib.sha256(source.read(index)).digest()
                hashes[index] = np.frombuffer(digest, np.uint8, HASH_BYTES)
        return len(chunk)

    if len(to_read):
        chunks = [to_read[start : start + CHUNK] for start in range(0, len(to_read), CHUNK)]
        title = f"reading {printable(source.name(0))} and {len(to_read) - 1} more for data.verify"
        with ProgressBar(title, len(to_read)) as progress, ThreadPoolExecutor(THREADS) as threads:
            for count in threads.map(work, chunks):
                progress.advance(count)
        with suppress(OSError):  # as for an index, which has said so
            save(path, Columns({"hashes": hashes, "stamps": stamps}))
    return hashes


def digest_of(hashes: np.ndarray) -> str:
    """SHA-256 in hexadecimal of all images' hashes."""
    return hashlib.sha256(hashes.tobytes()).hexdigest()


def save_hashes(path: Path, hashes: Sequence[np.ndarray]) -> None:
    """Write the hashes of a training and of an evaluation set. Raises OSError."""
    save(path, Columns(dict(zip(("train", "eval"), hashes, strict=True))))


def changed_images(path: Path, sources: Sequence[Source], hashes: Sequence[np.ndarray]) -> list[str]:
    """Keys of the images whose hashes differ from those that ``save_hashes`` wrote; none where these are not there."""
    try:
        noted = load(path).numbers
    except (OSError, ConfigError):
        return []
    changed = []
    for name, source, here in zip(("train", "eval"), sources, hashes, strict=True):
        if noted[name].shape == here.shape:
            places = np.flatnonzero((noted[name] != here).any(axis=1)).tolist()
            changed += [printable(source.key(place)) for place in places]
    return list(dict.fromkeys(changed))
