"""cit-scale predict: a row for each image, in the order given, whatever the image and its name."""

import csv
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from ranks import run_on_ranks

from cit_scale.distributed.world import World
from cit_scale.errors import ConfigError, MissingInputError
from cit_scale.inference import items as items_module
from cit_scale.inference.classifier import Classifier, open_classifier
from cit_scale.inference.commands import predict as main
from cit_scale.inference.images import decode_pixels, resize_and_crop
from cit_scale.inference.interface import Interface
from cit_scale.inference.items import Item, items_of, read_item
from cit_scale.inference.predict import disagreement, predict
from cit_scale.inference.tables import _open_text as open_text
from cit_scale.inference.turns import classify_all

ODD_NAMES = ['a"b', "c,d", "<b>e</b>", "f\ng", "h\r", "é", "| *i*", "j" * 200]


@pytest.fixture(scope="module")
def run(calm):
    return str(calm("plain").run_dir)


@pytest.fixture
def folder(tmp_path):
    """12 images, two files that are none, and one of another kind."""
    random = np.random.default_rng(0)
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for number in range(12):
        image = Image.fromarray(random.integers(0, 256, (20 + number, 24, 3), dtype=np.uint8))
        image.save(tmp_path / "in" / ("sub" if number % 2 else "") / f"{number:02d}.png")
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no image")
    (tmp_path / "in" / "empty.png").touch()
    (tmp_path / "in" / "notes.txt").write_text("no image, and not asked for")
    return tmp_path / "in"


def rows_of(run, images, tmp_path, **options):
    out = tmp_path / "rows.csv"
    predict(open_classifier(run, World()), [str(each) for each in images], World(), out=str(out), **options)
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def bright_or_dark(images):
    """Logits of two classes by brightness."""
    brightness = images.float().mean(dim=(1, 2, 3)) / 255
    return {"logits": torch.stack([brightness, 1 - brightness], dim=1)}


TWO_CLASSES = Classifier("two", Interface(("bright", "dark"), ("logits",), 8, 1.0), {}, bright_or_dark)


def test_every_image_has_its_row_in_sorted_order(run, folder, tmp_path):
    rows = rows_of(run, [folder], tmp_path, batch_size=4)
    expected = sorted(folder.glob("*.*g")) + sorted((folder / "sub").iterdir())
    assert [row["image"] for row in rows] == [str(each) for each in expected]
    reasons = {os.path.basename(row["image"]): row["reason"] for row in rows if row["reason"]}
    assert set(reasons) == {"bad.jpg", "empty.png"}
    assert all(row["class_1"] == "" for row in rows if row["reason"])
    assert all(0 < float(row["prob_1"]) <= 1 for row in rows if not row["reason"])


def test_a_row_says_what_the_network_says(run, folder, tmp_path):
    image = folder / "00.png"
    (row,) = rows_of(run, [image], tmp_path, top=3, heads=True)
    classifier = open_classifier(run, World())
    shown = classifier.interface
    pixels = resize_and_crop(decode_pixels(image.read_bytes()), shown.image_size, shown.crop_ratio)
    logits = classifier.classify(pixels[None])
    probs = logits["average"][0].double().softmax(dim=0)
    ranked = probs.argsort(descending=True)
    assert [row[f"class_{place}"] for place in (1, 2, 3)] == [classifier.classes[each] for each in ranked[:3]]
    assert [float(row[f"prob_{place}"]) for place in (1, 2, 3)] == pytest.approx(probs[ranked[:3]].tolist(), rel=1e-5)
    assert row["says_conv"] == classifier.classes[logits["conv"][0].argmax()]
    heads = [logits[head][0].double().softmax(dim=0).numpy() for head in ("cls", "conv")]
    assert float(row["prob_conv"]) == pytest.approx(heads[1].max(), rel=1e-5)
    assert float(row["disagreement"]) == pytest.approx(disagreement(heads), rel=1e-5)


def test_disagreement_goes_from_none_to_one():
    sure, other = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert disagreement([sure, sure, sure]) == 0
    assert disagreement([sure, other]) == pytest.approx(1)
    assert 0 < disagreement([np.array([0.8, 0.2]), np.array([0.4, 0.6])]) < 1


