"""data.verify: a file that is changed in place, with the same size, is noticed before a run goes on."""

import hashlib
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import sabotage
from PIL import Image
from tiny_run import TinyRun

from cit_scale.config import DataConfig
from cit_scale.datasets.contents import HASH_BYTES, changed_images, image_hashes, save_hashes
from cit_scale.datasets.folders import ImageFolder
from cit_scale.datasets.pack import pack
from cit_scale.datasets.sources import open_source, open_sources


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    for number in range(30):
        path = folder / f"class{number % 3}" / f"{number:02}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 8), (number, 0, 0)).save(path)
    return folder


def repaint(folder, name="class1/04.bmp"):
    """Change a file in place, and put its time of change back: size, name and time are as before."""
    path = folder / name
    times = path.stat()
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(len(content) - 10)
        file.write(b"\xff" * 10)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == len(content)


def test_hashes_are_those_of_the_bytes(images, tmp_path):
    source = ImageFolder(images, tmp_path / "cache")
    hashes = image_hashes(source, tmp_path / "cache")
    assert hashes.shape == (30, HASH_BYTES)
    for index in range(30):
        assert hashes[index].tobytes() == hashlib.sha256(source.read(index)).digest()[:HASH_BYTES]
    pack(source, tmp_path / "packed", workers=1)
    packed = open_source(str(tmp_path / "packed"), tmp_path / "cache", "data.train")
    assert np.array_equal(image_hashes(packed, tmp_path / "cache"), hashes)
    train, held_out = open_sources(DataConfig(train=str(images), cache_dir=str(tmp_path / "cache")))
    parts = {each.key(i): h for each in (train, held_out) for i, h in enumerate(image_hashes(each, tmp_path / "cache"))}
    assert all(np.array_equal(parts[source.key(index)], hashes[index]) for index in range(30))


def test_only_files_that_were_written_since_are_read_again(images, tmp_path, monkeypatch):
    source = ImageFolder(images, tmp_path / "cache")
    before = image_hashes(source, tmp_path / "cache")
    read, seen = ImageFolder.read, []
    monkeypatch.setattr(ImageFolder, "read", lambda self, index: seen.append(self.key(index)) or read(self, index))
    assert np.array_equal(image_hashes(source, tmp_path / "cache"), before)
    assert seen == []
    repaint(images)
    after = image_hashes(source, tmp_path / "cache")
    assert seen == [b"class1/04.bmp"]
    assert [source.key(index) for index in np.flatnonzero((after != before).any(axis=1))] == [b"class1/04.bmp"]


def test_an_image_that_is_gone_has_a_hash_of_its_own(images, tmp_path):
    source = ImageFolder(images, tmp_path / "cache")
    before = image_hashes(source, tmp_path / "cache")
    save_hashes(tmp_path / "noted.npz", (before, before[:0]))
    (images / "class2" / "05.bmp").unlink()
    after = image_hashes(source, tmp_path / "cache")
    changed = changed_images(tmp_path / "noted.npz", (source, source), (after, before[:0]))
    assert changed == ["class2/05.bmp"]
    assert changed_images(tmp_path / "nothing.npz", (source, source), (after, before[:0])) == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "zero1"])
def test_a_run_does_not_go_on_with_images_of_other_bytes(images, tiny_inputs, tmp_path, layout):
    data = f"--data.train={images}", f"--data.eval={images}", f"--data.cache_dir={tmp_path}/cache", "--train.epochs=4"
    run = TinyRun(tiny_inputs, tmp_path / "runs", layout, data)
    verified = replace(run, more=(*data, "--data.verify=true"))
    ended = verified.run(sabotage=(sabotage.at, 0, "forward", 5, sabotage.send, 15))
    assert set(ended.codes) == {75}, ended.output
    left = verified.copy(tmp_path / "left")
    repaint(images)
    before = verified.checkpoints()
    ended = verified.run()
    assert set(ended.codes) == {7}, ended.output
    assert "holds a run of other files (images with other bytes: class1/04.bmp; data, contents: " in ended.outputs[0]
    assert verified.checkpoints() == before
    # Without it nothing is noticed, and with it again what was noted then is.
    replace(left, more=data).run(sabotage=(sabotage.at, 0, "forward", 9, sabotage.send, 15))
    assert set(left.run().codes) == {7}
    ended = verified.finish("--override-resume")
    assert "continues although this changed: data, contents: " in ended.outputs[0]
    inputs = json.loads((verified.run_dir / "results.json").read_text())["inputs"]
    assert inputs["data, contents"] == inputs["evaluation data, contents"]
    verified.finish()
