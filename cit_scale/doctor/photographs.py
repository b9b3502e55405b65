"""Made-up photographs for the checks that read images."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cit_scale.bench.decode import HEIGHT, WIDTH, make_photos
from cit_scale.datasets.folders import ImageFolder


@contextlib.contextmanager
def photographs(count: int) -> Iterator[ImageFolder]:
    """So many of them, of HEIGHT x WIDTH pixels in two classes, for as long as the context lasts."""
    with tempfile.TemporaryDirectory() as folder:
        make_photos(Path(folder) / "photos", count, (HEIGHT, WIDTH), threads=2)
        yield ImageFolder(Path(folder) / "photos", Path(folder))