@pytest.mark.parametrize("name", [name.replace("/", " ") for name in ODD_NAMES])
def test_names_of_files_change_nothing_but_themselves(run, tmp_path, name):
    path = tmp_path / f"{name}.png"
    Image.new("RGB", (20, 20)).save(path)
    assert [row["image"] for row in rows_of(run, [path], tmp_path)] == [str(path)]
    out = tmp_path / "rows.jsonl"
    predict(TWO_CLASSES, [str(path)], World(), out=str(out))
    assert json.loads(out.read_text())["image"] == str(path)


@pytest.mark.parametrize("name", [*ODD_NAMES, "k" * 4000])
def test_names_of_classes_change_nothing_but_themselves(tmp_path, name):
    path = tmp_path / "x.png"
    Image.new("RGB", (20, 20)).save(path)
    classifier = Classifier("odd", Interface((f"not {name}", name), ("logits",), 8, 1.0), {}, bright_or_dark)
    for suffix, read in (
        (".csv", lambda file: next(csv.DictReader(file.open(newline="")))["class_1"]),
        (".jsonl", lambda file: json.loads(file.read_text())["class_1"]),
        (".parquet", lambda file: pyarrow.parquet.read_table(file)["class_1"].to_pylist()[0]),
    ):
        out = tmp_path / f"rows{suffix}"
        predict(classifier, [str(path)], World(), out=str(out))
        assert read(out) == name


