"""Sources: folders, tar shards, the digits, the held-out part; caches that appear whole or not at all."""

import io
import multiprocessing
import os
import tarfile
import threading
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from cit_scale.config import ConfigError, DataConfig
from cit_scale.data import sources
from cit_scale.data.sources import ImageFolder, Subset, TarShards, digits, open_sources, write_shards


def png(height=4, width=5, value=0):
    buffer = io.BytesIO()
    Image.new("L", (width, height), value).save(buffer, "PNG")
    return buffer.getvalue()


def make_folder(root, counts):
    """A folder with `counts[name]` images per class; image i is (4 + i) x 5 pixels of value i."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / name / f"{i}.png").write_bytes(png(4 + i, 5, i))
    return root


@pytest.fixture
def data(tmp_path):
    """Options whose caches go to a folder of the test's own."""
    return DataConfig(cache_dir=str(tmp_path / "cache"))


# --- ImageFolder ---


def test_a_folder_yields_its_images_by_class_in_sorted_order(tmp_path):
    folder = make_folder(tmp_path / "set", {"dog": 2, "ant": 3})
    source = ImageFolder(folder, tmp_path / "cache")
    assert source.classes == ("ant", "dog")
    assert source.labels.tolist() == [0, 0, 0, 1, 1]
    assert source.heights.tolist() == [4, 5, 6, 4, 5]
    assert source.widths.tolist() == [5] * 5
    assert len(source) == 5
    assert source.read(4) == (folder / "dog" / "1.png").read_bytes()
    assert source.name(4) == str(folder / "dog" / "1.png")


def test_folders_inside_a_class_are_searched_and_what_is_no_image_is_passed_over(tmp_path):
    folder = make_folder(tmp_path / "set", {"ant": 1, "dog/deeper": 2})
    (folder / "ant" / "notes.txt").write_text("no image")
    (folder / "ant" / "._0.png").write_text("left by another system")
    (folder / ".cache").mkdir()
    source = ImageFolder(folder, tmp_path / "cache")
    assert source.classes == ("ant", "dog")
    assert [os.path.relpath(source.name(i), folder) for i in range(3)] == [
        "ant/0.png",
        "dog/deeper/0.png",
        "dog/deeper/1.png",
    ]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(("orientation", "size"), [(1, (20, 30)), (3, (20, 30)), (6, (30, 20)), (8, (30, 20))])
