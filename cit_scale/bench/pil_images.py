"""Writes an image in every format, mode and orientation that PIL writes, and animations."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cit_scale.datasets.encoded import EXTENSIONS, ORIENTATION

HEIGHT, WIDTH = 64, 96

# Of each format: its extension here, and the ways to write it.
FORMATS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "JPEG": (
        ".jpg",
        [
            {},
            {"quality": 30},
            {"progressive": True},
            {"subsampling": 0},
            {"subsampling": 1},
            {"keep_rgb": True},
            {"restart_marker_rows": 1},
            {"icc_profile": b"abc" * 50},
        ],
    ),
    "MPO": (".jpg", [{}]),
    "PNG": (".png", [{}, {"compress_level": 0}, {"dpi": (72, 72)}, {"bits": 4}]),
    "WEBP": (".webp", [{}, {"lossless": True}, {"quality": 40}, {"icc_profile": b"abcd" * 30}]),
    "TIFF": (".tif", [{}, *({"compression": each} for each in ("tiff_lzw", "jpeg", "tiff_deflate", "packbits"))]),
    "AVIF": (".avif", [{}, {"quality": 60}]),
    "JPEG2000": (".jp2", [{}, {"irreversible": True}]),
    "GIF": (".gif", [{}]),
    "BMP": (".bmp", [{}]),
    "PPM": (".ppm", [{}]),
    "TGA": (".tga", [{}]),
    "PCX": (".pcx", [{}]),
}
ANIMATED = "PNG", "GIF", "WEBP", "AVIF", "TIFF"


def write_images(folder: Path) -> int:
    """Write the images into class folders, one for each format. Returns how many: what PIL cannot write is left out."""
    count = 0
    for name, data in _images():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        count += 1
    return count


def _images() -> Iterator[tuple[str, bytes]]:
    modes = _modes()
    for format_name, (extension, ways) in FORMATS.items():
        assert extension in EXTENSIONS
        for mode, image in modes.items():
            for number, options in enumerate(ways):
                for orientation in range(1, 9 if number == 0 else 2):
                    exif = Image.Exif()
                    exif[ORIENTATION] = orientation
                    turned = {"exif": exif} if orientation > 1 else {}
                    data = _encoded(image, format_name, **options, **turned)
                    if data:
                        yield f"{format_name}/{mode.replace(';', '_')}_{number}_{orientation}{extension}", data
        if format_name in ANIMATED:
            others = [Image.new("RGB", (WIDTH, HEIGHT), (0, 0, 255))] * 2
            still = {"default_image": True} if format_name == "PNG" else {}
            if data := _encoded(modes["RGB"], format_name, save_all=True, append_images=others, **still):
                yield f"{format_name}/animation{extension}", data


def _modes() -> dict[str, Image.Image]:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    colours = np.stack([x * 255 // WIDTH, y * 255 // HEIGHT, (x // 16 + y // 16) % 2 * 200], axis=-1).astype(np.uint8)
    image = Image.fromarray(colours)
    with_alpha = image.copy()
    with_alpha.putalpha(Image.fromarray((x * 2).astype(np.uint8)))
    transparent = image.quantize(64)
    transparent.info["transparency"] = 3
    converted = {mode: image.convert(mode) for mode in ("1", "L", "RGB", "CMYK", "YCbCr", "HSV")}
    red = colours[..., 0]
    return converted | {
        "LA": with_alpha.convert("LA"),
        "RGBA": with_alpha,
        "P": image.quantize(64),
        "P_transparent": transparent,
        "I;16": Image.fromarray(red.astype(np.uint16) * 257),
        "I": Image.fromarray(red.astype(np.int32) * 1000),
        "F": Image.fromarray(red.astype(np.float32)),
    }


def _encoded(image: Image.Image, format_name: str, **options: Any) -> bytes:
    """The encoded image; empty where PIL does not write this mode in this format."""
    buffer = io.BytesIO()
    try:
        image.save(buffer, format_name, **options)
    except (OSError, KeyError, ValueError, TypeError):
        return b""
    return buffer.getvalue()
