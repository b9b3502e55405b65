"""Training and evaluation batches: a pure function of seed and position.

One micro-batch comes about in four steps. A request says which images it holds (`order` decides that). Its plan has
their bytes and every random number (`reader` and `draws`). DALI decodes and augments what was planned (`dali`, which
decides nothing). Random erasing comes last, in PyTorch. So an image is the same, bit for bit, at any rank count, at any
micro-batch size, with any number of threads and after any resume (shown on CPUs), and the whole state of a stream is
how many micro-batches were taken from it.
"""

from __future__ import annotations

import itertools
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from cit_scale.batch import Batch
from cit_scale.config import AugmentConfig, DataConfig
from cit_scale.data import dali, draws
from cit_scale.data.draws import Draw
from cit_scale.data.erasing import Noise, draw_noise, erase_on_device, write_noise
from cit_scale.data.order import SPREAD, Cursor, balanced_order, epoch_order, rank_slice, steps_per_epoch
from cit_scale.data.reader import ByteGate, Reader
from cit_scale.data.transfer import to_device
from cit_scale.data.versions import LATEST
from cit_scale.distributed.world import World
from cit_scale.errors import one_line

T = TypeVar("T")

# ---------------------------------------------------------------------------------------------------------------------
# What is asked for, and what is planned


@dataclass(frozen=True)
class BatchRequest:
    """One micro-batch of this rank before anything is read."""

    epoch: int
    """0 in evaluation."""

    positions: np.ndarray
    """(B,) int64, as in Batch."""

    samples: np.ndarray
    """(B,) int64, the images asked for, by their index in the source."""

    repeats: np.ndarray
    """(B,) int64, which of its repetitions in this epoch each one is; zeros in evaluation."""

    doubtful: frozenset[int] = frozenset()
    """Samples that DALI could not decode, or is not trusted with, since this request was planned before: PIL decodes
    them, in this batch only."""

    goes_on: bool = False
    """Whether this is a part of a micro-batch, and the next request has more of it."""

    nbytes: int = 0
    """What its images take at most while they are decoded."""

    def in_parts(self, nbytes: np.ndarray, most: int) -> Iterator[BatchRequest]:
        """Split the request: each part takes at most so many bytes, or holds one image. nbytes: (B,), of each image."""
        starts, held = [0], 0
        for place, size in enumerate(nbytes.tolist()):
            if place and held + size > most:
                starts.append(place)
                held = 0
            held += size
        for first, end in itertools.pairwise([*starts, len(nbytes)]):
            here = slice(first, end)
            columns = self.positions[here], self.samples[here], self.repeats[here]
            count = int(nbytes[here].sum())
            yield BatchRequest(self.epoch, *columns, self.doubtful, goes_on=end < len(nbytes), nbytes=count)


@dataclass(frozen=True)
class PlannedBatch:
    """One micro-batch before it is decoded: what was read, and what to do with it."""

    request: BatchRequest

    positions: np.ndarray
    """(B,) int64, as in Batch."""

    samples: np.ndarray
    """(B,) int64, as in Batch: where an image is bad, the one that stands in for it."""

    encoded: list[np.ndarray]
    """B images, each its bytes in uint8."""

    crops: np.ndarray
    """(B, 4) int32: what is decoded of each, y, x, height, width."""

    arguments: tuple[np.ndarray, ...]
    """What the pipeline takes beside the encoded images; each has B rows."""

    draw: Draw | None = None
    """None in evaluation."""

    noise: Noise | None = None
    """Of random erasing, where the CPU draws it."""


ReadImages = Callable[[BatchRequest], tuple[np.ndarray, list[np.ndarray]]]
"""Reads a request's images. Returns the sample that stands at each place, a good one, (B,), and its encoded bytes."""


class Planner(Protocol):
    """Plans one request."""

    def __call__(self, request: BatchRequest, read: ReadImages) -> PlannedBatch: ...


class Pipeline(Protocol):
    """What a stream uses of a DALI pipeline."""

    def run(self, cuda_stream: Any = None) -> tuple[Any, ...]: ...


