"""Class folders of videos to labelled frames: a folder of images, or shards.

VIDEOS/cat/a.mp4 becomes OUT/cat/a.mp4/000000.jpg, 000001.jpg, ..., which --data.train OUT trains on. Folders inside a
class are searched as well; names that begin with a dot are passed over. The frames of a video appear together, once all
of it has been decoded without an error. A broken video is reported, listed with the reason in OUT/rejected.tsv, and
skipped. The same command goes on where it was stopped, and in a folder takes up videos that are new or have changed.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import ffmpeg
from imageio_ffmpeg import get_ffmpeg_exe

from cit_scale.datasets.defaults import FRAME_QUALITY
from cit_scale.datasets.folders import ImageFolder, find_files
from cit_scale.datasets.index import printable, reason_text, shorten
from cit_scale.datasets.pack import REJECTED, pack
from cit_scale.datasets.progress import ProgressBar
from cit_scale.distributed.stop import StopRequest
from cit_scale.errors import ConfigError, Stopped
from cit_scale.files import changed, write_text

EXTENSIONS = {
    *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
}
POLL_S = 0.1
CLOCK_ERROR_S = 0.001  # Matroska rounds the time of a frame to milliseconds

# In OUT. Readers of images pass over files beside the classes, and over what begins with a dot.
SETTINGS = "video.json"
PARTIAL = ".partial"
RECORD = ".video.json"  # in the folder of one video's frames

SOMETHING_ELSE = "holds something else; give a folder that is new or empty as OUT"


class BadVideoError(ValueError):
    """A video that no frames can be taken from. The message is the reason, in one line and without the name."""


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video to take, by exactly one of three rules. Raises ConfigError for anything else.

    fps: so many a second: the first frame, then the first at or after each tick, and none twice.
    count: so many: the middle ones of as many equal parts; all frames where there are fewer.
    scene: the first frame, then each that differs from the one before it by more than this, between 0 and 1.
    """

    fps: float | None = None
    count: int | None = None
    scene: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if len(given) != 1:
            raise ConfigError(f"one of fps, count and scene says which frames to take, not {given}; give exactly one")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ConfigError(f"fps={self.fps} is not above 0; give frames per second of video, such as 1 or 0.2")
        if self.count is not None and self.count < 1:
            raise ConfigError(f"count={self.count} is less than 1; give how many frames to take from each video")
        if self.scene is not None and not 0 < self.scene < 1:
            raise ConfigError(f"scene={self.scene} is not between 0 and 1; 0.3 finds most cuts, less finds more")

    def expression(self, num_frames: int) -> str:
        """The rule in the language of ffmpeg's filter `select`. num_frames: of the whole video; used by `count`."""
        if self.count is not None:
            middles_before = f"ceil({{}}*{self.count}/{num_frames}-0.5)"
            return f"gt({middles_before.format('(n+1)')},{middles_before.format('n')})"
        if self.fps is not None:
            ticks_until = f"floor(({{}}-start_t+{CLOCK_ERROR_S})*{self.fps})"
            return f"isnan(prev_selected_t)+gt({ticks_until.format('t')},{ticks_until.format('prev_selected_t')})"
        return f"isnan(prev_selected_t)+gt(scene,{self.scene})"


@dataclass(frozen=True)
class Probe:
    """What a video's header says, or None where it does not. height, width: of the upright frame, in pixels."""

    codec: str
    height: int
    width: int
    duration_s: float | None
    fps: float | None


@dataclass(frozen=True)
class Record:
    """What the frames of one video were taken from. software: why by the CPU, where the hardware failed."""

    size: int
    mtime_ns: int
    num_frames: int
    duration_s: float
    software: str = ""


@dataclass(frozen=True)
class Summary:
    """What `extract_all` found, by CLASS/VIDEO. orphans: frames in OUT whose videos have gone."""

    records: Mapping[str, Record]
    rejected: Mapping[str, str]
    orphans: list[str]


# --- One video ---


