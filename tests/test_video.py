"""Frames of videos: which ones, of what size and colour, of whole videos only, and the same after any stop."""

import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from cit_scale.datasets import video
from cit_scale.datasets.commands import video as main
from cit_scale.datasets.folders import ImageFolder
from cit_scale.datasets.shards import TarShards
from cit_scale.datasets.video import BadVideoError, Sampling, extract, extract_all, probe
from cit_scale.errors import ConfigError

LUMA_STEP = 8


def run_ffmpeg(*arguments):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True)


def make(path, source, *options):
    """A video of one of ffmpeg's own sources. Unless options say otherwise: nearly without loss, no B-frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    run_ffmpeg("-f", "lavfi", "-i", source, "-pix_fmt", "yuv420p", "-bf", "0", "-q:v", "2", *options, path)
    return path


def numbered(num_frames=20, fps=10, after=""):
    """A source whose frame n is grey, the lighter the later."""
    grey = f"geq=lum=16+{LUMA_STEP}*N:cb=128:cr=128"
    return f"nullsrc=s=64x48:r={fps}:d={num_frames / fps},{grey}{after}"


def numbers(folder):
    """The n of each frame in a folder, in the order of their names, by what PIL sees."""
    files = sorted(folder.glob("*.jpg"))
    assert [file.name for file in files] == [f"{i:06d}.jpg" for i in range(len(files))]
    greys = [np.asarray(Image.open(file).convert("L"), float).mean() for file in files]
    return [round(grey * 219 / 255 / LUMA_STEP) for grey in greys]


def colour(file):
    return np.asarray(Image.open(file).convert("RGB"), float).mean((0, 1)).round().astype(int).tolist()


def listing(folder):
    """Every file below a folder, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """20 numbered frames in two seconds."""
    return make(tmp_path_factory.mktemp("clip") / "clip.mp4", numbered(), "-movflags", "+faststart")


@pytest.fixture
def videos(tmp_path, clip):
    """Two classes of videos; one video is in a folder of its own."""
    for name in ("cat/a.mp4", "cat/deeper/b.mp4", "dog/a.mp4"):
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, tmp_path / "videos" / name)
    return tmp_path / "videos"


# --- Files as people have them ---


@pytest.mark.parametrize(("rule", "expected"), [({"count": 1000}, 40), ({"fps": 30}, 32)])
def test_frames_at_any_times_are_taken(tmp_path, rule, expected):
    """20 frames a second apart, then 20 that are 20 ms apart: of their mean rate's clock two fall into one tick."""
    times = "settb=1/1000,setpts='if(lt(N,20),N*1000,20000+(N-20)*20)/(1000*TB)'"
    options = ("-vf", times, "-fps_mode", "passthrough", "-enc_time_base", "1/1000")
    uneven = make(tmp_path / "uneven.mp4", "testsrc=s=64x48:r=25:d=1.6", *options)
    assert extract(uneven, tmp_path / "frames", Sampling(**rule)) == expected


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile other.mp4\n", "#EXTM3U\n#EXTINF:1,\nother.mp4\n"])
def test_a_text_that_names_another_video_is_not_followed(tmp_path, clip, text):
    shutil.copy(clip, tmp_path / "other.mp4")
    (tmp_path / "list.mp4").write_text(text)
    with pytest.raises(
        BadVideoError,
        match=r"it is not of a video format, but a text, or a list of other files|no frame was taken before$",
    ):
        extract(tmp_path / "list.mp4", tmp_path / "frames", Sampling(fps=1))
    assert not (tmp_path / "frames").exists()


def test_a_video_without_frames_says_so(tmp_path):
    make(tmp_path / "none.mkv", "testsrc=s=64x48:r=25:d=1", "-frames:v", "0")
    with pytest.raises(BadVideoError, match=r"no video in it|no frame was taken"):
        extract(tmp_path / "none.mkv", tmp_path / "frames", Sampling(fps=1))