def test_sizes_are_those_of_the_upright_image(tmp_path, kind, orientation, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(tmp_path / "image", kind, exif=exif)
    assert sources.image_size(tmp_path / "image") == size


def test_a_folder_opened_again_reads_no_headers_until_a_file_changes(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "set", {"ant": 2, "dog": 2})
    first = ImageFolder(folder, tmp_path / "cache")
    read = []
    image_size = sources.image_size
    monkeypatch.setattr(sources, "image_size", lambda file: read.append(file) or image_size(file))
    again = ImageFolder(folder, tmp_path / "cache")
    assert read == []
    assert again.heights.tolist() == first.heights.tolist()
    assert again.widths.tolist() == first.widths.tolist()
    (folder / "dog" / "1.png").write_bytes(png(50, 60))
    changed = ImageFolder(folder, tmp_path / "cache")
    assert len(read) == 4
    assert (changed.heights[3], changed.widths[3]) == (50, 60)


def test_files_that_are_no_images_are_named(tmp_path):
    folder = make_folder(tmp_path / "set", {"ant": 2, "dog": 2})
    (folder / "dog" / "bad.jpg").write_bytes(b"not an image")
    with pytest.raises(ConfigError, match=r"1 of 5 files .*dog/bad.jpg .*repair or remove"):
        ImageFolder(folder, tmp_path / "cache")


# --- Tar shards ---


def test_shards_give_back_every_byte_and_number(tmp_path):
    images = [(f"{'long' * 40}/{i}.png" if i == 3 else f"{i}.png", i % 2, png(4 + i, 5, i)) for i in range(7)]
    write_shards(tmp_path / "shards", ["ant", "dög"], images, images_per_shard=3)
    source = TarShards(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 3
    assert source.classes == ("ant", "dög")
    assert source.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert source.heights.tolist() == [4, 5, 6, 7, 8, 9, 10]
    assert [source.read(i) for i in range(7)] == [data for _, _, data in images]
    assert source.name(4) == f"{tmp_path}/shards/000001.tar:4.png"


def test_shards_have_the_webdataset_layout(tmp_path):
    write_shards(tmp_path / "shards", ["ant", "dog"], [("a/7.png", 1, png()), ("a/8.png", 0, png())])
    with tarfile.open(tmp_path / "shards" / "000000.tar") as tar:
        assert tar.getnames() == ["a/7.png", "a/7.cls", "a/8.png", "a/8.cls"]
        assert tar.extractfile("a/7.png").read() == png()
        assert tar.extractfile("a/7.cls").read() == b"1"


def test_a_shard_that_was_cut_short_is_refused(tmp_path):
    write_shards(tmp_path / "shards", ["ant"], [("0.png", 0, png()), ("1.png", 0, png())])
    os.truncate(tmp_path / "shards" / "000000.tar", 1000)
    with pytest.raises(ConfigError, match=r"000000.tar has 1000 bytes, its index expects .*delete"):
        TarShards(tmp_path / "shards")


def test_shards_without_images_are_refused_and_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match="no images to write"):
        write_shards(tmp_path / "shards", ["ant"], [])
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_is_killed_leaves_no_shards_and_the_next_one_succeeds(tmp_path):
    def die_halfway():
        yield "0.png", 0, png()
        os._exit(9)

    fork = multiprocessing.get_context("fork")
    writer = fork.Process(target=write_shards, args=(tmp_path / "shards", ["ant"], die_halfway(), 1))
    writer.start()
    writer.join()
    assert writer.exitcode == 9
    assert not (tmp_path / "shards").exists()
    write_shards(tmp_path / "shards", ["ant"], [("0.png", 0, png())])
    assert TarShards(tmp_path / "shards").read(0) == png()


def test_writers_that_meet_leave_one_whole_set(tmp_path):
    meeting = threading.Barrier(4)

    def images(value):
        for i in range(5):
            yield f"{i}.png", 0, png(value=value)
        meeting.wait()  # every writer has everything written before any can commit

    writers = [
        threading.Thread(target=write_shards, args=(tmp_path / "shards", ["ant"], images(value), 2))
        for value in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    source = TarShards(tmp_path / "shards")
    assert len({source.read(i) for i in range(5)}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


# --- Digits ---


def test_the_digits_are_scikit_learns(tmp_path):
    source = digits(tmp_path)
    data = load_digits()
    assert len(source) == 1797
    assert source.classes == tuple("0123456789")
    assert np.array_equal(source.labels, data.target)
    assert set(source.heights) == set(source.widths) == {8}
    for i in (0, 500, 1796):
        pixels = np.asarray(Image.open(io.BytesIO(source.read(i))))
        assert np.abs(pixels / 255 - data.images[i] / 16).max() < 0.5 / 255


def test_the_digits_are_written_once(tmp_path, monkeypatch):
    first = digits(tmp_path)
    monkeypatch.setattr(sources, "write_shards", lambda *_, **__: pytest.fail("written again"))
    assert digits(tmp_path).fingerprint == first.fingerprint


# --- Fingerprints ---


def test_a_fingerprint_follows_the_images_and_not_their_place(tmp_path):
    here = ImageFolder(make_folder(tmp_path / "here", {"ant": 2, "dog": 2}), tmp_path / "cache")
    there = ImageFolder(make_folder(tmp_path / "there", {"ant": 2, "dog": 2}), tmp_path / "cache")
    images = [
        (f"{name}/{i}.png", label, png(4 + i, 5, i)) for label, name in enumerate(["ant", "dog"]) for i in range(2)
    ]
    write_shards(tmp_path / "shards", ["ant", "dog"], images)
    assert here.fingerprint == there.fingerprint == TarShards(tmp_path / "shards").fingerprint


@pytest.mark.parametrize("change", ["name", "size", "class"])
def test_a_fingerprint_changes_with_names_sizes_and_classes(tmp_path, change):
    before = ImageFolder(make_folder(tmp_path / "set", {"ant": 2, "dog": 2}), tmp_path / "cache").fingerprint
    if change == "name":
        (tmp_path / "set" / "dog" / "1.png").rename(tmp_path / "set" / "dog" / "2.png")
    elif change == "size":
        (tmp_path / "set" / "dog" / "1.png").write_bytes(png(9, 9))
    else:
        (tmp_path / "set" / "dog").rename(tmp_path / "set" / "doe")
    assert ImageFolder(tmp_path / "set", tmp_path / "cache").fingerprint != before


def test_a_subset_has_its_own_images_and_fingerprint(tmp_path):
    source = ImageFolder(make_folder(tmp_path / "set", {"ant": 3, "dog": 3}), tmp_path / "cache")
    part = Subset(source, np.array([5, 1]))
    assert len(part) == 2
    assert part.classes == source.classes
    assert part.labels.tolist() == [1, 0]
    assert part.heights.tolist() == [6, 5]
    assert part.read(0) == source.read(5)
    assert part.name(1) == source.name(1)
    assert len({source.fingerprint, part.fingerprint, Subset(source, np.array([1, 5])).fingerprint}) == 3


# --- open_sources ---


def test_the_held_out_part_is_a_share_of_every_class(data):
    train, evaluation = open_sources(data)
    everything = np.sort(np.concatenate((train.indices, evaluation.indices)))
    assert np.array_equal(everything, np.arange(1797))
    for label in range(10):
        held_out, kept = (evaluation.labels == label).sum(), (train.labels == label).sum()
        assert held_out == round(0.2 * (held_out + kept))


def test_the_held_out_part_is_the_same_for_everybody(data, tmp_path):
    """Recorded once: a change here makes old accuracies incomparable with new ones."""
    expected = [8, 23, 25, 31, 37, 40, 43, 51]
    assert open_sources(data)[1].indices[:8].tolist() == expected
    assert open_sources(replace(data, cache_dir=str(tmp_path / "other")))[1].indices[:8].tolist() == expected


def test_the_held_out_part_is_no_row_of_neighbours(data):
    gaps = np.diff(open_sources(data)[1].indices)
    assert gaps.max() > 12
    assert (gaps == 1).sum() > 20


def test_a_class_of_two_gives_one_image_to_each_part(tmp_path, data):
    make_folder(tmp_path / "set", {"ant": 2, "dog": 2})
    train, evaluation = open_sources(replace(data, train=str(tmp_path / "set"), holdout=0.05))
    assert train.labels.tolist() == evaluation.labels.tolist() == [0, 1]


def test_an_evaluation_set_of_its_own_is_opened_whole(tmp_path, data):
    make_folder(tmp_path / "train", {"ant": 2, "dog": 3})
    make_folder(tmp_path / "val", {"ant": 1, "dog": 1})
    train, evaluation = open_sources(replace(data, train=str(tmp_path / "train"), eval=str(tmp_path / "val")))
    assert (len(train), len(evaluation)) == (5, 2)


def test_a_folder_of_shards_is_opened_as_shards(tmp_path, data):
    write_shards(tmp_path / "shards", ["ant"], [(f"{i}.png", 0, png()) for i in range(5)])
    train, evaluation = open_sources(replace(data, train=str(tmp_path / "shards")))
    assert (len(train), len(evaluation)) == (4, 1)


@pytest.mark.parametrize("holdout", [0.0, 1.0, -0.2, 20])
def test_a_share_outside_zero_and_one_is_refused(data, holdout):
    with pytest.raises(ConfigError, match=f"data.holdout={holdout} is not between 0 and 1; use 0.2"):
        open_sources(replace(data, holdout=holdout))


@pytest.mark.parametrize("option", ["train", "eval"])
def test_a_missing_folder_is_refused_with_what_would_work(data, option):
    with pytest.raises(
        ConfigError, match=rf"data\.{option}='/no/such' is not a folder; give a folder .* or .*'digits'"
    ):
        open_sources(replace(data, **{option: "/no/such"}))


def test_a_folder_without_classes_is_refused(tmp_path, data):
    (tmp_path / "0.png").write_bytes(png())
    with pytest.raises(ConfigError, match="one sub-folder of images per class"):
        open_sources(replace(data, train=str(tmp_path)))


def test_classes_without_images_are_named(tmp_path, data):
    make_folder(tmp_path / "set", {"ant": 1, "bee": 0, "cat": 0})
    with pytest.raises(ConfigError, match=r"no images for 2 of 3 classes: bee, cat; add images"):
        open_sources(replace(data, train=str(tmp_path / "set")))


def test_a_class_of_one_image_cannot_be_held_out_from(tmp_path, data):
    make_folder(tmp_path / "set", {"ant": 4, "dog": 1})
    with pytest.raises(ConfigError, match=r"class 'dog' has fewer than 2 images.*set data.eval"):
        open_sources(replace(data, train=str(tmp_path / "set")))


def test_different_classes_are_named(tmp_path, data):
    make_folder(tmp_path / "train", {"ant": 1, "dog": 1})
    make_folder(tmp_path / "val", {"ant": 1, "doe": 1})
    with pytest.raises(
        ConfigError, match=r"differ in their classes .*only in train: dog; only in eval: doe; name them"
    ):
        open_sources(replace(data, train=str(tmp_path / "train"), eval=str(tmp_path / "val")))


def test_the_same_classes_in_another_order_are_refused(tmp_path, data):
    make_folder(tmp_path / "train", {"ant": 1, "dog": 1})
    write_shards(tmp_path / "val", ["dog", "ant"], [("0.png", 0, png()), ("1.png", 1, png())])
    with pytest.raises(ConfigError, match="or in the order of them: only in train: none"):
        open_sources(replace(data, train=str(tmp_path / "train"), eval=str(tmp_path / "val")))
