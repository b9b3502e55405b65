"""Classifies any number of images over any number of ranks, and hands the answers to rank 0 in the order of the images.

Rank 0 alone knows the images. In a turn each rank classifies some batches; rank 0 deals the next turn's while this
turn's are computed, so that they are read and decoded meanwhile. A batch holds images that follow each other. On a CPU
each batch is computed by one thread, several batches at once: how a library splits one batch among threads changes the
last bits of its logits. So an image's logits are the same at any number of ranks and threads.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from cit_scale.datasets.index import UNUSABLE, reason_text
from cit_scale.distributed.world import World, deal, gather_on_main
from cit_scale.errors import BadImageError, RunError, is_out_of_memory, one_line
from cit_scale.inference.classifier import Classifier

T = TypeVar("T")

NOT_FINITE = "what the model says of it is not finite"  # as of fp16 that overflows

BATCH_SIZES = {"cpu": 32, "cuda": 256}
WHOLE_IMAGES = 4  # in a batch, where images are not made ready before

MOST_REASONS = 3  # different ones, in a message


@dataclass(frozen=True)
class Answers:
    """Of one batch. reasons: of each image, why it cannot be used; None for a good one. logits: by head, (G, K) float32
    of the G good images.
    """

    items: Sequence[Any]
    reasons: Sequence[str | None]
    logits: dict[str, np.ndarray]

    @property
    def good(self) -> list[Any]:
        """The items that the logits are of, in their order."""
        return [item for item, reason in zip(self.items, self.reasons, strict=True) if reason is None]

    @property
    def unusable(self) -> list[tuple[Any, str]]:
        """The other items, with their reasons."""
        return [(item, reason) for item, reason in zip(self.items, self.reasons, strict=True) if reason is not None]


def classify_all(
    items: Iterator[T | None],
    read: Callable[[T], bytes],
    classifier: Classifier,
    world: World,
    take: Callable[[Answers], bool],
    *,
    batch_size: int | None = None,
    threads: int,
    device: torch.device | None = None,
) -> None:
    """Collective. Classify all items.

    items: used on rank 0 alone; None among them says that no more is ready yet. read: the encoded image of an item, on
    any rank; raises BadImageError, and OSError. take: called on rank 0 with the answers of each batch, in order; once
    it returns False no more is computed. batch_size: None: by the device. threads: that read and decode, on each rank.
    device: on which the classifier computes; None: the rank's.
    What any rank raises is raised on all of them.
    """
    kind = (device or world.device).type
    size = batch_size or BATCH_SIZES[kind]
    if classifier.interface.pixels:  # they wait as large as they are
        size = min(size, WHOLE_IMAGES)
    lanes = torch.get_num_threads() if kind == "cpu" else 1
    prepare = functools.partial(_prepare, read, classifier)
    failure: Exception | None = None
    waiting: list[_Batch] | None = None
    goes_on = True
    with ThreadPoolExecutor(threads, "decode") as decoders, _computing_threads(kind, lanes) as computers:
        while True:
            dealt = _deal(items if goes_on else iter(()), size, lanes, world, failure)
            following = None
            if dealt is not None:
                following = [_Batch(batch, [decoders.submit(prepare, item) for item in batch]) for batch in dealt]
            if waiting is not None:
                everyone = gather_on_main(world, _answer_all(waiting, classifier, computers))
                if everyone is not None and goes_on:
                    try:
                        goes_on = all(_take(answers, take) for rank in everyone for answers in rank)
                    except Exception as error:  # raised on all ranks, in the next turn
                        failure, goes_on = portable(error), False
            elif dealt is None:
                return
            waiting = following


@dataclass(frozen=True)
class _Batch:
    items: Sequence[Any]
    images: Sequence[Future[Tensor | str]]


@contextlib.contextmanager
def _computing_threads(kind: str, count: int) -> Iterator[ThreadPoolExecutor | None]:
    """Threads that compute a batch each; None on a GPU, which computes in the caller's."""
    if kind != "cpu":
        yield None
        return
    with ThreadPoolExecutor(count, "compute", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool


def _prepare(read: Callable[[Any], bytes], classifier: Classifier, item: Any) -> Tensor | str:
    """The image as the classifier takes it, or the reason why it cannot be used.

    An OSError of the disk, not of the image, is raised.
    """
    try:
        return classifier.prepare(read(item))
    except UNUSABLE as error:
        return reason_text(error) if isinstance(error, OSError) else str(error)


def _deal(items: Iterator[T], size: int, lanes: int, world: World, failure: Exception | None) -> list[list[T]] | None:
    """Collective. This rank's next batches, maybe empty ones; None if no item is left. Raises rank 0's failure."""
    hands: Sequence[list[list[T]] | Exception | None] | None = None
    if world.is_main:
        try:
            batches, ended = _next_batches(items, size, lanes * world.world_size)
            cut = [batches[first : first + lanes] for first in range(0, len(batches), lanes)]
            hands = [None] * world.world_size if ended and not batches[0] else cut
        except Exception as error:  # of listing
            failure = portable(error)
        if failure is not None:
            hands = [failure] * world.world_size
    mine = deal(world, hands)
    if isinstance(mine, Exception):
        raise mine
    return mine


def _next_batches(items: Iterator[T | None], size: int, count: int) -> tuple[list[list[T]], bool]:
    """The next batches, as many as asked for, the last ones maybe empty; and whether there are no more items."""
    batches: list[list[T]] = []
    for _ in range(count):
        batch: list[T] = []
        while len(batch) < size:
            try:
                item = next(items)
            except StopIteration:
                return [*batches, batch, *([] for _ in range(count - len(batches) - 1))], True
            if item is None:
                return [*batches, batch, *([] for _ in range(count - len(batches) - 1))], False
            batch.append(item)
        batches.append(batch)
    return batches, False


def portable(error: Exception) -> Exception:
    """The same exception, or the message of one that may not survive being sent to another rank."""
    if isinstance(error, RunError | BadImageError | OSError) or type(error) is RuntimeError:
        return error
    return RuntimeError(f"{type(error).__name__}: {one_line(error)}").with_traceback(error.__traceback__)


def _answer_all(
    batches: Sequence[_Batch], classifier: Classifier, computers: ThreadPoolExecutor | None
) -> list[Answers | Exception]:
    answer = functools.partial(_answer, classifier)
    return list(map(answer, batches) if computers is None else computers.map(answer, batches))


def _answer(classifier: Classifier, batch: _Batch) -> Answers | Exception:
    try:
        prepared = [future.result() for future in batch.images]
        images = [image for image in prepared if isinstance(image, Tensor)]
        logits = classify_images(classifier, images)
        reasons = [image if isinstance(image, str) else None for image in prepared]
        finite = np.all([np.isfinite(each).all(axis=1) for each in logits.values()], axis=0) if logits else np.array([])
        if not finite.all():
            places = [place for place, reason in enumerate(reasons) if reason is None]
            for place in np.flatnonzero(~finite):
                reasons[places[place]] = NOT_FINITE
            logits = {head: each[finite] for head, each in logits.items()} if finite.any() else {}
        return Answers(batch.items, reasons, logits)
    except Exception as error:  # raised again on rank 0, and with the next turn on all ranks
        return portable(error)


def _take(answers: Answers | Exception, take: Callable[[Answers], bool]) -> bool:
    if isinstance(answers, Exception):
        raise answers
    return not answers.items or take(answers)


def classify_images(classifier: Classifier, images: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """Logits of G images as (G, K) by head. images: as ``Classifier.prepare`` returns them."""
    if not images:
        return {}
    if classifier.interface.pixels:
        parts = [classifier.classify(image[None]) for image in images]
    else:
        parts = _in_halves(classifier, torch.stack(list(images)))
    return {head: torch.cat([part[head] for part in parts]).float().numpy() for head in parts[0]}


def _in_halves(classifier: Classifier, images: Tensor) -> list[dict[str, Tensor]]:
    """Classify a batch, in parts where the device has not enough memory for it."""
    try:
        return [classifier.classify(images)]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or len(images) == 1:
            raise
    halves = images.tensor_split(2)
    return [part for half in halves for part in _in_halves(classifier, half)]


def unusable_text(reasons: Iterable[str]) -> str:
    """A few of the reasons, for a message: each once."""
    different = list(dict.fromkeys(reasons))
    shown = [one_line(reason, 100) for reason in different[:MOST_REASONS]]
    return "; ".join([*shown, "..."] if len(different) > MOST_REASONS else shown)