@pytest.mark.parametrize("rule", [{"count": 5}, {"fps": 1}])
def test_a_video_that_is_cut_short_says_how_many_frames_could_be_read(tmp_path, rule):
    whole = make(tmp_path / "whole.mp4", "testsrc=s=320x240:r=25:d=4", "-movflags", "+faststart")
    data = whole.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(BadVideoError, match=r"; \d+ frames were taken before$"):
        extract(tmp_path / "cut.mp4", tmp_path / "frames", Sampling(**rule))


# --- Which frames ---


@pytest.mark.parametrize(
    ("fps", "expected"),
    [(2, [0, 5, 10, 15]), (0.1, [0]), (3, [0, 4, 7, 10, 14, 17]), (10, range(20)), (1000, range(20))],
)
def test_fps_takes_the_first_frame_at_or_after_each_tick_and_none_twice(tmp_path, clip, fps, expected):
    assert extract(clip, tmp_path / "frames", Sampling(fps=fps)) == len(expected)
    assert numbers(tmp_path / "frames") == list(expected)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_fps_of_a_video_whose_frames_come_at_uneven_times_goes_by_these_times(tmp_path, suffix):
    times = [0.1 * n + 0.04 * n**2 for n in range(12)]
    uneven = make(tmp_path / f"uneven{suffix}", numbered(12, after=",setpts=(0.1*N+0.04*N*N)/TB"), "-fps_mode", "vfr")
    extract(uneven, tmp_path / "frames", Sampling(fps=2))
    seconds = [time_s // 0.5 for time_s in times]
    assert numbers(tmp_path / "frames") == [n for n in range(12) if n == 0 or seconds[n] != seconds[n - 1]]


@pytest.mark.parametrize("fps", [24, 29.97, 30, 60])
def test_fps_of_the_video_takes_every_frame_though_matroska_rounds_their_times(tmp_path, fps):
    rounded = make(tmp_path / "rounded.mkv", f"testsrc=s=64x48:r={fps}:d=2")
    num_frames = math.ceil(2 * fps)
    assert extract(rounded, tmp_path / "frames", Sampling(fps=fps)) == num_frames


@pytest.mark.parametrize("count", [1, 2, 3, 7, 19, 20, 21, 500])
def test_count_takes_the_middle_of_each_part_and_all_frames_where_there_are_fewer(tmp_path, clip, count):
    taken = min(count, 20)
    assert extract(clip, tmp_path / "frames", Sampling(count=count)) == taken
    assert numbers(tmp_path / "frames") == [math.floor((2 * k + 1) * 20 / (2 * taken)) for k in range(taken)]


def test_count_is_of_the_frames_that_are_shown(tmp_path, clip):
    """Cut without encoding, the file still holds the frames before the cut, and says not to show them."""
    run_ffmpeg("-ss", "1.15", "-i", clip, "-c", "copy", tmp_path / "cut.mp4")
    assert extract(tmp_path / "cut.mp4", tmp_path / "all", Sampling(fps=100)) == 8
    assert numbers(tmp_path / "all") == list(range(12, 20))
    assert extract(tmp_path / "cut.mp4", tmp_path / "four", Sampling(count=4)) == 4
    assert numbers(tmp_path / "four") == [13, 15, 17, 19]


def test_scene_takes_the_first_frame_and_each_after_a_cut(tmp_path):
    shots = [f"color={name}:s=64x48:r=10:d={seconds}" for name, seconds in (("red", 0.7), ("lime", 0.2), ("blue", 1))]
    cuts = make(tmp_path / "cuts.mp4", f"{';'.join(f'{shot}[{i}]' for i, shot in enumerate(shots))};[0][1][2]concat=3")
    assert extract(cuts, tmp_path / "frames", Sampling(scene=0.3)) == 3
    seen = np.array([colour(tmp_path / "frames" / f"{i:06d}.jpg") for i in range(3)])
    assert np.abs(seen - [[255, 0, 0], [0, 255, 0], [0, 0, 255]]).max() < 8


def test_scene_takes_one_frame_where_nothing_changes(tmp_path):
    still = make(tmp_path / "still.mp4", "color=red:s=64x48:r=10:d=1")
    assert extract(still, tmp_path / "frames", Sampling(scene=0.01)) == 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.avi", ["-c:v", "mpeg4"]),
        ("a.mpg", ["-c:v", "mpeg2video", "-r", "25"]),
        ("a.ts", ["-c:v", "libx264", "-bf", "2"]),
        ("a.webm", ["-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8"]),
        ("a.mov", ["-c:v", "mjpeg"]),
        ("a.flv", ["-c:v", "flv"]),
    ],
)
def test_every_usual_kind_of_file_gives_its_frames(tmp_path, name, options):
    file = make(tmp_path / name, "testsrc=s=64x48:r=10:d=1", *options)
    assert extract(file, tmp_path / "five", Sampling(count=5)) == 5
    assert extract(file, tmp_path / "two", Sampling(fps=2)) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "give exactly one"),
        ({"fps": 1, "count": 2}, r"not \{'fps': 1, 'count': 2\}; give exactly one"),
        ({"fps": 0}, "fps=0 is not above 0"),
        ({"fps": math.nan}, "fps=nan is not above 0"),
        ({"count": 0}, "count=0 is less than 1"),
        ({"scene": 30}, "scene=30 is not between 0 and 1; 0.3 finds"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**wrong)


