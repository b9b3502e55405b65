"""No image and no label is lost or mistaken without a word: links, cut files, odd names, tables, folders of parts."""

import errno
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from cit_scale.config import DataConfig
from cit_scale.datasets.folders import ImageFolder, Manifest
from cit_scale.datasets.index import number_classes
from cit_scale.datasets.pack import pack
from cit_scale.datasets.pixels import FIRST, LATEST
from cit_scale.datasets.shards import _expanded, open_foreign_shards
from cit_scale.datasets.sources import open_source, open_sources
from cit_scale.errors import ConfigError
from cit_scale.inference.items import items_of

MOST = 500  # characters of a message
DEEP = b"[" * 100_000
NUL, HALF = (json.dumps({"label": text}).encode() for text in ("a\0b", "\ud83d"))  # which is half of a character


def png(value=0):
    buffer = io.BytesIO()
    Image.new("L", (5, 4), value).save(buffer, "PNG")
    return buffer.getvalue()


def folder_of(root, *names):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(number))
    return root


def tar_of(root, *members):
    """members: (name, content), or (name, type, target) of a link."""
    root.mkdir(parents=True)
    with tarfile.open(root / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content, *target in members:
            member = tarfile.TarInfo(name)
            if target:
                member.type, member.linkname = content, target[0]
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return root


def keys(source):
    return [os.fsdecode(source.key(index)) for index in range(len(source))]


def labels(source):
    return [source.classes[label] for label in source.labels]


def refusal(function, *arguments, **options):
    with pytest.raises(ConfigError) as raised:
        function(*arguments, **options)
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) <= MOST
    return message


# --- tar files ---


@pytest.mark.parametrize("here", ["", "./"])
def test_links_inside_a_tar_file_are_followed(tmp_path, here):
    root = tar_of(
        tmp_path / "set",
        (f"{here}x/a.png", png(1)),
        (f"{here}x/a.cls", b"cat"),
        (f"{here}x/hard.png", tarfile.LNKTYPE, f"{here}x/a.png"),
        (f"{here}x/hard.cls", tarfile.LNKTYPE, f"{here}x/a.cls"),
        (f"{here}y/soft.png", tarfile.SYMTYPE, "../x/hard.png"),
        (f"{here}y/soft.cls", b"dog"),
    )
    source = open_foreign_shards(root, tmp_path / "cache")
    assert keys(source) == [f"{here}{name}" for name in ("x/a.png", "x/hard.png", "y/soft.png")]
    assert labels(source) == ["cat", "cat", "dog"]
    assert {source.read(index) for index in range(3)} == {png(1)}
    assert keys(open_foreign_shards(root, tmp_path / "cache", FIRST)) == [f"{here}x/a.png"]


def test_a_member_without_bytes_of_its_own_is_a_reject_with_a_reason(tmp_path):
    root = tar_of(
        tmp_path / "set",
        ("a.png", png(1)),
        ("a.cls", b"cat"),
        ("lost.png", tarfile.SYMTYPE, "nothing.png"),
        ("lost.cls", b"cat"),
        ("round.png", tarfile.SYMTYPE, "round.png"),
        ("round.cls", b"cat"),
    )
    source = open_foreign_shards(root, tmp_path / "cache")
    assert source.rejects == dict.fromkeys((1, 2), "no plain file, nor a link to one inside the tar file")


def test_a_tar_file_cut_between_members_is_refused(tmp_path):
    ends = {".png": png(), ".cls": b"a"}
    root = tar_of(tmp_path / "set", *((f"{number}{end}", ends[end]) for number in range(6) for end in ends))
    whole = (root / "a.tar").read_bytes()
    cut = 6 * 1024  # behind the sixth member: header and content are a block each
    (root / "a.tar").write_bytes(whole[:cut])
    message = refusal(open_foreign_shards, root, tmp_path / "cache")
    assert f"no end mark at byte {cut}" in message
    assert len(open_foreign_shards(root, tmp_path / "cache", FIRST)) == 3


