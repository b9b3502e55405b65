"""Compares our augmented images with those of PIL, torchvision and timm for the same random draws.

python -m cit_scale.bench.fidelity
python -m cit_scale.bench.fidelity --images
python -m cit_scale.bench.fidelity --images photos
python -m cit_scale.bench.fidelity --device cuda

The second writes an image in every format, mode and orientation that PIL writes, the third takes those of a folder of
class folders. Each goes through the streams of evaluation and training, and through `pack` and back; listed are those
that are further than 1 of 255 from what PIL shows (16 on a GPU), and those that cannot be used. The fourth computes our
images on a GPU, and compares them with the same ones of PIL.

The error of an image is the mean absolute difference of bytes, 0 to 255, over its pixels and channels. The table shows
the mean, the median and the largest error over all images. The exit code is 1 if a mean exceeds its limit at the first
of the image sizes.
"""

from __future__ import annotations

import argparse
import io
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from PIL.Image import Resampling
from timm.data import IMAGENET_DEFAULT_MEAN, auto_augment
from torch import Tensor
from torchvision import transforms

from cit_scale.bench.decode import (
    HEIGHT,
    WIDTH,
    add_decoder,
    library_versions_text,
    make_photos,
    posterize,
    refuse_hardware_without_gpu,
)
from cit_scale.bench.measure import table
from cit_scale.bench.pil_images import write_images
from cit_scale.config import AugmentConfig, DataConfig
from cit_scale.data import dali, draws
from cit_scale.data.draws import Draw
from cit_scale.data.order import Cursor
from cit_scale.data.reader import Reader
from cit_scale.data.stream import eval_stream, train_stream
from cit_scale.datasets.encoded import to_ppm
from cit_scale.datasets.folders import ImageFolder
from cit_scale.datasets.pack import pack
from cit_scale.datasets.shards import open_packed
from cit_scale.datasets.sources import Source
from cit_scale.distributed.world import World
from cit_scale.errors import ConfigError, error_line
from cit_scale.text import positive

EPOCHS = 4  # passes over the photographs, each with new draws
THREADS = 2
BATCH = 16


class Limits(NamedTuple):
    """decoded, operation, equalize: of the mean error, of images from JPEG, of one operation, of equalize. furthest: of
    a single byte from PIL's."""

    decoded: float
    operation: float
    equalize: float
    furthest: int


# Those of a GPU are assumed, and have not been tried: nvJPEG rounds otherwise than libjpeg, and DALI's resize repeats
# the border. 2 in the mean is what the tests marked gpu allow between a GPU's images and a CPU's.
LIMITS = {"cpu": Limits(0.5, 1.0, 0.5, 1), "cuda": Limits(2.0, 1.0, 0.5, 16)}

# --- Reference images by PIL ---


def _blur(image: Image.Image, sigma: float, **_: object) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(sigma))


THEIRS: dict[str, Callable[..., Image.Image]] = {
    "auto_contrast": auto_augment.auto_contrast,
    "equalize": auto_augment.equalize,
    "invert": auto_augment.invert,
    "rotate": auto_augment.rotate,
    "posterize": posterize,
    "solarize": auto_augment.solarize,
    "solarize_add": auto_augment.solarize_add,
    "color": auto_augment.color,
    "contrast": auto_augment.contrast,
    "brightness": auto_augment.brightness,
    "sharpness": auto_augment.sharpness,
    "shear_x": auto_augment.shear_x,
    "shear_y": auto_augment.shear_y,
    "translate_x": auto_augment.translate_x_rel,
    "translate_y": auto_augment.translate_y_rel,
    "gaussian_blur": _blur,
}
NO_ARGUMENT = {"auto_contrast", "equalize", "invert"}
WHOLE_NUMBERS = {"posterize", "solarize", "solarize_add"}
FILL = tuple(round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN)


def operate(image: Image.Image, name: str, argument: float, resample: Resampling) -> Image.Image:
    """Apply timm's operation ``name`` with a drawn argument. resample: PIL's filter for warps."""
    if name == "identity":
        return image
    arguments = [] if name in NO_ARGUMENT else [int(argument) if name in WHOLE_NUMBERS else float(argument)]
    return THEIRS[name](image, *arguments, fillcolor=FILL, resample=resample)