def probe(video: Path) -> Probe:
    """Read a video's header. Raises BadVideoError where there is no video in it."""
    log = _run_ffmpeg(_read(video)["V:0"].output("-", f="null", c="copy", t=0))
    header, _, chosen = log.partition("Output #0")
    found = re.search(r"Stream #0:0.*?: Video: (\w+).*?, (\d+)x(\d+)", chosen)
    if found is None:
        raise BadVideoError("its header does not say how large the frames are")
    codec, width, height = found[1], int(found[2]), int(found[3])
    rotation = re.search(r"rotation of (-?[\d.]+) degrees", chosen)
    if rotation and round(float(rotation[1])) % 180:
        height, width = width, height
    clock = re.search(r"Duration: (\d+):(\d+):([\d.]+)", header)
    duration_s = int(clock[1]) * 3600 + int(clock[2]) * 60 + float(clock[3]) if clock else None
    fps = re.search(r", ([\d.]+) fps", chosen)
    return Probe(codec, height, width, duration_s, float(fps[1]) if fps else None)


def extract(
    video: Path,
    folder: Path,
    sampling: Sampling,
    *,
    shorter_side: int | None = None,
    quality: int = FRAME_QUALITY,
    hwaccel: str | None = None,
    threads: int = 1,
    stop: StopRequest | None = None,
) -> int:
    """Write frames of a video as folder/000000.jpg, 000001.jpg, ..., and say how many.

    Frames are upright, have square pixels and JPEG's colours whatever the video's are, and are made smaller, never
    larger, for their shorter side to be `shorter_side`. The folder appears whole or not at all. Raises BadVideoError
    for a video that is broken anywhere, and OSError where frames cannot be written. What ends between two frames, in a
    format that does not say how much should come, such as MPEG-TS, FLV or WMV, cannot be told from a shorter video.
    """
    unfinished = folder.with_name(f".{uuid.uuid4().hex}.partial")

    def take(num_frames: int) -> int:
        unfinished.mkdir(parents=True)
        hardware = {"hwaccel": hwaccel} if hwaccel else {}
        frames = (
            _read(video, threads=threads, filter_complex_threads=threads, **hardware)["V:0"]
            .filter("select", sampling.expression(num_frames))
            .filter("scale", **_scale(shorter_side))
            .filter("setsar", 1)
            .filter("format", "yuv420p")
        )
        options = {"start_number": 0, "fps_mode": "passthrough", "threads": 1, "q:v": quality}
        _run_ffmpeg(frames.output("%06d.jpg", **options), unfinished, stop)
        return len(os.listdir(unfinished))

    def count_frames(**options: str) -> int:
        log = _run_ffmpeg(_read(video, threads=threads)["V:0"].output("-", f="null", **options), stop=stop)
        return int(re.findall(r"frame= *(\d+)", log)[-1])

    try:
        num_frames = count_frames(c="copy") if sampling.count else 0
        num_taken = take(num_frames)
        if sampling.count and num_taken != min(sampling.count, num_frames):
            # Packets are counted without decoding, and nearly always are the frames. Here they are not.
            shutil.rmtree(unfinished)
            num_taken = take(count_frames(fps_mode="passthrough"))
        if not num_taken:
            raise BadVideoError("there are no frames in it")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return num_taken


def _scale(shorter_side: int | None) -> dict[str, str]:
    """Options of ffmpeg's filter `scale`. Without the colour matrix, the colours of HD video would be off in a JPEG."""
    factor = f"min(1,{shorter_side or 10**9}/min(iw*sar,ih))"
    size = {"w": f"max(1,round(iw*sar*{factor}))", "h": f"max(1,round(ih*{factor}))"}
    return {**size, "flags": "bicubic+accurate_rnd", "out_color_matrix": "bt601", "out_range": "full"}


def _read(video: Path, **options: Any) -> Any:
    """The beginning of a command line: read a video, and end with its first error."""
    size, _ = _identify(video)
    try:
        with video.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise BadVideoError(reason_text(error)) from error
    whole = int.from_bytes(head[4:], "little") + 8
    if head.startswith(b"RIFF") and size < whole:  # ffmpeg would take an AVI that was cut short for a shorter one
        raise BadVideoError(f"the file ends after {size} of {whole} bytes")
    plain = {"hide_banner": None, "nostdin": None, "nostats": None, "loglevel": "level+info", "xerror": None}
    # "file:" keeps a name from being taken for an option or an address, and bytes are names in any encoding.
    return ffmpeg.input(os.fsencode(f"file:{video.absolute()}"), **plain, **options)


def _identify(video: Path) -> tuple[int, int]:
    """Size in bytes and time in nanoseconds, by which a changed file is known."""
    try:
        found = video.stat()
    except OSError as error:
        raise BadVideoError(reason_text(error)) from error
    if not stat.S_ISREG(found.st_mode):
        raise BadVideoError("not a file")
    if not found.st_size:
        raise BadVideoError("the file is empty")
    return found.st_size, found.st_mtime_ns


