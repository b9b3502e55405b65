"""Random erasing (arXiv:1708.04896) with noise per pixel: what stands in a box follows from the image's key alone.

The noise is N(0, 1) per pixel and channel in ImageNet-normalised space, as timm draws it: here mean + std * N(0, 1),
which leaves [0, 1] at times. It is drawn on the CPU, ahead of time and beside the other decisions of a batch, so that
it is the same on every device, and one launch writes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cit_scale.data.draws import Draw
from cit_scale.data.transfer import to_device

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Noise:
    """What is written to a batch of images. places: (n,) int64, in the flat batch. values: (n,) float32."""

    places: Tensor
    values: Tensor


def draw_noise(draw: Draw, image_size: int, *, pinned: bool) -> Noise:
    """The noise of all boxes of a batch of (B, 3, image_size, image_size). pinned: in page-locked memory, for a GPU."""
    boxes = list(_boxes(draw))
    count = sum(3 * height * width for _, _, (_, _, height, width) in boxes)
    noise = Noise(torch.empty(count, dtype=torch.int64, pin_memory=pinned), torch.empty(count, pin_memory=pinned))
    in_image = np.arange(3 * image_size**2).reshape(3, image_size, image_size)
    generator = torch.Generator()
    start = 0
    for image, key, (y, x, height, width) in boxes:
        box = slice(start, start + 3 * height * width)
        generator.manual_seed(key)
        _fill(noise.values[box].view(3, height, width), generator)
        places = noise.places[box].numpy().reshape(3, height, width)
        np.add(in_image[:, y : y + height, x : x + width], image * in_image.size, out=places)
        start = box.stop
    return noise


def write_noise(images: Tensor, noise: Noise) -> None:
    """Write it to (B, 3, H, W) images, in place."""
    if len(noise.places):
        places, values = to_device(noise.places, images.device), to_device(noise.values, images.device)
        images.view(-1).scatter_(0, places, values)


def erase_on_device(images: Tensor, draw: Draw) -> None:
    """Erase as the first version of the stream does: with noise that the images' device draws, a box at a time.

    A GPU makes other noise of a key than a CPU. images: (B, 3, H, W), changed in place.
    """
    generator = torch.Generator(images.device)
    for image, key, (y, x, height, width) in _boxes(draw):
        generator.manual_seed(key)
        noise = torch.empty((3, height, width), device=images.device)
        _fill(noise, generator)
        images[image, :, y : y + height, x : x + width] = noise


def _boxes(draw: Draw) -> Iterator[tuple[int, int, tuple[int, int, int, int]]]:
    """Index and key of each image with a box, and the box: y, x, height, width."""
    for image in np.flatnonzero(draw.erasing[:, 2]):
        y, x, height, width = map(int, draw.erasing[image])
        yield int(image), int(draw.erasing_key[image]), (y, x, height, width)


def _fill(box: Tensor, generator: torch.Generator) -> None:
    """Fill a box, (3, height, width), with noise."""
    torch.randn(box.shape, generator=generator, out=box)
    # A channel at a time: so small that PyTorch does not spread it over threads, whose waiting costs more.
    for channel, mean, std in zip(box, IMAGENET_MEAN, IMAGENET_STD, strict=True):
        torch.add(mean, channel, alpha=std, out=channel)
