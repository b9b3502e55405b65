"""From an image's bytes to what a network is given: decoded by PIL, resized and cropped as in training's evaluation."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cit_scale.datasets.encoded import decode
from cit_scale.errors import BadImageError
from cit_scale.inference.interface import Interface


def prepare_image(data: bytes, interface: Interface) -> Tensor:
    """From an encoded image to what a classifier takes, (3, H, W) uint8. Raises BadImageError."""
    pixels = decode_pixels(data)
    return pixels if interface.pixels else resize_and_crop(pixels, interface.image_size, interface.crop_ratio)


def decode_pixels(data: bytes) -> Tensor:
    """Decode an image. Returns (3, H, W) uint8, upright, RGB. Raises BadImageError."""
    image = decode(data)
    pixels = np.asarray(image)
    if not pixels.size:
        raise BadImageError("has no pixels")
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def resize_and_crop(pixels: Tensor, image_size: int, crop_ratio: float) -> Tensor:
    """Resize the shorter side to image_size / crop_ratio, and crop the centre, as torchvision rounds both.

    pixels: (3, H, W) uint8. Returns (3, image_size, image_size) uint8. Bicubic with antialiasing, in PyTorch's
    arithmetic for 8 bits, which is PIL's: the pixels are those of the trainer's evaluation on a CPU (data/dali.py).
    """
    height, width = pixels.shape[1:]
    shorter = round(image_size / crop_ratio)
    size = shorter * height // min(height, width), shorter * width // min(height, width)
    if size != (height, width):
        pixels = F.interpolate(pixels[None], size=size, mode="bicubic", antialias=True)[0]
    top, left = (round((side - image_size) / 2) for side in size)
    return pixels[:, top : top + image_size, left : left + image_size]
