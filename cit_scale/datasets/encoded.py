"""Encoded images before DALI sees them: their size, whether they are whole, and PIL's word where there is a doubt.

PIL is the measure of a good image, because the recipe's results were obtained with it. DALI decodes the usual formats
to the same pixels; the rest, and whatever looks broken, is decoded by PIL and handed on as uncompressed PPM.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from cit_scale.errors import BadImageError, one_line

# In a folder, these are images. What DALI cannot decode of them, PIL does.
EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".gif", ".avif"}
MAX_PIXELS = 178_956_970  # from here on PIL takes a file for a decompression bomb: 512 MiB as RGB
MAX_RATIO = 1000  # enlarged to a shorter side of 256, a longer line takes more than 200 MB
ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # what undoes each of its values
LYING = (5, 6, 7, 8)  # of an image that lies on its side


def read_size(file: Path | IO[bytes]) -> tuple[int, int]:
    """Height and width of the upright image, from its header. Raises BadImageError, OSError for a missing file."""
    with _reasons(), Image.open(file) as image:
        return _upright_size(image)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    if height * width > MAX_PIXELS:
        raise BadImageError(f"{width} x {height} pixels are more than {MAX_PIXELS}")
    if max(height, width) > MAX_RATIO * min(height, width):
        raise BadImageError(f"{width} x {height} pixels: one side is more than {MAX_RATIO} times the other")
    return (width, height) if _orientation(image) in LYING else (height, width)


def _orientation(image: Image.Image) -> int:
    """By the EXIF data in the header, as DALI goes by it; not by XMP, and not by what a PNG holds behind its pixels."""
    exif = Image.Exif()
    exif.load(image.info.get("exif", b""))
    return exif.get(ORIENTATION, 1)


def decode(data: bytes) -> Image.Image:
    """The whole upright image in RGB, as PIL makes it. Raises BadImageError, for one too large before decoding it."""
    with _reasons(), Image.open(io.BytesIO(data)) as image:
        _upright_size(image)
        orientation = _orientation(image)
        decoded = image.convert("RGB")
    return decoded.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else decoded


def to_ppm(image: Image.Image) -> bytes:
    """An RGB image uncompressed, for a decoder that does not know what it came from."""
    return b"P6 %d %d 255\n" % image.size + image.tobytes()


def is_usual(data: bytes) -> bool:
    """Whether this is whole, as far as its first and last bytes show, and of a kind that DALI decodes as PIL does.

    Costs about a microsecond. A broken middle is not seen, and a false answer is no judgement: it means, ask PIL.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return data.endswith(b"\xff\xd9") or data[-64:].rstrip(b"\0").endswith(b"\xff\xd9")
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data[24:25] != b"\x10" and data[-8:-4] == b"IEND"  # 16 bits a channel are cut to 8 in PIL's own way
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return int.from_bytes(data[4:8], "little") + 8 <= len(data)
    if data.startswith(b"BM"):
        return int.from_bytes(data[2:6], "little") <= len(data)
    return False


@contextmanager
def _reasons() -> Iterator[None]:
    """What PIL raises over a broken file, as a BadImageError. An OSError of the file system stays one."""
    try:
        yield
    except BadImageError:
        raise
    except UnidentifiedImageError:
        raise BadImageError("not an image of a known format") from None
    except Image.DecompressionBombError:
        raise BadImageError(f"more than {MAX_PIXELS} pixels") from None
    except Exception as error:  # PIL's readers let through whatever a parser stumbles over, struct.error to KeyError
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise BadImageError(one_line(error)) from None