@pytest.mark.parametrize("behind", [0, 1024])
def test_tar_files_joined_by_cat_are_refused(tmp_path, behind):
    """GNU tar reads the first alone, as Python does: what follows would vanish."""
    root = tar_of(tmp_path / "set", ("a.png", png(1)), ("a.cls", b"cat"))
    whole = (root / "a.tar").read_bytes()
    (root / "a.tar").write_bytes(whole[: 4 * 512 + 512] + bytes(behind) + whole)
    message = refusal(open_foreign_shards, root, tmp_path / "cache")
    assert "more follows behind the end mark at byte" in message
    assert "join tar files by tar -A" in message
    assert "more follows behind" in [each.reason for each in items_of([str(root / "a.tar")], None)][-1]
    assert len(open_foreign_shards(root, tmp_path / "cache", FIRST)) == 1


@pytest.mark.parametrize("sparse", [{"GNU.sparse.map": "x"}, {"GNU.sparse.size": "x"}, {"GNU.sparse.map": "0,4"}])
def test_members_in_pieces_are_rejects_or_damage(tmp_path, sparse):
    root = tmp_path / "set"
    root.mkdir()
    with tarfile.open(root / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content, headers in (
            ("a.png", png(1), {}),
            ("a.cls", b"cat", {}),
            ("b.png", png(2), sparse),
            ("b.cls", b"cat", {}),
        ):
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(content), headers
            tar.addfile(member, io.BytesIO(content))
    if "x" in sparse.values():
        assert "is not a whole, uncompressed tar file" in refusal(open_foreign_shards, root, tmp_path / "cache")
        assert "not a whole" in [each.reason for each in items_of([str(root / "a.tar")], None)][-1]
    else:
        source = open_foreign_shards(root, tmp_path / "cache")
        assert source.rejects == {1: "in pieces (sparse) inside the tar file"}


def test_links_lead_through_linked_folders(tmp_path):
    root = tar_of(
        tmp_path / "set",
        ("x/a.png", png(1)),
        ("y", tarfile.SYMTYPE, "x"),
        ("b.png", tarfile.SYMTYPE, "y/a.png"),
        ("b.cls", b"cat"),
        ("x/a.cls", b"cat"),
    )
    source = open_foreign_shards(root, tmp_path / "cache")
    assert source.rejects == {}
    assert {source.read(index) for index in range(2)} == {png(1)}


def test_one_sample_has_one_label(tmp_path):
    root = tar_of(tmp_path / "set", ("a.png", png(1)), ("a.cls", b"cat"), ("./a.cls", b"dog"))
    assert "./a.cls says dog, and a.cls cat of the same image" in refusal(open_foreign_shards, root, tmp_path / "cache")


def test_hidden_members_and_thumbnails_are_no_images(tmp_path):
    thumbnail = ("@eaDir/a.png", png(2)), ("@eaDir/a.cls", b"cat"), ("x/._a.png", b"?"), ("x/._a.cls", b"?")
    root = tar_of(tmp_path / "set", ("a.png", png(1)), ("a.cls", b"cat"), *thumbnail)
    source = open_foreign_shards(root, tmp_path / "cache")
    assert (keys(source), source.notes) == (["a.png"], ())


def test_a_tar_of_class_folders_is_refused_with_the_way_out(tmp_path):
    root = tar_of(tmp_path / "set", ("cat/a.png", png(1)), ("dog/b.png", png(2)))
    message = refusal(open_foreign_shards, root, tmp_path / "cache")
    assert "if its folders are the classes, unpack it and give the folder" in message


def test_packed_sets_that_a_pattern_joins_keep_the_names_of_their_classes(tmp_path):
    for name, animals in (("one", "cat dog"), ("two", "ant cat")):
        folder = folder_of(
            tmp_path / name, *(f"{animal}/{number}.png" for animal in animals.split() for number in "01")
        )
        pack(ImageFolder(folder, tmp_path / "cache"), tmp_path / "packed" / name, workers=1)
    source = open_source(f"{tmp_path}/packed/*/*.tar", tmp_path / "cache", "data.train")
    assert source.classes == ("ant", "cat", "dog")
    assert [os.path.dirname(key) for key in keys(source)] == labels(source)
    assert sorted(labels(source)) == ["ant", "ant", "cat", "cat", "cat", "cat", "dog", "dog"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"cat\ndog\ncat\n", "has cat in lines 1 and 3"),
        (b"cat\n\ndog\n", "names no class in line 2"),
        (b"cat\nd\x01g\n", "has a label that is no text"),
        ("cat\n".encode("utf-16-le"), "zero bytes, as UTF-16 without its mark"),
    ],
)
def test_a_file_of_classes_that_is_doubtful_is_refused(tmp_path, content, reason):
    root = tar_of(tmp_path / "set", ("a.png", png(1)), ("a.cls", b"0"))
    (root / "classes.txt").write_bytes(content)
    assert reason in refusal(open_foreign_shards, root, tmp_path / "cache")


