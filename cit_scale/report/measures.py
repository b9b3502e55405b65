"""What the report counts: confusion, intervals, calibration, agreement, linear CKA. Functions of arrays, nothing else.

N images, K classes. A network's choice is the class with its highest logit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cit_scale.inference.scores import BINS, bins_of

NORMAL_95 = 1.959963984540054  # quantile of the normal distribution at 97.5 %


@dataclass(frozen=True)
class Share:
    """``hits`` of ``count``, as a share from 0 to 1, with the bounds of its interval."""

    hits: int
    count: int

    @property
    def value(self) -> float:
        return self.hits / self.count if self.count else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval at 95 % (Wilson, JASA 22, 1927), which holds for few images and for none wrong.

        (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n); (0, 1) without images.
        """
        if not self.count:
            return 0.0, 1.0
        share, count, z = self.value, self.count, NORMAL_95
        middle = share + z * z / (2 * count)
        reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
        scale = 1 + z * z / count
        # At 0 and 1 the bound is the share itself; rounding would leave it 1e-17 beside.
        low = 0.0 if self.hits == 0 else (middle - reach) / scale
        high = 1.0 if self.hits == count else (middle + reach) / scale
        return low, high


@dataclass(frozen=True)
class Confused:
    """Images of class ``label`` that were taken for class ``choice``: ``count`` of ``of`` images of the label."""

    label: int
    choice: int
    count: int
    of: int


def confusion(labels: np.ndarray, choices: np.ndarray, num_classes: int) -> np.ndarray:
    """(K, K) int64: images of class i that the network takes for class j. labels, choices: (N,)."""
    places = labels.astype(np.int64) * num_classes + choices
    return np.bincount(places, minlength=num_classes * num_classes).reshape(num_classes, num_classes)


def most_confused(labels: np.ndarray, choices: np.ndarray, most: int) -> list[Confused]:
    """The pairs of different classes that were confused most often, the most frequent first; then by class.

    By the pairs that occur: a matrix of 20,000 classes would take gigabytes.
    """
    wrong = labels != choices
    pairs, counts = np.unique(np.stack([labels[wrong], choices[wrong]]), axis=1, return_counts=True)
    order = np.lexsort((pairs[1], pairs[0], -counts))[:most]
    images = np.bincount(labels)
    return [
        Confused(int(pairs[0, place]), int(pairs[1, place]), int(counts[place]), int(images[pairs[0, place]]))
        for place in order
    ]


def class_shares(labels: np.ndarray, correct: np.ndarray, num_classes: int) -> list[Share]:
    """The share of right images by class, of all K classes."""
    images = np.bincount(labels, minlength=num_classes)
    hits = np.bincount(labels[correct], minlength=num_classes)
    return [Share(int(hit), int(count)) for hit, count in zip(hits, images, strict=True)]