def augment_image(image: Image.Image, draw: Draw, i: int, data: DataConfig, resample: Resampling) -> Image.Image:
    """Apply the draws of image ``i`` with PIL and timm: crop, resize, flip, operations; no erasing."""
    y, x, height, width = map(int, draw.crop[i])
    image = image.crop((x, y, x + width, y + height)).resize((data.image_size,) * 2, Resampling.BICUBIC)
    image = ImageOps.mirror(image) if draw.flip[i] else image
    for operation, argument in zip(draw.operations[:, i], draw.arguments[:, i], strict=True):
        image = operate(image, draws.NAMES[operation], argument, resample)
    return image


# --- Errors of our images ---

# Filters of PIL's warps: bilinear as in our stream, and bicubic as in timm's recipes. DALI has no bicubic warps.
RESAMPLE = Resampling.BILINEAR, Resampling.BICUBIC


@dataclass(frozen=True)
class Errors:
    """Mean absolute error of each image, (N,), against PIL with bilinear and with bicubic warps.

    allowed: limit of the mean of ``bilinear``; None: no limit.
    """

    bilinear: np.ndarray
    bicubic: np.ndarray
    allowed: float | None = None

    @property
    def is_broken(self) -> bool:
        # Not "mean > allowed": a mean that is NaN must count as broken.
        return self.allowed is not None and not self.bilinear.mean() <= self.allowed


def errors_of(ours: Tensor, theirs: Sequence[Image.Image]) -> np.ndarray:
    """Mean absolute error of each image in bytes. Returns (B,). ours: (B, 3, H, W) in [0, 1]."""
    our_bytes = (ours.cpu() * 255).round().permute(0, 2, 3, 1).numpy()
    return np.abs(our_bytes - np.stack([np.asarray(image) for image in theirs])).mean(axis=(1, 2, 3))


def measure(source: Source, data: DataConfig, device: torch.device) -> dict[str, Errors]:
    """All comparisons at one image size, of images computed on a device. Returns the row's name to its errors."""
    photos = [Image.open(io.BytesIO(source.read(index))) for index in range(len(source))]
    return {
        "resized crop": measure_training(source, photos, data, device, None, LIMITS[device.type].decoded),
        "evaluation": measure_evaluation(source, photos, data, device),
        **measure_operations(photos, data, device),
        "RandAugment, JPEG to tensor": measure_training(source, photos, data, device, AugmentConfig.policy),
        "3-Augment, JPEG to tensor": measure_training(source, photos, data, device, "3a"),
    }


def measure_training(
    source: Source,
    photos: Sequence[Image.Image],
    data: DataConfig,
    device: torch.device,
    policy: str | None,
    allowed: float | None = None,
) -> Errors:
    """Compare the training stream, without erasing, with PIL over EPOCHS epochs."""
    augment = AugmentConfig(policy=policy, erase_prob=0.0)
    sizes = len(source), len(source)
    errors = []
    with closing(train_stream(Reader(source), augment, data, 0, Cursor(), *sizes, World(), device)) as stream:
        for epoch, batch in enumerate(itertools.islice(stream, EPOCHS)):
            samples = batch.samples.numpy()
            # The stream's draws are a function of seed, epoch, sample and repeat, so they can be drawn again here.
            repeats = np.zeros_like(samples)
            heights, widths = source.heights[samples], source.widths[samples]
            draw = draws.draw(0, epoch, samples, repeats, heights, widths, augment, data.image_size)
            for resample in RESAMPLE:
                theirs = [augment_image(photos[sample], draw, i, data, resample) for i, sample in enumerate(samples)]
                errors.append(errors_of(batch.images, theirs))
    # ``errors`` alternates between the two filters of RESAMPLE.
    return Errors(np.concatenate(errors[::2]), np.concatenate(errors[1::2]), allowed)


def measure_evaluation(source: Source, photos: Sequence[Image.Image], data: DataConfig, device: torch.device) -> Errors:
    """Compare the evaluation stream with torchvision's Resize and CenterCrop on PIL images."""
    resize = transforms.Resize(round(data.image_size / data.crop_ratio), transforms.InterpolationMode.BICUBIC)
    transform = transforms.Compose([resize, transforms.CenterCrop(data.image_size)])
    (batch,) = eval_stream(Reader(source), data, len(source), World(), device)
    errors = errors_of(batch.images, [transform(photos[sample]) for sample in batch.samples])
    return Errors(errors, errors, LIMITS[device.type].decoded)


