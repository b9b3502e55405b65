"""Takes labelled frames from class folders of videos, and writes them as a folder of images or as shards.

VIDEOS/cat/a.mp4 becomes OUT/cat/a.mp4/000000.jpg, 000001.jpg, ..., which --data.train OUT trains on. Sub-folders of a
class are searched, too; names that begin with a dot are ignored. The frames of a video appear together, once the whole
video has been decoded without an error. A broken video is reported, listed with the reason in OUT/rejected.tsv, and
skipped. The same command continues where it was stopped; in a folder of images it also adds new and changed videos.
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
from cit_scale.datasets.pixels import LATEST
from cit_scale.datasets.progress import ProgressBar
from cit_scale.distributed.stop import StopRequest
from cit_scale.errors import ConfigError, Stopped, error_line
from cit_scale.files import changed, write_text
from cit_scale.text import escape_unencodable

EXTENSIONS = {
    *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
}
# ffmpeg's names of the formats of these files. Others are not read: some are texts that name further files.
FORMATS = (
    "mov",
    "matroska",
    "avi",
    "flv",
    "live_flv",
    "mpegts",
    "mpeg",
    "mpegvideo",
    "ogg",
    "asf",
    "m4v",
    "h264",
    "hevc",
)
POLL_S = 0.1  # between two checks for a stop request
CLOCK_ERROR_S = 0.001  # Matroska rounds the time of a frame to milliseconds

# Files in OUT. ImageFolder ignores files beside the class folders, and names that begin with a dot.
SETTINGS = "video.json"
PARTIAL = ".partial"
RECORD = ".video.json"  # in the folder of each video's frames

SOMETHING_ELSE = "holds something else; give a folder that is new or empty as OUT"


class BadVideoError(ValueError):
    """No frames can be taken from a video. The message is the reason, in one line and without the video's name."""


