"""What a command says, and to whom: nobody who stops reading takes the command with them."""

from __future__ import annotations

import argparse
import errno
import io
import os
import select
import sys
from collections.abc import Sequence
from typing import Any

# A reader that has gone, a terminal that was closed.
NOBODY_READS = {errno.EPIPE, errno.EIO, errno.ENXIO}


class _Lasting(io.FileIO):
    """The raw end of a stream, which takes all of a text at once. What nobody reads is dropped."""

    drops_everything = False
    """Also what a full disk does not take."""

    def write(self, text: Any) -> int:
        left = memoryview(text)
        try:
            while left:
                written = super().write(left)
                if written is None:  # a pipe that does not block, and has no room just now
                    select.select([], [self], [])
                left = left[written or 0 :]
        except OSError as error:
            if not self.drops_everything and error.errno not in NOBODY_READS:
                raise
        return len(text)


def outlive_readers(*, and_full_disks: bool = True) -> None:
    """From here on, output that nobody reads is lost, and the process goes on without it.

    Otherwise ``| head -3``, a pager that is quit or a dead ``tee`` ends a run at its next line: Python raises, rich
    leaves with exit code 1. Called by what is started as a process of its own; a stream that is none of the process's,
    as under a test, is left alone.

    and_full_disks: the same for a log on a full disk; False where what is printed is the result.
    """
    for descriptor in range(3):  # one that was closed from the start would become some other file
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # started with it closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  as long as the process lives
        if not isinstance(stream, io.TextIOWrapper):
            continue
        try:
            stream.flush()
            descriptor = stream.fileno()
        except (OSError, ValueError):  # closed, or not of a file
            continue
        raw = _Lasting(descriptor, "wb", closefd=False)
        raw.drops_everything = and_full_disks
        lasting = io.TextIOWrapper(
            raw if stream.write_through else io.BufferedWriter(raw),  # as Python has it under -u, and without
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering or name == "stderr",
            write_through=stream.write_through,
        )
        setattr(sys, name, lasting)


class ExampleParser(argparse.ArgumentParser):
    """A parser whose help begins with commands that work. Options are never abbreviated."""

    def __init__(self, *, examples: Sequence[str], **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self._examples = examples

    def format_help(self) -> str:
        return "\n".join([*self._examples, "", super().format_help()])
