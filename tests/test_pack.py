"""Packing: the same images in shards; what is bad set aside; nothing half-written; the same bytes after any stop."""

import errno
import fcntl
import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageOps
from rich.console import Console

from cit_scale.datasets import pack as pack_module
from cit_scale.datasets import progress, shards
from cit_scale.datasets.commands import pack as main
from cit_scale.datasets.encoded import decode, for_dali, read_size
from cit_scale.datasets.pack import pack
from cit_scale.datasets.sources import ImageFolder, TarShards, digits, open_source
from cit_scale.errors import BadImageError, ConfigError

fork = multiprocessing.get_context("fork")


def encoded(height, width, kind="PNG", seed=0, mode="RGB", **options):
    """Noise, which no encoder makes small: about 3 bytes a pixel as PNG."""
    channels = {"L": (), "RGB": (3,), "CMYK": (4,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, *channels), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode).save(buffer, kind, **options)
    return buffer.getvalue()


def write_files(root, files):
    for name, data in files.items():
        path = Path(os.fsdecode(os.path.join(os.fsencode(root), os.fsencode(name))))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


@pytest.fixture
def folder(tmp_path):
    """48 images of 30 to 38 KB in two classes."""
    names = [f"{name}/{i:02d}.png" for name in ("ant", "dog") for i in range(24)]
    return write_files(tmp_path / "set", {name: encoded(99, 101 + i, seed=i) for i, name in enumerate(names)})


@pytest.fixture
def small_mib(monkeypatch):
    """One that four of the folder's images fill."""
    monkeypatch.setattr(pack_module, "MIB", 120_000)


@pytest.fixture
def source(folder, tmp_path):
    return ImageFolder(folder, tmp_path / "cache")