# --- What a frame looks like ---


def test_frames_are_upright(tmp_path):
    lying = make(tmp_path / "lying.mp4", "color=red:s=64x48:r=10:d=1,drawbox=w=32:h=48:color=blue:t=fill")
    run_ffmpeg("-display_rotation", "90", "-i", lying, "-c", "copy", tmp_path / "upright.mp4")
    extract(tmp_path / "upright.mp4", tmp_path / "frames", Sampling(count=1))
    frame = Image.open(tmp_path / "frames" / "000000.jpg")
    assert frame.size == (48, 64)
    assert [max("rgb", key=dict(zip("rgb", frame.getpixel((24, y)), strict=True)).get) for y in (8, 56)] == ["r", "b"]
    header = probe(tmp_path / "upright.mp4")
    assert (header.height, header.width, header.duration_s, header.fps) == (64, 48, 1.0, 10.0)


def test_frames_have_square_pixels(tmp_path):
    wide = make(tmp_path / "wide.mp4", "testsrc=s=64x48:r=10:d=0.2,setsar=4/3")
    extract(wide, tmp_path / "frames", Sampling(count=1))
    assert Image.open(tmp_path / "frames" / "000000.jpg").size == (85, 48)


@pytest.mark.parametrize(("side", "size"), [(24, (32, 24)), (25, (33, 25)), (48, (64, 48)), (100, (64, 48))])
def test_frames_are_made_smaller_and_never_larger(tmp_path, clip, side, size):
    extract(clip, tmp_path / "frames", Sampling(count=1), shorter_side=side)
    assert Image.open(tmp_path / "frames" / "000000.jpg").size == size


@pytest.mark.parametrize("matrix", ["bt709", "bt601"])
@pytest.mark.parametrize("value_range", ["tv", "pc"])
def test_colours_are_the_videos_whatever_they_are_coded_as(tmp_path, matrix, value_range):
    coded = f"color=c=0x10C040:s=64x48:r=5:d=0.4,format=rgb24,scale=out_color_matrix={matrix}:out_range={value_range}"
    tags = ["-colorspace", {"bt601": "smpte170m"}.get(matrix, matrix), "-color_range", value_range]
    file = make(tmp_path / "a.mp4", f"{coded},format=yuv420p", *tags, "-qp", "1")
    extract(file, tmp_path / "frames", Sampling(count=1))
    assert np.abs(np.subtract(colour(tmp_path / "frames" / "000000.jpg"), [0x10, 0xC0, 0x40])).max() <= 5


