"""``cit-scale predict``: the classes of images, a row for each, in the order in which they were given."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cit_scale.datasets.index import printable, shorten
from cit_scale.distributed.world import World, run_on_all_ranks
from cit_scale.errors import BadImageError, ConfigError, MissingInputError
from cit_scale.inference.classifier import Classifier, open_classifier
from cit_scale.inference.defaults import FRAMES_PER_S
from cit_scale.inference.entry import SMALLER_BATCHES, run_command
from cit_scale.inference.items import Item, items_of, read_item
from cit_scale.inference.outputs import check_output
from cit_scale.inference.tables import Row, Sheet, kind_of
from cit_scale.inference.turns import MOST_REASONS, Answers, classify_all, unusable_text
from cit_scale.run_folder import CONFIG


@dataclass
class Count:
    """Of the rows that were written."""

    rows: int = 0
    unusable: int = 0
    reasons: list[str] = field(default_factory=list)
    """Different ones of the images that could not be used, a few of them."""

    is_read: bool = True
    """Whether somebody still reads the rows."""

    seconds: float = 0.0

    def add(self, answers: Answers) -> None:
        self.rows += len(answers.items)
        self.unusable += len(answers.unusable)
        different = dict.fromkeys([*self.reasons, *(reason for _, reason in answers.unusable)])
        self.reasons = list(different)[: MOST_REASONS + 1]  # the last says that there are more


def run(arguments: argparse.Namespace) -> int:
    """Run ``cit-scale predict``. arguments: parsed by `cit_scale.inference.commands`. Returns an exit code."""

    out = None if arguments.out == "-" else arguments.out

    def work(world: World) -> None:
        kind_of(out, arguments.format)  # refuses a name before the model is opened
        runs = [each for each in arguments.images if os.path.isfile(os.path.join(each, CONFIG))]
        if runs:
            raise ConfigError(f"{printable(runs[0])} is a run; MODEL comes first, and images behind it")
        if out is not None:
            check_output("--out", out, [arguments.model, *arguments.images])
        classifier = open_classifier(arguments.model, world)
        if world.is_main:
            for note in classifier.notes:
                print(note, file=sys.stderr, flush=True)
        count = predict(
            classifier,
            arguments.images,
            world,
            out=None if out is None else os.path.realpath(out),
            kind=arguments.format,
            top=arguments.top,
            heads=arguments.heads,
            temperature=arguments.temperature,
            frames_per_s=arguments.fps,
            batch_size=arguments.batch_size,
            threads=arguments.threads,
        )
        if world.is_main and out is not None:
            rate = count.rows / count.seconds
            print(f"{count.rows} images in {printable(out)}, {rate:.0f} a second", file=sys.stderr)
        if world.is_main and count.rows == count.unusable > 0:
            raise BadImageError(f"none of {count.rows} images can be used: {unusable_text(count.reasons)}")
        if world.is_main and count.unusable:
            some = f"{count.unusable} of {count.rows} images cannot be used"
            print(f"{some}: {unusable_text(count.reasons)}", file=sys.stderr)

    return run_command(work, needs_less_memory=SMALLER_BATCHES)


def predict(
    classifier: Classifier,
    images: Sequence[str],
    world: World,
    *,
    out: str | None = None,
    kind: str | None = None,
    top: int = 1,
    heads: bool = False,
    temperature: float = 1.0,
    frames_per_s: float = FRAMES_PER_S,
    batch_size: int | None = None,
    threads: int = 4,
) -> Count:
    """Collective. Write a row for each image. images: as ``items_of`` takes them. out, kind: as ``table`` takes them.

    top: number of classes with their probabilities. heads: also what each head says, and how far they disagree.
    temperature: by which logits are divided first, as ``evaluate`` finds it.
    Raises ConfigError, also for ``heads`` of a classifier with one, MissingInputError where there are no images, and
    OSError where the table cannot be written.
    """
    top = min(top, len(classifier.classes))
    if not 0 < temperature < math.inf:
        raise ConfigError(f"--temperature {temperature} is not above 0; cit-scale evaluate finds the best one")
    if heads and len(classifier.interface.heads) < 2:
        raise ConfigError(f"--heads: {printable(classifier.name)} has one head, which agrees with itself; leave it out")
    columns = _columns(classifier, top, heads)
    count = Count()
    sheet: Sheet | None = None
    began_at = time.perf_counter()

    def items() -> Iterator[Item | None]:
        nonlocal sheet
        listed = items_of(images, getattr(sys.stdin, "buffer", None), frames_per_s)
        sheet = Sheet(out, kind, columns)
        yield from listed

    def take(answers: Answers) -> bool:
        assert sheet is not None  # rank 0 has listed the items
        count.is_read = sheet.write(list(_rows(answers, classifier, top, heads, temperature)))
        count.add(answers)
        return count.is_read

    def finish() -> None:
        if sheet is None:
            return
        if not count.rows and count.is_read:
            raise MissingInputError(f"there are no images in {shorten(list(map(printable, images)))}")
        sheet.finish()

    try:
        classify_all(items(), read_item, classifier, world, take, batch_size=batch_size, threads=threads)
        run_on_all_ranks(world, finish)
    except Exception:
        if sheet is not None:
            sheet.abandon()
        raise
    count.seconds = time.perf_counter() - began_at
    return count


def _columns(classifier: Classifier, top: int, heads: bool) -> dict[str, type]:
    columns: dict[str, type] = {"image": str}
    for place in range(1, top + 1):
        columns |= {f"class_{place}": str, f"prob_{place}": float}
    several = classifier.interface.heads if heads else ()
    for head in several:
        columns |= {f"says_{head}": str, f"prob_{head}": float}
    return columns | ({"disagreement": float} if several else {}) | {"reason": str}


def _rows(answers: Answers, classifier: Classifier, top: int, heads: bool, temperature: float) -> Iterator[Row]:
    """A row for each image. An image that cannot be used has a reason, and nothing else."""
    empty = dict.fromkeys(_columns(classifier, top, heads))
    probs = {head: softmax(logits / temperature) for head, logits in answers.logits.items()}
    good = 0
    for item, reason in zip(answers.items, answers.reasons, strict=True):
        row: dict[str, Any] = {**empty, "image": item.name, "reason": reason}
        if reason is None:
            row |= _answer({head: each[good] for head, each in probs.items()}, classifier.classes, top, heads)
            good += 1
        yield row


def _answer(probs: Mapping[str, np.ndarray], classes: Sequence[str], top: int, heads: bool) -> dict[str, Any]:
    """What the probabilities of one image say, each (K,) by head. The last is that of all heads."""
    *single, (_, whole) = probs.items()
    answer: dict[str, Any] = {}
    for place, column in enumerate(np.argsort(-whole, kind="stable")[:top].tolist(), start=1):
        answer |= {f"class_{place}": classes[column], f"prob_{place}": float(whole[column])}
    if not heads:
        return answer
    for head, each in single:
        answer |= {f"says_{head}": classes[int(each.argmax())], f"prob_{head}": float(each.max())}
    return answer | {"disagreement": disagreement([each for _, each in single])}


def softmax(logits: np.ndarray) -> np.ndarray:
    """(B, K) to probabilities, in float64."""
    likelihoods = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return likelihoods / likelihoods.sum(axis=1, keepdims=True)


def disagreement(probs: Sequence[np.ndarray]) -> float:
    """How far H heads are apart: their Jensen-Shannon divergence over its bound, log H.

    0: all say the same; 1: each is sure of another class. probs: H distributions, each (K,).
    JS = entropy(mean of p_h) - mean of entropy(p_h) (Lin, "Divergence measures based on the Shannon entropy", 1991).
    """
    mean = np.mean(probs, axis=0)
    divergence = _entropy(mean) - float(np.mean([_entropy(each) for each in probs]))
    return max(divergence, 0.0) / math.log(len(probs))


def _entropy(probs: np.ndarray) -> float:
    return -float((probs * np.log(np.maximum(probs, 1e-300))).sum())
