"""Walks over tar files without extracting anything, and notices damage that `tarfile` takes for their end."""

from __future__ import annotations

import errno
import os
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any, cast

MOST_LINKS = 40  # from one to the next, as Linux has it
BEHIND_THE_END = 1 << 20  # bytes that are looked at there; tar itself pads to 10,240


def tar_members(tar: tarfile.TarFile, *, keep: bool = True, demand_end: bool = True) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file that are no folders, in their order. tar: opened as "r:" from a file of its own.

    keep: whether `tar` remembers them. demand_end: whether a file without end mark, or with more behind it, is damaged.
    Raises tarfile.TarError for a damaged file.
    """
    for member in _all_members(tar):
        if member.size < 0:  # tarfile would look for the next header before this one
            raise tarfile.ReadError(f"a member of {member.size} bytes")
        if not member.isdir():
            yield member
        if not keep:
            cast(Any, tar).members = []
    # tarfile takes a header that it cannot parse for the end of the file, as it does the end of the bytes.
    descriptor = cast(Any, tar).fileobj.fileno()
    end = os.pread(descriptor, tarfile.BLOCKSIZE, tar.offset)
    if any(end):
        raise tarfile.ReadError(f"no header at byte {tar.offset}")
    if not demand_end:
        return
    if len(end) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"no end mark at byte {tar.offset}: it was cut short")
    if any(os.pread(descriptor, BEHIND_THE_END, tar.offset)):
        raise tarfile.ReadError(f"more follows behind the end mark at byte {tar.offset}; join tar files by tar -A")


def _all_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members. Numbers that cannot be read, or that lead nowhere, raise ReadError, too."""
    members = iter(tar)
    while True:
        try:
            member = next(members, None)
        except (ValueError, OverflowError) as error:
            raise tarfile.ReadError(str(error)) from error
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise tarfile.ReadError(f"a member that ends nowhere, before byte {tar.offset}") from error
        if member is None:
            return
        yield member


def followed(member: tarfile.TarInfo, by_name: Mapping[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """The plain file that a member is, or links to inside its tar file; None if it leads nowhere.

    by_name: under their names as ``os.path.normpath`` gives them: tar writes ./a.jpg where a folder was packed as ".".
    """
    found: tarfile.TarInfo | None = member
    for _ in range(MOST_LINKS):
        if found is None or found.isreg():
            return found
        if found.islnk():
            name = found.linkname
        elif found.issym():
            name = os.path.join(os.path.dirname(found.name), found.linkname)
        else:
            return None
        found = _named(os.path.normpath(name), by_name)
    return None


def _named(name: str, by_name: Mapping[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """The member of this name. Folders on the way to it may be links, too."""
    for _ in range(MOST_LINKS):
        if name in by_name:
            return by_name[name]
        parts = name.split("/")
        starts = ((by_name.get("/".join(parts[:end])), parts[end:]) for end in range(1, len(parts)))
        link = next(((found, rest) for found, rest in starts if found is not None and found.issym()), None)
        if link is None:
            return None
        name = os.path.normpath(os.path.join(os.path.dirname(link[0].name), link[0].linkname, *link[1]))
    return None