def contents(out):
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def samples(out):
    """What a WebDataset reader makes of the shards: neighbours of one key, which ends at the last part's first dot."""
    found = []
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = [(re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", member.name).groups(), member) for member in tar]
            for key, group in itertools.groupby(members, key=lambda pair: pair[0][0]):
                found.append((key, {suffix: tar.extractfile(member).read() for (_, suffix), member in group}))
    return found


# --- What is in the shards ---


def test_packed_images_are_the_folders_in_the_same_order(source, tmp_path, small_mib):
    summary = pack(source, tmp_path / "out", shard_mib=1, workers=2)
    packed = TarShards(tmp_path / "out")
    assert packed.fingerprint == source.fingerprint
    assert packed.classes == source.classes
    assert [packed.read(i) for i in range(48)] == [source.read(i) for i in range(48)]
    assert [packed.key(i) for i in range(48)] == [source.key(i) for i in range(48)]
    assert (summary.images, summary.rejected, summary.empty_classes) == (48, 0, ())
    assert summary.mib_before == sum(len(source.read(i)) for i in range(48)) / 120_000
    assert summary.images_per_s == pytest.approx(48 / summary.seconds)


def test_a_shard_ends_with_the_image_that_fills_it(source, tmp_path, small_mib):
    summary = pack(source, tmp_path / "out", shard_mib=1, workers=1)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert summary.shards == len(sizes) > 10
    assert summary.mib_after == sum(sizes) / 120_000
    assert all(120_000 <= size < 170_000 for size in sizes[:-1])


def test_other_readers_find_each_image_beside_its_label(tmp_path):
    names = ["a.b/1.left.png", "a.b/1.left.jpg", "a.b/1.right.png", "a.b/c.d/deep.png", "__x__/é 1.png", "__x__/--.png"]
    names += [b"__x__/\xff.png", b"__x__/" + b"long" * 50 + b".png", "__x__/new\nline.png", "__x__/.a.png"]
    source = ImageFolder(write_files(tmp_path / "set", {name: encoded(4, 4) for name in names}), tmp_path / "cache")
    pack(source, tmp_path / "out", workers=1)
    found = samples(tmp_path / "out")
    assert len(found) == len(source) == 9  # the one that begins with a dot is passed over
    assert len({key for key, _ in found}) == 9
    for i, (key, fields) in enumerate(found):
        assert set(fields) == {os.fsdecode(source.key(i)).rsplit(".", 1)[1], "cls"}
        assert int(fields.pop("cls")) == source.labels[i]
        assert fields.popitem()[1] == source.read(i)
        assert re.fullmatch(r"[\w-]+/[\w-]+", key)
        assert not key.startswith("__")
        assert all(len(part.encode()) <= 240 for part in key.split("/"))
    assert found[0][0] == "x/x-00000000"  # of __x__/--.png; a WebDataset reader skips what begins like __x__
    assert found[-1][0] == "a_b/deep-00000008"


def test_an_image_without_an_images_extension_gets_one(tmp_path):
    write_files(tmp_path / "set", {"one": encoded(4, 4), "two.dat": encoded(4, 5)})
    (tmp_path / "set" / "labels.csv").write_text("one,a\ntwo.dat,a\n")
    source = open_source(str(tmp_path / "set" / "labels.csv"), tmp_path / "cache", "SOURCE")
    pack(source, tmp_path / "out", workers=1)
    assert [key for key, _ in samples(tmp_path / "out")] == ["a/one-00000000", "a/two-00000001"]
    assert TarShards(tmp_path / "out").fingerprint == source.fingerprint


def test_shards_can_be_packed_again(source, tmp_path, small_mib):
    pack(source, tmp_path / "small", shard_mib=1, workers=1)
    summary = pack(TarShards(tmp_path / "small"), tmp_path / "large", shard_mib=100, workers=1)
    assert summary.shards == 1
    assert TarShards(tmp_path / "large").fingerprint == source.fingerprint


# --- Smaller images ---


def test_images_are_scaled_down_as_pil_does_it_and_smaller_ones_keep_their_bytes(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "a/lying.jpg": encoded(60, 90, "JPEG", exif=exif),
        "a/odd.png": encoded(64, 97, mode="RGBA"),
        "a/small.png": encoded(30, 300),
        "a/exact.webp": encoded(40, 50, "WEBP"),
        "a/print.jpg": encoded(70, 70, "JPEG", mode="CMYK"),
    }
    source = ImageFolder(write_files(tmp_path / "set", files), tmp_path / "cache")
    pack(source, tmp_path / "out", workers=2, shorter_side=40, quality=95)
    packed = TarShards(tmp_path / "out")
    for i in range(len(packed)):
        name = os.fsdecode(packed.key(i))
        height, width = int(packed.heights[i]), int(packed.widths[i])
        if name in ("a/small.png", "a/exact.webp"):
            assert packed.read(i) == files[name]
            assert (height, width) == (source.heights[i], source.widths[i])
            continue
        with Image.open(io.BytesIO(files[name])) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        scale = 40 / min(upright.size)
        assert (width, height) == (round(upright.width * scale), round(upright.height * scale))
        buffer = io.BytesIO()
        upright.resize((width, height), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=95)
        assert packed.read(i) == buffer.getvalue()
        assert decode(packed.read(i)).size == (width, height)
    assert {suffix for _, fields in samples(tmp_path / "out") for suffix in fields} == {"jpg", "png", "webp", "cls"}


def test_odd_images_that_need_no_scaling_keep_their_bytes(tmp_path):
    files = {
        "a/cmyk.jpg": encoded(9, 9, "JPEG", mode="CMYK"),
        "a/grey.tif": encoded(9, 9, "TIFF", mode="L"),
        "a/picture.gif": encoded(9, 9, "GIF", mode="L"),
        "a/wrong.jpg": encoded(9, 9, "PNG"),
    }
    source = ImageFolder(write_files(tmp_path / "set", files), tmp_path / "cache")
    pack(source, tmp_path / "out", workers=1, shorter_side=40)
    packed = TarShards(tmp_path / "out")
    assert [packed.read(i) for i in range(4)] == list(files.values())


def test_an_image_too_long_for_a_jpeg_is_set_aside(tmp_path):
    files = {"a/long.png": encoded(70, 70_000, mode="L"), "a/short.png": encoded(4, 4)}
    source = ImageFolder(write_files(tmp_path / "set", files), tmp_path / "cache")
    assert pack(source, tmp_path / "out", workers=1, shorter_side=70).images == 2
    assert pack(source, tmp_path / "smaller", workers=1, shorter_side=1).images == 2
    longer = ImageFolder(write_files(tmp_path / "long", {"a/0.png": encoded(72, 72_000, mode="L")} | files), tmp_path)
    assert pack(longer, tmp_path / "longer", workers=1, shorter_side=70).images == 2
    assert "do not fit into a JPEG" in (tmp_path / "longer" / "rejected.tsv").read_text()


# --- Bad images ---


def test_bad_images_are_set_aside_with_their_reasons_and_the_others_keep_their_order(tmp_path):
    whole = encoded(50, 60, "JPEG")
    files = {
        "a/0.png": encoded(4, 4),
        "a/1.jpg": whole[: len(whole) // 2],  # its header is good
        "a/2.jpg": b"not an image",
        "a/3.png": encoded(5, 5),
        "b/4\t.jpg": whole[:-300],
        "b/5.png": encoded(6, 6),
    }
    write_files(tmp_path / "set", files)
    (tmp_path / "set" / "b" / "6.png").symlink_to("nowhere.png")
    source = ImageFolder(tmp_path / "set", tmp_path / "cache")
    summary = pack(source, tmp_path / "out", workers=2)
    packed = TarShards(tmp_path / "out")
    assert [packed.key(i) for i in range(3)] == [b"a/0.png", b"a/3.png", b"b/5.png"]
    assert (summary.images, summary.rejected) == (3, 4)
    rejected = [line.split("\t") for line in (tmp_path / "out" / "rejected.tsv").read_text().splitlines()]
    assert [name for name, _ in rejected] == ["a/1.jpg", "a/2.jpg", r"b/4\x09.jpg", "b/6.png"]
    assert "truncated" in rejected[0][1]
    assert rejected[1][1] == "not an image of a known format"
    assert rejected[3][1] == "No such file or directory"
    assert len(samples(tmp_path / "out")) == 3


def test_bad_images_after_the_last_shard_make_no_empty_one(tmp_path, monkeypatch):
    monkeypatch.setattr(pack_module, "MIB", 1000)
    files = {f"a/{i}.png": encoded(30, 30, seed=i) for i in range(3)} | {"a/3.png": encoded(30, 30)[:-50]}
    source = ImageFolder(write_files(tmp_path / "set", files), tmp_path / "cache")
    summary = pack(source, tmp_path / "out", shard_mib=1, workers=1)
    assert (summary.images, summary.shards, summary.rejected) == (3, 3, 1)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 3
    assert [TarShards(tmp_path / "out").read(i) for i in range(3)] == list(files.values())[:3]


def test_a_class_of_which_nothing_is_left_is_named(tmp_path, capsys):
    files = {"a/0.png": encoded(4, 4), "b/0.png": encoded(30, 30)[:-50]}
    write_files(tmp_path / "set", files)
    assert main([str(tmp_path / "set"), str(tmp_path / "out"), "--cache-dir", str(tmp_path / "cache")]) == 0
    assert "no image is left of 1 classes: b" in capsys.readouterr().out


def test_a_set_of_which_nothing_is_left_is_refused(tmp_path):
    source = ImageFolder(write_files(tmp_path / "set", {"a/0.png": encoded(30, 30)[:-50]}), tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"none of 1 images can be decoded; .*rejected.tsv says why"):
        pack(source, tmp_path / "out", workers=1)


def test_a_failing_disk_is_no_bad_image(source, tmp_path, monkeypatch):
    read = source.read
    with monkeypatch.context() as patch:
        patch.setattr(source, "read", lambda i: fail(errno.EIO) if i == 8 else read(i))
        with pytest.raises(OSError, match="Input/output error"):
            pack(source, tmp_path / "out", workers=2)
    assert pack(source, tmp_path / "out", workers=2).images == 48


def test_a_file_that_goes_away_is_no_bad_image(arguments, folder, tmp_path, monkeypatch, capsys):
    """As when a disk is unmounted: what is left would pass for the whole."""
    decode_first = pack_module.decode

    def unmount(data):
        with suppress(FileNotFoundError):  # another thread was first
            folder.rename(tmp_path / "unmounted")
        return decode_first(data)

    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "decode", unmount)
        assert main(arguments) == 1
    assert re.match(r"error: .*No such file or directory: '.*/set/ant/\d\d.png'; complete", capsys.readouterr().err)
    (tmp_path / "unmounted").rename(folder)
    assert main(arguments) == 0
    assert len(TarShards(tmp_path / "out")) == 48


def fail(number):
    raise OSError(number, os.strerror(number))


# --- The same bytes, whatever happens ---


@pytest.fixture
def expected(source, tmp_path, small_mib):
    """What is in a folder that was packed in one go."""
    pack(source, tmp_path / "expected", shard_mib=1, workers=1, shorter_side=95)
    return contents(tmp_path / "expected")


def test_workers_change_nothing_but_the_time(source, tmp_path, expected):
    pack(source, tmp_path / "out", shard_mib=1, workers=5, shorter_side=95)
    assert contents(tmp_path / "out") == expected


class Killed:
    """A source that lets a process die by SIGKILL when it comes to an image."""

    def __init__(self, source, index):
        self.__dict__.update(source.__dict__)
        self._source, self._index = source, index
        self.fingerprint = source.fingerprint
        self.key = source.key

    def __len__(self):
        return len(self._source)

    def read(self, index):
        if index == self._index:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._source.read(index)


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def pack_and_die(source, out, workers):
    child = fork.Process(
        target=pack, args=(source, out), kwargs={"shard_mib": 1, "workers": workers, "shorter_side": 95}
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("workers", [1, 3])
def test_killed_at_any_image_it_goes_on_to_the_same_bytes(source, tmp_path, expected, workers):
    for index in (0, 20, 40, 47):
        pack_and_die(Killed(source, index), tmp_path / "out", workers)
        assert not (tmp_path / "out" / "index.npz").exists()
    pack(source, tmp_path / "out", shard_mib=1, workers=workers, shorter_side=95)
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (pack_module, "save"),  # a shard is there and does not count yet
        (pack_module, "write_index"),
        (shards, "save"),  # all but the index
        (pack_module, "_summarise"),
        (shards, "sync"),
        (os, "fsync"),
    ],
)
def test_killed_between_two_steps_it_goes_on_to_the_same_bytes(
    source, tmp_path, expected, monkeypatch, module, function
):
    with monkeypatch.context() as patch:
        patch.setattr(module, function, die)
        pack_and_die(source, tmp_path / "out", 2)
    pack(source, tmp_path / "out", shard_mib=1, workers=2, shorter_side=95)
    assert contents(tmp_path / "out") == expected


def test_a_restart_reads_only_what_is_missing(source, tmp_path, small_mib):
    pack_and_die(Killed(source, 30), tmp_path / "out", 1)
    num_committed = len(list((tmp_path / "out").glob("*.part.npz")))
    assert num_committed > 0
    seen = []
    watched = Killed(source, None)
    watched.read = lambda index: seen.append(index) or source.read(index)
    summary = pack(watched, tmp_path / "out", shard_mib=1, workers=1, shorter_side=95)
    assert seen == list(range(seen[0], 48))
    assert seen[0] >= 3 * num_committed
    assert summary.images_per_s == pytest.approx(len(seen) / summary.seconds)


def test_the_command_killed_at_some_moment_goes_on_to_the_same_bytes(folder, tmp_path):
    def command(out):
        options = ["--shard-mib", "1", "--workers", "2", "--cache-dir", str(tmp_path / "cache")]
        return [sys.executable, "-m", "cit_scale", "pack", str(folder), str(tmp_path / out), *options]

    assert main(command("expected")[4:]) == 0
    process = subprocess.Popen(command("out"), stdout=subprocess.DEVNULL)
    while not (tmp_path / "out" / "000000.part.npz").exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    subprocess.run(command("out"), check=True, stdout=subprocess.DEVNULL)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_an_unfinished_folder_is_no_data_set(source, tmp_path, small_mib):
    pack_and_die(Killed(source, 30), tmp_path / "out", 1)
    assert list((tmp_path / "out").glob("*.tar"))
    with pytest.raises(ConfigError, match=r"out is not packed to the end; give the command that packs it again"):
        open_source(str(tmp_path / "out"), tmp_path / "cache", "data.train")


def test_a_finished_folder_is_left_as_it_is(source, tmp_path, small_mib):
    first = pack(source, tmp_path / "out", shard_mib=1, workers=1)
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = pack(source, tmp_path / "out", shard_mib=1, workers=2)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times
    assert (again.images, again.shards, again.mib_before, again.mib_after) == (
        first.images, first.shards, first.mib_before, first.mib_after,
    )  # fmt: skip
    assert again.images_per_s == 0
    tars = {f"{i:06d}.tar" for i in range(first.shards)}
    assert set(times) == tars | {"README.md", "classes.txt", "index.npz", "pack.json", "rejected.tsv"}


# --- What is refused ---


@pytest.mark.parametrize("is_finished", [True, False])
def test_other_settings_and_another_source_are_refused_on_the_same_folder(source, tmp_path, small_mib, is_finished):
    pack_and_die(Killed(source, 30), tmp_path / "out", 1)
    if is_finished:
        pack(source, tmp_path / "out", shard_mib=1, workers=1, shorter_side=95)
    before = contents(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"out was begun .* \(shard_mib: 1 -> 2; quality: 90 -> 80\); give those"):
        pack(source, tmp_path / "out", shard_mib=2, workers=1, shorter_side=95, quality=80)
    with pytest.raises(ConfigError, match=r"another source or other settings \(source: \w+ -> \w+\)"):
        pack(digits(tmp_path / "cache"), tmp_path / "out", shard_mib=1, workers=1, shorter_side=95)
    assert contents(tmp_path / "out") == before


def test_a_folder_begun_before_a_setting_existed_goes_on_with_that_at_its_default(source, tmp_path, small_mib):
    pack(source, tmp_path / "out", shard_mib=1, workers=1)
    settings = tmp_path / "out" / shards.SETTINGS
    begun = json.loads(settings.read_text())
    settings.write_text(json.dumps({key: begun[key] for key in ("source", "shard_mib")}))
    pack(source, tmp_path / "out", shard_mib=1, workers=1)
    with pytest.raises(ConfigError, match="quality: 90 -> 80"):
        pack(source, tmp_path / "out", shard_mib=1, workers=1, quality=80)


def test_settings_may_change_as_long_as_no_shard_is_there(source, tmp_path):
    pack_and_die(Killed(source, 0), tmp_path / "out", 1)
    assert pack(source, tmp_path / "out", workers=1).shards == 1


def test_a_folder_with_something_else_in_it_is_refused(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    for out in (tmp_path / "out", tmp_path / "out" / "thesis.tex"):
        with pytest.raises(ConfigError, match="holds something else; give a folder that is new or empty"):
            pack(source, out, workers=1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_two_processes_do_not_pack_to_one_folder(source, tmp_path):
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / "pack.json").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"another process is packing to .*out; wait for it or stop it"):
            pack(source, tmp_path / "out", workers=1)
    assert pack(source, tmp_path / "out", workers=1).images == 48


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_mib": 0}, "shard_mib=0 must be 1 or more"),
        ({"workers": 0}, "workers=0 must be 1 or more"),
        ({"shorter_side": 0}, "shorter_side=0 must be 1 or more"),
        ({"quality": 101}, "quality=101 must be from 1 to 100"),
    ],
)
def test_numbers_out_of_range_are_refused(source, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        pack(source, tmp_path / "out", **{"workers": 1} | options)
    assert not (tmp_path / "out").exists()


# --- The command ---


@pytest.fixture
def arguments(folder, tmp_path):
    return [str(folder), str(tmp_path / "out"), "--shard-mib", "1", "--cache-dir", str(tmp_path / "cache")]


def test_the_command_packs_and_says_what_came_of_it(arguments, folder, tmp_path, capsys):
    (folder / "dog" / "bad.png").write_bytes(b"not an image")
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert re.search(r"^images    48$", out, re.MULTILINE)
    assert re.search(r"^shards    2, 1\.\d MiB of images in 1\.\d MiB$", out, re.MULTILINE)
    assert re.search(rf"^rejected  1, listed in {tmp_path}/out/rejected.tsv$", out, re.MULTILINE)
    assert re.search(r"^speed     \d+ images/s, \d+\.\d s$", out, re.MULTILINE)
    assert main(arguments) == 0
    assert re.search(r"^speed     nothing to pack$", capsys.readouterr().out, re.MULTILINE)


def test_both_spellings_of_an_option_are_accepted(folder, tmp_path):
    options = ["--shard_mib", "1", "--shorter_side", "50", "--cache_dir", str(tmp_path / "cache")]
    assert main([str(folder), str(tmp_path / "out"), *options]) == 0
    assert set(TarShards(tmp_path / "out").heights) == {50}


def test_mistakes_end_in_one_line_and_exit_code_2(arguments, folder, tmp_path, capsys):
    for wrong, message in (
        (["/no/such", *arguments[1:]], "error: SOURCE='/no/such' does not exist; give"),
        ([*arguments, "--quality", "0"], "error: quality=0 must be"),
        (
            [str(folder), str(folder / "packed"), *arguments[2:]],
            "error: OUT=.*packed is inside SOURCE=.*; give",
        ),
    ):
        assert main(wrong) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(f"{message}.*\n", err)


def test_a_full_disk_ends_in_one_line_and_exit_code_1_and_the_command_continues(
    arguments, tmp_path, monkeypatch, small_mib, capsys
):
    """The disk is full in the third shard. What was half-written makes room again."""
    add = shards.ShardWriter.add
    with monkeypatch.context() as patch:
        patch.setattr(
            shards.ShardWriter, "add", lambda self, row: fail(errno.ENOSPC) if row.index == 8 else add(self, row)
        )
        assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: .*No space left on device; complete shards in .*out are kept, and the same .*\n", err)
    assert sorted(contents(tmp_path / "out")) == [
        "000000.part.npz", "000000.tar", "000001.part.npz", "000001.tar", "pack.json",
    ]  # fmt: skip
    assert main(arguments) == 0
    assert len(TarShards(tmp_path / "out")) == 48


def test_ctrl_c_ends_in_one_line_and_the_command_continues(arguments, tmp_path, monkeypatch, small_mib, capsys):
    add = shards.ShardWriter.add

    def interrupt(self, row):
        if row.index == 8:
            os.kill(os.getpid(), signal.SIGINT)
        add(self, row)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with monkeypatch.context() as patch:
            patch.setattr(shards.ShardWriter, "add", interrupt)
            assert main(arguments) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert re.fullmatch(r"stopped; complete shards in .*out are kept, and the same .*\n", capsys.readouterr().err)
    assert not list((tmp_path / "out").glob(".*"))
    assert main(arguments) == 0
    assert len(TarShards(tmp_path / "out")) == 48


def test_the_help_shows_a_command_that_works(folder, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    (example,) = re.findall(r"^cit-scale pack (photos packed)$", capsys.readouterr().out, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    folder.rename("photos")
    assert main([*example.split(), "--cache-dir", "cache"]) == 0
    assert (tmp_path / "packed" / "index.npz").exists()


def test_other_libraries_are_told_which_files_are_the_data(source, tmp_path):
    """datasets 5.2, which reads this header, opened a packed folder as its images, and without it as pack.json."""
    pack(source, tmp_path / "packed", workers=1)
    _, header, text = (tmp_path / "packed" / "README.md").read_text().split("---\n")
    (config,) = yaml.safe_load(header)["configs"]
    assert sorted(tmp_path.glob(f"packed/{config['data_files']}")) == [tmp_path / "packed" / "000000.tar"]
    assert "classes.txt" in text


# --- The header alone ---


def test_an_image_above_the_limit_is_refused_by_its_header(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert read_size(io.BytesIO(encoded(10, 10))) == (10, 10)
    with pytest.raises(BadImageError, match="110 pixels are more than 100"):
        read_size(io.BytesIO(encoded(10, 11)))


def test_a_file_that_the_system_cannot_read_is_no_bad_image(tmp_path):
    with pytest.raises(IsADirectoryError):
        read_size(tmp_path)


def test_a_bitmap_is_whole_where_it_is_as_long_as_it_says():
    whole = encoded(5, 7, "BMP")
    assert for_dali(whole) == (whole, (5, 7))
    assert for_dali(whole[:-1]) is None


def test_a_long_job_shows_a_bar_on_a_terminal(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "SHORT_S", 0.0)
    monkeypatch.setattr(progress, "Console", lambda **options: Console(file=screen, force_terminal=True, width=120))
    with progress.ProgressBar("packing", total=4) as bar:
        bar.advance(2)
        bar.advance(2)
    assert re.search("packing .*4/4.* images .*left", screen.getvalue())