@pytest.mark.parametrize("content", [b"cat \r\ndog\r\n", "cat\ndog\n".encode("utf-16")])
def test_a_file_of_classes_may_be_of_windows(tmp_path, content):
    root = tar_of(tmp_path / "set", ("a.png", png(1)), ("a.cls", b"cat"), ("b.png", png(1)), ("b.cls", b"dog"))
    (root / "classes.txt").write_bytes(content)
    assert open_foreign_shards(root, tmp_path / "cache").classes == ("cat", "dog")


def test_names_with_several_dots_are_images_too(tmp_path):
    root = tar_of(tmp_path / "set", ("a.png", png(1)), ("a.cls", b"cat"), ("b.2.png", png(2)), ("b.2.cls", b"dog"))
    source = open_foreign_shards(root, tmp_path / "cache")
    assert keys(source) == ["a.png", "b.2.png"]
    assert labels(source) == ["cat", "dog"]


def test_what_is_passed_over_in_a_tar_file_is_said(tmp_path):
    samples = [("a.png", png(1)), ("a.cls", b"cat"), ("a.json", b"{}"), ("b.left.png", png()), ("b.right.png", png())]
    source = open_foreign_shards(tar_of(tmp_path / "set", *samples), tmp_path / "cache")
    assert keys(source) == ["a.png"]
    assert source.notes == (f"3 files in {tmp_path / 'set'} are no images here: 1 .json, 1 .left.png, 1 .right.png",)


@pytest.mark.parametrize("content", [b"\x03\0\0\0\0\0\0\0", b"\x1c", b"a\x0bb", b"1\x7f"])
def test_a_binary_label_is_refused(tmp_path, content):
    root = tar_of(tmp_path / "set", ("a.png", png(1)), ("a.cls", content))
    assert "a.cls has a label that is no text: " in refusal(open_foreign_shards, root, tmp_path / "cache")


@pytest.mark.parametrize("label", ["cat", 7, 7.0])
def test_labels_of_json_files_are_taken_by_the_key_that_is_asked_for(tmp_path, label):
    said = json.dumps({"caption": "a cat", "label": label, "exif": "x" * 5000}).encode()
    root = tar_of(tmp_path / "set", ("a.1.png", png(1)), ("a.1.json", said), ("b.png", png(2)), ("b.json", said))
    message = refusal(open_sources, DataConfig(train=str(root), cache_dir=str(tmp_path / "cache")))
    assert "its .json files have caption, label, exif: name the label's by data.label_key" in message
    train, _ = open_sources(DataConfig(train=str(root), cache_dir=str(tmp_path / "cache"), label_key="label"))
    assert train.classes == ("cat" if label == "cat" else "7",)
    missing = DataConfig(train=str(root), cache_dir=str(tmp_path / "cache"), label_key="class")
    assert "a.1.json has no text or number called class, by data.label_key; it has caption" in refusal(
        open_sources, missing
    )


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"{", b'{"label": null}', b'{"label": true}', b'{"label": " "}', b"[" * 100_000, NUL, HALF]
)
def test_a_json_without_a_label_is_refused(tmp_path, content):
    root = tar_of(tmp_path / "set", ("a.png", png(1)), ("a.json", content))
    assert "a.json" in refusal(open_foreign_shards, root, tmp_path / "cache", label_key="label")


