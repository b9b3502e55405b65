"""Images as the page shows them: thumbnails, what tokens look at, samples of training. All as ``data:`` addresses."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cit_scale.batch import MixedBatch
from cit_scale.config import RunConfig, split_batch
from cit_scale.data.mixing import mix
from cit_scale.data.order import Cursor, repeat_spread
from cit_scale.data.reader import Reader
from cit_scale.data.stream import train_stream
from cit_scale.data.versions import StreamVersions
from cit_scale.datasets.encoded import decode
from cit_scale.datasets.sources import Source
from cit_scale.distributed.world import World
from cit_scale.errors import ConfigError
from cit_scale.inference.images import prepare_image
from cit_scale.inference.interface import Interface
from cit_scale.models.network import Network
from cit_scale.report.attention import TokenAttention, token_attention
from cit_scale.report.figures import heat_colours

THUMBNAIL_PIXELS = 96  # pixels of the longer side
MAP_PIXELS = 112  # pixels of a map of attention
BRIGHT = 3.0  # times the mean of a map: its brightest colour
SAMPLES = 12  # of training
LEAST_SHARE = 0.005  # of an image in a mixed one, that is named
SAMPLE_PIXELS = 160  # pixels, at most


def thumbnail(source: Source, sample: int) -> str:
    """An image of a data set, small. Raises BadImageError, and OSError."""
    image = decode(source.read(sample))
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    return address(image)


def file_name(source: Source, sample: int) -> str:
    """An image's name inside its data set, usually CLASS/FILE."""
    return os.fsdecode(source.key(sample))


def address(image: Image.Image) -> str:
    """An image as a ``data:`` address: JPEG, or PNG where that is smaller."""
    written = []
    for form, options in (("JPEG", {"quality": 80}), ("PNG", {"optimize": True})):
        file = io.BytesIO()
        image.save(file, form, **options)
        written.append((file.getvalue(), form.lower()))
    data, form = min(written, key=lambda each: len(each[0]))
    return f"data:image/{form};base64,{base64.b64encode(data).decode()}"


@dataclass(frozen=True)
class TokenMap:
    """What a token looks at in an image, in the last layer and through all of them: pictures.

    last_peak, rollout_peak: the most that a patch gets, over what it would get if all got the same: 1 is flat.
    on_patches: the share of the last layer's attention that goes to patches, 0 to 1; the rest goes to tokens.
    """

    token: str
    last: str
    rollout: str
    last_peak: float
    rollout_peak: float
    on_patches: float


@dataclass(frozen=True)
class AttendedImage:
    """file: its name in the data set. image: as the network is given it."""

    file: str
    image: str
    maps: Sequence[TokenMap]


def attended_images(
    network: Network, interface: Interface, source: Source, samples: Sequence[int], device: torch.device
) -> list[AttendedImage]:
    """What the tokens of a vision transformer look at in some images."""
    prepared = torch.stack([prepare_image(source.read(sample), interface) for sample in samples])
    attention = token_attention(network.to(device), prepared.to(device).float().div(255))
    return [
        AttendedImage(
            file_name(source, sample),
            address(_picture(prepared[place]).resize((MAP_PIXELS, MAP_PIXELS), Image.Resampling.BICUBIC)),
            [_token_map(attention, place, number, prepared[place]) for number in range(len(attention.tokens))],
        )
        for place, sample in enumerate(samples)
    ]


def _token_map(attention: TokenAttention, place: int, number: int, pixels: Tensor) -> TokenMap:
    prefix = len(attention.tokens)
    last, rollout = (each[place, number, prefix:] for each in (attention.last, attention.rollout))
    return TokenMap(
        attention.tokens[number],
        last=address(overlay(pixels, last.reshape(attention.grid))),
        rollout=address(overlay(pixels, rollout.reshape(attention.grid))),
        last_peak=float(last.max() / last.mean()),
        rollout_peak=float(rollout.max() / rollout.mean()),
        on_patches=float(last.sum()),
    )


def overlay(pixels: Tensor, weights: Tensor) -> Image.Image:
    """The image in grey, and over it the weights of its patches in colour: dark for 0, bright for BRIGHT times the mean
    and more. The same scale for all, so that flat weights look flat.

    pixels: (3, H, W) uint8. weights: (rows, columns), of the patches.
    """
    scaled = (255 * weights / (BRIGHT * weights.mean())).clamp(max=255).round().to(torch.uint8)
    larger = Image.fromarray(scaled.numpy()).resize((MAP_PIXELS, MAP_PIXELS), Image.Resampling.BILINEAR)
    colours = heat_colours(np.asarray(larger))  # (MAP_PIXELS, MAP_PIXELS, 3)
    grey = np.asarray(_picture(pixels).convert("L").resize((MAP_PIXELS, MAP_PIXELS), Image.Resampling.BICUBIC)) / 255
    mixed = 0.35 * grey[..., None] + 0.65 * colours
    return Image.fromarray((255 * mixed).round().astype(np.uint8))


def _picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


@dataclass(frozen=True)
class TrainingSample:
    """An image as the network saw it in the first update. targets: the classes and their shares, the largest first."""

    image: str
    targets: Sequence[tuple[str, float]]


def training_samples(
    train_set: Source, config: RunConfig, versions: StreamVersions, ranks: int, device: torch.device
) -> list[TrainingSample]:
    """The first images of the first update. ranks: of the run's first start. Raises ConfigError."""
    mixed = first_images(train_set, config, versions, ranks, device)
    return [
        TrainingSample(address(_small(image)), _largest(targets, train_set.classes))
        for image, targets in zip(mixed.images[:SAMPLES].cpu(), mixed.targets[:SAMPLES].cpu(), strict=True)
    ]


def first_images(
    train_set: Source, config: RunConfig, versions: StreamVersions, ranks: int, device: torch.device
) -> MixedBatch:
    """The first images of the first update, cropped, augmented, erased and mixed: the data stream makes them again.

    Raises ConfigError where the images are fewer than an update takes.
    """
    batch_size, group = config.train.global_batch_size, config.mixing.group_size
    if len(train_set) < batch_size:
        raise ConfigError(f"{len(train_set)} training images are fewer than an update takes, {batch_size}")
    if group is None:  # a micro-batch is one group
        micro_batch_size = split_batch(config, ranks).micro_batch_size
    else:
        sizes = range(group, batch_size, group)
        micro_batch_size = next((size for size in sizes if size >= SAMPLES and batch_size % size == 0), batch_size)
    stream = train_stream(
        Reader(train_set),
        config.augment,
        config.data,
        seed=config.seed,
        cursor=Cursor.at_step(0, len(train_set), batch_size),
        global_batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        world=World(),
        device=device,
        spread=repeat_spread(versions.order, group),
        draws_version=versions.draws,
    )
    with closing(stream):
        return mix(next(stream), config.mixing, len(train_set.classes), seed=config.seed, step=0)


def _small(image: Tensor) -> Image.Image:
    picture = _picture((255 * image.clamp(0, 1)).round().to(torch.uint8))
    picture.thumbnail((SAMPLE_PIXELS, SAMPLE_PIXELS))
    return picture


def _largest(targets: Tensor, classes: Sequence[str]) -> list[tuple[str, float]]:
    """The one or two classes that a target is mixed of, with their shares, without what smoothing gives to all."""
    shares, numbers = (targets - targets.min()).topk(min(2, len(targets)))
    whole = max(float(shares.sum()), 1e-12)
    named = [(classes[int(number)], float(share) / whole) for number, share in zip(numbers, shares, strict=True)]
    return [named[0], *((name, share) for name, share in named[1:] if share >= LEAST_SHARE)]