@dataclass(frozen=True)
class Sampling:
    """The rule by which frames of a video are selected; exactly one of the three fields is set.

    fps: frames per second: the first frame, then the first frame at or after each tick; no frame is taken twice.
    count: frames per video: the middle frame of each of `count` equal parts; all frames of a video with fewer.
    scene: the first frame, then each frame whose scene score (ffmpeg's, 0 to 1, against the frame before) exceeds this.

    Raises ConfigError unless one field is set, to a value in its range.
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
        """Return the rule as an expression for ffmpeg's filter `select`, which keeps a frame if the value is not 0.

        num_frames: frames of the whole video; used by `count` only.
        """
        if self.count is not None:
            # Part k of `count` has its middle at (k + 0.5) * num_frames / count. Frame n is taken if a middle lies in
            # [n, n + 1): if more middles lie before n + 1 than before n.
            middles_before = f"ceil({{}}*{self.count}/{num_frames}-0.5)"
            return f"gt({middles_before.format('(n+1)')},{middles_before.format('n')})"
        if self.fps is not None:
            # A frame is taken if a tick has passed since the last frame taken; NaN: none has been taken.
            ticks_until = f"floor(({{}}-start_t+{CLOCK_ERROR_S})*{self.fps})"
            return f"isnan(prev_selected_t)+gt({ticks_until.format('t')},{ticks_until.format('prev_selected_t')})"
        return f"isnan(prev_selected_t)+gt(scene,{self.scene})"


@dataclass(frozen=True)
class Probe:
    """The header of a video. height, width: of the upright frame, in pixels. None: the header does not say."""

    codec: str
    height: int
    width: int
    duration_s: float | None
    fps: float | None


@dataclass(frozen=True)
class Record:
    """The file in the folder of a video's frames that says from which version of the video they were taken.

    size, mtime_ns: of the video file, to notice a change. num_frames: frames taken. duration_s: by the header, 0 if
    unknown. software: the error of the hardware decoder if the CPU has decoded the video instead; otherwise empty.
    """

    size: int
    mtime_ns: int
    num_frames: int
    duration_s: float
    software: str = ""


@dataclass(frozen=True)
class Summary:
    """The result of `extract_all`. Keys are CLASS/VIDEO.

    records: the videos whose frames are there. rejected: the reasons for the broken ones. orphans: frames in OUT of
    videos that no longer exist; they are kept.
    """

    records: Mapping[str, Record]
    rejected: Mapping[str, str]
    orphans: list[str]


# --- One video ---


def probe(video: Path) -> Probe:
    """Read a video's header. Raises BadVideoError for a file without a video stream, or one that cannot be read."""
    # The wheel imageio-ffmpeg has no ffprobe, so this parses what ffmpeg logs when it copies no frames (t=0).
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
    """Write frames of a video as folder/000000.jpg, 000001.jpg, .... Returns the number of frames.

    Frames are upright and have square pixels and JPEG's colour space, whatever the video has. The folder appears
    completely or not at all.

    shorter_side: frames with a longer shorter side, in pixels, are scaled down to it; smaller ones keep their size.
    quality: ffmpeg's JPEG quality, 2 (fine) to 31 (coarse). hwaccel: ffmpeg's name of a hardware decoder; None: CPU.
    threads: of ffmpeg. stop: when a stop is requested, the work ends with Stopped.

    Raises BadVideoError for a video that is broken anywhere, and OSError where frames cannot be written. Not detected:
    a file cut off between two frames in a format that does not state its length, such as MPEG-TS, FLV and WMV;
    and an Ogg file cut off anywhere.
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
            .filter("setpts", "N/TB")
        )
        # passthrough: ffmpeg would otherwise repeat or drop frames for a constant rate.
        # A frame a second, on a clock of seconds: the encoder's is the video's rate, too coarse where that varies or is
        # below one frame a second.
        options = {"start_number": 0, "fps_mode": "passthrough", "enc_time_base": "1/1", "threads": 1, "q:v": quality}
        _run_ffmpeg(frames.output("%06d.jpg", **options), unfinished, stop)
        return len(os.listdir(unfinished))

    def count_frames(**options: str) -> int:
        log = _run_ffmpeg(_read(video, threads=threads)["V:0"].output("-", f="null", **options), stop=stop)
        return int(re.findall(r"frame= *(\d+)", log)[-1])

    try:
        num_frames = count_frames(c="copy") if sampling.count else 0
        num_taken = take(num_frames)
        if sampling.count and num_taken != min(sampling.count, num_frames):
            # c="copy" counts packets without decoding, which is nearly always the number of frames. Not here: count
            # again by decoding.
            shutil.rmtree(unfinished)
            num_taken = take(count_frames(fps_mode="passthrough"))
        if not num_taken:
            raise BadVideoError("there are no frames in it")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return num_taken


def _scale(shorter_side: int | None) -> dict[str, str]:
    """Return options of ffmpeg's filter `scale` for frames of at most this shorter side, with square pixels.

    The colour matrix is JPEG's: HD video uses another one, and its colours would be wrong in a JPEG.
    """
    factor = f"min(1,{shorter_side or 10**9}/min(iw*sar,ih))"
    size = {"w": f"max(1,round(iw*sar*{factor}))", "h": f"max(1,round(ih*{factor}))"}
    return {**size, "flags": "bicubic+accurate_rnd", "out_color_matrix": "bt601", "out_range": "full"}


def _read(video: Path, **options: Any) -> Any:
    """Return ffmpeg-python's node that reads a video and ends with the first error. Raises BadVideoError."""
    size, _ = _identify(video)
    try:
        with video.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise BadVideoError(reason_text(error)) from error
    whole = int.from_bytes(head[4:], "little") + 8
    if head.startswith(b"RIFF") and size < whole:  # ffmpeg takes an AVI file that was cut off for a shorter video
        raise BadVideoError(f"the file ends after {size} of {whole} bytes")
    plain = {"hide_banner": None, "nostdin": None, "nostats": None, "loglevel": "level+info", "xerror": None}
    plain |= {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}
    # "file:" keeps ffmpeg from taking a name for an option or an address; bytes allow names in any encoding.
    return ffmpeg.input(os.fsencode(f"file:{video.absolute()}"), **plain, **options)