def test_a_file_of_classes_may_name_some_that_have_no_images(tmp_path):
    samples = ("a.png", png(1)), ("a.cls", b"0"), ("b.png", png(2)), ("b.cls", b"2"), ("c.png", png()), ("c.cls", b"0")
    root = tar_of(tmp_path / "set", *samples, ("d.png", png(3)), ("d.cls", b"2"))
    (root / "classes.txt").write_text("cat\ndog\neel\n")
    train, held_out = open_sources(DataConfig(train=str(root), cache_dir=str(tmp_path / "cache")))
    assert train.classes == held_out.classes == ("cat", "dog", "eel")
    assert sorted(labels(train) + labels(held_out)) == ["cat", "cat", "eel", "eel"]
    assert train.notes == (f"classes.txt in {root} names 1 classes without images: dog",)


# --- folders ---


def test_all_extensions_of_images_count_and_the_others_are_said(tmp_path):
    names = "0.jfif", "1.JPE", "2.pbm", "3.png", "4.txt", "5.heic", "6"
    root = folder_of(tmp_path / "set", *(f"a/{name}" for name in names), "b/0.png")
    (root / "labels.json").touch()
    source = ImageFolder(root, tmp_path / "cache")
    assert keys(source) == ["a/0.jfif", "a/1.JPE", "a/2.pbm", "a/3.png", "b/0.png"]
    said, converted = source.notes
    assert said == f"4 files in {root} are no images here: 1 without extension, 1 .heic, 1 .json, 1 .txt"
    assert f"find {root} -iname '*.heic' -exec heif-convert" in converted
    assert ImageFolder(root, tmp_path / "cache").notes == source.notes
    assert keys(ImageFolder(root, tmp_path / "cache", FIRST)) == ["a/3.png", "b/0.png"]


def test_a_class_of_images_that_cannot_be_read_here_is_refused_with_the_command_that_converts_them(tmp_path):
    root = folder_of(tmp_path / "set", "a/0.png", "b/0.heic")
    message = refusal(ImageFolder, root, tmp_path / "cache")
    assert "has no images for 1 of 2 classes: b" in message
    assert "heif-convert" in message


def test_thumbnails_of_other_programs_are_no_images(tmp_path):
    root = folder_of(tmp_path / "set", "a/0.png", "a/@eaDir/0.png/thumb.jpg", "__MACOSX/a/0.png", "b/0.png")
    assert keys(ImageFolder(root, tmp_path / "cache")) == ["a/0.png", "b/0.png"]


def test_classes_have_one_order_in_folders_and_tables(tmp_path):
    root = folder_of(tmp_path / "set", "class10/0.png", "class2/0.png", "class1b/0.png", "7/0.png")
    folder = ImageFolder(root, tmp_path / "cache")
    assert folder.classes == ("7", "class1b", "class2", "class10")
    assert labels(folder) == [os.path.dirname(key) for key in keys(folder)]
    (root / "labels.csv").write_text("".join(f"{key},{os.path.dirname(key)}\n" for key in keys(folder)))
    assert Manifest(root / "labels.csv", tmp_path / "cache").classes == folder.classes
    data = DataConfig(train=str(root), eval=str(root / "labels.csv"), cache_dir=str(tmp_path / "cache"))
    train, evaluation = open_sources(data)
    assert train.classes == evaluation.classes


def test_the_first_version_orders_classes_as_it_did(tmp_path):
    root = folder_of(tmp_path / "set", "10/0.png", "9/0.png")
    assert ImageFolder(root, tmp_path / "cache", FIRST).classes == ("10", "9")
    assert number_classes(["10", "9"], FIRST)[0] == ("9", "10")
    assert number_classes(["a10", "a9"], FIRST)[0] == ("a10", "a9")
    assert number_classes(["a10", "a9", "²", "007", "7"], LATEST)[0] == ("007", "7", "a9", "a10", "²")