def _run_ffmpeg(output: Any, folder: Path | None = None, stop: StopRequest | None = None) -> str:
    """Run a command line in `folder`; what ffmpeg said. Raises BadVideoError with the first thing that went wrong."""
    process = subprocess.Popen(
        ffmpeg.compile(output, cmd=get_ffmpeg_exe()),
        cwd=folder,  # and not part of the output's name, where a % would count frames
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        errors="replace",
        process_group=0,  # Ctrl-C is for us: ffmpeg would answer it with half a result
    )
    with process:
        try:
            log = _wait(process, stop)
        except BaseException:
            process.kill()
            raise
    errors = re.findall(r"^(?:\[(\w+).*?\] )?\[(?:error|fatal)\] (.+)", log, re.MULTILINE)
    # A decoder may complain and succeed. A file that ends too early is also called a success, but its reader complains:
    # "in", or the format's name in older ffmpegs.
    readers = {"in", *re.findall(r"^\[info\] Input #0, (\w+)", log, re.MULTILINE)}
    if process.returncode == 0 and not readers & dict(errors).keys():
        return log
    unwritten = re.search(r"Error submitting a packet to the muxer: (.+)", log)
    if unwritten:
        raise OSError(f"frames cannot be written to {folder}: {unwritten[1]}")
    if "matches no streams" in log:
        raise BadVideoError("there is no video in it")
    raise BadVideoError(printable(errors[0][1].strip() if errors else f"ffmpeg ended with status {process.returncode}"))


def _wait(process: subprocess.Popen[str], stop: StopRequest | None) -> str:
    """What a process says on stderr until it ends. Raises Stopped when asked to stop."""
    while True:
        try:
            return process.communicate(timeout=POLL_S)[1]
        except subprocess.TimeoutExpired:
            if stop is not None and stop.requested:
                raise Stopped(0, stop.signum) from None


def find_hwaccel(wanted: str) -> str | None:
    """The hardware decoder to use: `wanted`, or for "auto" the first that decodes a short clip here; None: the CPU.

    Raises ConfigError for one that ffmpeg does not know, or that decodes nothing here.
    """
    listing = subprocess.run([get_ffmpeg_exe(), "-hide_banner", "-hwaccels"], capture_output=True, text=True)
    known = listing.stdout.partition(":")[2].split()
    if wanted not in ("auto", *known):
        raise ConfigError(f"hwaccel={wanted!r} is unknown to this ffmpeg; use auto or one of {', '.join(known)}")
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        source = ffmpeg.input("testsrc=s=320x240:d=0.2", f="lavfi", loglevel="level+info", y=None)
        for name in known if wanted == "auto" else [wanted]:
            try:
                _run_ffmpeg(source.output(str(clip), vcodec="libx264", pix_fmt="yuv420p"))
                # ffmpeg goes over to the CPU without a word, but hwdownload accepts nothing from there.
                frames = _read(clip, hwaccel=name, hwaccel_output_format=name)["V:0"].filter("hwdownload")
                _run_ffmpeg(frames.filter("format", "nv12").output("-", f="null"))
            except BadVideoError as error:
                reason = str(error)
            else:
                return name
    if wanted == "auto":
        return None
    raise ConfigError(f"hwaccel={wanted!r} decodes nothing here ({reason}); use auto or leave it out")


# --- All videos ---


