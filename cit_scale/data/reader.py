"""Reads the images of a data set, and replaces each bad image by a good one.

The replacement depends only on which images are bad, so all numbers of ranks and all resumed runs train on the same
images.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from cit_scale.datasets.encoded import to_ppm
from cit_scale.datasets.index import UNUSABLE, reason_text
from cit_scale.datasets.pixels import LATEST, Pixels
from cit_scale.datasets.sources import Source
from cit_scale.errors import BadImageError

# What PIL takes for a pixel: decoded with transparency, converted, and written as PPM. What DALI takes for it
# afterwards, the PPM twice and decoded, is less.
BYTES_A_PIXEL = 4 + 3 + 3
# What DALI takes for a pixel of an image that it decodes, and the names of such images as a rule.
DALI_BYTES_A_PIXEL = 3
FOR_DALI = (b".jpg", b".jpeg", b".jpe", b".jfif", b".png", b".bmp", b".dib", b".webp")


class ByteGate:
    """Limits the bytes that all threads hold together. Who wants more than that waits until nobody else holds any."""

    def __init__(self, most: int) -> None:
        self._most = float(most)
        self._held = 0
        self._changed = threading.Condition()

    def take(self, count: int) -> None:
        """Wait until there is room, and hold so many bytes until they are given back."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + count <= self._most)
            self._held += count

    def give_back(self, count: int) -> None:
        with self._changed:
            self._held -= count
            self._changed.notify_all()

    def open(self) -> None:
        """Let everybody through from now on, those that wait first."""
        with self._changed:
            self._most = math.inf
            self._changed.notify_all()

    @contextmanager
    def hold(self, count: int) -> Iterator[None]:
        self.take(count)
        try:
            yield
        finally:
            self.give_back(count)


class Reader:
    """Reads encoded images of a source in a form that DALI can decode. Thread-safe.

    pixels: by which the source's images were measured, too. most_bytes: that PIL may take at once, in all threads.
    """

    def __init__(self, source: Source, pixels: Pixels = LATEST, most_bytes: int = 2 << 30) -> None:
        self.source = source
        self._decoding = ByteGate(most_bytes)
        self._pixels = pixels
        self.bad: dict[int, str] = dict(source.rejects)
        """Index -> reason of every bad image found so far; at first those that the source lists as rejects."""
        self._hopeless = set(source.rejects)  # are not read again
        self.hashes: np.ndarray | None = None
        """Of all images, as of ``datasets.contents``; None where data.verify is off."""

    def read(self, sample: int, doubtful: Collection[int] = ()) -> tuple[int, bytes]:
        """Return the index and the encoded bytes of a sample that can be decoded.

        This is `sample` itself or, if it is bad, the first good sample after it; the search wraps around at the end.
        doubtful: samples of the current batch that DALI could not decode; these are decoded by PIL. The doubt ends with
        the batch: the crop of another batch may lie in the intact part of the same image.
        Raises BadImageError when no image of the source is good, and OSError where reading fails.
        """
        num_samples = len(self.source)
        for candidate in self._candidates(sample):
            try:
                return candidate, self._read(candidate, candidate in doubtful)
            except BadImageError as error:
                self.bad[candidate] = str(error)
                # A doubtful image is bad for this batch only: PIL has to decode all of it, DALI only the crop.
                if candidate not in doubtful:
                    self._hopeless.add(candidate)
        raise BadImageError(
            f"none of {num_samples} images can be decoded; the last: {self.bad_image_lines([sample])[0]}"
        )

    def _candidates(self, sample: int) -> Iterator[int]:
        """`sample` itself and those after it, without those that are known to be bad."""
        num_samples = len(self.source)
        for candidate in range(sample, sample + num_samples):
            if candidate % num_samples not in self._hopeless:
                yield candidate % num_samples

    def decoded_bytes(self, samples: np.ndarray, most: int) -> np.ndarray:
        """What each image takes at most while it is decoded, (B,) int64. samples: (B,).

        most: bytes that images of one request share. One that is larger is counted as if PIL had to decode it.
        """
        read = np.array([next(self._candidates(int(sample)), int(sample)) for sample in samples])
        pixels = self.source.heights[read] * self.source.widths[read]
        is_usual = np.array([self.source.key(int(sample)).lower().endswith(FOR_DALI) for sample in read])
        by_dali = DALI_BYTES_A_PIXEL * pixels
        return np.where(is_usual & (by_dali <= most), by_dali, BYTES_A_PIXEL * pixels)

    def bad_image_lines(self, samples: Iterable[int]) -> list[str]:
        """Return ``name<TAB>reason`` of each bad image in `samples`, the lines of bad_images.tsv."""
        return [f"{self.source.name(sample)}\t{self.bad[sample]}" for sample in samples]

    def _read(self, sample: int, is_doubtful: bool) -> bytes:
        """Return the encoded image, or PIL's pixels of it as PPM. Raises BadImageError."""
        try:
            data = self.source.read(sample)
        except UNUSABLE as error:  # any other OSError is a fault of the disk, not of the image
            raise BadImageError(reason_text(error)) from None
        # Crops have been drawn for the size in the index; an image of another size was overwritten since.
        expected = int(self.source.heights[sample]), int(self.source.widths[sample])
        found = None if is_doubtful else self._pixels.for_dali(data)
        if found is not None and found[1] in (expected, None):
            return found[0]
        with self._decoding.hold(BYTES_A_PIXEL * expected[0] * expected[1]):
            return to_ppm(self._decoded(data, expected))

    def _decoded(self, data: bytes, expected: tuple[int, int]) -> Image.Image:
        image = self._pixels.decode(data)
        if (image.height, image.width) != expected:
            raise BadImageError(
                f"is now {image.height} x {image.width} pixels, but was {expected[0]} x {expected[1]} when indexed"
            )
        return image