@pytest.mark.parametrize(
    ("names", "way_out"),
    [
        (("train/a/0.png", "val/a/0.png"), "--data.train {0}/train --data.eval {0}/val"),
        (("Training/0.png", "Test/0.png"), "--data.train {0}/Training --data.eval {0}/Test"),
        (("train/0.png",), "--data.train {0}/train,"),
        (("a/0.png", "valid/0.png"), "--data.train {0}/valid,"),
        (("test/0.png", "train/0.png", "val/0.png"), "--data.train {0}/train --data.eval {0}/val"),
        (("train2017/0.png", "val2017/0.png"), "--data.train {0}/train2017 --data.eval {0}/val2017"),
        (("test_set/0.png", "training_set/0.png"), "--data.train {0}/training_set --data.eval {0}/test_set"),
        (("data/train/a/0.png", "data/dev/a/0.png"), "--data.train {0}/data/train --data.eval {0}/data/dev"),
    ],
)
def test_parts_of_a_data_set_are_no_classes(tmp_path, names, way_out):
    root = folder_of(tmp_path / "set", *names, *(name.replace("0.png", "1.png") for name in names))
    data = DataConfig(train=str(root), cache_dir=str(tmp_path / "cache"))
    message = refusal(open_sources, data)
    assert f"give {way_out.format(root)}" in message
    assert "say --data.split_names true if they are classes" in message
    with_them = DataConfig(train=str(root), cache_dir=str(tmp_path / "cache"), split_names=True)
    assert len(open_sources(with_them)[0]) > 0
    assert len(open_sources(data, FIRST)[0]) > 0  # as a run that was begun with them goes on


def test_the_way_out_can_be_pasted_where_paths_have_blanks(tmp_path):
    root = folder_of(tmp_path / "my 'set'", "train/a/0.png", "val/a/0.png")
    message = refusal(open_sources, DataConfig(train=str(root), cache_dir=str(tmp_path / "cache")))
    command = re.search(r"give (--data.train .*), or say", message)[1]
    assert shlex.split(command) == ["--data.train", str(root / "train"), "--data.eval", str(root / "val")]


@pytest.mark.parametrize("name", ["trains", "value", "devices", "testudo", "evaluate_me", "training ground"])
def test_classes_that_begin_like_parts_are_classes(tmp_path, name):
    root = folder_of(tmp_path / "set", f"{name}/0.png", f"{name}/1.png")
    assert open_sources(DataConfig(train=str(root), cache_dir=str(tmp_path / "cache")))[0].classes == (name,)


def test_names_that_look_alike_are_said(tmp_path):
    names = "Cat", "cat", "cafe\u0301", "caf\u00e9", "01", "1", "dog"
    root = folder_of(tmp_path / "set", *(f"{name}/{number}.png" for name in names for number in "01"))
    (note,) = open_source(str(root), tmp_path / "cache", "data.train").notes
    assert note.startswith("classes that look alike: '01' and '1', 'Cat' and 'cat', 'cafe")
    assert "dog" not in note


def test_a_name_was_built_in_in_the_first_version_whatever_there_was(tmp_path, monkeypatch):
    folder_of(tmp_path / "digits", "a/0.png", "b/0.png")
    monkeypatch.chdir(tmp_path)
    assert len(open_source("digits", tmp_path / "cache", "data.train", FIRST)) == 1797


def test_a_path_goes_before_a_built_in_name_and_says_so(tmp_path, monkeypatch):
    folder_of(tmp_path / "digits", "a/0.png", "b/0.png")
    monkeypatch.chdir(tmp_path)
    here = open_source("digits", tmp_path / "cache", "data.train")
    assert here.classes == ("a", "b")
    assert here.notes == (f"data.train=digits is {tmp_path / 'digits'} here; builtin:digits is the built-in data set",)
    built_in = open_source("builtin:digits", tmp_path / "cache", "data.train")
    assert len(built_in) == 1797
    monkeypatch.chdir("/")
    assert open_source("digits", tmp_path / "cache", "data.train").fingerprint == built_in.fingerprint


def test_evaluation_may_lack_classes_and_then_says_so(tmp_path):
    root = folder_of(tmp_path / "train", "a/0.png", "b/0.png", "c/0.png")
    held = folder_of(tmp_path / "eval", "c/0.png", "a/0.png")
    train, evaluation = open_sources(DataConfig(train=str(root), eval=str(held), cache_dir=str(tmp_path / "cache")))
    assert evaluation.classes == train.classes == ("a", "b", "c")
    assert labels(evaluation) == [os.path.dirname(key) for key in keys(evaluation)] == ["a", "c"]
    assert evaluation.notes == (f"data.eval={held} has no images of 1 of 3 classes: b",)
    alone = ImageFolder(held, tmp_path / "cache")
    assert len({evaluation.fingerprint, alone.fingerprint}) == 2


