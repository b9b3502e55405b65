"""Images that take much memory are read within a limit that the system enforces, and refused in one line."""

import gc
import io
import os
import struct
import subprocess
import sys
import textwrap
import weakref
import zlib

import pytest
from PIL import Image

from cit_scale.datasets.encoded import read_size
from cit_scale.errors import BadImageError

MIB = 1 << 20
LIMITED = """
    import resource, sys
    import torch
    from cit_scale.config import DataConfig
    from cit_scale.data.reader import Reader
    from cit_scale.data.stream import eval_stream
    from cit_scale.datasets.sources import open_sources
    from cit_scale.distributed.world import World
    from cit_scale.inference.items import items_of, read_item
    import nvidia.dali.fn  # before the limit: libraries are no images

    def limit(mib):
        here = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, ((here << 10) + (mib << 20),) * 2)

    def sources(**options):
        return open_sources(DataConfig(train=sys.argv[1], eval=sys.argv[1], cache_dir=sys.argv[2], **options))
"""


def run(folder, code):
    """Run code in a process of its own. Returns what it prints."""
    script = textwrap.dedent(LIMITED) + textwrap.dedent(code)
    command = [sys.executable, "-c", script, str(folder), str(folder.parent / "cache")]
    # What is freed leaves the process at once: glibc would keep some 300 MiB of it, more on some than on others.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def bomb(width, height):
    """A PNG that says it has so many pixels, and has one row of them."""
    content = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),
        b"IDAT": zlib.compress(bytes(1 + 3 * width)),
        b"IEND": b"",
    }
    chunks = [kind + data for kind, data in content.items()]
    parts = [struct.pack(">I", len(each) - 4) + each + struct.pack(">I", zlib.crc32(each)) for each in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture
def harmful(tmp_path):
    """Two good images, and files that are huge, say that they are, or hide behind 1,500 folders."""
    folder = tmp_path / "set" / "a"
    folder.mkdir(parents=True)
    good = folder / "good.jpg"
    Image.new("RGB", (40, 30), (200, 0, 0)).save(good)
    for number in range(3):  # as long as is read, and zeros
        (folder / f"zeros{number}.jpg").touch()
        (folder / f"zeros{number}.jpg").open("r+b").truncate(1000 * MIB)
    for name, start in (("huge.jpg", b""), ("huge_behind_a_good_one.jpg", good.read_bytes())):
        (folder / name).write_bytes(start)
        (folder / name).open("r+b").truncate(20_000 * MIB)
    (folder / "bomb.png").write_bytes(bomb(20_000, 20_000))
    (folder / "too_long.png").write_bytes(bomb(100_000, 3))
    deep = folder
    for _ in range(200):
        deep /= "d"
    deep.mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(deep / "deep.jpg")
    return folder.parent


class File(io.BytesIO):
    """One that can be watched."""


@pytest.fixture
def no_garbage_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_garbage_collection")
def test_the_bytes_of_a_file_that_is_no_image_are_let_go_of_at_once():
    file = File(bytes(1000))
    watched = weakref.ref(file)
    with pytest.raises(BadImageError, match="not an image of a known format") as refused:
        read_size(file)
    del file, refused
    assert watched() is None


def test_huge_files_and_bombs_are_refused_within_two_gigabytes(harmful):
    out = run(
        harmful,
        """
        limit(2000)  # of which one file of 1,000 MiB may stand twice for a moment
        train, _ = sources()
        reader = Reader(train)
        for index in range(len(train)):
            reader.read(index)
        for index, reason in sorted(reader.bad.items()):
            print(train.key(index).decode().split("/")[-1], "|", reason)
        print(len(train) - len(reader.bad), "good")
        """,
    )
    reasons = dict(line.split(" | ") for line in out.splitlines() if " | " in line)
    assert out.endswith("2 good\n")
    assert (
        reasons.pop("huge.jpg")
        == reasons.pop("huge_behind_a_good_one.jpg")
        == f"has {20_000 * MIB} bytes, more than {1 << 30}"
    )
    assert reasons.pop("bomb.png") == "400000000 pixels are more than 178956970"
    assert reasons.pop("too_long.png") == "100000 x 3 pixels: one side is more than 1000 times the other"
    assert reasons == {f"zeros{number}.jpg": "not an image of a known format" for number in range(3)}


def test_predict_reads_none_of_them_either(harmful):
    out = run(
        harmful,
        """
        limit(1500)
        from cit_scale.errors import BadImageError
        from cit_scale.inference.images import decode_pixels
        for item in items_of([sys.argv[1]], None):
            try:
                print(tuple(decode_pixels(read_item(item)).shape))
            except BadImageError as error:
                print(item.name.split("/")[-1], "|", error)
        """,
    )
    assert out.count("(3, 30, 40)\n") == 2
    assert out.count(" | ") == 7


@pytest.mark.parametrize("prefetch", [0, 4])
def test_large_images_that_pil_decodes_stay_within_what_is_allowed(tmp_path, prefetch):
    """A TIFF of 30 megapixels takes 300 MB in PIL, and 90 three times in DALI: more in flight are above the limit."""
    folder = tmp_path / "set" / "a"
    folder.mkdir(parents=True)
    image = Image.new("L", (6000, 5000), 77)
    for number in range(12):
        image.save(folder / f"{number:02}.tif", compression="tiff_lzw")
    out = run(
        folder.parent,
        f"""
        data = DataConfig(image_size=32, prefetch={prefetch}, decoded_mib=100)
        train, _ = sources()
        # DALI's threads and torch's come first, on an image that is small.
        limit(800)
        stream = eval_stream(Reader(train, most_bytes=100 << 20), data, 12, World(), torch.device("cpu"))
        for batch in stream:
            print(tuple(batch.images.shape), round(float(batch.images.mean()) * 255))
        """,
    )
    assert out == "(12, 3, 32, 32) 77\n"


@pytest.mark.parametrize("most", [10_000, 200_000_000])
def test_the_limit_of_pixels_is_a_setting(tmp_path, most):
    folder = tmp_path / "set" / "a"
    folder.mkdir(parents=True)
    Image.new("L", (100, 90)).save(folder / "small.png")
    Image.new("L", (20, 10)).save(folder / "tiny.png")
    (folder / "large.png").write_bytes(bomb(15_000, 13_000))
    out = run(
        folder.parent,
        f"""
        for most in ({most}, 8_999, {most}):
            train, _ = sources(max_pixels=most)
            print([train.key(index).decode() for index in train.rejects])
        """,
    )
    lines = [str(["a/large.png"] if most < 195_000_000 else []), str(["a/large.png", "a/small.png"])]
    assert out.splitlines() == [*lines, lines[0]]
