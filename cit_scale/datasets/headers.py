"""Reads the structure of encoded images: which ones DALI decodes to PIL's pixels, and where metadata stand in them.

Takes some microseconds an image, since every image of a training stream passes here. What is not plainly usual is left
to PIL: None is no judgement about an image.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"


class Usual(NamedTuple):
    """An image that DALI decodes to PIL's pixels. height, width: as stored, in pixels. metadata: where its orientation
    may stand, as an image without pixels, which PIL opens; empty where it has none. plain: the image without those.
    """

    height: int
    width: int
    plain: bytes
    metadata: bytes


def usual(data: bytes) -> Usual | None:
    """Read an image. None: PIL has to decode it, which it may still refuse."""
    try:
        if data.startswith(JPEG):
            return _jpeg(data)
        if data.startswith(PNG):
            return _png(data)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _webp(data)
        if data.startswith(b"BM"):
            return _bmp(data)
    except (struct.error, IndexError):  # cut short
        return None
    return None


# --- JPEG (ITU-T T.81, and JFIF and Adobe's markers) ---

FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended sequential, progressive; by Huffman codes
OTHER_FRAMES = (0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
APP1, ADOBE, START_OF_SCAN = 0xE1, 0xEE, 0xDA


def _jpeg(data: bytes) -> Usual | None:
    # A few zeros behind the end marker are padding.
    if not data.endswith(b"\xff\xd9") and not data[-64:].rstrip(b"\0").endswith(b"\xff\xd9"):
        return None
    height = width = 0
    has_metadata = False
    kept, at = [data[:2]], 2
    while True:
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == START_OF_SCAN:
            break
        if marker in OTHER_FRAMES or marker < 0xC0 or 0xD0 <= marker <= 0xD9 or marker == 0xFF:
            return None
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        segment = data[at:end]
        if marker in FRAMES:
            precision, height, width, components = struct.unpack_from(">BHHB", segment, 4)
            # Three components that are not called 1, 2, 3 may be red, green and blue.
            names = segment[10 : 10 + 3 * components : 3]
            if precision != 8 or not (components == 1 or names == b"\1\2\3"):
                return None
        # Adobe's marker may say that colours are not stored as luminance and chrominance.
        if marker == ADOBE and segment[4:9] == b"Adobe" and segment[15:16] != b"\1":
            return None
        if marker == APP1:
            has_metadata = True
        else:
            kept.append(segment)
        at = end
    if not height or not width:
        return None
    if not has_metadata:
        return Usual(height, width, data, b"")
    return Usual(height, width, b"".join([*kept, data[at:]]), data[:at] + data[at : at + 16])


def turned_jpeg(plain: bytes, orientation: int) -> bytes:
    """A JPEG without metadata that says how it lies, in a way that every reader understands."""
    tiff = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    exif = b"Exif\0\0" + tiff
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]


# --- PNG (third edition) ---

# Chunks that change nothing about the pixels, or that both decoders leave alone.
USUAL_CHUNKS = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"pHYs", b"tIME", b"bKGD"}
USUAL_CHUNKS |= {b"sBIT", b"hIST", b"sPLT", b"tRNS", b"iDOT"}
MOST_CHUNKS, LONGEST_CHUNK = 1 << 16, 1 << 24
METADATA_CHUNKS = {b"eXIf", b"tEXt", b"zTXt", b"iTXt"}


class Chunk(NamedTuple):
    kind: bytes
    start: int
    """Where its length stands, before the kind."""
    end: int


def chunks(data: bytes, at: int = len(PNG)) -> Iterator[Chunk]:
    """The chunks of a PNG up to its end. The last one may end behind the data, where these are cut short."""
    while at + 8 <= len(data):
        chunk = Chunk(data[at + 4 : at + 8], at, at + 12 + int.from_bytes(data[at : at + 4]))
        yield chunk
        if chunk.kind == b"IEND":
            return
        at = chunk.end


def _png(data: bytes) -> Usual | None:
    found = list(chunks(data))
    if not found or found[-1].kind != b"IEND" or found[-1].end != len(data) or found[0].kind != b"IHDR":
        return None
    if not {chunk.kind for chunk in found} <= USUAL_CHUNKS | METADATA_CHUNKS:
        return None
    width, height, depth = struct.unpack_from(">IIB", data, 16)
    if depth == 16:  # PIL has its own reduction to 8
        return None
    pixels = [place for place, chunk in enumerate(found) if chunk.kind == b"IDAT"]
    if not pixels or pixels[-1] - pixels[0] != len(pixels) - 1:  # interrupted: PIL does not read on
        return None
    if not any(chunk.kind in METADATA_CHUNKS for chunk in found):
        return Usual(height, width, data, b"")
    plain = b"".join([PNG, *(data[each.start : each.end] for each in found if each.kind not in METADATA_CHUNKS)])
    return Usual(height, width, plain, png_header(lambda start, size: data[start : start + size], b""))


def png_header(read: Callable[[int, int], bytes], tail: bytes) -> bytes:
    """A PNG without its pixels, and with all its metadata before these, where PIL reads them without decoding.

    read(start, size): bytes of the file. tail: its end, which saves walking over thousands of chunks; may be empty.
    PIL checks checksums before the pixels, and not behind them: those of what is moved are written anew.
    """
    parts, at, is_behind = [PNG], len(PNG), False
    for _ in range(MOST_CHUNKS):
        start = read(at, 8)
        length, kind = int.from_bytes(start[:4]), start[4:]
        # Behind the first frame of an animation PIL looks for nothing.
        is_next_frame = is_behind and kind == b"fcTL" and any(part[4:8] == b"acTL" for part in parts)
        if len(start) < 8 or kind == b"IEND" or is_next_frame:
            break
        if kind == b"IDAT" and not is_behind:
            is_behind = True
            moved = _metadata_of_tail(tail)
            if moved is not None:
                parts += moved
                break
        elif length > LONGEST_CHUNK:
            pass
        elif not is_behind:
            parts.append(read(at, 12 + length))
        elif kind in METADATA_CHUNKS:
            parts.append(_chunk(kind, read(at + 8, length)))
        at += 12 + length
    if is_behind:
        parts.append(_chunk(b"IDAT", b""))
    return b"".join(parts)


def _metadata_of_tail(tail: bytes) -> list[bytes] | None:
    """Metadata behind the last chunk of pixels. tail: the end of a file, from the midst of a chunk on.

    None: the last chunk of pixels begins before the tail.
    """
    at = len(tail)
    while (at := tail.rfind(b"IDAT", 0, at)) >= 4:
        found = list(chunks(tail, at - 4))
        if found[-1].kind == b"IEND":
            kinds = [each for each in found if each.kind in METADATA_CHUNKS]
            if any(each.kind in (b"fcTL", b"fdAT") for each in found):
                return None
            return [_chunk(each.kind, tail[each.start + 8 : each.end - 4]) for each in kinds]
    return None


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(content, zlib.crc32(kind))
    return len(content).to_bytes(4) + kind + content + checksum.to_bytes(4)


# --- WebP and BMP ---


def _webp(data: bytes) -> Usual | None:
    """The simple forms. An extended one may be animated, or turned; DALI refuses some of them."""
    if int.from_bytes(data[4:8], "little") + 8 != len(data):
        return None
    kind = data[12:16]
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return Usual(height & 0x3FFF, width & 0x3FFF, data, b"")
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return Usual((bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1, data, b"")
    return None


def _bmp(data: bytes) -> Usual | None:
    """24 bits a pixel, not compressed, from the bottom up."""
    size, _, _, offset, header, width, height, _, bits, compression = struct.unpack_from("<IHHIIiiHHI", data, 2)
    is_usual = header >= 40 and bits == 24 and compression == 0 and height > 0 and width > 0
    if (
        not is_usual
        or size > len(data)
        or offset < 14 + header
        or offset + height * (-(-3 * width // 4) * 4) > len(data)
    ):
        return None
    return Usual(height, width, data, b"")
