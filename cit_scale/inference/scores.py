"""Scores of a classifier from its logits: accuracy, negative log-likelihood, calibration error, temperature.

Sums over images are exactly rounded (math.fsum), so that no score depends on the order in which they were summed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

BINS = 15  # of confidence, as in Guo et al., "On Calibration of Modern Neural Networks", ICML 2017
TEMPERATURES = (0.02, 50.0)  # between which the best one is searched for


@dataclass(frozen=True)
class ImageScores:
    """What the scores need of each image, for one head. All (N,).

    correct, in_five: whether the label has the highest logit, is among the five highest. nll: negative log-likelihood
    of the label. confidence: the highest probability.
    """

    correct: np.ndarray
    in_five: np.ndarray
    nll: np.ndarray
    confidence: np.ndarray


@dataclass(frozen=True)
class Scores:
    """Scores of a head over N images.

    top1, top5: percent. class_mean: top1 as the mean over the classes that have images. nll: mean negative
    log-likelihood, in nats; None where images have several right labels. ece: expected calibration error with BINS
    bins of equal width, in percent.
    """

    top1: float
    top5: float
    class_mean: float | None
    nll: float | None
    ece: float


def score_images(logits: np.ndarray, labels: Sequence[Sequence[int]]) -> ImageScores:
    """logits: (B, K). labels: the right classes of each image, at least one; those of ReaL are several for some.

    An image counts as right if the highest logit is that of a right class. Of equal logits the first counts as higher.
    """
    logits = logits.astype(np.float64)
    ranked = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    right = [np.isin(row, classes) for row, classes in zip(ranked, labels, strict=True)]
    highest = logits.max(axis=1)
    log_sum = np.log(np.exp(logits - highest[:, None]).sum(axis=1))  # of probabilities over the highest
    own = logits[np.arange(len(logits)), [classes[0] for classes in labels]]
    return ImageScores(
        correct=np.array([row[0] for row in right]),
        in_five=np.array([row.any() for row in right]),
        nll=highest + log_sum - own,
        confidence=np.exp(-log_sum),
    )


def summarize(images: ImageScores, labels: np.ndarray | None) -> Scores:
    """labels: (N,), the class of each image; None where images have several."""
    count = len(images.correct)
    return Scores(
        top1=100 * (int(images.correct.sum()) / count),
        top5=100 * (int(images.in_five.sum()) / count),
        class_mean=None if labels is None else _class_mean(images.correct, labels),
        nll=None if labels is None else math.fsum(images.nll) / count,
        ece=calibration_error(images.confidence, images.correct),
    )


T = TypeVar("T", bound="DataclassInstance")


def joined(parts: Sequence[T]) -> T:
    """Dataclasses whose fields are arrays of some images each, (N1,), (N2,), ..., as one of all, in their order."""
    names = [field.name for field in fields(parts[0])]
    return type(parts[0])(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def _class_mean(correct: np.ndarray, labels: np.ndarray) -> float:
    seen = np.bincount(labels)
    hits = np.bincount(labels, weights=correct)
    return 100 * math.fsum(hits[seen > 0] / seen[seen > 0]) / int((seen > 0).sum())


def bins_of(confidence: np.ndarray) -> np.ndarray:
    """The bin of each confidence, (N,), from 0 to BINS - 1: as ``calibration_error`` has them."""
    return np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error in percent: sum over bins of (n_b / N) * |accuracy_b - mean confidence_b|.

    Bin b holds the confidences in (b / BINS, (b + 1) / BINS], as in Guo et al. (2017). Both are (N,).
    """
    bins = bins_of(confidence)
    gaps = [abs(int(correct[bins == each].sum()) - math.fsum(confidence[bins == each])) for each in range(BINS)]
    return 100 * math.fsum(gaps) / len(confidence)


def best_temperature(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """The T for which logits / T have the lowest mean negative log-likelihood (temperature scaling, Guo et al. 2017).

    logits: (N, K). labels: (N,). Found by bisection: in 1 / T the likelihood is convex. None where it lies outside of
    TEMPERATURES, as for a model that makes no mistake.
    """
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    own = logits[np.arange(len(logits)), labels]

    def slope(inverse: float) -> float:
        """Derivative of the negative log-likelihood by 1 / T, summed over images."""
        likelihoods = np.exp(inverse * logits)
        return math.fsum((likelihoods * logits).sum(axis=1) / likelihoods.sum(axis=1) - own)

    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    if not slope(low) < 0 < slope(high):
        return None
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 2 / (low + high)
