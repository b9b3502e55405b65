"""Checks encoded images before DALI decodes them: how large, whether complete, how they lie; decodes with PIL.

PIL is the judge, because the recipe's results were obtained with it: an image is good if PIL opens it, and its pixels
are those of ``ImageOps.exif_transpose(Image.open(file)).convert("RGB")``. DALI decodes the usual ones to the same
pixels. The others are decoded by PIL, and passed to DALI as uncompressed PPM. How an image lies is read by PIL alone:
DALI gets it in a form that leaves no doubt.

`encoded_v1` is the same for runs that were begun before the second version of pixels.
"""

from __future__ import annotations

import io
import math
import re
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from cit_scale.datasets.headers import PNG, png_header, turned_jpeg, usual
from cit_scale.errors import BadImageError, one_line

VERSION = 2  # of pixels, in the stream

# File names with these extensions count as images. PIL decodes the formats that DALI cannot.
EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".gif"}
EXTENSIONS |= {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".jpf", ".avif", ".tga", ".pcx"}
MAX_BYTES = 1 << 30  # of an encoded image; a larger file is not read
MAX_RATIO = 1000  # longer side / shorter side; resized to a shorter side of 256, a longer strip takes over 200 MB
HEADER_BYTES, LONG_HEADER_BYTES = 1 << 16, 1 << 24  # what is read of an image at first, and if that is not enough
_reading_whole = threading.Lock()  # then all of it, one image at a time: many threads measure
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


def limit_pixels(most: int) -> None:
    """Set how many pixels an image may have, in this process. As in PIL's own limit, which this sets, too."""
    Image.MAX_IMAGE_PIXELS = most / 2  # type: ignore[assignment]  # PIL warns above it, and refuses at twice as many
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def most_pixels() -> float:
    """How many pixels an image may have: as set by ``limit_pixels``, or PIL's default, 178,956,970."""
    return math.inf if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS


def measure(read: Callable[[int, int], bytes]) -> tuple[int, int]:
    """Return height and width of the upright image in pixels, from its header.

    read(start, size): bytes of the image; of its end for a negative start, all of them for size -1.
    Raises BadImageError for a broken or too large image, and what ``read`` does.
    """
    for count in (HEADER_BYTES, LONG_HEADER_BYTES):
        data = read(0, count)
        if data.startswith(PNG):  # whose metadata may stand behind the pixels
            return read_size(io.BytesIO(_png_header(data, read)))
        try:
            return read_size(io.BytesIO(data))
        except BadImageError:  # broken, or its header is longer
            if len(data) < count:
                raise
    with _reading_whole:
        return read_size(io.BytesIO(read(0, -1)))


def _png_header(start: bytes, read: Callable[[int, int], bytes]) -> bytes:
    """As ``headers.png_header``. start: the first bytes, which are not read again."""
    is_whole = len(start) < HEADER_BYTES

    def read_on(at: int, size: int) -> bytes:
        return start[at : at + size] if is_whole or at + size <= len(start) else read(at, size)

    return png_header(read_on, start if is_whole else read(-HEADER_BYTES, HEADER_BYTES))


def read_size(file: Path | IO[bytes]) -> tuple[int, int]:
    """Return height and width of the upright image in pixels, without decoding it.

    Raises BadImageError for a broken or too large image, and OSError where the file cannot be read.
    """
    with bad_image_reasons(), Image.open(file) as image:
        refuse_too_long(image)
        # PIL turns a TIFF by its tag when it is opened, and leaves the tag there until it is decoded.
        is_turned = ORIENTATION in getattr(image, "tag_v2", ())
        swaps_sides = not is_turned and _orientation(image) in LYING
        return image.size if swaps_sides else (image.height, image.width)


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

    Raises BadImageError for a broken image, and before decoding for one above ``most_pixels`` or MAX_RATIO.
    """
    with bad_image_reasons(), Image.open(io.BytesIO(data)) as image:
        refuse_too_long(image)  # before the pixels are decoded
        image.load()
        orientation = _orientation(image)
        decoded = image.convert("RGB")
    return decoded.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else decoded


def refuse_too_many_bytes(count: int) -> None:
    """Raise BadImageError for an encoded image of so many bytes."""
    if count > MAX_BYTES:
        raise BadImageError(f"has {count} bytes, more than {MAX_BYTES}")


def refuse_too_long(image: Image.Image) -> None:
    width, height = image.size
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


def _first_number(error: Exception) -> str:
    return next(iter(re.findall(r"\d+", str(error))), "its")


def to_ppm(image: Image.Image) -> bytes:
    """Encode an RGB image as binary PPM: uncompressed, so that DALI decodes it to exactly these pixels."""
    file = io.BytesIO()
    image.save(file, "PPM")  # in less memory than from ``image.tobytes()``
    return file.getvalue()


class bad_image_reasons(AbstractContextManager[None]):  # noqa: N801  called as a function
    """Turn what PIL raises over a broken file into BadImageError. An OSError of the file system passes through.

    A class and no generator: from Python 3.12 on an error that is thrown into a generator is part of a circle of
    frames, which keeps the bytes of the file until garbage is collected.
    """

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        match error:
            case BadImageError():
                return
            case UnidentifiedImageError():
                raise BadImageError("not an image of a known format") from None
            case Image.DecompressionBombError():
                raise BadImageError(f"{_first_number(error)} pixels are more than {most_pixels():.0f}") from None
            case OSError() if error.errno is not None:  # PIL's own, of broken images, have no number
                return
            case Exception():  # PIL's readers do not wrap parser errors: anything from struct.error to KeyError
                raise BadImageError(one_line(error)) from None