def test_quality_2_loses_nothing_to_be_seen_and_31_is_small(tmp_path):
    file = make(tmp_path / "a.mp4", "testsrc2=s=128x96:r=5:d=0.2", "-qp", "1")
    run_ffmpeg("-i", file, tmp_path / "a.png")
    exact = np.asarray(Image.open(tmp_path / "a.png").convert("L"), float)
    sizes = []
    for quality, most in ((2, 1.5), (31, 20)):
        extract(file, tmp_path / str(quality), Sampling(count=1), quality=quality)
        frame = tmp_path / str(quality) / "000000.jpg"
        assert np.abs(np.asarray(Image.open(frame).convert("L"), float) - exact).mean() < most
        sizes.append(frame.stat().st_size)
    assert sizes[0] > 2 * sizes[1]


# --- Broken videos ---


def cut(data):
    return data[: len(data) * 3 // 5]


def overwrite(data):
    noise = np.random.default_rng(0).integers(0, 256, len(data) // 5, np.uint8).tobytes()
    return data[: len(data) // 2] + noise + data[len(data) // 2 + len(noise) :]


@pytest.mark.parametrize("harm", [cut, overwrite])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".webm"])
def test_a_video_that_is_cut_short_or_damaged_gives_no_frame(tmp_path, suffix, harm):
    codec = ["-c:v", "libvpx-vp9", "-cpu-used", "8", "-deadline", "realtime"] if suffix == ".webm" else []
    broken = make(tmp_path / f"a{suffix}", "testsrc2=s=64x48:r=10:d=3", *codec, "-movflags", "+faststart")
    broken.write_bytes(harm(broken.read_bytes()))
    for sampling in (Sampling(fps=1), Sampling(count=2), Sampling(scene=0.2)):
        with pytest.raises(BadVideoError, match=r"\w"):
            extract(broken, tmp_path / "frames", sampling)
    assert list(tmp_path.iterdir()) == [broken]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "the file is empty"),
        ("text", "Invalid data|not found"),
        ("sound", "there is no video in it"),
        ("sound with a cover", "there is no video in it"),
        ("folder", "not a file"),
        ("dangling link", "No such file"),
    ],
)
def test_what_is_no_video_is_named_and_gives_no_frame(tmp_path, kind, reason):
    path = tmp_path / "a.mp4"
    sine = ("-f", "lavfi", "-i", "sine=d=1")
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("no video at all\n" * 100)
    elif kind == "sound":
        run_ffmpeg(*sine, path)
    elif kind == "sound with a cover":
        Image.new("RGB", (64, 48)).save(tmp_path / "cover.png")
        run_ffmpeg(*sine, "-i", tmp_path / "cover.png", "-c:v", "png", "-disposition:v", "attached_pic", path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "gone.mp4")
    with pytest.raises(BadVideoError, match=reason):
        probe(path)
    with pytest.raises(BadVideoError, match=reason):
        extract(path, tmp_path / "frames", Sampling(fps=1))
    assert not (tmp_path / "frames").exists()
    assert not list(tmp_path.glob(".*"))


def test_broken_videos_are_listed_and_the_others_used(tmp_path, videos, capsys):
    (videos / "dog" / "bad\n.mp4").write_bytes(cut((videos / "dog" / "a.mp4").read_bytes()))
    (videos / "dog" / "empty.mkv").touch()
    assert main([str(videos), str(tmp_path / "out"), "--fps", "1"]) == 0
    rows = [line.split("\t") for line in (tmp_path / "out" / "rejected.tsv").read_text().splitlines()]
    assert [name for name, _ in rows] == [rf"{videos}/dog/bad\x0a.mp4", f"{videos}/dog/empty.mkv"]
    assert rows[1][1] == "the file is empty"
    assert sorted(path.name for path in (tmp_path / "out" / "dog").iterdir()) == ["a.mp4"]
    said = capsys.readouterr().out
    assert f"skipped {videos}/dog/empty.mkv: the file is empty\n" in said
    assert f"skipped   2, listed in {tmp_path}/out/rejected.tsv\n" in said
    assert "frames    6: cat 4, dog 2\nvideos    3, 0:00:06 in all\n" in said


def test_a_class_without_a_usable_video_is_named_and_has_no_folder(tmp_path, videos, capsys):
    (videos / "dog" / "a.mp4").write_bytes(b"")
    assert main([str(videos), str(tmp_path / "out"), "--fps", "1"]) == 0
    assert "missing   1 classes without a usable video: dog\n" in capsys.readouterr().out
    assert ImageFolder(tmp_path / "out", tmp_path / "cache").classes == ("cat",)


