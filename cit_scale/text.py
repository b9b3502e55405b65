"""What the commands say and are told: keeps a process alive if nobody reads its output, prints help with examples, and
reads numbers."""

from __future__ import annotations

import argparse
import errno
import io
import os
import select
import sys
from collections.abc import Sequence
from typing import Any

# Errors of a write whose reader is gone: a closed pipe or a closed terminal.
NOBODY_READS = {errno.EPIPE, errno.EIO, errno.ENXIO}


class _Lasting(io.FileIO):
    """Raw file under a text stream whose ``write`` never fails because the reader is gone; the text is then dropped."""

    drops_everything = False
    """Whether text is also dropped on any other error, such as a full disk."""

    def write(self, text: Any) -> int:
        """Write all of ``text``, in several parts if need be. Returns its length, also if it was dropped."""
        left = memoryview(text)
        try:
            while left:
                written = super().write(left)
                if written is None:  # a non-blocking pipe that is full: wait until it has room
                    select.select([], [self], [])
                left = left[written or 0 :]
        except OSError as error:
            if not self.drops_everything and error.errno not in NOBODY_READS:
                raise
        return len(text)


def outlive_readers(*, and_full_disks: bool = True) -> None:
    """Replace stdout and stderr by streams that drop output which nobody reads, so that the process goes on.

    Without this, ``| head -3``, a closed pager or a dead ``tee`` ends a run at its next line: Python raises
    BrokenPipeError, and rich exits with code 1. Every entry point calls this function. A stream that was replaced
    already, as under pytest, stays as it is.

    and_full_disks: also drop output that a full disk does not take. False for a command whose output is its result.
    """
    # A closed descriptor 0, 1 or 2 would be given to the next file that the process opens, and prints would go there.
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # open returns the lowest free number, which is this one. Programs that are started need it, too.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # Python's value for a stream that was closed when the process started
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  stays open as long as the process lives
        if not isinstance(stream, io.TextIOWrapper):
            continue
        try:
            stream.flush()
            descriptor = stream.fileno()
        except (OSError, ValueError):  # the stream is closed, or is not backed by a file
            continue
        # The old stream still owns the descriptor: closefd=False.
        raw = _Lasting(descriptor, "wb", closefd=False)
        raw.drops_everything = and_full_disks
        lasting = io.TextIOWrapper(
            raw if stream.write_through else io.BufferedWriter(raw),  # unbuffered only under python -u
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering or name == "stderr",
            write_through=stream.write_through,
        )
        setattr(sys, name, lasting)


def escape_unencodable() -> None:
    """Have stdout write a character that its encoding lacks as an escape, such as \\udcff, instead of raising."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class ExampleParser(argparse.ArgumentParser):
    """Argument parser whose help starts with example commands. Options cannot be abbreviated."""

    def __init__(self, *, examples: Sequence[str], **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self._examples = examples

    def format_help(self) -> str:
        return "\n".join([*self._examples, "", super().format_help()])


def positive(text: str) -> int:
    """A type of argparse: a whole number above 0."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
