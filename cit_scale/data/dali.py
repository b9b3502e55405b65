"""Training and evaluation images through NVIDIA DALI, on a GPU or on the CPU.

DALI decodes and computes; it decides nothing. `order` says which image comes next, `draws` makes every random number,
and both reach DALI through its external source. So an image is the same, bit for bit, at any rank count, at any
micro-batch size and after any resume, and the whole state of a stream is how many micro-batches were taken from it.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali import math as dali_math
from nvidia.dali.auto_aug.core import select
from nvidia.dali.data_node import DataNode
from torch import Tensor

from cit_scale.batch import Batch
from cit_scale.config import AugmentConfig, ConfigError, DataConfig
from cit_scale.data import draws
from cit_scale.data.draws import Draw
from cit_scale.data.order import Cursor, epoch_order, rank_slice, steps_per_epoch
from cit_scale.data.sources import Source
from cit_scale.world import World

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FILL = (124, 116, 104)  # what a warp uncovers: ImageNet's mean colour, as timm fills it


class UndecodableImageError(RuntimeError):
    """An image that its index knows and the decoder does not take."""


@dataclass(frozen=True)
class Plan:
    """One micro-batch before it is decoded: what to read, and what to do with it."""

    positions: np.ndarray
    """(B,) int64, as in Batch."""

    samples: np.ndarray
    """(B,) int64, as in Batch."""

    arguments: tuple[np.ndarray, ...]
    """What the pipeline takes beside the encoded images; each has B rows."""

    draw: Draw | None = None


# --- The streams ---


def train_stream(
    source: Source,
    augment: AugmentConfig,
    data: DataConfig,
    seed: int,
    cursor: Cursor,
    global_batch_size: int,
    micro_batch_size: int,
    world: World,
    device: torch.device,
) -> Iterator[Batch]:
    """This rank's micro-batches from `cursor` on, without end and across epochs. Close it, or drop it, to stop DALI.

    Images are (micro_batch_size, 3, image_size, image_size) float32 in [0, 1], but for the noise of random erasing.
    Raises ValueError for batch sizes that fit neither each other nor the cursor, ConfigError for a RandAugment notation
    that cannot be read, and UndecodableImageError when the stream comes to such an image.
    """
    randaugment = read_randaugment(augment.randaugment)
    num_steps = steps_per_epoch(len(source), global_batch_size)
    cursor.step(len(source), global_batch_size)  # refuses a cursor of another global batch size

    def micro_batches_of(epoch: int, samples_seen: int) -> Iterator[Plan]:
        order = epoch_order(len(source), seed, epoch, augment.repeats)
        for start in range(samples_seen, num_steps * global_batch_size, global_batch_size):
            share = rank_slice(order, start, global_batch_size, micro_batch_size, world.rank, world.world_size)
            for positions, samples, repeats in zip(share.positions, share.samples, share.repeats, strict=True):
                draw = draws.draw(
                    seed,
                    epoch,
                    samples,
                    repeats,
                    source.heights[samples],
                    source.widths[samples],
                    image_size=data.image_size,
                    crop_scale=augment.crop_scale,
                    crop_ratio=augment.crop_ratio,
                    flip_prob=augment.flip_prob,
                    randaugment=randaugment,
                    erase_prob=augment.erase_prob,
                )
                yield Plan(positions, samples, _train_arguments(draw, data.image_size), draw)

    first = micro_batches_of(cursor.epoch, cursor.samples_seen)
    later = (micro_batches_of(epoch, 0) for epoch in itertools.count(cursor.epoch + 1))
    plans = itertools.chain(first, itertools.chain.from_iterable(later))
    plans = itertools.chain([next(plans)], plans)  # sizes that do not fit are reported now, not at the first image
    num_layers = randaugment.num_layers if randaugment else 0
    return _run(_train_pipeline, source, plans, data, micro_batch_size, device, num_layers=num_layers)


def eval_stream(
    source: Source, data: DataConfig, batch_size: int, world: World, device: torch.device
) -> Iterator[Batch]:
    """Every image of `source` exactly once over all ranks: this rank's are rank, rank + world_size, ...

    The shorter side is resized to image_size / crop_ratio, then the centre is cropped, as torchvision rounds both.
    Every rank yields the same number of batches of `batch_size`; where it has no more images, a repeated one stands in,
    with position -1.
    """

    def plans() -> Iterator[Plan]:
        per_rank = -(-len(source) // world.world_size)
        for first in range(0, per_rank, batch_size):
            positions = np.arange(batch_size) * world.world_size + world.rank
            samples = first * world.world_size + positions
            is_padding = samples >= len(source)
            positions = np.where(is_padding, -1, positions)
            samples = np.where(is_padding, len(source) - 1, samples)
            yield Plan(positions, samples, _eval_arguments(source.heights[samples], source.widths[samples], data))

    return _run(_eval_pipeline, source, plans(), data, batch_size, device)


def _run(
    pipeline_of: Callable[..., Pipeline],
    source: Source,
    plans: Iterator[Plan],
    data: DataConfig,
    batch_size: int,
    device: torch.device,
    **options: int,
) -> Iterator[Batch]:
    """Run the plans, in order, through one pipeline."""
    in_flight: deque[Plan] = deque()

    def feed() -> tuple[list[np.ndarray] | np.ndarray, ...]:
        plan = next(plans)  # its StopIteration tells DALI that this was all
        in_flight.append(plan)
        return [np.frombuffer(source.read(sample), np.uint8) for sample in plan.samples], *plan.arguments

    device_id = None
    if device.type == "cuda":
        device_id = torch.cuda.current_device() if device.index is None else device.index
    pipeline = pipeline_of(
        feed,
        data.image_size,
        batch_size=batch_size,
        num_threads=data.decode_threads,
        prefetch_queue_depth=data.prefetch,
        device_id=device_id,
        **options,
    )
    while True:
        try:
            # Outputs bound to torch's stream are neither read too early nor handed back to DALI too early.
            (images,) = pipeline.run(None if device_id is None else torch.cuda.current_stream(device_id))
        except StopIteration:
            return
        except RuntimeError as error:
            _name_undecodable(source, [sample for plan in in_flight for sample in plan.samples], error)
            raise
        plan = in_flight.popleft()
        images = torch.from_dlpack(images.as_tensor())  # the same memory, which DALI now leaves alone
        if plan.draw is not None:
            erase(images, plan.draw)
        yield Batch(
            images=images,
            labels=torch.from_numpy(source.labels[plan.samples]).to(device, non_blocking=True),
            positions=torch.from_numpy(plan.positions),
            samples=torch.from_numpy(plan.samples),
        )


def erase(images: Tensor, draw: Draw) -> None:
    """Fill each image's erasing box, in place, with noise that is a function of its key.

    images: (B, 3, H, W). The noise is N(0, 1) per pixel and channel in ImageNet-normalised space, as timm draws it:
    here mean + std * N(0, 1), which leaves [0, 1] at times. A CPU and a GPU make different noise of the same key.
    """
    generator = torch.Generator(images.device)
    mean, std = torch.tensor((IMAGENET_MEAN, IMAGENET_STD), device=images.device)[:, :, None, None]
    for i in np.flatnonzero(draw.erasing[:, 2]):
        y, x, height, width = draw.erasing[i]
        generator.manual_seed(int(draw.erasing_key[i]))
        noise = torch.randn((3, height, width), generator=generator, device=images.device)
        images[i, :, y : y + height, x : x + width] = mean + std * noise


# --- The pipelines ---


def _train_arguments(draw: Draw, image_size: int) -> tuple[np.ndarray, ...]:
    """The inputs of `_train_pipeline` beside the encoded images, B rows each."""
    matrices = warp_matrices(draw.operations, draw.arguments, image_size)
    layers = zip(draw.operations, draw.arguments, matrices, strict=True)
    arguments = draw.crop[:, :2], draw.crop[:, 2:], draw.flip.astype(np.int32), *itertools.chain.from_iterable(layers)
    return tuple(map(np.ascontiguousarray, arguments))


@pipeline_def(enable_conditionals=True)
def _train_pipeline(feed: Callable, image_size: int, num_layers: int) -> DataNode:
    layer_types = [types.INT32, types.FLOAT, types.FLOAT]
    encoded, start, shape, flip, *layers = fn.external_source(
        source=feed,
        num_outputs=4 + 3 * num_layers,
        dtype=[types.UINT8, types.INT32, types.INT32, types.INT32, *layer_types * num_layers],
        ndim=[1, 1, 1, 0, *[0, 0, 2] * num_layers],
    )
    images = fn.decoders.image_slice(
        encoded, start=start, shape=shape, axes=(0, 1), output_type=types.RGB, device=_decoder_device()
    )
    # PIL's filter, but for the border, which DALI repeats and PIL leaves out: seen where a few pixels become many.
    images = fn.resize(images, size=(image_size, image_size), interp_type=types.INTERP_CUBIC, antialias=True)
    images = fn.flip(images, horizontal=flip)
    operations = [RANDAUGMENT[name] for name in draws.OPERATIONS] + [_identity]
    for layer in range(num_layers):
        operation, argument, matrix = layers[3 * layer : 3 * layer + 3]
        images = select(operations, operation, images, argument, matrix)
    return _to_unit_range(images)


def _eval_arguments(heights: np.ndarray, widths: np.ndarray, data: DataConfig) -> tuple[np.ndarray, ...]:
    """The inputs of `_eval_pipeline` beside the encoded images: size (B, 2) and start of the crop (B, 2)."""
    sides = np.stack((heights, widths), axis=1)
    sizes = round(data.image_size / data.crop_ratio) * sides // sides.min(axis=1, keepdims=True)
    return sizes.astype(np.float32), np.rint((sizes - data.image_size) / 2).astype(np.int32)


@pipeline_def
def _eval_pipeline(feed: Callable, image_size: int) -> DataNode:
    encoded, size, start = fn.external_source(
        source=feed, num_outputs=3, dtype=[types.UINT8, types.FLOAT, types.INT32], ndim=1
    )
    images = fn.decoders.image(encoded, output_type=types.RGB, device=_decoder_device())
    images = fn.resize(images, size=size, interp_type=types.INTERP_CUBIC, antialias=True)
    images = fn.slice(images, start=start, shape=(image_size, image_size), axes=(0, 1))
    return _to_unit_range(images)


def _decoder_device() -> str:
    return "cpu" if Pipeline.current().device_id is None else "mixed"


def _to_unit_range(images: DataNode) -> DataNode:
    """HWC bytes -> CHW float32 in [0, 1]."""
    return fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout="CHW", mean=[0.0] * 3, std=[255.0] * 3)


# --- RandAugment: what timm does with PIL, on (H, W, 3) uint8 ---


def warp_matrices(operations: np.ndarray, arguments: np.ndarray, image_size: int) -> np.ndarray:
    """The affine map of each drawn warp, from output to input pixels, as PIL writes it: (L, B) -> (L, B, 2, 3) float32.

    Operations that do not warp get the identity.
    """
    matrices = np.zeros((*operations.shape, 2, 3))
    matrices[..., 0, 0] = matrices[..., 1, 1] = 1
    entries = {
        "shear_x": (0, 1, 1),
        "shear_y": (1, 0, 1),
        "translate_x": (0, 2, image_size),
        "translate_y": (1, 2, image_size),
    }
    names = list(draws.OPERATIONS)
    for name, (row, column, scale) in entries.items():
        drawn = operations == names.index(name)
        matrices[drawn, row, column] = scale * arguments[drawn]
    rotated = operations == names.index("rotate")
    angles = np.deg2rad(arguments[rotated].astype(np.float64))
    cos, sin, centre = np.cos(angles), np.sin(angles), image_size / 2
    rows = (cos, -sin, centre * (1 - cos + sin)), (sin, cos, centre * (1 - sin - cos))
    matrices[rotated] = np.moveaxis(np.array(rows), -1, 0)
    return matrices.astype(np.float32)


def _warp(images: DataNode, argument: DataNode, matrix: DataNode) -> DataNode:
    """Bilinear; DALI has no bicubic warp. It fills with one value for all channels, so the fill colour is made zero."""
    fill = types.Constant(np.array(FILL, np.float32))
    return fn.cast(fn.warp_affine(images - fill, matrix=matrix, fill_value=0.0) + fill, dtype=types.UINT8)


def _auto_contrast(images: DataNode, argument: DataNode, matrix: DataNode) -> DataNode:
    low = fn.reductions.min(images, axis_names="HW", keep_dims=True)
    high = fn.reductions.max(images, axis_names="HW", keep_dims=True)
    span = high - low + 255 * (low == high)  # a channel of one value stays as it is
    return fn.cast((images - low * (low < high)) * 255 // span, dtype=types.UINT8)


def _equalize(images: DataNode, argument: DataNode, matrix: DataNode) -> DataNode:
    """With OpenCV's formula. PIL cuts its steps to whole pixels: 2 of 255 away at 224 x 224, but 13 at 32 x 32."""
    return fn.equalize(images)


