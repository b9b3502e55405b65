"""Versions of what a run's batches depend on. A run goes on with those that it began with, whatever came after."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cit_scale.datasets import pixels
from cit_scale.errors import RefusedError


@dataclass(frozen=True)
class StreamVersions:
    """One number for each part of the stream; 1 is what a run has that does not note it."""

    order: int = 2
    """Which samples stand where in an epoch. 2: repeats of a sample are two mixing groups apart. 1: 64 places apart."""

    draws: int = 2
    """The random numbers of augmentation. 2: the noise of random erasing is the same on every device. 1: a GPU drew its
    own."""

    pixels: int = pixels.LATEST.version
    """Which files are images, the order of classes, an image's pixels. 2: those of PIL. 1: DALI turned some images."""

    mixing: int = 1
    """What mixup and cutmix make of a batch."""

    def fingerprint(self, data: str) -> str:
        """A digest of a data set's fingerprint and these versions: ``data`` itself for the first ones."""
        if self == FIRST:
            return data
        return hashlib.sha256(f"{data} {sorted(asdict(self).items())}".encode()).hexdigest()


FIRST = StreamVersions(1, 1, 1, 1)
LATEST = StreamVersions()


def read_versions(noted: Mapping[str, Any], where: object) -> StreamVersions:
    """The versions in a note. where: of the note, for messages. Raises RefusedError for ones not known here."""
    if not isinstance(noted, Mapping):
        raise RefusedError(f"{where} is damaged: it has {noted!r} for versions; restore it, or start over with --fresh")
    latest, versions = asdict(LATEST), {**asdict(FIRST), **noted}
    unknown = [
        f"{part} {found!r}" for part, found in versions.items() if found not in range(1, latest.get(part, 0) + 1)
    ]
    if unknown:
        raise RefusedError(
            f"{where} was begun by another version of CiT-Scale, whose images this one does not know "
            f"({', '.join(unknown)}); go on with that one, or start over with --fresh"
        )
    return StreamVersions(**versions)
