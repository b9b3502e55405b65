"""Reads idx files, the format of MNIST and Fashion-MNIST: arrays of bytes, plain or compressed with gzip."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from cit_scale.errors import ConfigError

UNSIGNED_BYTES = 0x08  # the type code in the third byte of the header


def labels_beside(images: Path) -> Path | None:
    """Return the file of labels that belongs to a file of images: ...labels...idx1... for ...images...idx3....

    Either may end in .gz. Returns None if `images` is not named like a file of images.
    Raises ConfigError where the file of labels is missing.
    """
    if not ("images" in images.name and "idx3" in images.name):
        return None
    plain = images.with_name(images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1"))
    for path in (plain, plain.with_name(f"{plain.name}.gz")):
        if path.is_file():
            return path
    raise ConfigError(f"{images} has no labels beside it; put {plain.name} or {plain.name}.gz into its folder")


def read_idx(path: Path, num_dimensions: int) -> np.ndarray:
    """Return the array in an idx file, uint8 with `num_dimensions` axes.

    Raises ConfigError for a file that is damaged, incomplete, or not an idx file of bytes with that many axes.
    """
    try:
        raw = path.read_bytes()
        data = gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} is damaged ({error}); restore it") from error
    start = 4 + 4 * num_dimensions  # a magic number of 4 bytes, then the length of each axis in 4 bytes
    if data[:4] != bytes((0, 0, UNSIGNED_BYTES, num_dimensions)) or len(data) < start:
        raise ConfigError(f"{path} begins with {data[:4].hex()}, not as an idx file of bytes in {num_dimensions} axes")
    shape = np.frombuffer(data, ">u4", num_dimensions, offset=4).astype(int)
    expected = start + int(shape.prod())
    if len(data) != expected:
        raise ConfigError(f"{path} has {len(data)} bytes, and {expected} by its header; restore it")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