def test_a_name_that_is_not_utf8_is_kept(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.png"
    Image.new("RGB", (20, 20)).save(io.FileIO(path, "w"), "png")
    out = tmp_path / "rows.csv"
    predict(TWO_CLASSES, [os.fsdecode(path)], World(), out=str(out))
    assert path in out.read_bytes()
    predict(TWO_CLASSES, [os.fsdecode(path)], World(), out=str(tmp_path / "rows.parquet"))


def test_the_screen_shows_a_line_for_each_image(run, folder, capsys):
    assert main([run, str(folder / "00.png"), str(folder / "bad.jpg")]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{folder}/00.png  ")
    assert second == f"{folder}/bad.jpg  cannot be used: not an image of a known format"


def test_members_of_a_shard_are_images(run, folder, tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("00.png", "bad.jpg", "notes.txt"):
            tar.add(folder / name, name)
    rows = rows_of(run, [tmp_path / "s.tar", folder / "00.png"], tmp_path)
    assert [row["image"] for row in rows[:2]] == [f"{tmp_path}/s.tar:00.png", f"{tmp_path}/s.tar:bad.jpg"]
    assert (rows[0]["class_1"], rows[0]["prob_1"]) == (rows[2]["class_1"], rows[2]["prob_1"])


@pytest.mark.parametrize("content", [b"", b"no tar", b"x" * 2000])
def test_a_shard_that_is_none_is_a_row_with_a_reason(tmp_path, content):
    (tmp_path / "s.tar").write_bytes(content)
    (found,) = items_of([str(tmp_path / "s.tar")], io.BytesIO())
    assert "not a whole, uncompressed tar file" in found.reason


@pytest.mark.parametrize("harm", ["a flipped bit in a header", "cut in a header", "cut behind a member"])
def test_a_damaged_shard_does_not_lose_images_in_silence(folder, tmp_path, harm):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("00.png", "02.png", "04.png"):
            tar.add(folder / name, name)
    with tarfile.open(path) as tar:
        second = tar.getmembers()[1].offset
    data = bytearray(path.read_bytes())
    if harm.startswith("a flipped"):
        data[second + 10] ^= 1
    path.write_bytes(data[: second + (300 if harm == "cut in a header" else 0)] if harm.startswith("cut") else data)
    first, rest = items_of([str(path)], io.BytesIO())
    assert first.reason is None
    assert any(each in rest.reason for each in ("no header at byte", "no end mark at byte", "truncated"))


def test_links_in_a_shard_are_rows_with_a_reason(folder, tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(folder / "00.png", "00.png")
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.LNKTYPE, "00.png"
        tar.addfile(link)
    first, second = items_of([str(tmp_path / "s.tar")], io.BytesIO())
    assert first.reason is None
    assert "link" in second.reason


@pytest.mark.parametrize("name", ["loop.png", "x" * 300 + ".png", "a\0b.png"])
def test_a_name_that_leads_nowhere_is_a_row_with_a_reason(folder, tmp_path, name):
    os.symlink(folder / "loop.png", folder / "loop.png")
    listed = io.BytesIO(b"".join(os.fsencode(folder / each) + b"\n" for each in (name, "00.png")))
    out = tmp_path / "rows.csv"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "stdin", io.TextIOWrapper(listed))
        predict(TWO_CLASSES, ["-"], World(), out=str(out))
    first, second = csv.DictReader(out.open(newline=""))
    assert first["reason"]
    assert not second["reason"]


def test_a_list_of_another_system_has_other_line_ends(folder):
    listed = io.BytesIO(os.fsencode(folder / "00.png") + b"\r\n\r\n")
    assert [item.name for item in items_of(["-"], listed)] == [str(folder / "00.png")]


def test_devices_and_pipes_are_written_and_links_lead_to_their_files(run, folder, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)
    arguments = [run, str(folder / "00.png"), "--format", "csv", "--out"]
    assert main([*arguments, str(tmp_path / "pipe")]) == 0
    assert b"00.png" in reader.communicate()[0]
    (tmp_path / "real.csv").touch()
    os.symlink(tmp_path / "real.csv", tmp_path / "link.csv")
    assert main([*arguments, str(tmp_path / "link.csv")]) == 0
    assert (tmp_path / "link.csv").is_symlink()
    assert "00.png" in (tmp_path / "real.csv").read_text()
    assert main([*arguments, "/dev/null"]) == 0
    assert not Path("/dev/null").is_file()


def test_after_an_error_nothing_is_left(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInputError):
        predict(TWO_CLASSES, [str(tmp_path / "empty")], World(), out=str(tmp_path / "rows.csv"))
    assert not list(tmp_path.glob("rows*"))


class AwkwardError(Exception):
    def __init__(self, one, two):
        super().__init__(one)


def awkward_on(world):
    def read(item):
        raise AwkwardError(1, 2)

    try:
        classify_all(iter(range(9)), read, TWO_CLASSES, world, lambda answers: True, batch_size=2, threads=1)
    except RuntimeError as error:
        return str(error)
    return None


def test_an_exception_that_cannot_travel_ends_all_ranks_too():
    assert run_on_ranks(2, awkward_on) == ["AwkwardError: 1"] * 2


def test_what_one_head_says_cannot_disagree(folder, tmp_path):
    with pytest.raises(ConfigError, match="has one head"):
        predict(TWO_CLASSES, [str(folder)], World(), out=str(tmp_path / "rows.csv"), heads=True)


def test_a_temperature_divides_the_logits(folder, tmp_path):
    def probability(**options):
        predict(TWO_CLASSES, [str(folder / "00.png")], World(), out=str(tmp_path / "rows.jsonl"), **options)
        return json.loads((tmp_path / "rows.jsonl").read_text())["prob_1"]

    plain, sharp = probability(), probability(temperature=0.5)
    assert np.log(sharp / (1 - sharp)) == pytest.approx(2 * np.log(plain / (1 - plain)), rel=1e-4)
    with pytest.raises(ConfigError, match="--temperature"):
        probability(temperature=0.0)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_frames_per_second_that_are_none_are_refused(folder, rate):
    with pytest.raises(ConfigError, match="--fps"):
        items_of([str(folder)], None, rate)


def test_a_closed_standard_input_is_no_matter_without_a_list(run, folder):
    command = [sys.executable, "-m", "cit_scale", "predict", run, str(folder / "00.png")]
    ended = subprocess.run(["sh", "-c", '"$@" <&-', "sh", *command], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_frames_of_a_video_are_images(tmp_path):
    from imageio_ffmpeg import get_ffmpeg_exe

    video = tmp_path / "v.mp4"
    source = "testsrc=duration=3:size=64x48:rate=10"
    subprocess.run([get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", source, str(video)], check=True)
    found = list(items_of([str(tmp_path)], io.BytesIO()))
    assert [item.name for item in found] == [f"{video}:{second}" for second in range(3)]
    assert all(decode_pixels(read_item(item)).shape == (3, 48, 64) for item in found)
    video.write_bytes(b"no video")
    (broken,) = items_of([str(video)], io.BytesIO())
    assert broken.reason


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    for name in ("p.png", "p.tar", "p.mp4"):
        os.mkfifo(tmp_path / name)
    reasons = []
    for item in items_of([str(tmp_path)], io.BytesIO()):
        try:
            read_item(item)
        except ValueError as error:
            reasons.append(str(error))
    assert reasons == ["not a regular file"] * 3


def test_a_list_is_read_line_by_line_as_the_rows_are_written(run, folder):
    command = [sys.executable, "-m", "cit_scale", "predict", run, "-"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.write(b"".join(os.fsencode(folder / name) + b"\n" for name in ("00.png", "02.png", "04.png")))
    process.stdin.flush()
    assert b"00.png" in process.stdout.readline()  # before the list has ended
    process.stdin.write(os.fsencode(folder / "missing.png") + b"\n")
    process.stdin.close()
    rest = process.stdout.read()
    assert process.wait() == 0
    assert rest.count(b"\n") == 3
    assert b"missing.png  cannot be used: No such file or directory" in rest


def test_a_reader_that_leaves_ends_the_work(folder, tmp_path, monkeypatch):
    listed = itertools.count()

    def endless(path, frames_per_s):
        for _ in range(100_000):
            next(listed)
            yield Item(str(folder / "00.png"), str(folder / "00.png"))

    monkeypatch.setattr(items_module, "_named", endless)
    reading, writing = os.pipe()
    os.close(reading)
    screen = os.fdopen(writing, "w")
    monkeypatch.setattr(sys, "stdout", screen)
    from cit_scale.text import outlive_readers

    outlive_readers()
    count = predict(TWO_CLASSES, [str(folder)], World(), batch_size=10)
    assert not count.is_read
    assert next(listed) < 100


def test_a_killed_command_leaves_the_old_table(run, folder, tmp_path):
    out = tmp_path / "rows.csv"
    out.write_text("of before\n")
    command = [sys.executable, "-m", "cit_scale", "predict", run, "-", "--batch-size", "1", "--out", str(out)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    for _ in range(4):
        process.stdin.write(os.fsencode(folder / "00.png") + b"\n")
    process.stdin.flush()
    partial = tmp_path / "rows.csv.partial"
    for _ in range(600):
        if partial.exists() and partial.read_text().count("\n") > 1:
            break
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert out.read_text() == "of before\n"
    assert partial.read_text().endswith("\n")


def table_on(world, run, folder, out):
    classifier = open_classifier(run, world)
    predict(classifier, [folder], world, out=out, top=2, heads=True, batch_size=2, threads=1)


def test_two_ranks_write_the_table_of_one(run, folder, tmp_path):
    for ranks in (1, 2, 3):
        run_on_ranks(ranks, table_on, run, str(folder), str(tmp_path / f"{ranks}.csv"))
    one, two, three = ((tmp_path / f"{ranks}.csv").read_bytes() for ranks in (1, 2, 3))
    assert one.count(b"\n") == 15
    assert one == two == three


def failing_on(world, run, folder, out):
    try:
        table_on(world, run, folder, out)
    except (OSError, ConfigError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_what_one_rank_meets_is_raised_on_all(run, folder, tmp_path):
    wrong = run_on_ranks(2, failing_on, run, str(folder), "/dev/full/x.csv")
    assert wrong[0] == wrong[1]
    assert "NotADirectoryError" in wrong[0]
    missing = run_on_ranks(2, failing_on, run, str(folder / "nothing"), str(tmp_path / "x.csv"))
    assert missing[0] == missing[1]
    assert "does not exist" in missing[0]


def disk_fails(item):
    if item == 5:
        raise OSError(5, "Input/output error")
    return b"no image"


def failing_read_on(world):
    try:
        classify_all(iter(range(9)), disk_fails, TWO_CLASSES, world, lambda answers: True, batch_size=2, threads=1)
    except OSError as error:
        return error.errno
    return None


def test_a_disk_that_fails_on_one_rank_ends_all():
    assert run_on_ranks(2, failing_read_on) == [5, 5]


def test_an_answer_that_is_not_finite_is_a_row_with_a_reason(folder, tmp_path):
    def classify(images):
        logits = bright_or_dark(images)["logits"]
        logits[0, 0] = float("nan")
        return {"logits": logits}

    out = tmp_path / "rows.jsonl"
    images = [str(folder / name) for name in ("00.png", "bad.jpg", "02.png")]
    predict(Classifier("odd", TWO_CLASSES.interface, {}, classify), images, World(), out=str(out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["reason"] is None for row in rows] == [False, False, True]
    assert "is not finite" in rows[0]["reason"]


def test_threads_do_not_mix_what_a_network_keeps_during_a_call():
    """An advised model keeps its pooled features between two parts of its forward."""
    from concurrent.futures import ThreadPoolExecutor

    from cit_scale.inference.classifier import OpenedNetwork, classifier_of
    from cit_scale.models.network import build_network

    torch.manual_seed(0)
    network = build_network("mobilenetv3_small_050", {}, num_classes=3, image_size=32, teachers=("conv", "inv")).eval()
    interface = Interface(("a", "b", "c"), network.heads, 32, 1.0)
    opened = OpenedNetwork("x", Path("x"), network, interface, {}, None, ())
    classify = classifier_of(opened, torch.device("cpu")).classify
    batches = list(torch.randint(0, 256, (40, 2, 3, 32, 32), dtype=torch.uint8))
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = list(pool.map(classify, batches))
        expected = [pool.submit(classify, batch).result() for batch in batches]
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[head], other[head]) for head in one)


def test_a_batch_that_does_not_fit_the_memory_is_halved():
    sizes = []

    def classify(images):
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError
        return bright_or_dark(images)

    small = Classifier("small", TWO_CLASSES.interface, {}, classify)
    from cit_scale.inference.turns import classify_images

    images = list(torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8))
    found = classify_images(small, images)["logits"]
    assert np.array_equal(found, bright_or_dark(torch.stack(images))["logits"].numpy())
    assert max(size for size in sizes if size <= 2) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["EMPTY"], 3, "there are no images in"),
        (["EMPTY/x.jpg"], 3, "does not exist"),
        (["-", "-"], 2, "can stand there once"),
        (["EMPTY", "--out", "rows"], 2, "does not say which format"),
        (["EMPTY", "--format", "parquet"], 2, "needs a file"),
        (["IMAGE", "--out", "EMPTY.csv"], 2, "is a folder"),
        (["IMAGE", "--out", "EMPTY/no/x.csv"], 3, "lies in no folder that exists"),
        (["IMAGE", "--out", "IMAGE", "--format", "csv"], 7, "would overwrite an input"),
        (["IMAGE", "--out", "RUN/config.json", "--format", "csv"], 7, "would overwrite"),
        (["BAD"], 4, "none of 1 images can be used: not an image of a known format"),
        (["RUN"], 2, "is a run; MODEL comes first, and images behind it"),
    ],
)
def test_bad_input_is_one_line(run, folder, tmp_path, arguments, code, said, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.csv").mkdir()
    places = {"EMPTY": tmp_path / "empty", "IMAGE": folder / "00.png", "BAD": folder / "bad.jpg", "RUN": run}
    for place, path in places.items():
        arguments = [each.replace(place, str(path)) for each in arguments]
    assert main([run, *arguments]) == code
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert error.startswith("error: ")


def test_a_full_disk_is_an_error(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("cit_scale.inference.tables._open_text", lambda path: open_text(Path("/dev/full")))
    with pytest.raises(OSError, match="No space left"):
        predict(TWO_CLASSES, [str(folder)], World(), out=str(tmp_path / "rows.csv"))


def test_no_images_at_all_is_an_error(tmp_path):
    with pytest.raises(MissingInputError, match="there are no images"):
        predict(TWO_CLASSES, [str(tmp_path)], World(), out=str(tmp_path / "rows.csv"))