@pytest.mark.parametrize("named", ["{0}/a.tar", "{0}/[ab].tar", "{0}/{{a,b}}.tar", "{0}/*.tar", "{1}/*/*.tar"])
def test_shards_are_named_by_patterns_too(tmp_path, named):
    samples = ("a.png", png(1)), ("a.cls", b"cat"), ("b.png", png(2)), ("b.cls", b"dog")
    root = tar_of(tmp_path / "set" / "deeper", *samples)
    if "a.tar" not in named:
        shutil.copy(root / "a.tar", root / "b.tar")
    source = open_source(named.format(root, root.parent), tmp_path / "cache", "data.train")
    assert len(source) == (2 if "a.tar" in named else 4)
    assert source.read(0) == png(1)
    assert source.name(0) == f"{root / 'a.tar'}:a.png"


@pytest.mark.parametrize("named", ["{{a,a}}.tar", "{{a,*}}.tar", "[ab].tar"])
def test_a_shard_that_is_named_twice_or_linked_counts_once(tmp_path, named):
    root = tar_of(tmp_path / "set", ("a.png", png(1)), ("a.cls", b"cat"))
    (root / "b.tar").symlink_to("a.tar")
    assert len(open_source(f"{root}/{named.format()}", tmp_path / "cache", "data.train")) == 1
    assert len(open_source(str(root), tmp_path / "cache", "data.train")) == 1


def test_folders_that_are_called_like_a_pattern_are_found(tmp_path):
    root = tar_of(tmp_path / "[2024]", ("a.png", png(1)), ("a.cls", b"cat"))
    assert len(open_source(f"{root}/*.tar", tmp_path / "cache", "data.train")) == 1


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{11..8}", ["11", "10", "9", "8"]),
        ("{00..2}", ["00", "01", "02"]),
        ("{098..101}", ["098", "099", "100", "101"]),
        ("{1..002}", ["001", "002"]),
        ("x{a,b}{1..2}y", ["xa1y", "xa2y", "xb1y", "xb2y"]),
        ("{a}", ["{a}"]),
    ],
)
def test_braces_are_those_of_bash(pattern, names):
    assert _expanded(pattern) == names
    assert subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True).stdout.split() == names


@pytest.mark.parametrize("pattern", ["{0..9999999}", "{0..9999}{0..9999}", "{000..999}{000..999}{0..9}"])
def test_braces_name_a_million_shards_at_most(pattern):
    assert "names more than 1000000 shards" in refusal(_expanded, pattern)


def test_numbers_in_braces_have_their_digits(tmp_path):
    root = tar_of(tmp_path / "set", ("a.png", png(1)), ("a.cls", b"cat"))
    for number in range(3):
        shutil.copy(root / "a.tar", root / f"{number:03d}.tar")
    assert len(open_source(f"{root}/{{000..002}}.tar", tmp_path / "cache", "data.train")) == 3
    message = refusal(open_source, f"{root}/{{000..003}}.tar", tmp_path / "cache", "data.train")
    assert message == f"1 of 4 shards do not exist: {root}/003.tar"
    assert "does not exist" in refusal(open_source, f"{root}/{{7..9}}.tar", tmp_path / "cache", "data.train")
    assert "more than" in refusal(open_source, f"{root}/{{0..9999999}}.tar", tmp_path / "cache", "data.train")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("a/0.tar", "are named by a pattern"),
        ("0.tar.gz", "unpack them with gunzip"),
        ("data.zip", "has to be unpacked first"),
        ("a/0.parquet", "written to a folder for each class"),
        ("0.tfrecord", "written to a folder for each class"),
        ("data_batch_1", "of CIFAR's batches to a folder for each class"),
    ],
)
def test_data_sets_in_other_forms_are_refused_with_the_way_out(tmp_path, name, hint):
    root = folder_of(tmp_path / "set", name)
    assert hint in refusal(open_source, str(root), tmp_path / "cache", "data.train")
    if "." in name and "/" not in name:
        assert hint in refusal(open_source, str(root / name), tmp_path / "cache", "data.train")


# --- the cache ---


