"""The benchmarks of the data streams: made-up photographs, images a second, distance from PIL."""

import argparse
import itertools
import math
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from odd_images import odd_images
from PIL import Image, ImageOps

from cit_scale.bench import decode, fidelity, involution, teachers
from cit_scale.data import dali
from cit_scale.datasets.pack import pack
from cit_scale.datasets.sources import ImageFolder, TarShards
from cit_scale.errors import ConfigError


def cells_of(said):
    """The rows of the table in what a benchmark printed, without its head."""
    lines = [line for line in said.splitlines() if line.startswith("| ")]
    return [line[2:-2].split(" | ") for line in lines[2:]]


@pytest.mark.parametrize("main", [decode.main, fidelity.main])
def test_the_commands_explain_themselves(main, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "python -m cit_scale.bench." in capsys.readouterr().out


# --- Photographs ---


def test_made_up_photographs_are_like_photographs():
    pictures = [decode.photo(375, 500, seed) for seed in range(3)]
    assert not np.array_equal(*pictures[:2])
    assert np.array_equal(decode.photo(375, 500, 1), pictures[1])
    for picture in pictures:
        assert picture.shape == (375, 500, 3)
        assert picture.dtype == np.uint8
        assert 70_000 < len(decode.to_jpeg(picture)) < 120_000  # ImageNet's have 110 KB on average
        spread = picture.std(axis=(0, 1))
        assert spread.min() > 30
        between_neighbours = np.abs(np.diff(picture.astype(int), axis=1)).mean(axis=(0, 1))
        assert (between_neighbours < spread / 3).all()  # of noise it would be more than the spread
        assert between_neighbours.min() > 2
        correlations = np.corrcoef(picture.reshape(-1, 3).T)
        assert 0.5 < correlations.min() < 0.99  # coloured, but less than bright and dark
        assert np.isin(picture, (0, 255)).mean() < 0.1


def test_photographs_are_a_data_set(tmp_path):
    decode.make_photos(tmp_path / "photos", 5, (30, 40), 2)
    source = ImageFolder(tmp_path / "photos", tmp_path)
    assert source.classes == ("even", "odd")
    assert source.labels.tolist() == [0, 0, 0, 1, 1]
    assert {(30, 40)} == set(zip(source.heights.tolist(), source.widths.tolist(), strict=True))
    assert len({source.read(index) for index in range(5)}) == 5


# --- Images a second ---


@pytest.mark.slow
def test_all_kinds_of_streams_are_timed():
    """In a process of its own: worker processes are forked, and PyTorch's threads are set."""
    names = ["recipe", "timm_recipe", "crop", "timm_crop", "dali_crop", "shards", "packed"]
    tiny = ["--synthetic", "16", "--images", "32", "--batch", "8", "--image_size", "32", "--rounds", "1"]
    command = [sys.executable, "-m", "cit_scale.bench.decode", *tiny, "--rows", *names]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"commit \w+.*1 threads; Python.*DALI [\d.]+, Pillow [\d.]+; 2 threads or workers.*1 rounds", said)
    rows = cells_of(said)
    assert [row[0].split(":")[0] for row in rows] == names
    for row in rows:
        assert len(row) == 4
        figures = [float(figure) for figure in re.fullmatch(r"(\S+) \((\S+) to (\S+)\)", row[2]).groups()]
        assert all(0 < figure < math.inf for figure in figures)
    leads = {row[0].split(":")[0]: re.findall(r"([\d.]+) x (\w+)", row[3]) for row in rows}
    assert {name: tuple(peer for _, peer in found) for name, found in leads.items()} == {
        name: decode.ROWS[name].peers for name in names
    }
    assert all(0 < float(lead) < math.inf for found in leads.values() for lead, _ in found)
    assert {row[1].split(",")[0] for row in rows[:-1]} == {"500 x 375"}
    assert rows[-1][1].startswith("341 x 256, ")


def test_what_was_ready_before_a_turn_is_not_timed():
    taken = []

    def stream(name):
        for place in itertools.count():
            time.sleep(0.1 if place % 5 < 3 else 0)  # the first three of a turn
            taken.append(name)
            yield torch.zeros(1)

    times = decode.take_turns({name: stream(name) for name in "ab"}, batches=2, rounds=2, prefetched=3)
    assert "".join(taken) == 2 * (5 * "a" + 5 * "b")
    assert [len(figures) for figures in times.values()] == [2, 2]
    assert max(map(max, times.values())) < 0.1


def test_a_turn_waits_until_all_rest(monkeypatch):
    used_s = iter([1.0, 1.1, 1.2, 1.22, 1.239, 9.0])  # of 0.1 s each: 100 %, 100 %, 20 % and 19 % of a core
    monkeypatch.setattr(decode, "_cpu_s", lambda: next(used_s))
    monkeypatch.setattr(decode.time, "sleep", lambda _: None)
    decode.wait_for_rest(every_s=0.1, share=0.2)
    assert next(used_s) == 9.0


