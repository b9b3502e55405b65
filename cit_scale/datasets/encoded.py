"""Checks encoded images before DALI decodes them: reads their size, tests whether they are complete, decodes with PIL.

PIL decides whether an image is good, because the recipe's results were obtained with PIL. DALI decodes the usual
formats to the same pixels. Other formats, and files that look broken, are decoded by PIL and passed to DALI as
uncompressed PPM.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from cit_scale.errors import BadImageError, one_line

# File names with these extensions count as images. PIL decodes the formats that DALI cannot.
EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".gif", ".avif"}
MAX_PIXELS = 178_956_970  # larger images PIL refuses as decompression bombs: 512 MiB as RGB
MAX_RATIO = 1000  # longer side / shorter side; resized to a shorter side of 256, a longer strip takes over 200 MB
ORIENTATION = 0x0112  # the EXIF tag
# EXIF orientation -> the transpose that makes the image upright. 1 means upright already.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LYING = (5, 6, 7, 8)  # orientations that exchange height and width


def read_size(file: Path | IO[bytes]) -> tuple[int, int]:
    """Return height and width of the upright image in pixels, from its header.

    Raises BadImageError for a broken or too large image, and OSError where the file cannot be read.
    """
    with _reasons(), Image.open(file) as image:
        return _upright_size(image)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Return height and width after the EXIF orientation has been applied. Raises BadImageError above the limits."""
    width, height = image.size
    if height * width > MAX_PIXELS:
        raise BadImageError(f"{width} x {height} pixels are more than {MAX_PIXELS}")
    if max(height, width) > MAX_RATIO * min(height, width):
        raise BadImageError(f"{width} x {height} pixels: one side is more than {MAX_RATIO} times the other")
    return (width, height) if _orientation(image) in LYING else (height, width)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 where there is none.

    Reads only the EXIF data in the header, as DALI does. An orientation in XMP, or behind the pixels of a PNG, does not
    count: with it, the sizes in the index and those of the decoded images disagreed.
    """
    exif = Image.Exif()
    exif.load(image.info.get("exif", b""))
    return exif.get(ORIENTATION, 1)


def decode(data: bytes) -> Image.Image:
    """Decode an image with PIL and return it upright and in RGB.

    Raises BadImageError for a broken image, and before decoding for one above MAX_PIXELS or MAX_RATIO.
    """
    with _reasons(), Image.open(io.BytesIO(data)) as image:
        _upright_size(image)  # raises for an image above the limits; must come before the pixels are decoded
        orientation = _orientation(image)
        decoded = image.convert("RGB")
    return decoded.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else decoded


def to_ppm(image: Image.Image) -> bytes:
    """Encode an RGB image as binary PPM: uncompressed, so that DALI decodes it to exactly these pixels."""
    return b"P6 %d %d 255\n" % image.size + image.tobytes()


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


@contextmanager
def _reasons() -> Iterator[None]:
    """Turn what PIL raises over a broken file into BadImageError. An OSError of the file system passes through."""
    try:
        yield
    except BadImageError:
        raise
    except UnidentifiedImageError:
        raise BadImageError("not an image of a known format") from None
    except Image.DecompressionBombError:
        raise BadImageError(f"more than {MAX_PIXELS} pixels") from None
    except Exception as error:  # PIL's readers do not wrap parser errors: anything from struct.error to KeyError
        # PIL raises OSError for broken images, too, but only the operating system sets a number.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise BadImageError(one_line(error)) from None