@pytest.fixture
def read_only(tmp_path, monkeypatch):
    """A folder in which nothing can be made, whoever the user is."""

    def refuse(self, *arguments, **options):
        if self.is_relative_to(tmp_path / "cache"):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return mkdir(self, *arguments, **options)

    mkdir = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", refuse)
    return tmp_path / "cache"


def test_without_a_cache_that_can_be_written_a_folder_is_read_all_the_same(tmp_path, read_only):
    root = folder_of(tmp_path / "set", "a/0.png", "b/0.png")
    source = ImageFolder(root, read_only)
    assert len(source) == 2
    (note,) = source.notes
    assert note.startswith(f"the index cannot be kept in {read_only} (Permission denied)")
    assert "--data.cache_dir" in note


def test_a_built_in_data_set_needs_a_cache(read_only):
    message = refusal(open_source, "builtin:digits", read_only, "data.train")
    assert message == f"{read_only} cannot be written (Permission denied); name another folder by --data.cache_dir"


def test_without_a_home_the_cache_has_to_be_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user whom the system does not know
    message = refusal(open_sources, DataConfig(train="builtin:digits"))
    assert "lies in your home, and there is none; name another folder by --data.cache_dir" in message


# --- links and depth ---


def test_folders_that_link_to_each_other_are_refused(tmp_path):
    root = folder_of(tmp_path / "set", "a/x/0.png", "a/y/0.png")
    (root / "a" / "x" / "to_y").symlink_to("../y")
    (root / "a" / "y" / "to_x").symlink_to("../x")
    assert "is a link to a folder that contains the link; remove it" in refusal(ImageFolder, root, tmp_path / "cache")


def test_a_folder_that_many_links_of_a_class_lead_to_counts_once(tmp_path):
    """Two links on each of 26 levels are 67 million ways to three images."""
    root = folder_of(tmp_path / "set", "a/0/0.png", "a/0/1.png", "b/0.png")
    for level in range(1, 27):
        (root / "a" / str(level)).mkdir()
        for name in ("x", "y"):
            (root / "a" / str(level) / name).symlink_to(f"../{level - 1}")
    assert keys(ImageFolder(root, tmp_path / "cache")) == ["a/0/0.png", "a/0/1.png", "b/0.png"]


def test_a_folder_that_is_linked_twice_is_no_circle(tmp_path):
    root = folder_of(tmp_path / "set", "a/0.png", "store/0.png")
    (root / "b").symlink_to("store")
    (root / "c").symlink_to("store")
    assert ImageFolder(root, tmp_path / "cache").classes == ("a", "b", "c", "store")


def deep(root, name, levels):
    """A path below root that is too long to be made at once."""
    root.mkdir(parents=True)
    before = os.getcwd()
    try:
        os.chdir(root)
        for _ in range(levels):
            os.mkdir(name)
            os.chdir(name)
        with open("0.png", "wb") as file:
            file.write(png())
    finally:
        os.chdir(before)
    return root


def remove_deep(root):
    """pytest's own way follows the path at once, which is too long."""
    subprocess.run(["rm", "-rf", root], check=True)


def test_folders_nested_deeper_than_functions_are_searched(tmp_path):
    root = deep(tmp_path / "set" / "a", "d", 1500).parent
    try:
        (found,) = keys(ImageFolder(root, tmp_path / "cache"))
        assert found.count("/") == 1501
    finally:
        remove_deep(root)


def test_a_path_that_is_too_long_is_one_short_line(tmp_path):
    root = deep(tmp_path / "set" / "a", "d" * 200, 25).parent
    try:
        assert "is longer than a path may be" in refusal(ImageFolder, root, tmp_path / "cache")
    finally:
        remove_deep(root)


# --- tables ---


