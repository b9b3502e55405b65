"""Checkpoint layout: which file holds each tensor of the training state, and which rank writes the file.

    student.safetensors         weights and buffers under the model's own names: a timm state dict that loads as it is
    student_ema.safetensors     moving averages of the student's weights and buffers, if the run keeps them; same names
    optimizer_000.safetensors   AdamW's moments and counts, one file per rank; no tensor is split over files

The number of optimizer files and their contents depend on the number of ranks; the tensors do not. Any engine on any
number of ranks therefore loads a checkpoint of any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from cit_scale.run_folder import STUDENT, STUDENT_EMA

# The student is a Network, which holds timm's model as its attribute ``model``. The files drop this prefix, so that
# their keys are those of timm's model.
PREFIX = "model."

Place = tuple[str, str]
"""(file name, key in the file)"""


def share_out(shapes: Mapping[str, torch.Size], world_size: int) -> list[dict[str, Place]]:
    """Distribute the tensors of the training state over ranks. Returns, for each rank, state key to place.

    shapes: as ``Engine.state_shapes`` returns them.

    Rank 0 writes the student, rank 1 (rank 0 of a single rank) the moving average, each as one file. The moments follow
    greedily: the largest first, each to the rank with the fewest elements. Weights, average and two moments are four
    equal parts, so on up to four ranks all ranks write about the same number of bytes.
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
    # The key breaks ties, so that every rank computes the same shares.
    for key in sorted(moments, key=lambda key: (-math.prod(shapes[key]), key)):
        rank = loads.index(min(loads))
        shares[rank][key] = (f"optimizer_{rank:03d}.safetensors", key)
        loads[rank] += math.prod(shapes[key])
    return shares


def by_file(state: Mapping[str, Tensor], share: Mapping[str, Place]) -> dict[str, dict[str, Tensor]]:
    """Group a rank's tensors by the file that they go to. Returns file name to (key in the file to tensor)."""
    files: dict[str, dict[str, Tensor]] = {}
    for state_key, (file, key) in share.items():
        files.setdefault(file, {})[key] = state[state_key]
    return files


class SavedState(Mapping[str, Tensor]):
    """The training state of a checkpoint as a mapping from state key to tensor.

    Each look-up reads one tensor from its file and keeps no copy, so that loading needs little memory. places: state
    key to place. Raises OSError or SafetensorError for a file that cannot be read, KeyError for an unknown state key.
    """

    def __init__(self, folder: Path, places: Mapping[str, Place]) -> None:
        self._places = places
        files = {file for file, _ in places.values()}
        for file in files:
            # Python's open raises an OSError with an errno, by which os_error tells a wrong path from a failing disk.
            # safetensors turns every such error into "no such file".
            (folder / file).open("rb").close()
        self._files = {file: safetensors.safe_open(folder / file, framework="pt") for file in files}

    def __getitem__(self, state_key: str) -> Tensor:
        file, key = self._places[state_key]
        return self._files[file].get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
