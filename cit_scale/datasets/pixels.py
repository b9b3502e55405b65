"""The versions of what an image is: which files are images, how classes are ordered, and which pixels an image has."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from PIL import Image

from cit_scale.datasets import encoded, encoded_v1


def sorted_first(classes: Iterable[str]) -> list[str]:
    """By number if all are numbers, otherwise as text: 10 before 2a. Folders were sorted as text always."""
    names = list(classes)
    are_numbers = all(name.isascii() and name.isdigit() for name in names)
    return sorted(names, key=(lambda name: (int(name), name)) if are_numbers else None)


def sorted_naturally(classes: Iterable[str]) -> list[str]:
    """As people count: class2 before class10. The same order for folders, tables and tar files."""

    def key(name: str) -> tuple[list[tuple[int, int, str]], str]:
        parts = re.findall(r"[0-9]+|[^0-9]+", name)
        return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts], name

    return sorted(classes, key=key)


@dataclass(frozen=True)
class Pixels:
    """A version. extensions: in lower case, with the dot. skipped: names of folders that other programs put beside
    images. sorted_classes, sorted_folders: their order. measure, for_dali, decode: as `encoded` has them.
    """

    version: int
    extensions: frozenset[str]
    skipped: frozenset[str]
    sorted_classes: Callable[[Iterable[str]], list[str]]
    sorted_folders: Callable[[Iterable[str]], list[str]]
    measure: Callable[[Callable[[int, int], bytes]], tuple[int, int]]
    for_dali: Callable[[bytes], tuple[bytes, tuple[int, int] | None] | None]
    decode: Callable[[bytes], Image.Image]


FIRST = Pixels(
    1,
    frozenset(encoded_v1.EXTENSIONS),
    frozenset(),
    sorted_first,
    sorted,
    encoded_v1.measure,
    encoded_v1.for_dali,
    encoded_v1.decode,
)
LATEST = Pixels(
    encoded.VERSION,
    frozenset(encoded.EXTENSIONS),
    frozenset({"@eaDir", "@Recycle", "@tmp", "#recycle", "#snapshot", "__MACOSX", "$RECYCLE.BIN", "lost+found"})
    | {"System Volume Information"},
    sorted_naturally,
    sorted_naturally,
    encoded.measure,
    encoded.for_dali,
    encoded.decode,
)
BY_VERSION = {each.version: each for each in (FIRST, LATEST)}