def table(tmp_path, text, *names):
    root = folder_of(tmp_path / "set", *names)
    (root / "labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return root / "labels.csv"


def test_blanks_around_a_label_do_not_make_a_class(tmp_path):
    path = table(tmp_path, "a.png,cat\nb.png, cat\nc.png ,cat \nd.png,\tdog\n", "a.png", "b.png", "c.png", "d.png")
    source = Manifest(path, tmp_path / "cache")
    assert labels(source) == ["cat", "cat", "cat", "dog"]
    assert keys(source) == ["a.png", "b.png", "c.png", "d.png"]


def test_an_image_with_two_labels_is_refused_and_one_that_is_named_twice_counts_once(tmp_path):
    path = table(tmp_path, "a.png,cat\nb.png,dog\n./a.png,cat\n", "a.png", "b.png")
    source = Manifest(path, tmp_path / "cache")
    assert keys(source) == ["a.png", "b.png"]
    assert source.notes == (f"{path} names 1 images again, which count once",)
    path.write_text("a.png,cat\nb.png,dog\nx/../a.png,dog\n")
    assert "line 3 says dog of x/../a.png, and line 1 cat" in refusal(Manifest, path, tmp_path / "cache")


@pytest.mark.parametrize("way", ["whole", "through a linked folder"])
def test_an_image_is_known_by_where_it_lies(tmp_path, way):
    path = table(tmp_path, "a.png,cat\n", "a.png")
    (path.parent / "here").symlink_to(".")
    again = path.parent / "a.png" if way == "whole" else "here/a.png"
    path.write_text(f"a.png,cat\n{again},dog\n")
    assert "line 2 says dog of" in refusal(Manifest, path, tmp_path / "cache")


@pytest.mark.parametrize("second", ["cat", "dog"])
def test_columns_the_other_way_round_are_noticed(tmp_path, second):
    path = table(tmp_path, f"label,path\ncat,a.png\n{second},b.png\n", "a.png", "b.png")
    assert "write the path first, then the label" in refusal(Manifest, path, tmp_path / "cache")


@pytest.mark.parametrize(("name", "there"), [("a", "a.png"), ("a.png", "images/a.png"), ("a", "images/a.png")])
def test_paths_without_extension_or_folder_are_refused_with_what_is_there(tmp_path, name, there):
    path = table(tmp_path, f"id,label\n{name},cat\n", there)
    assert f"names {name}, which is not there, and {there} is" in refusal(Manifest, path, tmp_path / "cache")


@pytest.mark.parametrize("label", ["cat\x1f", "c\x0bat", "cat\0", "cat\x85"])
def test_controls_in_labels_of_tables_are_refused(tmp_path, label):
    path = table(tmp_path, f"a.png,{label}\n", "a.png")
    assert "line 1 has a label that is no text" in refusal(Manifest, path, tmp_path / "cache")


@pytest.mark.parametrize("damage", ["an odd byte", "half a character", "no mark"])
def test_a_damaged_table_of_utf_16_is_refused(tmp_path, damage):
    text = "a.png,cat\nb.png,dog\n".encode("utf-16")
    broken = {"an odd byte": text[:-1], "half a character": text[:4] + b"\0\xd8" + text[4:], "no mark": text[2:]}
    path = table(tmp_path, broken[damage], "a.png", "b.png")
    assert "save it as UTF-8" in refusal(Manifest, path, tmp_path / "cache")


def test_a_name_that_begins_with_a_blank_is_taken_as_it_is_where_it_is_there(tmp_path):
    source = Manifest(table(tmp_path, "a.png,cat\n b.png,dog\n", "a.png", " b.png", "b.png"), tmp_path / "cache")
    assert labels(source) == ["cat", "dog"]


@pytest.mark.parametrize(
    "text",
    [
        b"sep=;\na.png;cat\nb/c.png;dog\n",
        b'a.png, "cat"\nb/c.png, "dog"\n',
        b"a.png,cat\n  ,  \nb/c.png,dog\n\x1a",
        b"a.png,\xef\xbb\xbfcat\xc2\xa0\nb/c.png,dog\n",
        "image,label\na.png,cat\nb/c.png,dog\n".encode("utf-16"),
        b"image;label\na.png;cat\nb/c.png;dog\n",
        b"image\tlabel\r\na.png\tcat\r\nb/c.png\tdog\r\n",
        b"image,label\na.png,cat\nb\\c.png,dog\n",
    ],
)
def test_tables_as_spreadsheets_write_them_are_read(tmp_path, text):
    source = Manifest(table(tmp_path, text, "a.png", "b/c.png"), tmp_path / "cache")
    assert labels(source) == ["cat", "dog"]
    assert source.rejects == {}
