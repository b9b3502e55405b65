"""The images that a run could not use: counted over all ranks, listed in the run folder, and past a limit its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from cit_scale.data.reader import Reader
from cit_scale.distributed.world import World, gather
from cit_scale.errors import BadDataError
from cit_scale.files import write_text

FILE = "bad_images.tsv"


class BadImages:
    """What the readers met since this start, by name, and its list in the run folder, which keeps earlier ones."""

    def __init__(self, run_dir: Path, readers: Sequence[Reader], most: int, world: World) -> None:
        self._path = run_dir / FILE
        self._readers = readers
        self._most = most
        self._world = world
        self._counted = 0
        self._reasons: dict[str, str] = {}
        self._unwritten = False

    @property
    def has_news(self) -> bool:
        """Whether this rank has met some since the last call of `collect`."""
        return sum(len(reader.bad) for reader in self._readers) > self._counted

    @property
    def too_many(self) -> bool:
        """The same on every rank. Images that an earlier start met do not count: they may have been repaired."""
        return len(self._reasons) > self._most

    def collect(self, say: Callable[[str], None]) -> None:
        """Collective. Bring the ranks' lists together, write them, and say how many are new."""
        self._counted = sum(len(reader.bad) for reader in self._readers)
        mine = [line for reader in self._readers for line in reader.bad_image_lines(sorted(reader.bad))]
        before = len(self._reasons)
        for lines in gather(self._world, mine):
            self._reasons = dict(line.split("\t", 1) for line in lines) | self._reasons
        if len(self._reasons) > before:
            self._unwritten = True
            name, reason = next(iter(self._reasons.items()))
            say(
                f"{len(self._reasons)} images cannot be used and are replaced by others, {len(self._reasons) - before} "
                f"of them new, such as {name} ({reason}); their list: {self._path}"
            )
        if self._unwritten and self._world.is_main:
            try:
                self._write()
                self._unwritten = False
            except OSError as error:
                say(f"the list of images that cannot be used was not written: {error}; it is tried again with the next")

    def _write(self) -> None:
        lines = self._path.read_text().split("\n")[:-1] if self._path.exists() else []
        reasons = dict(line.split("\t", 1) for line in lines) | self._reasons
        write_text(self._path, "".join(f"{name}\t{reason}\n" for name, reason in sorted(reasons.items())))

    def refuse_too_many(self) -> None:
        """Raise BadDataError, on every rank, when there are."""
        if self.too_many:
            raise BadDataError(
                f"{len(self._reasons)} images cannot be used, more than data.max_bad_images={self._most}; their list: "
                f"{self._path}; repair them, or raise the limit: the same command continues"
            )
