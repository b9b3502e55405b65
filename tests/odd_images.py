"""Images about which decoders disagree: metadata in odd places, animations, unusual colours. By file name."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 96, 64
PNG_HEAD = 33  # bytes of a PNG's signature and IHDR


def picture():
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return Image.fromarray(
        np.stack([x * 255 // WIDTH, y * 255 // HEIGHT, ((x // 16 + y // 16) % 2) * 200], axis=-1).astype(np.uint8)
    )


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(kind=3, value=6, order="<", count=1):
    """A TIFF structure with an orientation. kind: 1 BYTE, 3 SHORT, 4 LONG."""
    stored = {1: struct.pack(order + "B3x", value), 3: struct.pack(order + "HH", value, 0)}
    stored[4] = struct.pack(order + "I", value)
    start = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    return start + struct.pack(order + "HHHI", 1, 0x0112, kind, count) + stored[kind] + bytes(4)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_app1(jpeg, *contents):
    segments = (b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content for content in contents)
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def pixel_data(png):
    at = png.index(b"IDAT")
    return png[at + 4 : at + 4 + int.from_bytes(png[at - 4 : at])]


def animated(still, frame):
    """An animated PNG whose still image is not part of the animation."""

    def control(number):
        return chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, WIDTH, HEIGHT, 0, 0, 1, 10, 0, 0))

    first, second = (chunk(b"fdAT", struct.pack(">I", number) + pixel_data(frame)) for number in (1, 3))
    animation = [chunk(b"acTL", struct.pack(">II", 2, 0)), chunk(b"IDAT", pixel_data(still))]
    animation += [control(0), first, control(2), second, chunk(b"IEND", b"")]
    return still[:PNG_HEAD] + b"".join(animation)


def without_adobe(jpeg):
    at = jpeg.index(b"Adobe") - 4
    return jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4]) :]


def in_chunks(png, size):
    """The same PNG with its pixels in chunks of so many bytes."""
    kinds, at = [], 8
    while at < len(png):
        count = int.from_bytes(png[at : at + 4], "big")
        kinds.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + count]))
        at += 12 + count
    pixels = b"".join(content for kind, content in kinds if kind == b"IDAT")
    parts = [chunk(b"IDAT", pixels[first : first + size]) for first in range(0, len(pixels), size)]
    before = [chunk(kind, content) for kind, content in kinds if kind not in (b"IDAT", b"IEND")]
    return png[:8] + b"".join([*before, *parts, chunk(b"IEND", b"")])


def bmp_565(image):
    """A bitmap of 16 bits a pixel: 5 of red, 6 of green, 5 of blue."""
    red, green, blue = (np.asarray(image).astype(np.uint16)[::-1] >> (3, 2, 3)).transpose(2, 0, 1)
    pixels = (red << 11 | green << 5 | blue).astype("<u2").tobytes()
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    header = struct.pack("<IiiHHIIiiII", 40, WIDTH, HEIGHT, 1, 16, 3, len(pixels), 0, 0, 0, 0)
    offset = 14 + len(header) + len(masks)
    return b"BM" + struct.pack("<IHHI", offset + len(pixels), 0, 0, offset) + header + masks + pixels


def odd_images():
    image = picture()
    jpeg, png = encode(image, "JPEG", quality=92), encode(image, "PNG")
    bmp = encode(image, "BMP")
    long_text = b"Comment\0" + b"x" * (1 << 17)
    blue = encode(Image.new("RGB", image.size, (0, 0, 255)), "PNG")
    head = b"Exif\0\0"
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    profile = b"Raw profile type exif\0\0" + zlib.compress(
        b"\nexif\n%8d\n" % len(exif()) + (head + exif()).hex().encode() + b"\n"
    )
    start, end = png[:PNG_HEAD], png[-12:]
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "exif_byte.jpg": with_app1(jpeg, head + exif(kind=1)),
        "exif_long.jpg": with_app1(jpeg, head + exif(kind=4)),
        "exif_long_big_endian.jpg": with_app1(jpeg, head + exif(kind=4, order=">")),
        "exif_short_big_endian.jpg": with_app1(jpeg, head + exif(order=">")),
        "exif_count_0.jpg": with_app1(jpeg, head + exif(count=0)),
        "exif_upright_then_turned.jpg": with_app1(jpeg, head + exif(value=1), head + exif()),
        "exif_turned_then_upright.jpg": with_app1(jpeg, head + exif(), head + exif(value=1)),
        "exif_prefix_twice.jpg": with_app1(jpeg, head + head + exif()),
        "exif_no_such_orientation.jpg": with_app1(jpeg, head + exif(value=9)),
        "exif_garbage.jpg": with_app1(jpeg, head + b"garbage garbage"),
        "exif_zeros.jpg": with_app1(jpeg, head + bytes(200)),
        "exif_cut.jpg": with_app1(jpeg, head + b"II*\0"),
        "exif_cut_in_the_directory.jpg": with_app1(jpeg, head + exif()[:16]),
        "exif_mirrored.jpg": with_app1(jpeg, head + exif(value=5)),
        "xmp.jpg": encode(image, "JPEG", xmp=xmp),
        "xmp.png": encode(image, "PNG", xmp=xmp),
        "xmp.webp": encode(image, "WEBP", xmp=xmp),
        "exif.png": start + chunk(b"eXIf", exif()) + png[PNG_HEAD:],
        "exif_with_prefix.png": start + chunk(b"eXIf", head + exif()) + png[PNG_HEAD:],
        "exif_behind_the_pixels.png": png[:-12] + chunk(b"eXIf", exif()) + end,
        "raw_profile.png": start + chunk(b"zTXt", profile) + png[PNG_HEAD:],
        "raw_profile_behind_the_pixels.png": png[:-12] + chunk(b"zTXt", profile) + end,
        "still_is_not_in_the_animation.png": animated(png, blue),
        "animation.webp": encode(image, "WEBP", save_all=True, append_images=[Image.new("RGB", image.size)]),
        "lossless_exif.webp": encode(image, "WEBP", lossless=True, exif=turned),
        "exif.webp": encode(image, "WEBP", exif=turned),
        "exif_checksum_behind_the_pixels.png": png[:-12] + chunk(b"eXIf", exif())[:-1] + b"?" + end,
        "exif_then_text_behind_the_pixels.png": png[:-12] + chunk(b"eXIf", exif()) + chunk(b"tEXt", long_text) + end,
        "long_exif_behind_the_pixels.png": png[:-12] + chunk(b"eXIf", exif() + bytes(1 << 17)) + end,
        "exif_and_more_behind_the_end.png": png[:-12] + chunk(b"eXIf", exif()) + end + bytes(100),
        "exif_and_much_behind_the_end.png": png[:-12] + chunk(b"eXIf", exif()) + end + bytes(1 << 17),
        "exif_behind_the_end.png": png + chunk(b"eXIf", exif()),
        "exif_behind_an_animation.png": animated(png, blue)[:-12] + chunk(b"eXIf", exif()) + end,
        "many_chunks_of_pixels.png": in_chunks(png, 50)[:-12] + chunk(b"eXIf", exif()) + end,
        "xmp.tif": encode(image, "TIFF", tiffinfo={700: xmp}),
        "xmp_and_exif.tif": encode(image, "TIFF", exif=turned, tiffinfo={700: xmp, 0x0112: 6}),
        "offset_0.bmp": bmp[:10] + bytes(4) + bmp[14:],
        "exif.tif": encode(image, "TIFF", exif=turned),
        "exif.avif": encode(image, "AVIF", exif=turned),
        "cmyk.jpg": encode(image.convert("CMYK"), "JPEG", quality=95),
        "cmyk_without_adobe.jpg": without_adobe(encode(image.convert("CMYK"), "JPEG", quality=95)),
        "rgb.jpg": encode(image, "JPEG", keep_rgb=True),
        "bits_565.bmp": bmp_565(image),
        "palette.bmp": encode(image.quantize(32), "BMP"),
        "palette.png": encode(image.quantize(32), "PNG"),
        "grey_16.png": encode(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG"),
    }
