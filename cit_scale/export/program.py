"""A network as one function of images, made of torch's own operators: what every format is written from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cit_scale.inference.interface import KEY
from cit_scale.models.involution import in_torchs_operators
from cit_scale.models.network import Network

INPUT, OUTPUT = "images", "logits"  # names in a file


class Program(nn.Module):
    """Images in [0, 1] to the mean of all heads' logits, in evaluation mode.

    dtype: in which the network computes; images and logits are float32 either way.
    Forward: (B, 3, S, S) float32 in [0, 1] -> (B, K) float32.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: Network, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model = network.model.to(dtype)
        self.size = network.image_size
        self.dtype = dtype
        self.register_buffer("mean", network.mean.clone())
        self.register_buffer("std", network.std.clone())
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        if self.size is not None:  # the network sees another size than it is given
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
        normalised = ((images - self.mean) / self.std).to(self.dtype)
        # timm's forward of a model with several heads is the mean of them.
        return cast(Tensor, self.model(normalised)).float()


@contextmanager
def exporting() -> Iterator[None]:
    """Without gradients, and with involutions that need nothing of this project."""
    with in_torchs_operators(), torch.no_grad():
        yield


def example_images(size: int, count: int = 2) -> Tensor:
    """Images to trace with, (B, 3, S, S). Two: torch.export takes a dimension of 1 for a constant."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def export_program(program: Program, size: int) -> torch.export.ExportedProgram:
    """The program as torch.export has it, for any number of images of a size."""
    with exporting():
        return torch.export.export(
            program, (example_images(size),), dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}}
        )


def write_pt2(program: Program, size: int, path: Path, noted: str) -> None:
    """Write a file of torch.export. noted: what the file says of itself (``Interface.to_json``)."""
    torch.export.save(export_program(program, size), path, extra_files={KEY: noted})


def write_torchscript(program: Program, size: int, path: Path, noted: str) -> None:
    """Write a traced TorchScript file. noted: what the file says of itself (``Interface.to_json``)."""
    with exporting():
        traced = torch.jit.trace(program, example_images(size), check_inputs=[(example_images(size, 3),)])
    torch.jit.save(traced, str(path), _extra_files={KEY: noted})
