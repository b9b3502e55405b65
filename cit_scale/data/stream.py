"""Training and evaluation batches: a pure function of seed and position.

`order` says which image comes next, `draws` makes every random number, `dali` computes and decides nothing. So an image
is the same, bit for bit, at any rank count, at any micro-batch size, with any number of threads and after any resume,
and the whole state of a stream is how many micro-batches were taken from it.
"""

from __future__ import annotations

import itertools
import operator
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from cit_scale.batch import Batch
from cit_scale.config import AugmentConfig, DataConfig
from cit_scale.data import dali, draws
from cit_scale.data.draws import Draw
from cit_scale.data.order import Cursor, epoch_order, rank_slice, steps_per_epoch
from cit_scale.data.reader import Reader
from cit_scale.datasets.sources import Source
from cit_scale.distributed.world import World
from cit_scale.errors import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """One micro-batch before it is decoded: what was read, and what to do with it."""

    remake: Callable[[frozenset[int]], Plan]
    """Plans the same micro-batch anew, with these samples in doubt."""

    doubtful: frozenset[int]
    """Samples that DALI could not decode."""

    positions: np.ndarray
    """(B,) int64, as in Batch."""

    samples: np.ndarray
    """(B,) int64, as in Batch."""

    encoded: list[np.ndarray]
    """B images, each its bytes in uint8."""

    crops: np.ndarray
    """(B, 4) int32: what is decoded of each, y, x, height, width."""

    arguments: tuple[np.ndarray, ...]
    """What the pipeline takes beside the encoded images; each has B rows."""

    draw: Draw | None = None


