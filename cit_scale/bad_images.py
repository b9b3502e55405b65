"""The images that a run could not use: counted over all ranks, listed in the run folder, and past a limit its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from cit_scale.data.reader import Reader
from cit_scale.files import write_text
from cit_scale.world import World, broadcast, gather

FILE = "bad_images.tsv"


class TooManyBadImagesError(RuntimeError):
    """More images than data.max_bad_images cannot be used."""


class BadImages:
    """What the readers met, as lines ``name<TAB>reason``, in run_dir/bad_images.tsv. Replaced images stay replaced."""

    def __init__(self, run_dir: Path, readers: Sequence[Reader], most: int, world: World) -> None:
        """Collective. Goes on with what an earlier start of the run has found."""
        self._path = run_dir / FILE
        self._readers = readers
        self._most = most
        self._world = world
        self._counted = 0
        lines = self._path.read_text().split("\n")[:-1] if world.is_main and self._path.exists() else []
        self._lines = dict.fromkeys(broadcast(world, lines))

    @property
    def has_news(self) -> bool:
        """Whether this rank has met some since the last call of `collect`."""
        return sum(len(reader.bad) for reader in self._readers) > self._counted

    @property
    def too_many(self) -> bool:
        """The same on every rank."""
        return len(self._lines) > self._most

    def collect(self, say: Callable[[str], None]) -> None:
        """Collective. Bring the ranks' lists together, write them, and say how many are new."""
        self._counted = sum(len(reader.bad) for reader in self._readers)
        mine = [line for reader in self._readers for line in reader.describe(sorted(reader.bad))]
        before = len(self._lines)
        for lines in gather(self._world, mine):
            self._lines.update(dict.fromkeys(lines))
        if len(self._lines) > before:
            if self._world.is_main:
                write_text(self._path, "".join(f"{line}\n" for line in sorted(self._lines)))
            newest = list(self._lines)[-1].replace("\t", ": ")
            say(
                f"{len(self._lines)} images cannot be used and are replaced by others, {len(self._lines) - before} of "
                f"them new, such as {newest}; their list: {self._path}"
            )

    def refuse_too_many(self) -> None:
        """Raise TooManyBadImagesError, on every rank, when there are."""
        if self.too_many:
            raise TooManyBadImagesError(
                f"{len(self._lines)} images cannot be used, more than data.max_bad_images={self._most}; their list: "
                f"{self._path}; repair them, or raise the limit: the same command continues"
            )
