"""Files that survive: what is on the disk, what is in it, all of it or nothing."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rename_to_free(path: Path, suffixes: Iterable[str]) -> Path:
    """Add the first of ``suffixes`` that is free to a name, so that nothing is overwritten. Returns the new path."""
    return path.rename(next(free for suffix in suffixes if not (free := path.with_name(path.name + suffix)).exists()))


def rename_aside(path: Path) -> Path:
    """Rename a file or folder to path.1, or .2 and so on where that is taken. Returns the new path."""
    return rename_to_free(path, (f".{i}" for i in itertools.count(1)))


def read_note(path: Path) -> Any:
    """What a JSON file of a run folder says; None where there is none.

    One that is damaged is set aside: nothing hangs on it.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        rename_aside(path)
        return None


def changed(begun: Mapping[str, Any], settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """``key: old -> new`` for each of ``settings`` that differs from those that something was begun with.

    begun: as it was written then. What that version did not know was at its default.
    """
    before = {**defaults, **begun}
    return [f"{key}: {before.get(key)} -> {value}" for key, value in settings.items() if before.get(key) != value]


def write_text(path: Path, text: str) -> None:
    """Replace a file by one with this text: a reader sees the old or the new one, whole."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text)
        sync(partial)
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()  # a full disk is not kept full
        raise