def train_stream(
    reader: Reader,
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
    A bad image's place is taken by the one that stands in for it, with its label. Raises ValueError for batch sizes
    that fit neither each other nor the cursor, ConfigError for a policy that cannot be read, BadImageError when no
    image is good.
    """
    source = reader.source
    policy = read_policy(augment.policy)
    num_steps = steps_per_epoch(len(source), global_batch_size)
    cursor.step(len(source), global_batch_size)  # refuses a cursor of another global batch size

    def plan(
        epoch: int,
        positions: np.ndarray,
        samples: np.ndarray,
        repeats: np.ndarray,
        read: Read,
        doubtful: frozenset[int] = frozenset(),
    ) -> Plan:
        good, encoded = read(samples, doubtful)
        draw = draw_samples(source, augment, data.image_size, seed, epoch, good, repeats)
        remake = partial(plan, epoch, positions, samples, repeats, read)
        arguments = dali.train_arguments(draw, data.image_size)
        return Plan(remake, doubtful, positions, good, encoded, draw.crop, arguments, draw)

    def requests_of(epoch: int, samples_seen: int) -> Iterator[Request]:
        order = epoch_order(len(source), seed, epoch, augment.repeats)
        for start in range(samples_seen, num_steps * global_batch_size, global_batch_size):
            share = rank_slice(order, start, global_batch_size, micro_batch_size, world.rank, world.world_size)
            for rows in zip(share.positions, share.samples, share.repeats, strict=True):
                yield partial(plan, epoch, *rows)

    first = requests_of(cursor.epoch, cursor.samples_seen)
    later = (requests_of(epoch, 0) for epoch in itertools.count(cursor.epoch + 1))
    requests = itertools.chain(first, itertools.chain.from_iterable(later))
    requests = itertools.chain([next(requests)], requests)  # sizes that do not fit are reported now, not at an image
    num_layers = policy.num_layers if policy else 0
    return _run(dali.train_pipeline, reader, requests, data, micro_batch_size, device, num_layers=num_layers)


def eval_stream(
    reader: Reader, data: DataConfig, batch_size: int, world: World, device: torch.device
) -> Iterator[Batch]:
    """Every good image exactly once over all ranks: this rank's are rank, rank + world_size, ...

    The shorter side is resized to image_size / crop_ratio, then the centre is cropped, as torchvision rounds both.
    Every rank yields the same number of batches of `batch_size`; where it has no more images, or a bad one, another
    stands in, with position -1.
    """
    source = reader.source

    def plan(first: int, read: Read, doubtful: frozenset[int] = frozenset()) -> Plan:
        positions = np.arange(batch_size) * world.world_size + world.rank
        samples = first * world.world_size + positions
        asked = np.minimum(samples, len(source) - 1)
        good, encoded = read(asked, doubtful)
        positions = np.where(good == samples, positions, -1)
        heights, widths = source.heights[good], source.widths[good]
        whole = np.stack((0 * heights, 0 * widths, heights, widths), axis=1).astype(np.int32)
        arguments = dali.eval_arguments(heights, widths, data)
        return Plan(partial(plan, first, read), doubtful, positions, good, encoded, whole, arguments)

    per_rank = -(-len(source) // world.world_size)
    requests = (partial(plan, first) for first in range(0, per_rank, batch_size))
    return _run(dali.eval_pipeline, reader, requests, data, batch_size, device)


@cache
def read_policy(text: str | None) -> draws.Policy | None:
    """AugmentConfig.policy, or a ConfigError."""
    try:
        return None if text is None else draws.parse_policy(text)
    except ValueError as error:
        raise ConfigError(f"augment.{error}") from None


def draw_samples(
    source: Source,
    augment: AugmentConfig,
    image_size: int,
    seed: int,
    epoch: int,
    samples: np.ndarray,
    repeats: np.ndarray,
) -> Draw:
    """The augmentation of these samples (B,), each for the time that `repeats` (B,) says, in an epoch."""
    return draws.draw(
        seed,
        epoch,
        samples,
        repeats,
        source.heights[samples],
        source.widths[samples],
        image_size=image_size,
        crop_scale=augment.crop_scale,
        crop_ratio=augment.crop_ratio,
        flip_prob=augment.flip_prob,
        policy=read_policy(augment.policy),
        erase_prob=augment.erase_prob,
    )


def read_all(
    reader: Reader, pool: Executor, chunks: int, samples: np.ndarray, doubtful: frozenset[int]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The good samples (B,) in the place of `samples` (B,), and their encoded bytes.

    A thread takes a chunk of them, so that a slow disk is asked for several at once and a fast one is not slowed down.
    """
    parts = np.array_split(samples, chunks)
    read = pool.map(lambda part: [reader.read(int(sample), doubtful) for sample in part], parts)
    good, encoded = zip(*itertools.chain.from_iterable(read), strict=True)
    return np.array(good), [np.frombuffer(data, np.uint8) for data in encoded]


Read = Callable[[np.ndarray, frozenset[int]], tuple[np.ndarray, list[np.ndarray]]]
Request = Callable[[Read], Plan]


def _run(
    pipeline_of: Callable[..., dali.Pipeline],
    reader: Reader,
    requests: Iterator[Request],
    data: DataConfig,
    batch_size: int,
    device: torch.device,
    **options: int,
) -> Iterator[Batch]:
    """Plan the requests and run the plans, in order, through one pipeline."""
    device_id = None
    if device.type == "cuda":
        device_id = torch.cuda.current_device() if device.index is None else device.index
        if data.pinned_memory_mib:
            dali.reserve_pinned_memory(data.pinned_memory_mib)
    in_flight: deque[Plan] = deque()
    again: deque[Plan] = deque()
    planning_failed = False

    def feed() -> tuple[list[np.ndarray] | np.ndarray, ...]:
        nonlocal planning_failed
        try:
            plan = again.popleft() if again else next(plans)
        except StopIteration:
            raise  # which tells DALI that this was all
        except Exception:
            planning_failed = True
            raise
        in_flight.append(plan)
        return plan.encoded, *plan.arguments

    def planned(read: Read) -> Iterator[Plan]:
        return (request(read) for request in requests)

    def build() -> dali.Pipeline:
        return pipeline_of(
            feed,
            data,
            batch_size=batch_size,
            num_threads=data.decode_threads,
            prefetch_queue_depth=max(data.prefetch, 1),
            device_id=device_id,
            **options,
        )

    with (
        ThreadPoolExecutor(data.decode_threads, "read") as pool,
        closing(ahead(planned(partial(read_all, reader, pool, data.decode_threads)), data.prefetch)) as plans,
    ):
        pipeline = build()
        while True:
            try:
                # Outputs bound to torch's stream are neither read too early nor handed back to DALI too early.
                (images,) = pipeline.run(None if device_id is None else torch.cuda.current_stream(device_id))
            except StopIteration:
                return
            except RuntimeError:
                # DALI names no image when a batch fails, and loses what is in flight: find out, plan anew, go on.
                remade = [] if planning_failed else [_without_undecodable(plan) for plan in in_flight]
                if all(map(operator.is_, remade, in_flight)):
                    raise
                again.extendleft(reversed(remade))
                in_flight.clear()
                pipeline = build()
                continue
            plan = in_flight.popleft()
            images = torch.from_dlpack(images.as_tensor())  # the same memory, which DALI now leaves alone
            if plan.draw is not None:
                erase(images, plan.draw)
            yield Batch(
                images=images,
                labels=torch.from_numpy(reader.source.labels[plan.samples]).to(device, non_blocking=True),
                positions=torch.from_numpy(plan.positions),
                samples=torch.from_numpy(plan.samples),
            )


def _without_undecodable(plan: Plan) -> Plan:
    """The same plan where DALI decodes all of it, else another one."""
    samples = {int(plan.samples[place]) for place in dali.undecodable(plan.encoded, plan.crops)}
    return plan if samples <= plan.doubtful else plan.remake(plan.doubtful | samples)


def ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, made by a thread of its own that runs up to `depth` of them ahead; with 0 when asked for.

    Close it to end the thread. An exception of `items` is raised in its place in the order.
    """
    if depth == 0:
        yield from items
        return
    made: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    closed = threading.Event()

    def put(item: T | None, error: BaseException | None) -> None:
        while not closed.is_set():
            try:
                return made.put((item, error), timeout=0.1)
            except queue.Full:
                continue

    def make() -> None:
        try:
            while not closed.is_set():
                put(next(items), None)
        except BaseException as error:  # StopIteration too: all are handed over and end the other side
            put(None, error)

    thread = threading.Thread(target=make, name="plan", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        closed.set()
        thread.join()


def erase(images: Tensor, draw: Draw) -> None:
    """Fill each image's erasing box, in place, with noise that is a function of its key.

    images: (B, 3, H, W). The noise is N(0, 1) per pixel and channel in ImageNet-normalised space, as timm draws it:
    here mean + std * N(0, 1), which leaves [0, 1] at times. A CPU and a GPU make different noise of the same key.
    """
    generator = torch.Generator(images.device)
    for i in np.flatnonzero(draw.erasing[:, 2]):
        y, x, height, width = draw.erasing[i]
        generator.manual_seed(int(draw.erasing_key[i]))
        noise = torch.randn((3, height, width), generator=generator, device=images.device)
        box = images[i, :, y : y + height, x : x + width]
        # A channel at a time: so small that PyTorch does not spread it over threads, whose waiting costs more.
        for channel, mean, std in zip(range(3), IMAGENET_MEAN, IMAGENET_STD, strict=True):
            torch.add(mean, noise[channel], alpha=std, out=box[channel])