def _identify(video: Path) -> tuple[int, int]:
    """Return size in bytes and modification time in nanoseconds, by which a changed video is noticed.

    Raises BadVideoError for an empty file, for anything but a regular file, and where it cannot be read.
    """
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
    """Run ffmpeg in `folder` and return its log. Raises BadVideoError with ffmpeg's first error, OSError, Stopped."""
    process = subprocess.Popen(
        ffmpeg.compile(output, cmd=get_ffmpeg_exe()),
        cwd=folder,  # not part of the output's name, in which ffmpeg would replace a % by the frame number
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        errors="replace",
        process_group=0,  # keeps Ctrl-C from ffmpeg, which would end with an incomplete result
    )
    with process:
        try:
            log = _wait(process, stop)
        except BaseException:
            process.kill()
            raise
    errors = re.findall(r"^(?:\[(\w+).*?\] )?\[(?:error|fatal)\] (.+)", log, re.MULTILINE)
    # A decoder may log an error and still succeed. A file that ends too early also gives exit status 0, but then the
    # error comes from the reader: "in", or the format's name in older versions of ffmpeg.
    readers = {"in", *re.findall(r"^\[info\] Input #0, (\w+)", log, re.MULTILINE)}
    if process.returncode == 0 and not readers & dict(errors).keys():
        return log
    unwritten = re.search(r"Error submitting a packet to the muxer: (.+)", log)
    if unwritten:
        raise OSError(f"frames cannot be written to {folder}: {unwritten[1]}")
    if "matches no streams" in log:
        raise BadVideoError("there is no video in it")
    if "Format not on whitelist" in log:
        raise BadVideoError("it is not of a video format, but a text, or a list of other files")
    reason = printable(errors[0][1].strip()) if errors else f"ffmpeg ended with status {process.returncode}"
    frames = int((re.findall(r"frame= *(\d+)", log) or ["0"])[-1])
    raise BadVideoError(
        f"{reason}; {frames} frames were taken before" if frames else f"{reason}; no frame was taken before"
    )


def _wait(process: subprocess.Popen[str], stop: StopRequest | None) -> str:
    """Wait until a process ends and return its stderr. Raises Stopped when a stop is requested."""
    while True:
        try:
            return process.communicate(timeout=POLL_S)[1]
        except subprocess.TimeoutExpired:
            if stop is not None and stop.requested:
                raise Stopped(0, stop.signum) from None


