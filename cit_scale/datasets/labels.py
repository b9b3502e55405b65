"""Labels as text: one rule for those of tables, of files beside images in tar shards, and of classes.txt."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cit_scale.datasets.index import printable, shorten
from cit_scale.errors import ConfigError

MOST_BYTES = 1 << 30  # of a table, or of a list of classes
# Controls, C1 among them, and lone surrogates but for those that stand for bytes that are no UTF-8.
NO_TEXT = re.compile("[\0-\x1f\x7f-\x9f\ud800-\udc7f\udd00-\udfff]")


def label_text(text: str, where: str) -> str:
    """A label without blanks around it. where: it stands, for messages.

    Raises ConfigError for controls in it: of binary labels some would be lost as blanks, and classes would merge.
    """
    label = text.strip(" \t\r\n")
    if NO_TEXT.search(label):
        raise ConfigError(
            f"{where} has a label that is no text: {label[:16]!a}; write a number in digits, or a class's name"
        )
    return label.strip().strip("\ufeff\u200b")


def read_text(path: Path) -> str:
    """A text file of UTF-8, or of UTF-16 by its first bytes. Raises ConfigError where it is too long, or damaged."""
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ConfigError(
            f"{printable(path)} has {size} bytes, more than a text file of {MOST_BYTES}; it is something else"
        )
    content = path.read_bytes()
    if not content.startswith((b"\xff\xfe", b"\xfe\xff")):
        if content[:4096].count(b"\0") > len(content[:4096]) // 4:
            raise ConfigError(f"{printable(path)} has zero bytes, as UTF-16 without its mark; save it as UTF-8")
        return content.decode("utf-8-sig", "surrogateescape")
    try:
        return content.decode("utf-16")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{printable(path)} is damaged at byte {error.start} ({error.reason}); save it as UTF-8"
        ) from None


def read_classes(path: Path) -> tuple[str, ...]:
    """The classes of a classes.txt, one in each line: line numbers are labels. Raises ConfigError for lines without."""
    lines = [label_text(line, f"{printable(path)}") for line in read_text(path).rstrip("\r\n").split("\n")]
    empty = [str(number) for number, line in enumerate(lines, 1) if not line]
    if empty:
        raise ConfigError(f"{printable(path)} names no class in line {shorten(empty)}; write a class in each line")
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if seen.setdefault(line, number) != number:
            lines_of = f"{seen[line]} and {number}"
            raise ConfigError(
                f"{printable(path)} has {printable(line)} in lines {lines_of}; give each class another name"
            )
    return tuple(lines)


def labels_by_file(path: Path, classes: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """Return the class of each label, (N,) int64: labels are line numbers if all of them can be, otherwise names.

    path: of the file that has the classes. Raises ConfigError for labels that are neither.
    """
    by_number = {str(number): number for number in range(len(classes))}
    by_name = {name: number for number, name in enumerate(classes)}
    known = by_number if set(texts) <= by_number.keys() else by_name
    unknown = sorted(set(texts) - known.keys())
    if unknown:
        raise ConfigError(
            f"{printable(path)} has {len(classes)} classes and not these labels: "
            f"{shorten([printable(text) for text in unknown])}; add them, or remove the file to go by the labels alone"
        )
    return np.array([known[text] for text in texts], np.int64)


def alike(classes: Sequence[str]) -> list[str]:
    """A note on classes whose names differ in nothing that one sees, or in capitals; none as a rule."""
    groups: dict[str, list[str]] = {}
    for name in classes:
        plain = unicodedata.normalize("NFKC", name).casefold().strip().replace("\u200b", "")
        number = re.fullmatch(r"0*(\d+)(\.0*)?", plain)
        groups.setdefault(number[1] if number else plain, []).append(name)
    pairs = [" and ".join(repr(name) for name in group) for group in groups.values() if len(group) > 1]
    return [f"classes that look alike: {shorten(pairs)}; if they are one, name them alike"] if pairs else []