def extract_all(
    videos: Path,
    out: Path,
    sampling: Sampling,
    *,
    shorter_side: int | None = None,
    quality: int = FRAME_QUALITY,
    hwaccel: str | None = None,
    workers: int = 1,
    stop: StopRequest | None = None,
) -> Summary:
    """Write frames of videos/CLASS/VIDEO to out/CLASS/VIDEO, from `workers` videos at once; those there are kept.

    Names the broken videos as it meets them. Raises ConfigError, OSError, and Stopped when asked to stop.
    """
    names = find_videos(videos)
    scratch = out / PARTIAL
    shutil.rmtree(scratch, ignore_errors=True)  # from a run that was killed
    threads = max(1, len(os.sched_getaffinity(0)) // min(workers, len(names)))
    options = {"shorter_side": shorter_side, "quality": quality, "threads": threads, "stop": stop}
    take = partial(extract, sampling=sampling, **options)
    records: dict[str, Record] = {}
    rejected: dict[str, str] = {}
    progress = ProgressBar(f"frames of {printable(videos)}", len(names), "videos")
    with progress, ThreadPoolExecutor(workers) as pool:
        try:
            jobs = {pool.submit(_renew, videos / name, out / name, scratch, take, hwaccel): name for name in names}
            for job in as_completed(jobs):
                name = jobs[job]
                try:
                    records[name] = job.result()
                except BadVideoError as error:
                    rejected[name] = str(error)
                    print(f"skipped {printable(videos / name)}: {error}", flush=True)
                progress.advance()
        finally:
            pool.shutdown(cancel_futures=True)
            shutil.rmtree(scratch, ignore_errors=True)
    for name in rejected:
        with suppress(OSError):
            os.removedirs((out / name).parent)  # a class is empty once its last video has been broken
    there = {str(path.parent.relative_to(out)) for path in out.rglob(RECORD)}
    return Summary(records, rejected, sorted(there - set(names)))


def find_videos(folder: Path) -> list[str]:
    """CLASS/VIDEO of each video in a folder, in sorted order. Raises ConfigError for a folder that is no data set."""
    if not folder.is_dir():
        raise ConfigError(f"{printable(folder)} is not a folder; give one with a sub-folder of videos per class")
    return [name for names in find_files(folder, EXTENSIONS, "videos").values() for name in names]


def _renew(video: Path, folder: Path, scratch: Path, take: Callable[..., int], hwaccel: str | None) -> Record:
    """The record of the frames in `folder`. They are taken now, unless they are there and the video has not changed."""
    size, mtime_ns = _identify(video)
    with suppress(FileNotFoundError, ValueError, TypeError):  # not there, or damaged as by a power cut
        record = Record(**json.loads((folder / RECORD).read_text()))
        if (record.size, record.mtime_ns) == (size, mtime_ns):
            return record
    fresh = scratch / uuid.uuid4().hex
    scratch.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        folder.rename(scratch / f"{fresh.name}.old")
    duration_s = probe(video).duration_s or 0.0
    software = ""
    try:
        num_frames = take(video, fresh, hwaccel=hwaccel)
    except BadVideoError as error:
        if hwaccel is None:
            raise
        num_frames = take(video, fresh)  # hardware knows fewer formats; of a broken video, the CPU says so again
        software = str(error)
    record = Record(size, mtime_ns, num_frames, duration_s, software)
    (fresh / RECORD).write_text(json.dumps(asdict(record)))
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh.rename(folder)
    return record


# --- The command ---


@contextmanager
def _claim(folder: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Hold a folder for this command alone. Raises ConfigError where another holds it, or something else is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process writes to {printable(folder)}; wait for it or stop it") from None
        if not (folder / SETTINGS).exists() and set(os.listdir(folder)) - {f"{SETTINGS}.partial"}:
            raise ConfigError(f"{printable(folder)} {SOMETHING_ELSE}")
        _check_settings(folder, settings)
        write_text(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")
        yield
    finally:
        os.close(descriptor)  # which releases the lock, as the end of the process does


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises ConfigError where a folder was written with other settings."""
    if not (folder / SETTINGS).exists():
        return
    changes = changed(json.loads((folder / SETTINGS).read_text()), settings, {"quality": FRAME_QUALITY})
    if changes:
        raise ConfigError(
            f"{printable(folder)} was begun with other settings ({'; '.join(changes)}); "
            f"give those again, or another OUT, or delete this one"
        )


def _print_summary(summary: Summary, sampling: Sampling, out: Path, rejected: Path) -> None:
    records = summary.records.values()
    frames: Counter[str] = Counter()
    for name, record in summary.records.items():
        frames[_class_of(name)] += record.num_frames
    per_class = [f"{printable(name)} {number}" for name, number in sorted(frames.items())]
    duration = timedelta(seconds=round(sum(record.duration_s for record in records)))
    fewer = sum(record.num_frames < (sampling.count or 0) for record in records)
    software = [f"{printable(name)} ({record.software})" for name, record in summary.records.items() if record.software]
    missing = [printable(name) for name in sorted({_class_of(name) for name in summary.rejected} - frames.keys())]
    orphans = [printable(name) for name in summary.orphans]
    print(f"frames    {frames.total()}: {shorten(per_class, most=10)}")
    print(f"videos    {len(records)}, {duration} in all")
    if fewer:
        print(f"fewer     {fewer} videos have fewer than {sampling.count} frames and gave all of them")
    if software:
        print(f"by CPU    {len(software)} videos that the hardware failed on: {shorten(software)}")
    if summary.rejected:
        print(f"skipped   {len(summary.rejected)}, listed in {printable(rejected)}")
    if missing:
        print(f"missing   {len(missing)} classes without a usable video: {shorten(missing)}")
    if orphans:
        print(f"left over {len(orphans)} videos have gone, and their frames are still there: {shorten(orphans)}")
    if records:
        print(f"data set  {printable(out)}")


def _class_of(name: str) -> str:
    return name.partition("/")[0]


def _run(arguments: argparse.Namespace) -> int:
    videos, out = arguments.videos, arguments.out
    sampling = Sampling(arguments.fps, arguments.count, arguments.scene)
    if not 2 <= arguments.quality <= 31:
        raise ConfigError(f"quality={arguments.quality} is not in 2 ... 31, from best to worst; 2 is the default")
    for name in ("shorter_side", "workers", "shard_mib"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ConfigError(f"{name}={getattr(arguments, name)} is less than 1; give a number from 1 on")
    if out.resolve().is_relative_to(videos.resolve()):
        raise ConfigError(f"{printable(out)} lies in {printable(videos)} and would be a class of it; give another OUT")
    if not out.resolve().name:
        raise ConfigError(f"{printable(out)} is the root; give a folder that is new or empty as OUT")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{printable(out)} is a file; give a folder that is new or empty as OUT")
    find_videos(videos)  # before anything is written
    settings = {
        "videos": os.fsencode(videos.resolve()).decode(errors="backslashreplace"),
        **asdict(sampling),
        "shorter_side": arguments.shorter_side,
        "quality": arguments.quality,
        "shard_mib": arguments.shard_mib if arguments.shards else None,
    }
    hwaccel = None
    if arguments.hwaccel:
        hwaccel = find_hwaccel(arguments.hwaccel)
        print(f"decoding with {hwaccel}" if hwaccel else "no hardware decoder works here; decoding with the CPU")
    # Shards stand alone in OUT: the frames on the way to them stand beside it.
    folder = out.resolve().with_name(f".{out.resolve().name}.frames") if arguments.shards else out
    if arguments.shards and (out / SETTINGS).exists():
        _check_settings(out, settings)
        shutil.rmtree(folder, ignore_errors=True)
        print(f"{printable(out)} has its shards already; delete it to write them anew")
        return 0
    if arguments.shards and not folder.exists() and out.exists() and any(out.iterdir()):
        raise ConfigError(f"{printable(out)} {SOMETHING_ELSE}")
    with _claim(folder, settings):
        with StopRequest() as stop:
            summary = extract_all(
                videos,
                folder,
                sampling,
                shorter_side=arguments.shorter_side,
                quality=arguments.quality,
                hwaccel=hwaccel,
                workers=arguments.workers,
                stop=stop,
            )
        if arguments.shards and summary.records:
            pack(ImageFolder(folder, folder / ".cache"), out, shard_mib=arguments.shard_mib, workers=arguments.workers)
        rejected = (out if summary.records else folder) / REJECTED
        lines = (f"{printable(videos / name)}\t{reason}\n" for name, reason in sorted(summary.rejected.items()))
        write_text(rejected, "".join(lines))
        if arguments.shards and summary.records:
            write_text(out / SETTINGS, (folder / SETTINGS).read_text())  # from here on, all is done
            shutil.rmtree(folder)
    _print_summary(summary, sampling, out, rejected)
    return 0 if summary.records else 1


def run(arguments: argparse.Namespace) -> int:
    """Take frames and report. arguments: as ``commands.video_parser`` parses them.

    Returns the exit code: 0, 1 without a frame or where a disk fails, 2 for a mistake, 128 + signal if stopped.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to fail
    goes_on = f"what is whole in {printable(arguments.out)} stays, and the same command continues there"
    try:
        return _run(arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; {goes_on}", file=sys.stderr)
        return 1
    except (Stopped, KeyboardInterrupt) as stopped:
        print(f"stopped; {goes_on}", file=sys.stderr)
        return 128 + (getattr(stopped, "signum", None) or signal.SIGINT)
