"""The images that ``cit-scale predict`` is asked about, one by one: files, folders, tar shards, videos, a list.

A list or a shard is read while its images are classified, and a folder when its turn comes.
"""

from __future__ import annotations

import functools
import math
import os
import select
import stat
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cit_scale.datasets.encoded import EXTENSIONS, refuse_too_many_bytes
from cit_scale.datasets.folders import open_without_waiting
from cit_scale.datasets.index import UNUSABLE, printable, reason_text
from cit_scale.datasets.pixels import LATEST
from cit_scale.datasets.tars import tar_members
from cit_scale.errors import BadImageError, ConfigError, MissingInputError
from cit_scale.inference.defaults import FRAMES_PER_S


@dataclass(frozen=True)
class Item:
    """An image, or what stands in its place.

    name: as it is shown. path, offset, size: where its bytes lie; size None: a whole file. data: the bytes, where they
    lie nowhere else. reason: why there is no image.
    """

    name: str
    path: str = ""
    offset: int = 0
    size: int | None = None
    data: bytes | None = None
    reason: str | None = None


def read_item(item: Item) -> bytes:
    """Return the encoded image. Raises BadImageError, and OSError where the disk fails."""
    if item.reason is not None:
        raise BadImageError(item.reason)
    if item.data is not None:
        return item.data
    descriptor = open_without_waiting(item.path)
    with open(descriptor, "rb", buffering=0) as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise BadImageError("not a regular file")
        size = about.st_size if item.size is None else item.size
        refuse_too_many_bytes(size)
        file.seek(item.offset)
        data = file.read(size)
    if len(data) < size:
        raise BadImageError("the file ends too early")
    return data


def items_of(
    arguments: Sequence[str], stdin: IO[bytes] | None, frames_per_s: float = FRAMES_PER_S
) -> Iterator[Item | None]:
    """Every image of the arguments, in their order. stdin: the list that "-" stands for, a path a line.

    What cannot be read is an item with a reason; None says that the list has no more lines yet. Raises
    MissingInputError at once for an argument that does not exist, and ConfigError for a "-" that stands twice, and for
    frames_per_s that are none.
    """
    if not 0 < frames_per_s < math.inf:
        raise ConfigError(f"--fps {frames_per_s} is not above 0; give frames per second of video, such as 1 or 0.2")
    missing = [printable(each) for each in arguments if each != "-" and not os.path.lexists(each)]
    if missing:
        raise MissingInputError(f"{missing[0] or 'an empty name'} does not exist")
    if list(arguments).count("-") > 1:
        raise ConfigError("- is the list on standard input, and can stand there once")
    if "-" in arguments and stdin is None:
        raise MissingInputError("- is the list on standard input, which is closed")
    return _items(arguments, stdin, frames_per_s)


def _items(arguments: Sequence[str], stdin: IO[bytes] | None, frames_per_s: float) -> Iterator[Item | None]:
    for argument in arguments:
        if argument == "-":
            assert stdin is not None
            for line in lines_of(stdin):
                if line is None:
                    yield None
                elif name := _existing(line):
                    yield from _named(name, frames_per_s)
        else:
            yield from _named(argument, frames_per_s)


def _existing(line: bytes) -> str:
    """The path on a line: without a carriage return at its end, unless the file is called so."""
    name = os.fsdecode(line)
    return name.removesuffix("\r") if name.endswith("\r") and not os.path.lexists(name) else name


def lines_of(file: IO[bytes]) -> Iterator[bytes | None]:
    """Lines without their end. Where the next one is not there yet: None twice, and then it is waited for."""
    try:
        descriptor = file.fileno()
    except OSError:  # io.UnsupportedOperation: no file of the operating system
        yield from (line.removesuffix(b"\n") for line in file)
        return
    begun = b""
    while True:
        if not select.select([descriptor], [], [], 0)[0]:
            # Twice: the batch that ends with the first is computed when the next one, which ends with the second, is
            # dealt.
            yield None
            yield None
        data = os.read(descriptor, 1 << 16)
        *lines, begun = (begun + data).split(b"\n")
        yield from lines
        if not data:
            if begun:
                yield begun
            return


def _named(path: str, frames_per_s: float) -> Iterator[Item]:
    """All images of a path that somebody named."""
    if os.path.isdir(path):
        yield from _in_folder(path, frames_per_s)
    else:
        yield from _in_file(path, frames_per_s)


def _in_folder(folder: str, frames_per_s: float) -> Iterator[Item]:
    """Images of a folder and its sub-folders, in sorted order. Neither hidden names nor other programs' folders count.

    Not recursive: folders may lie deeper in each other than functions can.
    """
    waiting = [folder]
    while waiting:
        path = waiting.pop()
        if not os.path.isdir(path):
            if path == folder or _suffix(path) in EXTENSIONS | {".tar"} | _videos():
                yield from _in_file(path, frames_per_s)
            continue
        if path != folder and os.path.islink(path):  # a link to a folder above would have no end
            continue
        try:
            names = [name for name in os.listdir(path) if not name.startswith(".") and name not in LATEST.skipped]
        except OSError as error:
            yield Item(path, reason=reason_text(error))
            continue
        waiting += [os.path.join(path, name) for name in sorted(names, reverse=True)]


def _in_file(path: str, frames_per_s: float) -> Iterator[Item]:
    suffix = _suffix(path)
    if suffix == ".tar" or suffix in _videos():
        try:
            is_file = stat.S_ISREG(os.stat(path).st_mode)
        except OSError as error:
            yield Item(path, reason=reason_text(error))
            return
        if not is_file:  # reading a named pipe would wait for a writer
            yield Item(path, reason="not a regular file")
        else:
            yield from _in_shard(path) if suffix == ".tar" else _in_video(path, frames_per_s)
    else:
        yield Item(path, path)


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


@functools.cache
def _videos() -> frozenset[str]:
    """Extensions of videos."""
    from cit_scale.datasets import video  # takes a tenth of a second

    return frozenset(video.EXTENSIONS)


def _in_shard(path: str) -> Iterator[Item]:
    """Members with an image's extension, in their order in the file."""
    try:
        with open(path, "rb") as file, tarfile.open(path, "r:", file) as tar:
            for member in tar_members(tar, keep=False):
                name = f"{path}:{member.name}"
                if _suffix(member.name) in EXTENSIONS and not os.path.basename(member.name).startswith("."):
                    is_whole = member.isreg() and not member.issparse()
                    if is_whole:
                        yield Item(name, path, member.offset_data, member.size)
                    else:
                        yield Item(name, reason="a link, or in pieces, inside the tar file")
    except (tarfile.TarError, *UNUSABLE) as error:
        yield Item(path, reason=f"not a whole, uncompressed tar file: {reason_text(error)}")


def _in_video(path: str, frames_per_s: float) -> Iterator[Item]:
    """Frames as ``cit-scale video`` takes them, called PATH:0, PATH:1, ... in their order."""
    from cit_scale.datasets.video import BadVideoError, Sampling, extract

    with tempfile.TemporaryDirectory(prefix="cit_scale_") as folder:
        frames = Path(folder) / "frames"
        try:
            count = extract(Path(path), frames, Sampling(fps=frames_per_s))
        except BadVideoError as error:
            yield Item(path, reason=str(error))
            return
        for number in range(count):
            yield Item(f"{path}:{number}", data=(frames / f"{number:06d}.jpg").read_bytes())