@pytest.mark.parametrize("shards", [[], ["--shards"]])
def test_the_exit_status_is_1_where_no_video_can_be_used_and_0_once_one_can(tmp_path, clip, shards):
    (tmp_path / "videos" / "cat").mkdir(parents=True)
    (tmp_path / "videos" / "cat" / "a.mp4").touch()
    assert main([str(tmp_path / "videos"), str(tmp_path / "out"), "--fps", "1", *shards]) == 1
    shutil.copy(clip, tmp_path / "videos" / "cat")
    assert main([str(tmp_path / "videos"), str(tmp_path / "out"), "--fps", "1", *shards]) == 0


# --- A folder of frames ---


def test_frames_are_an_image_folder_with_the_classes_of_the_videos(tmp_path, videos):
    (videos / ".hidden").mkdir()
    (videos / "cat" / "._a.mp4").write_text("left by another system")
    (videos / "cat" / "notes.txt").write_text("no video")
    assert main([str(videos), str(tmp_path / "out"), "--count", "2"]) == 0
    source = ImageFolder(tmp_path / "out", tmp_path / "cache")
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert (source.heights.tolist(), source.widths.tolist()) == ([48] * 6, [64] * 6)
    assert source.key(3) == b"cat/deeper/b.mp4/000001.jpg"
    assert not source.rejects


NAMES = [
    "a.mp4",
    "a.mkv",
    "a.MP4",
    "-y.mp4",
    "100% of %06d %s.mp4",
    "two words.mp4",
    "[b] 'q' \"d\" \\;,:*?.mp4",
    "grüße 猫.mp4",
    "http:host.mp4",
    "line\nbreak.mp4",
    "sub/a.mp4",
    "sub.mp4/a.mp4",
    os.fsdecode(b"latin-\xe9.mp4"),
]


def test_any_name_is_a_name_and_none_is_taken_for_another(tmp_path, clip):
    for name in NAMES:
        path = tmp_path / "50% videos" / "cl%d ass" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, path)
    assert main([str(tmp_path / "50% videos"), str(tmp_path / "50% out"), "--count", "2"]) == 0
    source = ImageFolder(tmp_path / "50% out", tmp_path / "cache")
    keys = {os.fsencode(f"cl%d ass/{name}/00000{i}.jpg") for name in NAMES for i in range(2)}
    assert {source.key(i) for i in range(len(source))} == keys


def test_relative_paths_and_a_leading_dash_work(tmp_path, videos):
    (tmp_path / "-videos").symlink_to(videos)
    command = [sys.executable, "-m", "cit_scale.data.video", "--fps", "1", "--", "-videos", "-out"]
    env = {**os.environ, "PYTHONPATH": str(Path(video.__file__).parents[2])}
    assert subprocess.run(command, cwd=tmp_path, env=env).returncode == 0
    assert len(ImageFolder(tmp_path / "-out", tmp_path / "cache")) == 6


def test_any_number_of_workers_gives_the_same_files(tmp_path, videos):
    for workers in (1, 3):
        assert main([str(videos), str(tmp_path / f"out{workers}"), "--fps", "4", "--workers", str(workers)]) == 0
    assert listing(tmp_path / "out1") == listing(tmp_path / "out3")


# --- Once more ---


def test_what_is_there_is_kept_and_what_is_new_or_changed_is_taken(tmp_path, videos, clip, monkeypatch, capsys):
    command = [str(videos), str(tmp_path / "out"), "--count", "20"]
    assert main(command) == 0
    make(videos / "cat" / "a.mp4", numbered(5))
    shutil.copy(clip, videos / "dog" / "new.mp4")
    (videos / "cat" / "deeper" / "b.mp4").rename(videos / "dog" / "b.mp4")
    (videos / "dog" / "a.mp4").write_bytes(b"no longer a video")
    taken = []
    monkeypatch.setattr(
        video, "extract", lambda path, *rest, **named: taken.append(path.name) or extract(path, *rest, **named)
    )
    capsys.readouterr()
    assert main(command) == 0
    assert sorted(taken) == ["a.mp4", "b.mp4", "new.mp4"]
    assert numbers(tmp_path / "out" / "cat" / "a.mp4") == list(range(5))
    assert not (tmp_path / "out" / "dog" / "a.mp4").exists()
    said = capsys.readouterr().out
    assert "left over 1 videos have gone, and their frames are still there: cat/deeper/b.mp4\n" in said
    assert "fewer     1 videos have fewer than 20 frames and gave all of them\n" in said
    taken.clear()
    assert main(command) == 0
    assert taken == []


