"""Benchmark of the training stream, in images per second, against timm's loader and DALI's own file reader.

python -m cit_scale.bench.decode --synthetic 400
python -m cit_scale.bench.decode --data photos --threads 8 --batch 256 --images 12800
python -m cit_scale.bench.decode --data photos --rows recipe timm_recipe
python -m cit_scale.bench.decode --data photos --device cuda --threads 8 --batch 256 --images 12800

With --device cuda the batches come to lie on the GPU: decoded there by us and by DALI's reader, and brought there by
timm's loader, which then normalises and erases. A turn ends when the GPU is done.

All streams are opened once, never end, and take turns. A stream prefetches until its queues are full, also during
another stream's turn. A turn therefore starts when all streams are idle, and first takes, untimed, as many batches as
can have been prefetched.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import PIL
import psutil
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from PIL import Image, ImageOps
from timm.data import ImageDataset, auto_augment, create_loader
from torch import Tensor

from cit_scale.bench.measure import CPU, add_device, machine_text, ratio, seconds, spread, table
from cit_scale.config import AugmentConfig, DataConfig
from cit_scale.data.order import Cursor, permutation
from cit_scale.data.reader import Reader
from cit_scale.data.stream import train_stream
from cit_scale.datasets.folders import ImageFolder, Manifest
from cit_scale.datasets.pack import pack
from cit_scale.datasets.shards import TarShards
from cit_scale.datasets.sources import Source, Subset, open_source
from cit_scale.distributed.world import World
from cit_scale.errors import ConfigError
from cit_scale.run.results import environment_record
from cit_scale.text import positive

# --- Synthetic images ---

HEIGHT, WIDTH = 375, 500  # the most common size in ImageNet
LARGE_HEIGHT, LARGE_WIDTH = 768, 1024  # the usual size in Open Images
QUALITY = 90  # of the JPEG; gives about 90 KB an image
# Amplitude falls with frequency ** -FALL: close to the spectrum of photographs, and gives files of their size.
FALL = 1.15
SHAPES = 5


def photo(height: int, width: int, seed: int) -> np.ndarray:
    """Draw a synthetic image that takes about as long to decode as a photograph. Returns (height, width, 3) uint8.

    Noise with a photograph's spectrum, in brightness and more weakly in colour, and in front of it shaded ellipses,
    which add edges.
    """
    rng = np.random.default_rng(seed)
    y, x = np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width
    amplitude = np.hypot(y, x).clip(min=1) ** -FALL
    light, red_cyan, blue_yellow = (_clouds(rng, amplitude, height, width) for _ in range(3))
    light += 0.4 * np.linspace(1, -1, height)[:, None]  # brighter at the top, as a sky
    y, x = np.mgrid[:height, :width] / max(height, width)
    for _ in range(SHAPES):
        centre_y, centre_x = rng.random(2) * (height, width) / max(height, width)
        radius_y, radius_x = rng.uniform(0.05, 0.25, 2)
        distance = ((y - centre_y) / radius_y) ** 2 + ((x - centre_x) / radius_x) ** 2
        inside = distance < 1
        for plane, deviation in ((light, 1.0), (red_cyan, 1.5), (blue_yellow, 1.5)):
            plane[inside] = 0.5 * plane[inside] + rng.normal(0, deviation)
        light[inside] -= 0.5 * distance[inside]
    colours = light + 0.35 * red_cyan, light - 0.15 * red_cyan - 0.1 * blue_yellow, light + 0.4 * blue_yellow
    return (120 + 50 * np.stack(colours, axis=-1)).clip(0, 255).astype(np.uint8)


def _clouds(rng: np.random.Generator, amplitude: np.ndarray, height: int, width: int) -> np.ndarray:
    """Noise with a given amplitude spectrum. Returns (height, width), with a standard deviation of 1."""
    noise = np.fft.rfft2(rng.standard_normal((height, width)))
    clouds = np.fft.irfft2(noise * amplitude, s=(height, width))
    return clouds / clouds.std()


def to_jpeg(pixels: np.ndarray) -> bytes:
    """Encode (height, width, 3) uint8 as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def make_photos(folder: Path, count: int, size: tuple[int, int], threads: int) -> None:
    """Write ``count`` synthetic images as JPEG to a new folder with two classes. size: (height, width) in pixels."""
    for name in ("even", "odd"):
        (folder / name).mkdir(parents=True)

    def write(seed: int) -> None:
        path = folder / ("odd" if seed % 2 else "even") / f"{seed:06d}.jpg"
        path.write_bytes(to_jpeg(photo(*size, seed)))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(count)))


# --- Streams: each yields (B, 3, image_size, image_size) float32 without end ---