def measure_operations(photos: Sequence[Image.Image], data: DataConfig, device: torch.device) -> dict[str, Errors]:
    """Compare each operation alone: RandAugment's at magnitudes 1, 9 (the recipe's) and 10, and 3-Augment's blur."""
    size = data.image_size, data.image_size
    images = [photo.convert("RGB").resize(size, Resampling.BICUBIC) for photo in photos]
    # Reduce the contrast of every other image, so that operations which raise contrast have an effect.
    images = [image.point(lambda value: value // 2 + 40) if i % 2 else image for i, image in enumerate(images)]

    limits = LIMITS[device.type]
    allowed: dict[tuple[str, tuple[float, ...]], float | None] = {
        (name, arguments_at(level, name)): limits.equalize if name == "equalize" else limits.operation
        for name in draws.OPERATIONS
        for level in (0.1, 0.9, 1.0)
    }
    allowed |= {("gaussian_blur", (sigma,)): None for sigma in (0.1, 0.5, 1.0, 2.0)}
    cases = [(name, argument) for name, arguments in allowed for argument in arguments]
    computed = dict(zip(cases, compute(images, cases, data, device), strict=True))

    def errors(name: str, arguments: Sequence[float], resample: Resampling) -> np.ndarray:
        pairs = [
            (computed[name, argument], [operate(image, name, argument, resample) for image in images])
            for argument in arguments
        ]
        return np.concatenate([errors_of(*pair) for pair in pairs])

    found = {}
    for (name, arguments), limit in allowed.items():
        bilinear, bicubic = (errors(name, arguments, resample) for resample in RESAMPLE)
        found[operation_text(name, arguments)] = Errors(bilinear, bicubic, limit)
    return found


def operation_text(name: str, arguments: Sequence[float]) -> str:
    return name if name in NO_ARGUMENT else f"{name} {', '.join(f'{argument:g}' for argument in arguments)}"


def arguments_at(level: float, name: str) -> tuple[float, ...]:
    """Arguments that RandAugment passes to an operation, for both signs. level: magnitude / 10."""
    arguments = draws.INCREASING_OPERATIONS[name](np.full(2, level), np.array((-1.0, 1.0)))
    return tuple(np.unique(arguments).tolist())


def compute(
    images: Sequence[Image.Image], cases: Sequence[tuple[str, float]], data: DataConfig, device: torch.device
) -> Iterator[Tensor]:
    """Apply each (operation, argument) with the training pipeline on a device. Yields (B, 3, H, W) in [0, 1] for each
    case, on the CPU.

    The crop takes the whole image, and the image is passed as PPM, without loss, so that only the operation differs.
    """
    count = len(images)
    encoded = [np.frombuffer(to_ppm(image), np.uint8) for image in images]

    def arguments(name: str, argument: float) -> tuple[np.ndarray, ...]:
        draw = Draw(
            crop=np.tile(np.array((0, 0, data.image_size, data.image_size), np.int32), (count, 1)),
            flip=np.zeros(count, bool),
            operations=np.full((1, count), draws.NAMES.index(name), np.int32),
            arguments=np.full((1, count), argument, np.float32),
            erasing=np.zeros((count, 4), np.int32),
            erasing_key=np.zeros(count, np.uint64),
        )
        return dali.train_arguments(draw, data.image_size)

    batches = ((encoded, *arguments(*case)) for case in cases)
    pipeline = dali.train_pipeline(
        lambda: next(batches),
        data,
        num_layers=1,
        batch_size=count,
        num_threads=THREADS,
        device_id=torch.cuda.current_device() if device.type == "cuda" else None,
    )
    for _ in cases:
        (computed,) = pipeline.run()
        yield torch.from_dlpack(computed.as_cpu().as_tensor())


# --- Command ---


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table. Returns the exit code: 1 if a mean exceeds its limit at the first image size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=positive, default=16, help="synthetic photographs to compare (default: 16)")
    parser.add_argument("--image_sizes", type=positive, nargs="+", default=[224, 32], help="pixels (default: 224 32)")
    parser.add_argument(
        "--images",
        metavar="FOLDER",
        nargs="?",
        const="",
        help="compare each of these instead, at the first of the sizes",
    )
    add_decoder(parser)
    arguments = parser.parse_args(argv)
    refuse_hardware_without_gpu(parser, arguments)
    load, device = arguments.hw_decoder_load, arguments.device
    common = DataConfig(decode_threads=THREADS, hw_decoder_load=load)
    if arguments.images is not None:
        folder = Path(arguments.images) if arguments.images else None
        try:
            return compare_each(folder, replace(common, image_size=arguments.image_sizes[0]), device)
        except (ConfigError, OSError) as error:
            print(f"error: {error_line(error)}", file=sys.stderr)
            return 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "photos"
        make_photos(folder, arguments.photos, (HEIGHT, WIDTH), THREADS)
        source = ImageFolder(folder, Path(temporary))
        by_size = {size: measure(source, replace(common, image_size=size), device) for size in arguments.image_sizes}
    print(f"{library_versions_text(device)}; {arguments.photos} made-up photographs of {WIDTH} x {HEIGHT} pixels\n")
    print(report(by_size))
    broken = [name for name, errors in by_size[arguments.image_sizes[0]].items() if errors.is_broken]
    if broken:
        print(f"\nmore than allowed: {'; '.join(broken)}", file=sys.stderr)
    return int(bool(broken))


class Distance(NamedTuple):
    """The largest difference of a byte, 0 to 255, from what PIL shows: resized by our filter, and by PIL's."""

    ours: float
    pil: float


def compare_each(folder: Path | None, data: DataConfig, device: torch.device) -> int:
    """Print the largest distances by each way, the images that are too far, and those that cannot be used.

    folder: None: images in every format, mode and orientation that PIL writes. Returns the exit code: 1 for an image
    that is too far, or that PIL opens and we do not use, or the other way round.
    """
    furthest = LIMITS[device.type].furthest
    with tempfile.TemporaryDirectory() as temporary:
        if folder is None:
            folder = Path(temporary) / "images"
            write_images(folder)
        source = ImageFolder(folder, Path(temporary))
        pack(source, Path(temporary) / "packed", workers=THREADS)
        packed = open_packed(Path(temporary) / "packed", Path(temporary))
        readers = {"evaluation": Reader(source), "training": Reader(source), "packed, evaluation": Reader(packed)}
        rows, faults = [], list[str]()
        for way, reader in readers.items():
            found = (train_distances if way == "training" else eval_distances)(reader, data, device)
            far = {name: each.ours for name, each in found.items() if each.ours > furthest}
            faults += [f"{way}: {name} is off by {error:.0f}" for name, error in sorted(far.items())]
            largest = (f"{max((each[place] for each in found.values()), default=0):.0f}" for place in range(2))
            rows.append([way, str(len(found)), *largest, str(len(far))])
        bad = dict[int, str]()
        for reader in (readers["training"], readers["evaluation"]):
            bad |= reader.bad
        for index, reason in sorted(bad.items()):
            print(f"cannot be used: {source.name(index)}\t{reason}")
            if upright(source, index) is not None:
                faults.append(f"PIL opens {source.name(index)}, and it cannot be used here: {reason}")
        there = {packed.key(place) for place in range(len(packed))}
        faults += [
            f"packed: {source.name(index)} is missing"
            for index in range(len(source))
            if index not in bad and source.key(index) not in there
        ]
    print(*faults, sep="\n")
    print(f"\n{library_versions_text(device)}; {len(source)} images at {data.image_size} pixels\n")
    header = ["seen in", "images", "largest distance of 255", "with PIL's filter", f"above {furthest}"]
    print(table(header, rows))
    return int(bool(faults))


def eval_distances(reader: Reader, data: DataConfig, device: torch.device) -> dict[str, Distance]:
    """The distance of each image that can be used, seen whole."""
    image_size, found = data.image_size, {}
    with closing(eval_stream(reader, replace(data, crop_ratio=1.0), BATCH, World(), device)) as stream:
        for batch in stream:
            for image, position, sample in zip(batch.images, batch.positions, batch.samples.tolist(), strict=True):
                if position >= 0:
                    whole = upright(reader.source, sample)
                    found[reader.source.name(sample)] = ABSENT
                    if whole is not None:
                        scale = image_size / min(whole.size)
                        width, height = (max(int(side * scale), image_size) for side in whole.size)
                        left, top = round((width - image_size) / 2), round((height - image_size) / 2)
                        box = left, top, left + image_size, top + image_size
                        found[reader.source.name(sample)] = _distance(image, whole, width, height, box)
    return found


def train_distances(reader: Reader, data: DataConfig, device: torch.device) -> dict[str, Distance]:
    """The same for the crop of each image in the first epoch of training, neither flipped nor otherwise changed."""
    source, image_size = reader.source, data.image_size
    augment = AugmentConfig(flip_prob=0.0, policy=None, erase_prob=0.0)
    found = {}
    sizes = len(source), 1
    with closing(train_stream(reader, augment, data, 0, Cursor(), *sizes, World(), device)) as stream:
        for batch in itertools.islice(stream, len(source)):
            samples = batch.samples.numpy()
            sides = source.heights[samples], source.widths[samples]
            drawn = draws.draw(0, 0, samples, np.zeros_like(samples), *sides, augment, image_size)
            (y, x, height, width), sample = drawn.crop[0].tolist(), int(samples[0])
            whole = upright(source, sample)
            found[source.name(sample)] = ABSENT
            if whole is not None:
                part = whole.crop((x, y, x + width, y + height))
                box = 0, 0, image_size, image_size
                found[source.name(sample)] = _distance(batch.images[0], part, image_size, image_size, box)
    return found


ABSENT = Distance(255, 255)  # of an image that PIL does not open


def _distance(image: Tensor, theirs: Image.Image, width: int, height: int, box: tuple[int, int, int, int]) -> Distance:
    """image: (3, H, W) in [0, 1]. theirs: what is resized to width and height, and then cropped to the box."""
    ours = (image.cpu() * 255).round().permute(1, 2, 0).numpy()
    by_us = Image.fromarray(dali.resize(torch.from_numpy(np.array(theirs)), torch.tensor([height, width])).numpy())
    expected = (np.asarray(each.crop(box)).astype(float) for each in (by_us, resized(theirs, width, height)))
    return Distance(*(float(np.abs(ours - each).max()) for each in expected))


def upright(source: Source, sample: int) -> Image.Image | None:
    """The image as PIL shows it; None where PIL cannot open it."""
    try:
        with Image.open(io.BytesIO(source.read(sample))) as image:
            image.load()
            try:
                return ImageOps.exif_transpose(image).convert("RGB")
            except Exception:  # of metadata that cannot be read
                return image.convert("RGB")
    except Exception:  # PIL's readers raise anything
        return None


def resized(image: Image.Image, width: int, height: int) -> Image.Image:
    """The width first, as before Pillow 13, which begins with the height where that is less work."""
    return image.resize((width, image.height), Resampling.BICUBIC).resize((width, height), Resampling.BICUBIC)


def report(by_size: Mapping[int, Mapping[str, Errors]]) -> str:
    """The table in Markdown. by_size: image size in pixels to the result of ``measure``. Limits apply to the first."""
    judged, *_ = by_size
    header = ["compared"]
    for image_size in by_size:
        header += [f"{image_size} pixels: mean", "median", "largest", *(["allowed"] if image_size == judged else [])]
        header += ["mean, bicubic warps"]
    rows = []
    for name in by_size[judged]:
        row = [name]
        for image_size, rows_of_size in by_size.items():
            errors = rows_of_size[name]
            values = errors.bilinear.mean(), np.median(errors.bilinear), errors.bilinear.max()
            row += [f"{value:.3f}" for value in values]
            if image_size == judged:
                row.append(
                    "" if errors.allowed is None else f"{errors.allowed}{', broken' if errors.is_broken else ''}"
                )
            row.append(f"{mean:.3f}" if (mean := errors.bicubic.mean()) != errors.bilinear.mean() else "")
        rows.append(row)
    return table(header, rows)


if __name__ == "__main__":
    sys.exit(main())