def plan_training(
    request: BatchRequest,
    read: ReadImages,
    reader: Reader,
    augment: AugmentConfig,
    seed: int,
    size: int,
    draw_erasing: Callable[[Draw], Noise | None],
) -> PlannedBatch:
    """size: height and width of the finished images. draw_erasing: None leaves erasing to the images' device."""
    source = reader.source
    samples, encoded = read(request)
    heights, widths = source.heights[samples], source.widths[samples]
    draw = draws.draw(seed, request.epoch, samples, request.repeats, heights, widths, augment, size)
    arguments = dali.train_arguments(draw, size)
    return PlannedBatch(request, request.positions, samples, encoded, draw.crop, arguments, draw, draw_erasing(draw))


def plan_evaluation(request: BatchRequest, read: ReadImages, reader: Reader, data: DataConfig) -> PlannedBatch:
    """An image that is bad counts as padding: another one is decoded in its place, and its position is -1."""
    source = reader.source
    samples, encoded = read(request)
    heights, widths = source.heights[samples], source.widths[samples]
    positions = np.where(samples == request.samples, request.positions, -1)
    whole = np.stack((0 * heights, 0 * widths, heights, widths), axis=1).astype(np.int32)
    return PlannedBatch(request, positions, samples, encoded, whole, dali.eval_arguments(heights, widths, data))


# ---------------------------------------------------------------------------------------------------------------------
# The two streams


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
    spread: int = SPREAD,
    draws_version: int = LATEST.draws,
) -> Generator[Batch, None, None]:
    """This rank's micro-batches from `cursor` on, without end and across epochs. Close it, or drop it, to stop DALI.

    Images are (micro_batch_size, 3, image_size, image_size) float32 in [0, 1], but for the noise of random erasing,
    which the device itself draws in the first version of the draws.
    A bad image's place is taken by the one that stands in for it, with its label. Raises ValueError for batch sizes
    that do not fit each other, or do not fit the cursor, and ConfigError for a policy that cannot be read. The first
    batch raises BadImageError if no image is good.
    """
    num_samples = len(reader.source)
    data = with_threads(data, world, device)
    policy = draws.read_policy(augment.policy)
    cursor.step(num_samples, global_batch_size)  # refuses a cursor that stands inside a global batch
    samples_per_epoch = steps_per_epoch(num_samples, global_batch_size) * global_batch_size

    def endless_requests() -> Iterator[BatchRequest]:
        samples_seen = cursor.samples_seen
        for epoch in itertools.count(cursor.epoch):
            if data.balance == "none":
                order = epoch_order(num_samples, seed, epoch, augment.repeats, spread)
            else:
                labels = reader.source.labels
                order = balanced_order(labels, data.balance, samples_per_epoch, seed, epoch, augment.repeats, spread)
            for start in range(samples_seen, samples_per_epoch, global_batch_size):
                share = rank_slice(order, start, global_batch_size, micro_batch_size, world.rank, world.world_size)
                for rows in zip(share.positions, share.samples, share.repeats, strict=True):
                    yield BatchRequest(epoch, *rows)
            samples_seen = 0

    requests = endless_requests()
    # The first request is made here, so that sizes that do not fit raise now and not at the first batch.
    requests = itertools.chain([next(requests)], requests)

    def draw_erasing(draw: Draw) -> Noise | None:
        return draw_noise(draw, data.image_size, pinned=device.type == "cuda") if draws_version > 1 else None

    plan = partial(
        plan_training, reader=reader, augment=augment, seed=seed, size=data.image_size, draw_erasing=draw_erasing
    )
    pipeline = partial(dali.train_pipeline, num_layers=policy.num_layers if policy else 0)
    return _batches(partial(BatchStream, reader, requests, plan, pipeline, data, micro_batch_size, device))


