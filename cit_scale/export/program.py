"""A network as one function of images, which every format is written from, and the formats of torch."""

from __future__ import annotations

import io
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

    Forward: (B, 3, S, S) float32 in [0, 1] -> (B, K) float32.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.model = network.model
        self.size = network.image_size
        # No names of operators, such as mean: an ONNX file has one name for each.
        self.register_buffer("image_mean", network.mean.clone())
        self.register_buffer("image_std", network.std.clone())
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        if self.size is not None:  # the network sees another size than it is given
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
        # timm's forward of a model with several heads is the mean of them.
        return cast(Tensor, self.model((images - self.image_mean) / self.image_std))


def example_images(size: int, count: int = 2) -> Tensor:
    """Images to trace with, (B, 3, S, S). Two: torch.export takes a dimension of 1 for a constant."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def export_program(program: Program, size: int) -> torch.export.ExportedProgram:
    """The program as torch.export has it, for any number of images of a size."""
    with torch.no_grad():
        return torch.export.export(
            program, (example_images(size),), dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}}
        )


def write_pt2(program: Program, size: int, path: Path, noted: str) -> None:
    """Write a file of torch.export. noted: what the file says of itself (``Interface.to_json``)."""
    file = io.BytesIO()  # torch's own writers do not say what an operating system says of a full disk
    with in_torchs_operators():
        exported = export_program(program, size)
    torch.export.save(exported, file, extra_files={KEY: noted})
    path.write_bytes(file.getbuffer())


def write_torchscript(program: Program, size: int, path: Path, noted: str) -> None:
    """Write a traced TorchScript file. noted: what the file says of itself (``Interface.to_json``)."""
    with in_torchs_operators(), torch.no_grad():
        traced = torch.jit.trace(program, example_images(size), check_inputs=[(example_images(size, 3),)])
    file = io.BytesIO()
    torch.jit.save(traced, file, _extra_files={KEY: noted})
    path.write_bytes(file.getbuffer())
