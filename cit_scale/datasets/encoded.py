"""Checks encoded images before DALI decodes them: how large, whether complete, how they lie; decodes with PIL.

PIL is the judge, because the recipe's results were obtained with it: an image is good if PIL opens it, and its pixels
are those of ``ImageOps.exif_transpose(Image.open(file)).convert("RGB")``. DALI decodes the usual ones to the same
pixels. The others are decoded by PIL, and passed to DALI as uncompressed PPM. How an image lies is read by PIL alone:
DALI gets it in a form that leaves no doubt.

`encoded_v1` is the same for runs that were begun before the second version of pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from cit_scale.datasets.headers import PNG, turned_jpeg, usual, with_metadata_first
from cit_scale.errors import BadImageError, one_line

VERSION = 2  # of pixels, in the stream

# File names with these extensions count as images. PIL decodes the formats that DALI cannot.
EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".gif"}
EXTENSIONS |= {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".jpf", ".avif", ".tga", ".pcx"}
MAX_PIXELS = 178_956_970  # larger images PIL refuses as decompression bombs: 512 MiB as RGB
MAX_RATIO = 1000  # longer side / shorter side; resized to a shorter side of 256, a longer strip takes over 200 MB
HEADER_BYTES = 1 << 16  # first read of an image; one with a longer header is read a second time, completely
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


def measure(read: Callable[[int, int], bytes]) -> tuple[int, int]:
    """Return height and width of the upright image in pixels, from its header.

    read(start, size): bytes of the image; of its end for a negative start, all of them for size -1.
    Raises BadImageError for a broken or too large image, and what ``read`` does.
    """
    data = read(0, HEADER_BYTES)
    if data.startswith(PNG):  # whose metadata may stand behind the pixels
        tail = read(-HEADER_BYTES, HEADER_BYTES) if len(data) == HEADER_BYTES else b""
        data = with_metadata_first(data, tail)
    try:
        return read_size(io.BytesIO(data))
    except BadImageError:  # broken, or its header is longer than HEADER_BYTES
        data = read(0, -1)
        return read_size(io.BytesIO(with_metadata_first(data) if data.startswith(PNG) else data))


def read_size(file: Path | IO[bytes]) -> tuple[int, int]:
    """Return height and width of the upright image in pixels, without decoding it.

    Raises BadImageError for a broken or too large image, and OSError where the file cannot be read.
    """
    with bad_image_reasons(), Image.open(file) as image:
        refuse_too_large(image)
        # PIL turns a TIFF when it is opened, and leaves its orientation there until it is decoded.
        lies = image.format != "TIFF" and _orientation(image) in LYING
        return image.size if lies else (image.height, image.width)


def for_dali(data: bytes) -> tuple[bytes, tuple[int, int]] | None:
    """Return the image in a form that DALI decodes to PIL's pixels, with its height and width upright, or None.

    None does not mean broken: the caller then decodes with PIL. Damage in the middle of the file is not seen.
    """
    found = usual(data)
    if found is None:
        return None
    shape = found.height, found.width
    if not found.metadata:
        return data, shape
    try:
        with Image.open(io.BytesIO(found.metadata)) as image:
            orientation = _orientation(image)
    except Exception:  # of a header that is odd in some other way
        return None
    if orientation == 1:
        return found.plain, shape
    if data.startswith(PNG):
        return None
    turned = turned_jpeg(found.plain, orientation)
    return turned, (shape[::-1] if orientation in LYING else shape)


def decode(data: bytes) -> Image.Image:
    """Decode an image with PIL and return it upright and in RGB.

    Raises BadImageError for a broken image, and before decoding for one above MAX_PIXELS or MAX_RATIO.
    """
    with bad_image_reasons(), Image.open(io.BytesIO(data)) as image:
        refuse_too_large(image)  # before the pixels are decoded
        image.load()
        orientation = _orientation(image)
        decoded = image.convert("RGB")
    return decoded.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else decoded


def refuse_too_large(image: Image.Image) -> None:
    width, height = image.size
    if height * width > MAX_PIXELS:
        raise BadImageError(f"{width} x {height} pixels are more than {MAX_PIXELS}")
    if max(height, width) > MAX_RATIO * min(height, width):
        raise BadImageError(f"{width} x {height} pixels: one side is more than {MAX_RATIO} times the other")


def _orientation(image: Image.Image) -> int:
    """Return the orientation as ``ImageOps.exif_transpose`` finds it, 1 where there is none that can be read."""
    try:
        # Not a PNG's own method, which decodes the image to see what stands behind the pixels.
        found = Image.Image.getexif(image).get(ORIENTATION, 1)
        return int(found) if found in UPRIGHT else 1
    except Exception:  # of metadata that are damaged: the pixels are not
        return 1


def to_ppm(image: Image.Image) -> bytes:
    """Encode an RGB image as binary PPM: uncompressed, so that DALI decodes it to exactly these pixels."""
    return b"P6 %d %d 255\n" % image.size + image.tobytes()


@contextmanager
def bad_image_reasons() -> Iterator[None]:
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