@dataclass(frozen=True)
class Setting:
    """Settings of all rows. threads: decoding threads, or timm's worker processes. image_size: in pixels. device: where
    the batches come to lie. hw_decoder_load: as data.hw_decoder_load, for DALI's reader too.
    """

    threads: int
    batch: int
    image_size: int
    device: torch.device = CPU
    hw_decoder_load: float = 0.0


Stream = Generator[Tensor, None, None]
Open = Callable[[Source, Setting], Stream]


def ours(augment: AugmentConfig) -> Open:
    """Our training stream with ``augment``."""

    def batches(source: Source, setting: Setting) -> Stream:
        data = DataConfig(
            image_size=setting.image_size, decode_threads=setting.threads, hw_decoder_load=setting.hw_decoder_load
        )
        sizes, device = (setting.batch, setting.batch), setting.device
        with closing(train_stream(Reader(source), augment, data, 0, Cursor(), *sizes, World(), device)) as stream:
            for batch in stream:
                yield batch.images

    return batches


def timm_loader(**augment: Any) -> Open:
    """timm.data.create_loader as timm's training script calls it.

    The workers produce uint8; PrefetchLoader, in the main process, converts to normalised float32 and erases. On a CPU
    this is as fast as use_prefetcher=False. use_multi_epochs_loader keeps the workers alive from one epoch to the next.
    """

    def batches(source: Source, setting: Setting) -> Stream:
        # Patched while the loader is built: RandAugment looks its operations up then.
        with mock.patch.dict(auto_augment.NAME_TO_OP, PosterizeIncreasing=posterize):
            loader = create_loader(
                ImageDataset("", reader=_TimmReader(source)),
                (3, setting.image_size, setting.image_size),
                setting.batch,
                is_training=True,
                interpolation="bicubic",
                num_workers=setting.threads,
                use_multi_epochs_loader=True,
                device=setting.device,
                **augment,
            )
        while True:
            for images, _ in loader:
                yield images

    return batches