@pytest.mark.parametrize("shards", [[], ["--shards"]])
def test_other_settings_for_the_same_folder_are_refused(tmp_path, videos, capsys, shards):
    out = tmp_path / "out"
    assert main([str(videos), str(out), "--fps", "1", *shards]) == 0
    before = listing(out)
    assert main([str(videos), str(out), "--fps", "2", "--quality", "3", *shards]) == 2
    assert capsys.readouterr().err == (
        f"error: {out} was begun with other settings (fps: 1.0 -> 2.0; quality: 2 -> 3); "
        "give those again, or another OUT, or delete this one\n"
    )
    assert main([str(videos), str(out), "--fps", "1", *({"--shards"} - set(shards))]) == 2
    assert listing(out) == before


def test_a_folder_begun_before_a_setting_existed_goes_on_with_that_at_its_default(tmp_path, videos, capsys):
    out = tmp_path / "out"
    command = [str(videos), str(out), "--fps", "1"]
    assert main(command) == 0
    before = listing(out)
    settings = out / video.SETTINGS
    begun = json.loads(settings.read_text())
    settings.write_text(json.dumps({key: begun[key] for key in ("videos", "fps")}))
    for record in out.rglob(video.RECORD):
        record.write_text(json.dumps({key: value for key, value in json.loads(record.read_text()).items() if value}))
    assert main(command) == 0
    assert main([*command, "--quality", "3"]) == 2
    assert "quality: 2 -> 3" in capsys.readouterr().err
    assert listing(out).keys() == before.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{videos}", "{videos}/out", "--fps", "1"], "would be a class of it; give another OUT"),
        (["{videos}", "{videos}/..", "--fps", "1"], "holds something else; give a folder that is new or empty"),
        (["{videos}", "{videos}/..", "--fps", "1", "--shards"], "holds something else; give a folder that is new"),
        (["{videos}/none", "{out}", "--fps", "1"], "is not a folder; give one with a sub-folder of videos per class"),
        (["{videos}/dog", "{out}", "--fps", "1"], "has no sub-folders"),
        (["{videos}", "{out}", "--fps", "1", "--quality", "90"], "quality=90 is not in 2 ... 31"),
        (["{videos}", "{out}", "--fps", "1", "--workers", "0"], "workers=0 is less than 1"),
        (["{videos}", "{out}", "--fps", "1", "--shorter_side", "-1"], "shorter_side=-1 is less than 1"),
        (["{videos}", "{out}", "--fps", "1", "--shard_mib", "0"], "shard_mib=0 is less than 1"),
        (["{videos}", "{out}", "--fps", "-1"], "fps=-1.0 is not above 0"),
        (["{videos}", "{out}", "--fps", "1", "--hwaccel", "none"], "'none' is unknown to this ffmpeg; use auto or one"),
    ],
)
def test_a_mistake_is_one_line_with_the_way_out(tmp_path, videos, capsys, arguments, message):
    assert main([argument.format(videos=videos, out=tmp_path / "out") for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert message in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["videos"]


def test_a_class_without_videos_is_refused(tmp_path, videos, capsys):
    (videos / "eel").mkdir()
    assert main([str(videos), str(tmp_path / "out"), "--fps", "1"]) == 2
    assert "no videos for 1 of 3 classes: eel; add videos (.3gp, .avi" in capsys.readouterr().err


def test_two_commands_do_not_write_to_the_same_folder(tmp_path, videos, capsys):
    (tmp_path / "out").mkdir()
    other = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert main([str(videos), str(tmp_path / "out"), "--fps", "1"]) == 2
    assert "another process writes to" in capsys.readouterr().err
    os.close(other)
    assert main([str(videos), str(tmp_path / "out"), "--fps", "1"]) == 0


# --- Stopped ---


@pytest.fixture
def stuck(tmp_path, videos):
    """A command that stops in the middle of videos/dog/slow.mp4: frames are there, and ffmpeg does not end."""
    shutil.copy(videos / "dog" / "a.mp4", videos / "dog" / "slow.mp4")
    stand_in = tmp_path / "ffmpeg"
    real = imageio_ffmpeg.get_ffmpeg_exe()
    hang = f'"{real}" "$@"; echo $$ > "{tmp_path}/pid.new"; mv "{tmp_path}/pid.new" "{tmp_path}/pid"; exec sleep 100'
    stand_in.write_text(f'#!/bin/sh\ncase "$*" in *slow.mp4*%06d.jpg) {hang};; *) exec "{real}" "$@";; esac\n')
    stand_in.chmod(0o755)
    command = [sys.executable, "-m", "cit_scale", "video", str(videos), str(tmp_path / "out"), "--fps", "2"]
    env = {**os.environ, "IMAGEIO_FFMPEG_EXE": str(stand_in)}
    process = subprocess.Popen(
        command,
        cwd=Path(video.__file__).parents[2],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or len(list((tmp_path / "out").glob("*/**/.video.json"))) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    yield process, int((tmp_path / "pid").read_text())
    process.kill()
    process.wait()


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_command_leaves_whole_videos_only_and_is_continued(tmp_path, videos, stuck):
    process, ffmpeg_pid = stuck
    process.kill()
    process.wait()
    os.kill(ffmpeg_pid, signal.SIGKILL)
    out = tmp_path / "out"
    assert len(list((out / ".partial").rglob("*.jpg"))) == 4
    source = ImageFolder(out, tmp_path / "cache")
    assert [source.key(i) for i in range(len(source)) if b"slow" in source.key(i)] == []
    assert len(source) == 12
    kept = listing(out / "cat")
    assert main([str(videos), str(out), "--fps", "2"]) == 0
    assert main([str(videos), str(tmp_path / "unbroken"), "--fps", "2"]) == 0
    assert listing(out) == listing(tmp_path / "unbroken")
    assert listing(out / "cat") == kept
    assert not (out / ".partial").exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_asked_to_stop_leaves_whole_videos_only_and_no_process(tmp_path, stuck, signum):
    process, ffmpeg_pid = stuck
    assert is_running(ffmpeg_pid)
    process.send_signal(signum)
    said, _ = process.communicate(timeout=10)
    assert process.returncode == 128 + signum
    assert said == f"stopped; finished frames in {tmp_path}/out are kept, and the same command continues there\n"
    assert not is_running(ffmpeg_pid)
    assert not (tmp_path / "out" / ".partial").exists()
    assert sorted(path.name for path in (tmp_path / "out" / "dog").iterdir()) == ["a.mp4"]


def test_a_full_disk_ends_the_command_and_is_no_fault_of_the_video(tmp_path, videos, monkeypatch, capsys):
    stand_in = tmp_path / "ffmpeg"
    line = "[vost#0:0/mjpeg @ 0x1] [error] Error submitting a packet to the muxer: No space left on device"
    real = imageio_ffmpeg.get_ffmpeg_exe()
    stand_in.write_text(f'#!/bin/sh\ncase "$*" in *.jpg) echo "{line}" >&2; exit 228;; *) exec "{real}" "$@";; esac\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(stand_in))
    assert main([str(videos), str(tmp_path / "out"), "--fps", "1"]) == 1
    said = capsys.readouterr()
    assert "No space left on device; finished frames" in said.err
    assert "skipped" not in said.out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["video.json"]


# --- Hardware ---


def test_hardware_that_is_not_there_is_refused_and_auto_goes_by_the_cpu(tmp_path, videos, capsys):
    out = tmp_path / "out"
    if video.find_hwaccel("auto") is not None:
        pytest.skip("there is a hardware decoder here")
    assert main([str(videos), str(out), "--fps", "1", "--hwaccel", "cuda"]) == 2
    assert "hwaccel='cuda' decodes nothing here (" in capsys.readouterr().err
    assert main([str(videos), str(out), "--fps", "1", "--hwaccel", "auto"]) == 0
    assert "no hardware decoder works here; decoding with the CPU\n" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_decodes_to_the_same_frames(tmp_path, clip):
    assert video.find_hwaccel("cuda") == "cuda"
    extract(clip, tmp_path / "frames", Sampling(fps=2), hwaccel="cuda")
    assert numbers(tmp_path / "frames") == [0, 5, 10, 15]


def test_a_video_that_the_hardware_fails_on_is_decoded_by_the_cpu_which_is_said(tmp_path, videos):
    (videos / "dog" / "broken.mp4").touch()
    summary = extract_all(videos, tmp_path / "out", Sampling(fps=1), hwaccel="no such hardware")
    assert {name: record.num_frames for name, record in summary.records.items()} == {
        "cat/a.mp4": 2,
        "cat/deeper/b.mp4": 2,
        "dog/a.mp4": 2,
    }
    assert "Unrecognized hwaccel: no such hardware" in summary.records["dog/a.mp4"].software
    assert summary.rejected == {"dog/broken.mp4": "the file is empty"}


# --- Shards ---


def test_shards_hold_the_frames_that_a_folder_would(tmp_path, videos, capsys):
    (videos / "dog" / "empty.mp4").touch()
    assert main([str(videos), str(tmp_path / "folder"), "--fps", "2"]) == 0
    assert main([str(videos), str(tmp_path / "shards"), "--fps", "2", "--shards", "--shard-mib", "1"]) == 0
    folder, shards = ImageFolder(tmp_path / "folder", tmp_path / "cache"), TarShards(tmp_path / "shards")
    assert len(shards) == 12
    assert shards.classes == folder.classes
    assert shards.labels.tolist() == folder.labels.tolist()
    assert [shards.key(i) for i in range(12)] == [folder.key(i) for i in range(12)]
    assert [shards.read(i) for i in range(12)] == [folder.read(i) for i in range(12)]
    assert (tmp_path / "shards" / "rejected.tsv").read_text() == f"{videos}/dog/empty.mp4\tthe file is empty\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "folder", "shards", "videos"]
    capsys.readouterr()
    assert main([str(videos), str(tmp_path / "shards"), "--fps", "2", "--shards", "--shard-mib", "1"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/shards has its shards already; delete it to write them anew\n"


def test_shards_that_were_interrupted_are_continued_without_decoding_again(tmp_path, videos, monkeypatch, capsys):
    command = [str(videos), str(tmp_path / "out"), "--fps", "2", "--shards"]

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(video, "pack", interrupt)
        assert main(command) == 130
    assert "the same command continues there" in capsys.readouterr().err
    monkeypatch.setattr(video, "extract", lambda *_, **__: pytest.fail("decoded again"))
    assert main(command) == 0
    assert len(TarShards(tmp_path / "out")) == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "videos"]


def test_the_record_of_a_video_says_what_its_frames_are(tmp_path, videos):
    main([str(videos), str(tmp_path / "out"), "--fps", "2"])
    record = json.loads((tmp_path / "out" / "dog" / "a.mp4" / ".video.json").read_text())
    stat = (videos / "dog" / "a.mp4").stat()
    assert record == {
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "num_frames": 4,
        "duration_s": 2.0,
        "software": "",
    }


def test_a_link_in_a_circle_is_named(tmp_path, capsys):
    (tmp_path / "videos" / "cat").mkdir(parents=True)
    (tmp_path / "videos" / "cat" / "again").symlink_to("../cat")
    assert main([str(tmp_path / "videos"), str(tmp_path / "out"), "--fps", "1"]) == 2
    assert "cat/again is a link to a folder that contains the link; remove it" in capsys.readouterr().err