def _invert(images: DataNode, argument: DataNode, matrix: DataNode) -> DataNode:
    return images ^ types.Constant(255, dtype=types.UINT8)


def _posterize(images: DataNode, argument: DataNode, matrix: DataNode) -> DataNode:
    return images & fn.cast(256 - dali_math.pow(2.0, 8 - argument), dtype=types.UINT8)


def _solarize(images: DataNode, argument: DataNode, matrix: DataNode) -> DataNode:
    return images ^ ((images >= argument) * types.Constant(255, dtype=types.UINT8))


def _solarize_add(images: DataNode, argument: DataNode, matrix: DataNode) -> DataNode:
    return images + (images < 128) * fn.cast(argument, dtype=types.UINT8)  # at most 127 + 110: no overflow


def _color(images: DataNode, argument: DataNode, matrix: DataNode) -> DataNode:
    return fn.saturation(images, saturation=argument)


def _contrast(images: DataNode, argument: DataNode, matrix: DataNode) -> DataNode:
    """Away from, or towards, the mean grey of the image."""
    means = fn.reductions.mean(images, axis_names="HW", keep_dims=True)
    weights = types.Constant(np.array([0.299, 0.587, 0.114], np.float32))  # ITU-R 601, PIL's grey
    grey = dali_math.floor(fn.reductions.sum(means * weights, axis_names="C", keep_dims=True) + 0.5)
    return fn.cast(images * argument + grey * (1 - argument), dtype=types.UINT8)