class _TimmReader:
    """Adapts one of our sources to the reader interface of timm's ImageDataset: all rows read the same bytes."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        return io.BytesIO(self._source.read(index)), int(self._source.labels[index])


def posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    """timm's posterize that also accepts 0 bits, which timm draws at magnitude 10.

    Pillow 13 raises ValueError for 0 bits; earlier versions returned a black image, as this function does.
    """
    return ImageOps.posterize(image, bits_to_keep) if bits_to_keep else Image.new("RGB", image.size)


def dali_reader(source: Source, setting: Setting) -> Stream:
    """The batches of ``reader_pipeline``."""
    pipeline, is_cuda = reader_pipeline(source, setting), setting.device.type == "cuda"
    while True:
        images, _ = pipeline.run(torch.cuda.current_stream(setting.device) if is_cuda else None)
        yield torch.from_dlpack(images.as_tensor())


def reader_pipeline(source: Source, setting: Setting) -> Pipeline:
    """The pipeline of DALI's examples, with timm's distribution of crops.

    DALI draws the crops and flips itself, so that they cannot be reproduced.
    """
    assert isinstance(source, Subset)  # as open_sources makes it
    assert isinstance(source.source, ImageFolder | Manifest)
    folder, is_cuda = source.source.folder, setting.device.type == "cuda"
    device_id = torch.cuda.current_device() if is_cuda else None
    decoder = {"device": "mixed", "hw_decoder_load": setting.hw_decoder_load} if is_cuda else {"device": "cpu"}

    @pipeline_def(batch_size=setting.batch, num_threads=setting.threads, device_id=device_id, prefetch_queue_depth=2)
    def read_and_crop() -> tuple[DataNode, DataNode]:
        encoded, labels = fn.readers.file(
            files=[str(folder / os.fsdecode(source.key(index))) for index in range(len(source))],
            labels=source.labels.tolist(),
            random_shuffle=True,
        )
        images = fn.decoders.image_random_crop(
            encoded,
            random_area=AugmentConfig.crop_scale,
            random_aspect_ratio=AugmentConfig.crop_ratio,
            **decoder,
        )
        size = [setting.image_size] * 2
        images = fn.resize(images, size=size, interp_type=types.INTERP_CUBIC, antialias=True)
        mirror = fn.random.coin_flip(probability=AugmentConfig.flip_prob)
        options = {"dtype": types.FLOAT, "output_layout": "CHW", "mean": [0.0] * 3, "std": [255.0] * 3}
        return fn.crop_mirror_normalize(images, mirror=mirror, **options), labels

    return read_and_crop()


class Row(NamedTuple):
    """A line of the table. open: opens the stream. peers: names of the rows that this row is compared with."""

    title: str
    open: Open
    peers: tuple[str, ...] = ()


RECIPE = ours(AugmentConfig())
CROP = ours(AugmentConfig(policy=None, erase_prob=0.0))
ROWS = {
    "recipe": Row("ours, whole recipe", RECIPE, ("timm_recipe",)),
    "timm_recipe": Row(
        "timm, whole recipe", timm_loader(auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, re_mode="pixel")
    ),
    "crop": Row("ours, crop and flip only", CROP, ("timm_crop", "dali_crop")),
    "timm_crop": Row("timm, crop and flip only", timm_loader(color_jitter=0.0)),
    "dali_crop": Row("DALI's file reader, crop and flip only", dali_reader, ("timm_crop",)),
    "3a": Row("ours, 3-Augment", ours(AugmentConfig(policy="3a", erase_prob=0.0)), ("timm_3a",)),
    "timm_3a": Row("timm, 3-Augment", timm_loader(auto_augment="3a", color_jitter=0.3)),
    "crop_shards": Row("ours, crop and flip only, shards", CROP),
    "crop_packed": Row("ours, crop and flip only, shards packed at shorter side 256", CROP, ("crop_shards",)),
    "shards": Row("ours, whole recipe, shards", RECIPE),
    "packed": Row("ours, whole recipe, shards packed at shorter side 256", RECIPE, ("shards",)),
    "large_shards": Row("ours, whole recipe, shards of larger images", RECIPE),
    "large_packed": Row("ours, whole recipe, the same packed at shorter side 256", RECIPE, ("large_shards",)),
}
LARGE = {"large_shards", "large_packed"}  # read the larger synthetic images
# Rows that read shards: the shorter side to which pack resizes the images, in pixels; None keeps them as they are.
SHORTER_SIDES = {
    "crop_shards": None,
    "crop_packed": 256,
    "shards": None,
    "packed": 256,
    "large_shards": None,
    "large_packed": 256,
}


# --- Timing ---


def take_turns(
    streams: Mapping[str, Iterator[Tensor]], batches: int, rounds: int, prefetched: int, device: torch.device = CPU
) -> dict[str, list[float]]:
    """Time the streams in turns. Returns name to seconds per ``batches`` batches, one figure per round.

    prefetched: number of batches that a stream may have prefetched; they are taken before the clock starts. device: on
    which the batches lie; it is waited for.
    """
    times: dict[str, list[float]] = {name: [] for name in streams}
    for _ in range(rounds):
        for name, stream in streams.items():
            wait_for_rest()
            take(stream, prefetched)
            times[name].append(seconds(partial(take, stream, batches), device))
    return times


def take(stream: Iterator[Tensor], count: int) -> None:
    """Take ``count`` batches from a stream and drop them."""
    for _ in itertools.islice(stream, count):
        pass


def wait_for_rest(every_s: float = 0.1, share: float = 0.2) -> None:
    """Wait until this process and its workers use less than ``share`` of a core over ``every_s`` seconds."""
    used_s = _cpu_s()
    while True:
        time.sleep(every_s)
        before_s, used_s = used_s, _cpu_s()
        if used_s - before_s < share * every_s:
            return


def _cpu_s() -> float:
    """CPU seconds that this process and its children have used so far."""
    this = psutil.Process()
    used = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return sum(times.user + times.system for times in used)


# --- Command ---


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark and print a table in Markdown."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    # With more threads timm's main process and our erasing lose time to threads that wait.
    torch.set_num_threads(1)
    device, load = arguments.device, arguments.hw_decoder_load
    refuse_hardware_without_gpu(parser, arguments)
    setting = Setting(arguments.threads, arguments.batch, arguments.image_size, device, load)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as opened:
        try:
            sources = open_sources(arguments, Path(temporary))
        except ConfigError as error:
            parser.error(str(error))
        # Reads every image once, so that all rows find the files in the page cache.
        sizes = {name: image_sizes_text(source) for name, source in sources.items()}
        streams = {name: ROWS[name].open(source, setting) for name, source in sources.items()}
        # Start timm's streams first: they fork workers, which is safest before DALI has started threads.
        for name in sorted(streams, key=lambda name: not name.startswith("timm")):
            opened.enter_context(closing(streams[name]))
            take(streams[name], 1)
        batches = max(1, arguments.images // arguments.batch)
        # timm's workers prefetch 2 batches each and its PrefetchLoader 1; our stream and DALI's reader prefetch fewer.
        times = take_turns(streams, batches, arguments.rounds, prefetched=2 * arguments.threads + 1, device=device)
    about = (
        library_versions_text(device),
        f"{setting.threads} threads or workers, batches of {setting.batch} images, {setting.image_size} pixels"
        + (f", {load:g} of the JPEGs decoded by the GPU's hardware" if load else ""),
        f"median (minimum to maximum) of {arguments.rounds} rounds in turns, {batches} batches each",
    )
    print("; ".join(about) + "\n")
    print(report(times, sizes, batches * setting.batch))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--data", metavar="FOLDER", help="images or shards, as for data.train")
    images.add_argument("--synthetic", type=positive, metavar="N", help=f"draw N images of {WIDTH} x {HEIGHT} pixels")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="rows to measure (default: all that the data allow)")
    parser.add_argument(
        "--packed", action="store_true", help="with --data: add the rows that pack the images to shards first"
    )
    parser.add_argument("--threads", type=positive, default=2, help="decoding threads, or timm's workers (default: 2)")
    parser.add_argument("--batch", type=positive, default=64, help="images per batch (default: 64)")
    parser.add_argument("--rounds", type=positive, default=5, help="rounds to take the median of (default: 5)")
    parser.add_argument(
        "--images", type=positive, default=1536, help="images per round, chosen from larger data at random"
    )
    parser.add_argument("--image_size", type=positive, default=224, help="pixels (default: 224)")
    add_decoder(parser)
    return parser


def add_decoder(parser: argparse.ArgumentParser) -> None:
    """Add --device and --hw_decoder_load."""
    add_device(parser)
    parser.add_argument(
        "--hw_decoder_load", type=_share, default=0.0, metavar="SHARE", help="as data.hw_decoder_load (default: 0)"
    )


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def refuse_hardware_without_gpu(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.hw_decoder_load and arguments.device.type == "cpu":
        parser.error(f"--hw_decoder_load {arguments.hw_decoder_load:g} is a GPU's; give --device cuda")


def open_sources(arguments: argparse.Namespace, temporary: Path) -> dict[str, Source]:
    """Returns row name to its images, for the rows of --rows or all possible rows.

    temporary: folder for synthetic images and shards. Raises ConfigError for a row that the data do not allow, or for
    fewer images than a batch.
    """
    is_synthetic = arguments.synthetic is not None
    if is_synthetic:
        make_photos(temporary / "photos", arguments.synthetic, (HEIGHT, WIDTH), arguments.threads)
        whole: Source = ImageFolder(temporary / "photos", temporary)
    else:
        whole = open_source(arguments.data, Path(DataConfig.cache_dir).expanduser(), "--data")
    good = np.setdiff1d(np.arange(len(whole)), list(whole.rejects))
    source = Subset(whole, good[permutation(len(good), 0)[: arguments.images]])
    if len(source) < arguments.batch:
        raise ConfigError(
            f"{len(source)} images do not fill a batch of {arguments.batch}; give more or a smaller batch"
        )

    # dali_crop passes paths of image files to DALI, so the data must not be shards.
    impossible = set() if isinstance(whole, ImageFolder | Manifest) else {"dali_crop"}
    impossible |= set() if is_synthetic else LARGE
    if refused := impossible & set(arguments.rows or ()):
        raise ConfigError(f"no rows {', '.join(refused)}: dali_crop reads image files, the large ones are --synthetic")
    unwanted = set() if is_synthetic or arguments.packed else set(SHORTER_SIDES)
    rows = arguments.rows or [name for name in ROWS if name not in impossible | unwanted]
    sources: dict[str, Source] = dict.fromkeys(rows, source)
    larger: Source = source
    if LARGE & sources.keys():
        make_photos(temporary / "larger", 2 * arguments.batch, (LARGE_HEIGHT, LARGE_WIDTH), arguments.threads)
        larger = ImageFolder(temporary / "larger", temporary)
    for name in sources.keys() & SHORTER_SIDES.keys():
        unpacked, shorter_side = larger if name in LARGE else source, SHORTER_SIDES[name]
        pack(unpacked, temporary / name, workers=arguments.threads, shorter_side=shorter_side)
        sources[name] = TarShards(temporary / name)
    return sources


def image_sizes_text(source: Source) -> str:
    """Mean width, height and file size of the images, as text. Reads every image."""
    kilobytes = sum(len(source.read(index)) for index in range(len(source))) / len(source) / 1e3
    return f"{source.widths.mean():.0f} x {source.heights.mean():.0f}, {kilobytes:.0f} KB"


def library_versions_text(device: torch.device = CPU) -> str:
    """Commit, hardware and library versions in one line."""
    packages = environment_record(World())["packages"]
    dali_version = next(version for name, version in packages.items() if name.startswith("nvidia-dali"))
    return f"{machine_text(device)}, DALI {dali_version}, Pillow {PIL.__version__}"


def report(times: Mapping[str, list[float]], sizes: Mapping[str, str], images: int) -> str:
    """The table in Markdown. times: row name to the seconds for ``images`` images, one figure per round."""
    rows = []
    for name, row_times in times.items():
        row = ROWS[name]
        leads = [f"{ratio(times[peer], row_times):.2f} x {peer}" for peer in row.peers if peer in times]
        rows.append(
            [f"{name}: {row.title}", sizes[name], spread([images / time_s for time_s in row_times]), ", ".join(leads)]
        )
    return table(["row", "mean image", "images/s", "as fast as its peer"], rows)


if __name__ == "__main__":
    main()
