"""Unusable images of a run: counted over all ranks, listed in bad_images.tsv, and limited by data.max_bad_images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from cit_scale.data.reader import Reader
from cit_scale.distributed.world import World, gather
from cit_scale.errors import BadDataError
from cit_scale.files import write_text
from cit_scale.run_folder import BAD_IMAGES


class BadImages:
    """Unusable images that the readers of all ranks have met since this start, and the list in the run folder.

    The file keeps the entries of earlier starts as well; the limit counts this start only.
    """

    def __init__(self, run_dir: Path, readers: Sequence[Reader], most: int, world: World) -> None:
        """most: data.max_bad_images. readers: those of this rank, for training and evaluation."""
        self._path = run_dir / BAD_IMAGES
        self._readers = readers
        self._most = most
        self._world = world
        self._counted = 0  # of this rank, at the last ``collect``
        self._reasons: dict[str, str] = {}  # of all ranks, by image name
        self._unwritten = False  # whether the file lacks entries

    @property
    def has_news(self) -> bool:
        """Whether this rank has met new bad images since the last call of ``collect``."""
        return sum(len(reader.bad) for reader in self._readers) > self._counted

    @property
    def too_many(self) -> bool:
        """Whether more than ``most`` images are unusable; equal on every rank.

        Images that an earlier start met do not count, because they may have been repaired.
        """
        return len(self._reasons) > self._most

    def collect(self, say: Callable[[str], None]) -> None:
        """Collective. Gather the ranks' bad images, write the list on rank 0, and print how many are new.

        An error of the disk is passed to ``say`` and does not end the run.
        """
        self._counted = sum(len(reader.bad) for reader in self._readers)
        mine = [line for reader in self._readers for line in reader.bad_image_lines(sorted(reader.bad))]
        before = len(self._reasons)
        for lines in gather(self._world, mine):
            # The right operand wins: an image keeps the first reason that was found.
            self._reasons = dict(line.split("\t", 1) for line in lines) | self._reasons
        if len(self._reasons) > before:
            self._unwritten = True
            name, reason = next(iter(self._reasons.items()))
            say(
                f"{len(self._reasons)} images cannot be used and are replaced by others; {len(self._reasons) - before} "
                f"are new, such as {name} ({reason}); list: {self._path}"
            )
        if self._unwritten and self._world.is_main:
            try:
                self._write()
                self._unwritten = False
            except OSError as error:
                say(f"{self._path} was not written: {error}; training goes on, and the next bad image writes it")

    def _write(self) -> None:
        """Merge this start's images into the list of earlier starts; a new reason replaces an old one."""
        lines = self._path.read_text().split("\n")[:-1] if self._path.exists() else []
        reasons = dict(line.split("\t", 1) for line in lines) | self._reasons
        write_text(self._path, "".join(f"{name}\t{reason}\n" for name, reason in sorted(reasons.items())))

    def refuse_too_many(self) -> None:
        """Raise BadDataError, on every rank, if ``too_many``."""
        if self.too_many:
            raise BadDataError(
                f"{len(self._reasons)} images cannot be used, more than data.max_bad_images={self._most}; their list: "
                f"{self._path}; repair them or raise data.max_bad_images, then the same command continues"
            )