def test_the_time_of_workers_counts():
    before_s = decode._cpu_s()
    worker = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        deadline = time.monotonic() + 60
        while decode._cpu_s() - before_s < 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert decode._cpu_s() - before_s >= 1
        assert time.process_time() < before_s + 1  # ours alone would not have done
    finally:
        worker.kill()
        worker.wait()


def test_ratios_are_of_pairs_and_speeds_of_images():
    times = {"recipe": [1.0, 4.0, 2.0], "timm_recipe": [3.0, 8.0, 5.0]}
    lines = decode.report(times, dict.fromkeys(times, "a size"), images=100).splitlines()
    assert lines[2] == "| recipe: ours, whole recipe | a size | 50 (25 to 100) | 2.50 x timm_recipe |"
    assert lines[3] == "| timm_recipe: timm, whole recipe | a size | 20 (12.5 to 33.3) |  |"


def test_posterizing_to_no_bits_is_black_and_else_as_pil():
    image = Image.fromarray(decode.photo(20, 30, 0))
    assert not np.asarray(decode.posterize(image, 0)).any()
    for bits in (1, 4, 8):
        assert np.array_equal(decode.posterize(image, bits), ImageOps.posterize(image, bits))


def arguments_of(**given):
    fixed = {"synthetic": None, "data": None, "rows": None, "packed": False, "images": 8, "batch": 4, "threads": 1}
    return argparse.Namespace(**{**fixed, **given})


@pytest.fixture
def folder(tmp_path):
    decode.make_photos(tmp_path / "photos", 10, (300, 400), 1)
    return tmp_path / "photos"


@pytest.mark.usefixtures("_own_cache")
def test_by_default_there_are_the_rows_that_the_data_allow(folder, tmp_path):
    all_but_large = set(decode.ROWS) - decode.LARGE
    sources = decode.open_sources(arguments_of(data=str(folder)), tmp_path)
    assert sources.keys() == all_but_large - set(decode.SHORTER_SIDES)
    assert {len(source) for source in sources.values()} == {8}  # as many as a round needs
    assert len({source.key(index) for source in sources.values() for index in range(8)}) == 8
    sources = decode.open_sources(arguments_of(data=str(folder), packed=True), tmp_path)
    assert sources.keys() == all_but_large
    assert sources["shards"].heights.tolist() == [300] * 8
    assert sources["packed"].heights.tolist() == [256] * 8

    pack(ImageFolder(folder, tmp_path), tmp_path / "given", workers=1)
    sources = decode.open_sources(arguments_of(data=str(tmp_path / "given")), tmp_path)
    assert sources.keys() == all_but_large - set(decode.SHORTER_SIDES) - {"dali_crop"}


@pytest.mark.usefixtures("_own_cache")
def test_rows_that_cannot_be_are_refused(folder, tmp_path):
    pack(ImageFolder(folder, tmp_path), tmp_path / "given", workers=1)
    with pytest.raises(ConfigError, match="no rows dali_crop: dali_crop reads image files"):
        decode.open_sources(arguments_of(data=str(tmp_path / "given"), rows=["crop", "dali_crop"]), tmp_path)
    with pytest.raises(ConfigError, match="no rows large_packed"):
        decode.open_sources(arguments_of(data=str(folder), rows=["large_packed"]), tmp_path)
    with pytest.raises(ConfigError, match="8 images do not fill a batch of 9"):
        decode.open_sources(arguments_of(data=str(folder), batch=9), tmp_path)


@pytest.fixture
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(decode.DataConfig, "cache_dir", str(tmp_path))


def test_larger_images_are_made_where_they_are_asked_for(tmp_path):
    sources = decode.open_sources(arguments_of(synthetic=4, rows=["large_packed", "crop"], batch=1), tmp_path)
    assert list(sources) == ["large_packed", "crop"]
    assert isinstance(sources["large_packed"], TarShards)
    assert decode.image_sizes_text(sources["large_packed"]).startswith("341 x 256, ")
    assert decode.image_sizes_text(sources["crop"]).startswith("500 x 375, ")


# --- On a GPU: what a machine without one can tell ---

