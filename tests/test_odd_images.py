"""Every image has the pixels that PIL shows, whatever is odd about it: in evaluation, in training, packed and back."""

import io
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from odd_images import HEIGHT, WIDTH, encode, odd_images, picture, with_app1
from PIL import Image, ImageOps
from stream_cases import CPU, PLAIN, take

from cit_scale.config import DataConfig
from cit_scale.data import draws
from cit_scale.data.order import Cursor
from cit_scale.data.reader import Reader
from cit_scale.data.stream import eval_stream, train_stream
from cit_scale.datasets import encoded, headers
from cit_scale.datasets.index import load, save
from cit_scale.datasets.pack import pack
from cit_scale.datasets.pixels import FIRST, LATEST
from cit_scale.datasets.sources import ImageFolder, TarShards, open_source
from cit_scale.distributed.world import World

SIDE = 64
DATA = DataConfig(image_size=SIDE, crop_ratio=1.0, decode_threads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    (folder / "all").mkdir()
    for name, data in odd_images().items():
        (folder / "all" / name).write_bytes(data)
    return folder


def upright(data):
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def in_evaluation(reader):
    """The pixels of each image by name, (SIDE, SIDE, 3)."""
    with closing(eval_stream(reader, DATA, 8, World(), CPU)) as stream:
        return {
            reader.source.key(sample): (image * 255).round().permute(1, 2, 0).numpy()
            for batch in stream
            for image, position, sample in zip(batch.images, batch.positions, batch.samples.tolist(), strict=True)
            if position >= 0
        }


def centre(image):
    """As evaluation cuts it: the shorter side has SIDE pixels already."""
    left, top = round((image.width - SIDE) / 2), round((image.height - SIDE) / 2)
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE))).astype(float)


def test_evaluation_sees_what_pil_shows(folder, tmp_path):
    source = ImageFolder(folder, tmp_path)
    reader = Reader(source)
    found = in_evaluation(reader)
    assert reader.bad == {}
    assert len(found) == len(source) == len(odd_images())
    expected = {source.key(index): upright(source.read(index)) for index in range(len(source))}
    far = {name: np.abs(found[name] - centre(image)).max() for name, image in expected.items()}
    assert {name: error for name, error in far.items() if error > 1} == {}


def test_training_sees_what_pil_shows(folder, tmp_path):
    source = ImageFolder(folder, tmp_path)
    reader = Reader(source)
    crops = replace(PLAIN, flip_prob=0.0)
    batches = take(train_stream(reader, crops, DATA, 0, Cursor(), len(source), 1, World(), CPU), len(source))
    assert reader.bad == {}
    far = {}
    for batch in batches:
        samples = batch.samples.numpy()
        sizes = source.heights[samples], source.widths[samples]
        drawn = draws.draw(0, 0, samples, np.zeros_like(samples), *sizes, crops, SIDE)
        for image, sample, (y, x, height, width) in zip(batch.images, samples, drawn.crop.tolist(), strict=True):
            part = upright(source.read(sample)).crop((x, y, x + width, y + height))
            # The width first, as before Pillow 13, which begins with the height where that is less work.
            wide = part.resize((SIDE, part.height), Image.Resampling.BICUBIC)
            expected = np.asarray(wide.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(float)
            far[source.key(sample)] = np.abs((image * 255).round().permute(1, 2, 0).numpy() - expected).max()
    assert len(far) == len(source)
    assert {name: error for name, error in far.items() if error > 2} == {}  # 1 of it is PyTorch's rounding, enlarged


def test_packed_and_back_they_are_the_same(folder, tmp_path):
    source = ImageFolder(folder, tmp_path)
    assert pack(source, tmp_path / "packed", workers=2).rejected == 0
    packed = open_source(str(tmp_path / "packed"), tmp_path, "SOURCE")
    before, after = in_evaluation(Reader(source)), in_evaluation(Reader(packed))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_the_first_version_still_sees_what_it_saw(folder, tmp_path):
    """Among them pictures that lie on their side, and some that it threw away."""
    source = ImageFolder(folder, tmp_path, FIRST)
    reader = Reader(source, FIRST)
    found = in_evaluation(reader)
    assert {source.key(index) for index in source.rejects} == {
        b"all/exif_cut.jpg",
        b"all/exif_garbage.jpg",
        b"all/exif_zeros.jpg",
    }
    shown = {source.key(index): upright(source.read(index)) for index in range(len(source))}
    wrong = {name for name in found if np.abs(found[name] - centre(shown[name])).max() > 1}
    assert {b"all/exif_byte.jpg", b"all/xmp.jpg", b"all/exif_with_prefix.png"} <= wrong


def test_a_folder_that_was_packed_before_is_measured_anew(folder, tmp_path):
    """Its index has the sizes of the first version: an image with its orientation in XMP has another there."""
    source = ImageFolder(folder, tmp_path)
    pack(source, tmp_path / "packed", workers=2)
    index = load(tmp_path / "packed" / "index.npz")
    place = [source.key(number) for number in range(len(source))].index(b"all/xmp.jpg")
    index.numbers["heights"][place], index.numbers["widths"][place] = HEIGHT, WIDTH
    del index.numbers["pixels"]
    save(tmp_path / "packed" / "index.npz", index)
    assert TarShards(tmp_path / "packed").heights[place] == HEIGHT
    for pixels, height in ((LATEST, WIDTH), (FIRST, HEIGHT)):
        opened = open_source(str(tmp_path / "packed"), tmp_path, "SOURCE", pixels)
        assert opened.heights[place] == height
        again = open_source(str(tmp_path / "packed"), tmp_path, "SOURCE", pixels)
        assert again.fingerprint == opened.fingerprint


def test_an_image_that_was_turned_since_it_was_indexed_is_named(folder, tmp_path):
    (tmp_path / "set" / "ant").mkdir(parents=True)
    path = tmp_path / "set" / "ant" / "0.jpg"
    path.write_bytes(encode(picture(), "JPEG"))
    (tmp_path / "set" / "ant" / "1.jpg").write_bytes(encode(picture(), "JPEG"))
    source = ImageFolder(tmp_path / "set", tmp_path / "cache")
    path.write_bytes(odd_images()["exif_mirrored.jpg"])
    reader = Reader(source)
    assert reader.read(0)[0] == 1
    assert reader.bad == {0: f"is now {WIDTH} x {HEIGHT} pixels, but was {HEIGHT} x {WIDTH} when indexed"}


@pytest.mark.parametrize("name", odd_images())
def test_a_cut_image_is_never_usual(name):
    data = odd_images()[name]
    for cut in {*range(0, min(len(data), 400), 7), len(data) - 1, len(data) - 20}:
        found = headers.usual(data[:cut])
        assert found is None, cut


def test_metadata_do_not_reach_dali_except_how_it_lies():
    jpeg = encode(picture(), "JPEG")
    secret = with_app1(jpeg, b"http://ns.adobe.com/xap/1.0/\0" + b"x" * 100, b"Exif\0\0" + b"y" * 100)
    assert encoded.for_dali(secret) == (jpeg, (HEIGHT, WIDTH))
    assert encoded.for_dali(jpeg) == (jpeg, (HEIGHT, WIDTH))
    turned, shape = encoded.for_dali(odd_images()["exif_mirrored.jpg"])
    assert shape == (WIDTH, HEIGHT)
    assert Image.open(io.BytesIO(turned)).getexif() == {0x0112: 5}