@dataclass(frozen=True)
class Bin:
    """Images whose confidence lies in (low, high]. confidence, accuracy: their means, 0 to 1; NaN without images."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float

    @property
    def right(self) -> Share:
        return Share(round(self.accuracy * self.count) if self.count else 0, self.count)


def reliability_bins(confidence: np.ndarray, correct: np.ndarray) -> list[Bin]:
    """The bins of ``calibration_error``, as Guo et al. (ICML 2017) draw them. Both are (N,)."""
    places = bins_of(confidence)
    bins = []
    for place in range(BINS):
        inside = places == place
        count = int(inside.sum())
        means = (
            (math.fsum(confidence[inside]) / count, int(correct[inside].sum()) / count) if count else (math.nan,) * 2
        )
        bins.append(Bin(place / BINS, (place + 1) / BINS, count, *means))
    return bins


def agreement_matrix(choices: Sequence[np.ndarray]) -> np.ndarray:
    """(V, V): the share of images for which two of V networks choose the same class. choices: V of (N,)."""
    stacked = np.stack(list(choices))
    return np.array([[float((row == other).mean()) for other in stacked] for row in stacked])


@dataclass(frozen=True)
class Advice:
    """What became of a teacher's advice in one head.

    agrees: all images, those on which both choose the same class. when_right, when_wrong: the same among the images on
    which the teacher is right and wrong: there the head makes the same mistake. mends: of the teacher's mistakes, those
    on which the head is right.
    """

    agrees: Share
    when_right: Share
    when_wrong: Share
    mends: Share


def compare_advice(labels: np.ndarray, teacher: np.ndarray, head: np.ndarray) -> Advice:
    """Compare the choices of a teacher and of a head. All (N,)."""
    same, right = teacher == head, teacher == labels
    head_right = head == labels
    return Advice(
        agrees=_share(same),
        when_right=_share(same[right]),
        when_wrong=_share(same[~right]),
        mends=_share(head_right[~right]),
    )


def right_where_wrong(labels: np.ndarray, whole: np.ndarray, other: np.ndarray) -> tuple[Share, Share]:
    """Of the images on which ``whole`` is wrong, those on which ``other`` is right; and the reverse. All (N,)."""
    whole_right, other_right = whole == labels, other == labels
    return _share(other_right[~whole_right]), _share(whole_right[~other_right])


def _share(hits: np.ndarray) -> Share:
    return Share(int(hits.sum()), len(hits))


def kl_divergence(teacher: np.ndarray, head: np.ndarray) -> np.ndarray:
    """KL(teacher || head) of each image, in nats, (N,): sum over classes of p log(p / q). Both: logits (N, K)."""
    p, q = _log_softmax(teacher), _log_softmax(head)
    return (np.exp(p) * (p - q)).sum(axis=1)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class Cka:
    """plain: linear CKA (Kornblith et al., ICML 2019), which few images and wide features drive up to 1.
    debiased: with the unbiased estimator of HSIC in its place (Song et al., JMLR 13, 2012), as Nguyen et al. (ICLR
    2021) use it; about 0 for features that have nothing in common. NaN where it is not defined.
    """

    plain: float
    debiased: float


def linear_cka(x: np.ndarray, y: np.ndarray) -> Cka:
    """Linear centered kernel alignment of two networks' features of the same N images. x: (N, C1). y: (N, C2).

    plain = ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F) with centered columns. Both by Gram matrices, (N, N).
    """
    x, y = (features.astype(np.float64) - features.mean(axis=0, dtype=np.float64) for features in (x, y))
    first, second = x @ x.T, y @ y.T
    plain = _ratio((first * second).sum(), (first * first).sum(), (second * second).sum())
    if len(x) < 4:
        return Cka(plain, math.nan)
    hsic = [_unbiased_hsic(*pair) for pair in ((first, second), (first, first), (second, second))]
    return Cka(plain, _ratio(*hsic))


def _ratio(both: float, first: float, second: float) -> float:
    """both / sqrt(first * second); NaN where a network says the same of all images."""
    product = first * second
    return float(both / math.sqrt(product)) if first > 0 and second > 0 and product > 0 else math.nan


def _unbiased_hsic(first: np.ndarray, second: np.ndarray) -> float:
    """The unbiased estimator of Song et al. (2012) of two Gram matrices, for N > 3:

    (tr(KL) + 1'K1 1'L1 / ((N - 1)(N - 2)) - 2 / (N - 2) 1'KL1) / (N (N - 3)), the diagonals of K and L set to 0.
    """
    first, second = first.copy(), second.copy()
    np.fill_diagonal(first, 0)
    np.fill_diagonal(second, 0)
    count = len(first)
    whole = first.sum() * second.sum() / ((count - 1) * (count - 2))
    crossed = 2 / (count - 2) * (first.sum(axis=0) @ second.sum(axis=0))
    return float(((first * second).sum() + whole - crossed) / (count * (count - 3)))