CUDA = torch.device("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("main", [decode.main, fidelity.main, involution.main, teachers.main])
def test_a_gpu_that_is_not_there_is_refused_in_one_line(main, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cuda"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("argument --device: PyTorch sees no GPU; leave it out to measure the CPU")
    )


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (("--device", "tpu"), "--device: 'tpu' is neither cpu nor cuda"),
        (("--hw_decoder_load", "2"), "--hw_decoder_load: '2' is not a number from 0 to 1"),
        (("--hw_decoder_load", "half"), "--hw_decoder_load: 'half' is not a number from 0 to 1"),
        (("--hw_decoder_load", "0.5"), "--hw_decoder_load 0.5 is a GPU's; give --device cuda"),
    ],
)
def test_a_decoder_that_cannot_be_is_refused(asked, answer, capsys):
    for main, more in ((decode.main, ["--synthetic", "4"]), (fidelity.main, [])):
        with pytest.raises(SystemExit) as stopped:
            main([*more, *asked])
        assert stopped.value.code == 2
        assert answer in capsys.readouterr().err


def test_every_stream_is_opened_on_the_device_with_its_decoder(folder, tmp_path, monkeypatch):
    opened = []

    def train_stream(reader, augment, data, *rest):
        opened.append((rest[-1], data.hw_decoder_load))
        return (batch for batch in ())

    def create_loader(*_, device, **__):
        opened.append(device)
        raise StopIteration

    def image_random_crop(encoded, **options):
        opened.append((options["device"], options["hw_decoder_load"]))
        return decoder(encoded, **options)

    decoder = decode.fn.decoders.image_random_crop
    monkeypatch.setattr(decode, "train_stream", train_stream)
    monkeypatch.setattr(decode, "create_loader", create_loader)
    monkeypatch.setattr(decode.fn.decoders, "image_random_crop", image_random_crop)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    source = decode.Subset(ImageFolder(folder, tmp_path), np.arange(8))
    setting = decode.Setting(threads=1, batch=4, image_size=32, device=CUDA, hw_decoder_load=0.25)
    assert list(decode.ROWS["recipe"].open(source, setting)) == []
    with pytest.raises(RuntimeError):  # as Python turns a generator's StopIteration
        next(decode.ROWS["timm_recipe"].open(source, setting))
    assert decode.reader_pipeline(source, setting).device_id == 3
    assert opened == [(CUDA, 0.25), CUDA, ("mixed", 0.25)]