def _brightness(images: DataNode, argument: DataNode, matrix: DataNode) -> DataNode:
    return fn.brightness(images, brightness=argument)


def _sharpness(images: DataNode, argument: DataNode, matrix: DataNode) -> DataNode:
    """Away from, or towards, PIL's smoothed image."""
    smooth = types.Constant(np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13)
    same = types.Constant(np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], np.float32))
    kernel = same * argument + smooth * (1 - argument)
    return fn.filter(images, kernel.gpu() if images.device == "gpu" else kernel)


def _identity(images: DataNode, argument: DataNode, matrix: DataNode) -> DataNode:
    return images


RANDAUGMENT: dict[str, Callable[[DataNode, DataNode, DataNode], DataNode]] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": _invert,
    "rotate": _warp,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _color,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "shear_x": _warp,
    "shear_y": _warp,
    "translate_x": _warp,
    "translate_y": _warp,
}


# --- When it goes wrong ---


def read_randaugment(text: str | None) -> draws.RandAugment | None:
    """AugmentConfig.randaugment, or a ConfigError."""
    try:
        return None if text is None else draws.parse_randaugment(text)
    except ValueError as error:
        raise ConfigError(f"augment.{error}") from None


def _name_undecodable(source: Source, samples: list[int], error: Exception) -> None:
    """DALI names no image when a batch fails: try one by one and raise UndecodableImageError for the first bad one."""

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def decode_one(data: bytes) -> DataNode:
        encoded = fn.external_source(source=lambda: [np.frombuffer(data, np.uint8)], dtype=types.UINT8, ndim=1)
        return fn.decoders.image(encoded, output_type=types.RGB)

    for sample in samples:
        try:
            (image,) = decode_one(source.read(sample)).run()
        except RuntimeError:
            raise UndecodableImageError(
                f"{source.name(sample)} cannot be decoded; restore it to go on, or start anew without it (--no-resume)"
            ) from error
        found, expected = tuple(image.at(0).shape[:2]), (source.heights[sample], source.widths[sample])
        if found != expected:
            raise UndecodableImageError(
                f"{source.name(sample)} is now {found[0]} x {found[1]} pixels, but was {expected[0]} x {expected[1]} "
                f"when it was indexed; restore it, or index the data set again"
            ) from error
