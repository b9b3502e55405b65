"""The training stream with the paper's augmentation: images per second on one rank."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import closing
from functools import partial

import torch

from cit_scale.batch import Batch
from cit_scale.bench.decode import HEIGHT, WIDTH
from cit_scale.bench.measure import seconds
from cit_scale.config import AugmentConfig, DataConfig
from cit_scale.data.order import Cursor
from cit_scale.data.reader import Reader
from cit_scale.data.stream import train_stream
from cit_scale.distributed.world import World
from cit_scale.doctor.devices import share_of_threads
from cit_scale.doctor.findings import Asked, Finding, failed, ok
from cit_scale.doctor.photographs import photographs

PHOTOS, BATCH = 64, 64
CPU_BATCHES, GPU_BATCHES = 8, 100
AHEAD = 5  # batches that may be ready before the clock starts


def check(asked: Asked) -> Finding:
    """Read, decode and augment made-up photographs."""
    device = World().device
    with photographs(PHOTOS) as source:
        sizes = BATCH, BATCH
        data = DataConfig(decode_threads=share_of_threads())
        batches = GPU_BATCHES if device.type == "cuda" else CPU_BATCHES
        stream = train_stream(Reader(source), AugmentConfig(), data, 0, Cursor(), *sizes, World(), device)
        with closing(stream):
            *_, last = itertools.islice(stream, AHEAD)
            taken = seconds(partial(take, stream, batches), device)
    return judge(last.images, batches * BATCH / taken, device, data.decode_threads)


def take(stream: Iterator[Batch], count: int) -> None:
    for _ in itertools.islice(stream, count):
        pass


def judge(images: torch.Tensor, images_per_s: float, device: torch.device, threads: int | None = None) -> Finding:
    """images: of one batch, (B, 3, H, W). threads: a rank's share of those that decode; None: not shared."""
    # Random erasing puts normal values there, of which some are outside of [0, 1].
    inside = ((images >= 0) & (images <= 1)).float().mean().item()
    mean, deviation = images.mean().item(), images.std().item()
    if not (inside > 0.9 and 0.2 < mean < 0.8 and deviation > 0.05):  # NaN is none of it
        says = f"{inside:.0%} of the values are in [0, 1], {mean:.2f} on average with a deviation of {deviation:.2f}"
        return failed(says, "see the row of augmentation")
    shared = f" with {threads} threads, one GPU's share of the cores" if threads else ""
    return ok(
        f"{images_per_s:.0f} images/s of {WIDTH} x {HEIGHT} pixels, decoded and augmented on the "
        f"{device.type.upper()}{shared}",
        figures={"images_per_s": images_per_s},
    )
