"""Which file of a checkpoint each tensor of the training state lies in, and who writes it.

    student.safetensors         weights and buffers under the model's own names: a timm state dict, for use as it is
    student_ema.safetensors     their moving averages, likewise, where they are kept
    optimizer_000.safetensors   AdamW's moments and counts, each tensor whole in one of these files, one file per rank

The files differ with the number of ranks that wrote them, the tensors in them do not: any engine on any number of ranks
reads any of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors
import torch
from torch import Tensor

STUDENT = "student.safetensors"
STUDENT_EMA = "student_ema.safetensors"

# The student is a Network, which holds timm's model under this name.
PREFIX = "model."

Place = tuple[str, str]
"""A file, and the key in it."""


def share_out(shapes: Mapping[str, torch.Size], world_size: int) -> list[dict[str, Place]]:
    """For each rank, what it writes: state key to place. shapes: as ``Engine.state_shapes`` returns them.

    The student goes to rank 0 and its average to the next, as one file each; moments go one by one, the largest first,
    to whoever has the least. With an average and no more than four ranks all write about the same.
    """
    shares: list[dict[str, Place]] = [{} for _ in range(world_size)]
    loads = [0] * world_size
    moments = []
    for key, shape in shapes.items():
        kind, _, name = key.partition("/")
        if kind in ("weight", "buffer", "ema"):
            rank = 1 % world_size if kind == "ema" else 0
            shares[rank][key] = (STUDENT_EMA if kind == "ema" else STUDENT, name.removeprefix(PREFIX))
            loads[rank] += math.prod(shape)
        else:
            moments.append(key)
    for key in sorted(moments, key=lambda key: (-math.prod(shapes[key]), key)):
        rank = loads.index(min(loads))
        shares[rank][key] = (f"optimizer_{rank:03d}.safetensors", key)
        loads[rank] += math.prod(shapes[key])
    return shares


def by_file(state: Mapping[str, Tensor], share: Mapping[str, Place]) -> dict[str, dict[str, Tensor]]:
    """A rank's tensors as the files that it writes."""
    files: dict[str, dict[str, Tensor]] = {}
    for state_key, (file, key) in share.items():
        files.setdefault(file, {})[key] = state[state_key]
    return files


class SavedState(Mapping[str, Tensor]):
    """The training state in a checkpoint's folder. Each look-up reads one tensor from its file, and keeps nothing.

    places: by state key. Raises OSError or SafetensorError for a file that cannot be read, KeyError for a wrong place.
    """

    def __init__(self, folder: Path, places: Mapping[str, Place]) -> None:
        self._places = places
        files = {file for file, _ in places.values()}
        for file in files:
            (folder / file).open(
                "rb"
            ).close()  # whose error has a number; safetensors makes "no such file" of every one
        self._files = {file: safetensors.safe_open(folder / file, framework="pt") for file in files}

    def __getitem__(self, state_key: str) -> Tensor:
        file, key = self._places[state_key]
        return self._files[file].get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