def find_hwaccel(wanted: str) -> str | None:
    """Return the name of the hardware decoder to use: `wanted`, or for "auto" the first that decodes a short test clip.

    Returns None, for the CPU, where "auto" finds none. Raises ConfigError for a `wanted` decoder that ffmpeg does not
    know or that fails on the test clip.
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
                # ffmpeg falls back to the CPU silently. The filter hwdownload fails on frames in the CPU's memory.
                frames = _read(clip, hwaccel=name, hwaccel_output_format=name)["V:0"].filter("hwdownload")
                _run_ffmpeg(frames.filter("format", "nv12").output("-", f="null"))
            except BadVideoError as error:
                reason = str(error)
            else:
                return name
    if wanted == "auto":
        return None
    raise ConfigError(f"hwaccel={wanted!r} decodes nothing here ({reason}); use auto or leave it out")


# --- All videos of a folder ---


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
    """Write frames of each videos/CLASS/VIDEO to the folder out/CLASS/VIDEO, from `workers` videos at once.

    Frames of videos that have not changed are kept. Prints the name of each broken video when it is found. The other
    arguments are those of `extract`.
    Raises ConfigError for a folder without class folders or videos, OSError, and Stopped when a stop is requested.
    """
    names = find_videos(videos)
    scratch = out / PARTIAL
    shutil.rmtree(scratch, ignore_errors=True)  # from a run that was killed
    # Each ffmpeg gets an equal share of the cores: with fewer videos than workers, a larger one.
    threads = max(1, len(os.sched_getaffinity(0)) // min(workers, len(names)))
    take = partial(extract, sampling=sampling, shorter_side=shorter_side, quality=quality, threads=threads, stop=stop)
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
            pool.shutdown(cancel_futures=True)  # before `scratch` goes: running jobs still write to it
            shutil.rmtree(scratch, ignore_errors=True)
    for name in rejected:
        with suppress(OSError):
            os.removedirs((out / name).parent)  # removes only empty folders: an empty class is no part of a data set
    there = {str(path.parent.relative_to(out)) for path in out.rglob(RECORD)}
    return Summary(records, rejected, sorted(there - set(names)))


def find_videos(folder: Path) -> list[str]:
    """Return CLASS/VIDEO of each video in a folder, in sorted order.

    Raises ConfigError for a path that is not a folder, has no class folders, or has a class without videos.
    """
    if not folder.is_dir():
        raise ConfigError(f"{printable(folder)} is not a folder; give one with a sub-folder of videos per class")
    found = find_files(folder, EXTENSIONS, "videos", skipped=LATEST.skipped)
    return [name for names in found.values() for name in names]


def _renew(video: Path, folder: Path, scratch: Path, take: Callable[..., int], hwaccel: str | None) -> Record:
    """Take the frames of a video unless `folder` has them and the video has not changed. Returns their record.

    scratch: a folder on the same disk for unfinished frames. take: `extract` with its other arguments.
    """
    size, mtime_ns = _identify(video)
    with suppress(FileNotFoundError, ValueError, TypeError):  # missing, or damaged, as by a power cut
        record = Record(**json.loads((folder / RECORD).read_text()))
        if (record.size, record.mtime_ns) == (size, mtime_ns):
            return record
    fresh = scratch / uuid.uuid4().hex
    scratch.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        folder.rename(scratch / f"{fresh.name}.old")  # in one step: no half-deleted frames remain after a kill
    duration_s = probe(video).duration_s or 0.0
    software = ""
    try:
        num_frames = take(video, fresh, hwaccel=hwaccel)
    except BadVideoError as error:
        if hwaccel is None:
            raise
        # The CPU decodes more formats than the hardware. For a broken video it raises BadVideoError, too.
        num_frames = take(video, fresh)
        software = str(error)
    record = Record(size, mtime_ns, num_frames, duration_s, software)
    (fresh / RECORD).write_text(json.dumps(asdict(record)))  # before the rename: the frames appear with their record
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh.rename(folder)
    return record


# --- Command line ---


@contextmanager
def _claim(folder: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Lock a folder for this process, and write the settings to it.

    Raises ConfigError for a folder that another process has locked, that has other content, or other settings.
    """
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
        os.close(descriptor)  # releases the lock; the end of the process would do so, too


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError if `folder` was begun with other settings. A folder without settings passes."""
    if not (folder / SETTINGS).exists():
        return
    changes = changed(json.loads((folder / SETTINGS).read_text()), settings, {"quality": FRAME_QUALITY})
    if changes:
        raise ConfigError(
            f"{printable(folder)} was begun with other settings ({'; '.join(changes)}); "
            f"give those again, or another OUT, or delete this one"
        )


def _print_summary(summary: Summary, sampling: Sampling, out: Path, rejected: Path) -> None:
    """Print the summary on stdout. rejected: the file with the list of broken videos."""
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
    """Return CLASS of CLASS/VIDEO."""
    return name.partition("/")[0]


def _run(arguments: argparse.Namespace) -> int:
    """Check the arguments, take the frames, pack them if wanted, and print a summary. Returns the exit code."""
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
    find_videos(videos)  # raises for a wrong VIDEOS before anything is written
    settings = {
        # JSON has no bytes: escape what is not UTF-8 in the name.
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
    # `pack` accepts only a folder of its own, so the frames that become shards are kept in a hidden folder beside OUT.
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
        write_text(rejected, "".join(lines))  # with --shards in the place of the list of `pack`, which names frames
        if arguments.shards and summary.records:
            # Settings in OUT mark the shards as complete. Written before the frames are deleted: a command killed in
            # between finds the mark and deletes them.
            write_text(out / SETTINGS, (folder / SETTINGS).read_text())
            shutil.rmtree(folder)
    _print_summary(summary, sampling, out, rejected)
    return 0 if summary.records else 1


def run(arguments: argparse.Namespace) -> int:
    """Take frames from videos and print a summary. arguments: as parsed by ``commands.video_parser``.

    Returns the exit code: 0 success, 1 no frames, or reading or writing failed, 2 wrong option or folder, 128 + signal
    if stopped.
    """
    escape_unencodable()  # a name that the terminal cannot encode must not end the command
    goes_on = f"finished frames in {printable(arguments.out)} are kept, and the same command continues there"
    try:
        return _run(arguments)
    except ConfigError as error:
        print(f"error: {error_line(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error_line(error)}; {goes_on}", file=sys.stderr)
        return 1
    except (Stopped, KeyboardInterrupt) as stopped:
        print(f"stopped; {goes_on}", file=sys.stderr)
        return 128 + (getattr(stopped, "signum", None) or signal.SIGINT)
