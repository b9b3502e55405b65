"""The first version of pixels, for runs that were begun with it: two readers decide how an image lies, PIL and DALI.

Where they disagree (EXIF that one of them cannot read, or that stands twice, or behind the pixels; XMP), an image was
trained on squeezed or lying on its side. `encoded` has the version for all other runs.
"""

from __future__ import annotations

import io
from collections.abc import Callable

from PIL import Image

from cit_scale.datasets.encoded import (
    HEADER_BYTES,
    LYING,
    ORIENTATION,
    UPRIGHT,
    bad_image_reasons,
    refuse_too_long,
)
from cit_scale.errors import BadImageError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".gif", ".avif"}


def measure(read: Callable[[int, int], bytes]) -> tuple[int, int]:
    """As ``encoded.measure``."""
    try:
        return _read_size(read(0, HEADER_BYTES))
    except BadImageError:
        return _read_size(read(0, -1))


def _read_size(data: bytes) -> tuple[int, int]:
    with bad_image_reasons(), Image.open(io.BytesIO(data)) as image:
        return _upright_size(image)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    refuse_too_long(image)
    return image.size if _orientation(image) in LYING else (image.height, image.width)


def _orientation(image: Image.Image) -> int:
    """The orientation in the EXIF data of the header, 1 where there is none."""
    exif = Image.Exif()
    exif.load(image.info.get("exif", b""))
    return exif.get(ORIENTATION, 1)


def decode(data: bytes) -> Image.Image:
    """As ``encoded.decode``."""
    with bad_image_reasons(), Image.open(io.BytesIO(data)) as image:
        _upright_size(image)
        orientation = _orientation(image)
        decoded = image.convert("RGB")
    return decoded.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else decoded


def for_dali(data: bytes) -> tuple[bytes, None] | None:
    """As ``encoded.for_dali``, without the size: DALI applies the orientation that it finds."""
    return (data, None) if is_usual(data) else None


def is_usual(data: bytes) -> bool:
    """Whether the first and last bytes show a complete file of a format that DALI decodes to the same pixels as PIL.

    Takes about a microsecond. Damage in the middle of the file is not seen. False does not mean broken: the caller then
    decodes with PIL.
    """
    if data.startswith(b"\xff\xd8\xff"):
        # A few zeros behind the end marker are padding.
        return data.endswith(b"\xff\xd9") or data[-64:].rstrip(b"\0").endswith(b"\xff\xd9")
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data[24:25] != b"\x10" and data[-8:-4] == b"IEND"  # 16 bits per channel: PIL has its own reduction to 8
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return int.from_bytes(data[4:8], "little") + 8 <= len(data)
    if data.startswith(b"BM"):
        return int.from_bytes(data[2:6], "little") <= len(data)
    return False