def test_a_turn_lasts_until_the_device_is_done(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(decode, "wait_for_rest", lambda: None)
    decode.take_turns({"recipe": itertools.repeat(torch.zeros(1))}, 2, 3, 1, CUDA)
    assert waited == [CUDA] * 6  # before and after each turn


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """A CPU does what the streams and pipelines are asked to do on a GPU. Returns what they were asked."""
    asked = []

    def on_the_cpu(name):
        real = getattr(fidelity, name)
        return lambda *arguments: asked.append((name, arguments[-1])) or real(*arguments[:-1], torch.device("cpu"))

    def train_pipeline(*arguments, device_id, **options):
        asked.append(("train_pipeline", device_id))
        return real_pipeline(*arguments, device_id=None, **options)

    real_pipeline = dali.train_pipeline
    for name in ("train_stream", "eval_stream"):
        monkeypatch.setattr(fidelity, name, on_the_cpu(name))
    monkeypatch.setattr(fidelity.dali, "train_pipeline", train_pipeline)
    monkeypatch.setattr(fidelity, "library_versions_text", str)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return asked


def test_images_of_a_gpu_are_compared_with_pils_within_limits_of_its_own(as_on_a_gpu, capsys):
    assert fidelity.main(["--photos", "2", "--image_sizes", "96", "--device", "cuda"]) == 0
    asked, said = set(as_on_a_gpu), capsys.readouterr().out
    assert {("train_stream", CUDA), ("eval_stream", CUDA), ("train_pipeline", 0)} <= asked
    assert {device for name, device in asked if name != "train_pipeline"} == {CUDA}
    assert said.startswith("cuda; ")
    allowed = {row[0]: row[4] for row in cells_of(said)}
    assert allowed["resized crop"] == allowed["evaluation"] == "2.0"


def test_each_image_of_a_gpu_is_listed_from_a_distance_of_its_own(as_on_a_gpu, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "set" / "a"
    folder.mkdir(parents=True)
    (folder / "0.jpg").write_bytes(odd_images()["cmyk.jpg"])
    assert fidelity.main(["--images", str(folder.parent), "--image_sizes", "64", "--device", "cuda"]) == 0
    assert {("train_stream", CUDA), ("eval_stream", CUDA)} <= set(as_on_a_gpu)
    assert "above 16" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_all_that_is_computed_is_near_pils(capsys):
    assert fidelity.main(["--photos", "4", "--image_sizes", "224", "--device", "cuda"]) == 0
    assert "NVIDIA" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_every_stream_is_timed():
    tiny = ["--synthetic", "16", "--images", "32", "--batch", "8", "--image_size", "32", "--rounds", "1"]
    rows = ["recipe", "timm_recipe", "dali_crop"]
    command = [sys.executable, "-m", "cit_scale.bench.decode", *tiny, "--device", "cuda", "--rows", *rows]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [row[0].split(":")[0] for row in cells_of(said)] == rows


# --- Distance from PIL ---


def test_all_that_is_computed_is_near_pils(capsys):
    assert fidelity.main(["--photos", "4", "--image_sizes", "224"]) == 0
    rows = {row[0]: row[1:] for row in cells_of(capsys.readouterr().out)}
    names = {name.split(" ")[0] for name in rows}
    assert {"resized", "evaluation", "RandAugment,", "3-Augment,", *dali.COMPUTED_BY} - names == {"identity"}
    for name, (mean, median, largest, allowed, _) in rows.items():
        assert 0 <= float(mean) <= float(largest)
        assert 0 <= float(median) <= float(largest)
        is_judged = not name.startswith(("gaussian_blur", "RandAugment", "3-Augment"))
        assert (allowed != "") == is_judged
    assert float(rows["rotate -27, 27"][4]) > float(rows["rotate -27, 27"][0]) > 0  # bicubic is farther
    assert rows["invert"][4] == ""


def nearest(image, size):
    rows, columns = (torch.arange(new) * old // new for new, old in zip(size.tolist(), image.shape[:2], strict=True))
    return image[rows][:, columns].contiguous()


@pytest.mark.parametrize(
    ("function", "other", "broken"),
    [("equalize", lambda image: 255 - image, ["equalize"]), ("resize", nearest, ["resized crop", "evaluation"])],
)
def test_what_is_too_far_ends_with_1_and_is_named(function, other, broken, monkeypatch, capsys):
    monkeypatch.setattr(dali, function, other)
    assert fidelity.main(["--photos", "2", "--image_sizes", "96"]) == 1
    captured = capsys.readouterr()
    assert captured.err.strip() == f"more than allowed: {'; '.join(broken)}"
    assert [row[0] for row in cells_of(captured.out) if "broken" in row[4]] == broken


def test_errors_count_in_bytes():
    ours = torch.full((2, 3, 4, 5), 10 / 255)
    theirs = [Image.new("RGB", (5, 4), (10, 13, 10)), Image.new("RGB", (5, 4), (10, 10, 10))]
    assert fidelity.errors_of(ours, theirs).tolist() == [1.0, 0.0]


def test_every_image_of_a_folder_is_compared_with_pil(tmp_path, capsys):
    folder = tmp_path / "set" / "a"
    folder.mkdir(parents=True)
    images = odd_images()
    for name, data in {**images, "broken.jpg": b"no image"}.items():
        (folder / name).write_bytes(data)
    assert fidelity.main(["--images", str(folder.parent), "--image_sizes", "64"]) == 0
    printed = capsys.readouterr().out
    for way in ("evaluation", "training", "packed, evaluation"):
        assert re.search(rf"^\| {way} \| +{len(images)} \| +0 \| +[012] \| +0 \|$", printed, re.MULTILINE), way
    assert f"cannot be used: {folder / 'broken.jpg'}\tnot an image of a known format" in printed


@pytest.mark.slow
def test_images_of_every_format_mode_and_orientation_are_those_that_pil_shows(capsys):
    assert fidelity.main(["--images", "--image_sizes", "64"]) == 0
    counts = re.findall(r"^\| [a-z, ]+ \| +(\d+) \| +0 \| +[012] \| +0 \|$", capsys.readouterr().out, re.MULTILINE)
    assert len(counts) == 3
    assert min(map(int, counts)) > 300


def test_an_image_that_pil_opens_and_we_do_not_use_is_an_error(tmp_path, capsys):
    folder = tmp_path / "set" / "a"
    folder.mkdir(parents=True)
    Image.new("L", (2, 2)).save(folder / "0.png")
    Image.new("L", (3000, 1)).save(folder / "strip.png")
    assert fidelity.main(["--images", str(folder.parent), "--image_sizes", "8"]) == 1
    assert f"PIL opens {folder / 'strip.png'}, and it cannot be used here: 3000 x 1 pixels" in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_one_line(capsys):
    assert fidelity.main(["--images", "/nowhere"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_an_image_that_is_off_is_listed_and_an_error(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "set" / "a"
    folder.mkdir(parents=True)
    (folder / "0.jpg").write_bytes(odd_images()["cmyk.jpg"])
    shown = fidelity.upright
    monkeypatch.setattr(fidelity, "upright", lambda *arguments: ImageOps.invert(shown(*arguments)))
    assert fidelity.main(["--images", str(folder.parent), "--image_sizes", "64"]) == 1
    assert f"evaluation: {folder / '0.jpg'} is off by" in capsys.readouterr().out
