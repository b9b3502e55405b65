"""Reads a data set that may hold bad images: each is reported, and a good one stands in for it.

Which one stands in depends on the images alone, so every rank layout and every resumed run trains on the same pictures.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from cit_scale.datasets.encoded import decode, is_usual, to_ppm
from cit_scale.datasets.index import UNUSABLE, reason_text
from cit_scale.datasets.sources import Source
from cit_scale.errors import BadImageError


class Reader:
    """Encoded images of a source as DALI can decode them. Safe to use from several threads."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.bad: dict[int, str] = dict(source.rejects)
        """Index to reason, of every bad image that was met so far; those that the index knows come first."""
        self._hopeless = set(source.rejects)

    def read(self, sample: int, doubtful: Collection[int] = ()) -> tuple[int, bytes]:
        """A sample that can be decoded, this one or else the first good one after it, and its encoded bytes.

        doubtful: samples that DALI could not decode, so that PIL has to. That is the caller's doubt, for one batch: of
        an image that breaks off in its midst, another batch may ask for a part that is good.
        Raises BadImageError when no image is good.
        """
        num_samples = len(self.source)
        for candidate in range(sample, sample + num_samples):
            candidate %= num_samples
            if candidate in self._hopeless:
                continue
            try:
                return candidate, self._read(candidate, candidate in doubtful)
            except BadImageError as error:
                self.bad[candidate] = str(error)
                if candidate not in doubtful:
                    self._hopeless.add(candidate)
        raise BadImageError(
            f"none of {num_samples} images can be decoded; the last: {self.bad_image_lines([sample])[0]}"
        )

    def bad_image_lines(self, samples: Iterable[int]) -> list[str]:
        """``name<TAB>reason`` of bad images."""
        return [f"{self.source.name(sample)}\t{self.bad[sample]}" for sample in samples]

    def _read(self, sample: int, is_doubtful: bool) -> bytes:
        try:
            data = self.source.read(sample)
        except UNUSABLE as error:  # any other OSError is the disk's, not the image's
            raise BadImageError(reason_text(error)) from None
        if not is_doubtful and is_usual(data):
            return data
        image = decode(data)
        expected = self.source.heights[sample], self.source.widths[sample]
        if (image.height, image.width) != expected:
            raise BadImageError(
                f"is now {image.height} x {image.width} pixels, but was {expected[0]} x {expected[1]} when indexed"
            )
        return to_ppm(image)