def eval_stream(
    reader: Reader, data: DataConfig, batch_size: int, world: World, device: torch.device
) -> Generator[Batch, None, None]:
    """Every good image exactly once over all ranks: this rank's are rank, rank + world_size, ...

    The shorter side is resized to image_size / crop_ratio, then the centre is cropped, as torchvision rounds both.
    Every rank yields the same number of batches of `batch_size`; where it has no more images, or a bad one, another
    stands in, with position -1.
    """
    num_samples = len(reader.source)
    data = with_threads(data, world, device)
    per_rank = -(-num_samples // world.world_size)
    positions = np.arange(batch_size) * world.world_size + world.rank  # in a batch of all ranks

    def request_from(first: int) -> BatchRequest:
        samples = first * world.world_size + positions
        is_there = samples < num_samples
        asked = np.minimum(samples, num_samples - 1)  # something has to be decoded for padding, too
        return BatchRequest(0, np.where(is_there, positions, -1), asked, np.zeros_like(asked))

    requests = map(request_from, range(0, per_rank, batch_size))
    plan = partial(plan_evaluation, reader=reader, data=data)
    return _batches(partial(BatchStream, reader, requests, plan, dali.eval_pipeline, data, batch_size, device))


def with_threads(data: DataConfig, world: World, device: torch.device) -> DataConfig:
    """``data`` with its ``decode_threads`` decided."""
    if data.decode_threads is not None:
        return data
    return replace(data, decode_threads=default_threads(world.local_world_size, device.type))


def default_threads(ranks: int, device_type: str) -> int:
    """Of each rank on a machine with so many of them.

    Four threads are taken to feed about 2,500 images a second to a GPU that decodes them, so a small student on a fast
    GPU wants more. Neither that nor whether more than a dozen help is in docs/measurements.
    """
    return max(4, min(len(os.sched_getaffinity(0)) // ranks, 12)) if device_type == "cuda" else 4


def _batches(start: Callable[[], BatchStream]) -> Generator[Batch, None, None]:
    """A generator, so that a stream starts with its first batch and ends when it is closed, dropped or exhausted."""
    with closing(start()) as stream:
        while (batch := stream.next_batch()) is not None:
            yield batch


# ---------------------------------------------------------------------------------------------------------------------
# How a stream runs


class BatchStream:
    """Plans requests in a thread, up to data.prefetch of them ahead, and runs the plans through one DALI pipeline.

    DALI calls ``feed`` from ``next_batch``, for some batches beyond the one that this returns: plans that were fed and
    whose batch is not there yet are in flight. When decoding fails, DALI loses all of them and does not say which image
    it was; ``recover`` finds out, plans anew what has to change, and feeds all of them again to a new pipeline.
    """

    def __init__(
        self,
        reader: Reader,
        requests: Iterator[BatchRequest],
        planner: Planner,
        pipeline: Callable[..., Pipeline],
        data: DataConfig,
        batch_size: int,
        device: torch.device,
    ) -> None:
        """planner: plans one request. pipeline: builds a DALI pipeline from ``feed``, ``data`` and DALI's options."""
        self._reader = reader
        self._device = device
        self._device_id: int | None = None
        if device.type == "cuda":
            self._device_id = torch.cuda.current_device() if device.index is None else device.index
            if data.pinned_memory_mib:
                dali.reserve_pinned_memory(data.pinned_memory_mib)
        assert data.decode_threads is not None  # by ``with_threads``
        self._num_readers = data.decode_threads
        self._readers = ThreadPoolExecutor(data.decode_threads, "read")
        self._planner = planner
        depth = max(data.prefetch, 1)
        # What is planned, what waits for DALI, what DALI decodes ahead, and what it has handed out.
        self._most_bytes = (data.decoded_mib << 20) // (2 * depth + 2)
        self._memory = ByteGate(data.decoded_mib << 20)
        self._handed_out = 0
        """Bytes of it that are held by what is no longer in flight."""

        self._plans = prefetch(self._plan_all(requests), data.prefetch)
        self._to_refeed: deque[PlannedBatch | None] = deque()
        """What is to be fed before the next of ``_plan_all``."""

        self._in_flight: deque[PlannedBatch] = deque()
        """Plans that were fed and whose batches ``next_batch`` has not returned yet, in order."""

        self._planning_failed = False
        self._has_told = False
        """Whether it was said that PIL decodes what a GPU could not."""

        self._is_full = False
        """Whether what is in flight has to be handed out before the next plan."""

        self._make_pipeline = partial(
            pipeline,
            data=data,
            batch_size=batch_size,
            num_threads=data.decode_threads,
            prefetch_queue_depth=depth,
            device_id=self._device_id,
        )
        self._pipeline: Pipeline | None = self._make_pipeline(self.feed)

    def close(self) -> None:
        """End the threads, DALI's among them."""
        self._memory.open()
        self._plans.close()
        self._readers.shutdown()
        # The pipeline holds ``feed``, and so this object: without this line DALI's threads would live until the next
        # garbage collection.
        self._pipeline = None

    def feed(self) -> tuple[list[np.ndarray] | np.ndarray, ...]:
        """The next plan's inputs, for DALI. StopIteration tells DALI that there are no more.

        DALI passes any other exception on to ``next_batch``, where a RuntimeError of planning would look like one of
        decoding: hence the flag.
        """
        try:
            plan = self._to_refeed.popleft() if self._to_refeed else next(self._plans)
            if plan is None:
                self._is_full = True
                raise StopIteration
        except StopIteration:
            raise
        except Exception:
            self._planning_failed = True
            raise
        self._in_flight.append(plan)
        return plan.encoded, *plan.arguments

    def next_batch(self) -> Batch | None:
        """The next batch; None after the last one."""
        parts: list[Batch] = []
        goes_on = True
        while goes_on:
            found = self._next_part()
            if found is None:
                return None
            part, goes_on = found
            parts.append(part)
        if len(parts) == 1:
            return parts[0]
        columns = ([getattr(part, field.name) for part in parts] for field in fields(Batch))
        return Batch(*map(torch.cat, columns))

    def _plan_all(self, requests: Iterable[BatchRequest]) -> Iterator[PlannedBatch | None]:
        """The plans of all requests, of large ones in parts.

        Parts are so small that there is always room for them, but for an image that is larger than a part may be. It
        waits until what was planned before is handed out, and DALI asks for more before it hands anything out. Hence
        None, before and behind it: nothing more until all is handed out and its memory is free.
        """
        was_large = False
        for whole in requests:
            nbytes = self._reader.decoded_bytes(whole.samples, self._most_bytes)
            for request in whole.in_parts(nbytes, self._most_bytes):
                is_large = request.nbytes > self._most_bytes
                if is_large or was_large:
                    yield None
                was_large = is_large
                self._memory.take(request.nbytes)
                yield self._plan(request)

    def _give_back(self) -> None:
        self._memory.give_back(self._handed_out)
        self._handed_out = 0

    def _next_part(self) -> tuple[Batch, bool] | None:
        """The images of the next plan, and whether the next one belongs to the same batch; None after the last one."""
        assert self._pipeline is not None  # until the stream is closed
        while True:
            stream = None if self._device_id is None else torch.cuda.current_stream(self._device_id)
            try:
                # Outputs bound to torch's stream are neither read too early nor handed back to DALI too early.
                (decoded,) = self._pipeline.run(stream)
            except StopIteration:
                if not self._is_full:
                    return None
                # Nothing is in flight any more. A new pipeline, because this one keeps the memory that it has taken.
                self._is_full, self._pipeline = False, None
                self._give_back()
                self._pipeline = self._make_pipeline(self.feed)
                continue
            except RuntimeError as error:
                if not self.recover(error):
                    raise
                continue
            plan = self._in_flight.popleft()
            self._handed_out += plan.request.nbytes
            if not self._is_full:
                self._give_back()
            images = torch.from_dlpack(decoded.as_tensor())  # the same memory, which DALI now leaves alone
            if plan.noise is not None:
                write_noise(images, plan.noise)
            elif plan.draw is not None:
                erase_on_device(images, plan.draw)
            batch = Batch(
                images=images,
                labels=to_device(torch.from_numpy(self._reader.source.labels[plan.samples]), self._device),
                positions=torch.from_numpy(plan.positions),
                samples=torch.from_numpy(plan.samples),
            )
            return batch, plan.request.goes_on

    def recover(self, error: RuntimeError) -> bool:
        """Go on after a batch that failed with `error`. False: the caller has to raise it.

        Going on makes no sense if the failure came from planning, which DALI only passed on. If the CPU's decoder can
        decode every image in flight by itself, a GPU's may still refuse one: PIL decodes all of them, once. Where it
        does already, the same plans would fail again, for a reason that is not an image.
        """
        if self._planning_failed:
            return False
        if self._plan_anew(self._without_undecodable):
            return True
        if self._device_id is None or not self._plan_anew(self._decoded_by_pil):
            return False
        if not self._has_told:
            # On whichever rank it happens: the others do not know of it.
            reason = one_line(error, 300)
            told = f"DALI failed on a GPU with images that it can decode on a CPU; PIL decodes them: {reason}"
            print(told, file=sys.stderr, flush=True)
        self._has_told = True
        return True

    def _plan_anew(self, change: Callable[[PlannedBatch], PlannedBatch]) -> bool:
        """Change what is in flight, and feed it again to a new pipeline. False: nothing changed, and nothing was done.

        change: returns the same plan, or a new one.
        """
        plans = [change(plan) for plan in self._in_flight]
        if all(new is old for new, old in zip(plans, self._in_flight, strict=True)):
            return False
        self._to_refeed.extendleft(reversed([*plans, None] if self._is_full else plans))
        self._is_full = False
        self._in_flight.clear()
        self._pipeline = self._make_pipeline(self.feed)
        return True

    def _without_undecodable(self, plan: PlannedBatch) -> PlannedBatch:
        """The same plan where DALI decodes all its images, or has refused them before; otherwise a new one.

        In the new one PIL decodes the images that DALI refuses, or others stand in for them.
        """
        return self._doubting(plan, {int(plan.samples[place]) for place in dali.undecodable(plan.encoded, plan.crops)})

    def _decoded_by_pil(self, plan: PlannedBatch) -> PlannedBatch:
        """The same plan where PIL decodes all its images; otherwise a new one, in which it does."""
        return self._doubting(plan, set(plan.samples.tolist()))

    def _doubting(self, plan: PlannedBatch, samples: set[int]) -> PlannedBatch:
        request = plan.request
        if samples <= request.doubtful:
            return plan
        return self._plan(replace(request, doubtful=request.doubtful | samples))

    def _plan(self, request: BatchRequest) -> PlannedBatch:
        return self._planner(request, self._read)

    def _read(self, request: BatchRequest) -> tuple[np.ndarray, list[np.ndarray]]:
        """As ``ReadImages``.

        Each thread takes a chunk of the samples, so that a slow disk is asked for several at once, and the hand-over
        between threads does not slow a fast one down.
        """

        def read(chunk: Iterable[int]) -> list[tuple[int, bytes]]:
            return [self._reader.read(int(sample), request.doubtful) for sample in chunk]

        chunks = np.array_split(request.samples, self._num_readers)
        pairs = list(itertools.chain.from_iterable(self._readers.map(read, chunks)))
        return np.array([sample for sample, _ in pairs]), [np.frombuffer(data, np.uint8) for _, data in pairs]


@dataclass(frozen=True)
class _Raised:
    error: BaseException


def prefetch(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """The same items, made by a thread ahead of time: `depth` that wait, and one in the making; with 0, when asked for.

    Close it to end the thread. An exception of `items` is raised in its place in the order.
    """
    if depth == 0:
        yield from items
        return
    made: queue.Queue[T | _Raised] = queue.Queue(depth)
    closed = threading.Event()

    def put(item: T | _Raised) -> None:
        while not closed.is_set():
            try:
                return made.put(item, timeout=0.1)
            except queue.Full:
                continue

    def make() -> None:
        try:
            while not closed.is_set():
                put(next(items))
        except BaseException as error:  # StopIteration too: all are handed over and end the other side
            put(_Raised(error))

    thread = threading.Thread(target=make, name="plan", daemon=True)
    thread.start()
    try:
        while True:
            item = made.get()
            if not isinstance(item, _Raised):
                yield item
            elif isinstance(item.error, StopIteration):
                return
            else:
                raise item.error
    finally:
        closed.set()
        thread.join()
