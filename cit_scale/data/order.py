"""The order of the training samples, for the whole job and for one rank.

The order is a pure function of (seed, epoch). Positions 0 ... N-1 of an epoch are cut into global batches of G images;
the incomplete last batch is dropped, as in DeiT. Rank r of W gets positions [r * G / W, (r + 1) * G / W) of every
global batch and cuts them into micro-batches in order. The global batch is therefore the same for every number of ranks
and micro-steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

SPREAD = 64  # positions between two repeats of a sample, where no mixing group says otherwise
ORDER_TAG = 0x0EDE  # keeps the seed of the order apart from all other seeds made from (seed, epoch)
CLASS_TAG = 0xC1A5  # likewise, for the order of the samples of a class

Balance = Literal["none", "sqrt", "full"]
EXPONENTS: dict[Balance, float] = {"none": 1.0, "sqrt": 0.5, "full": 0.0}
"""A class of n samples stands in an epoch in proportion to n to this power."""


@dataclass(frozen=True)
class Cursor:
    """The complete state of the training stream. samples_seen: samples of `epoch` consumed so far by all ranks."""

    epoch: int = 0
    samples_seen: int = 0

    @classmethod
    def at_step(cls, step: int, num_samples: int, global_batch_size: int) -> Cursor:
        """Return the cursor after `step` updates from the start of the run. num_samples: N of the data set."""
        epoch, step_in_epoch = divmod(step, steps_per_epoch(num_samples, global_batch_size))
        return cls(epoch, step_in_epoch * global_batch_size)

    def step(self, num_samples: int, global_batch_size: int) -> int:
        """Return the number of updates from the start of the run to this cursor: the inverse of `at_step`.

        Raises ValueError if the cursor is not at the beginning of a global batch.
        """
        if self.samples_seen % global_batch_size:
            raise ValueError(
                f"samples_seen={self.samples_seen} is not a multiple of global_batch_size={global_batch_size}; "
                f"a run can only continue with the global batch size it was started with"
            )
        return self.epoch * steps_per_epoch(num_samples, global_batch_size) + self.samples_seen // global_batch_size


@dataclass(frozen=True)
class MicroBatches:
    """One rank's share of one global batch. Arrays are (micro_steps, micro_batch_size) int64; row i is micro-step i."""

    positions: np.ndarray
    """Positions in the global batch, 0 ... G-1."""

    samples: np.ndarray
    """Indices into the source."""

    repeats: np.ndarray
    """The number of the sample's repetition in this epoch, from 0; gives each repetition another augmentation."""


def steps_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Return the number of complete global batches in one epoch. Raises ValueError if there is none."""
    if num_samples < global_batch_size:
        raise ValueError(
            f"{num_samples} training images do not fill one global batch of {global_batch_size}; "
            f"set train.global_batch_size to at most {num_samples}"
        )
    return num_samples // global_batch_size


def permutation(num_samples: int, *entropy: int) -> np.ndarray:
    """Return a permutation of 0 ... num_samples-1, (num_samples,) int64, as a pure function of `entropy`.

    The permutation sorts raw bits of PCG64. NumPy guarantees the stream of raw bits across versions, but not the
    results of Generator.permutation.
    """
    bits = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(num_samples)
    return np.argsort(bits, kind="stable")  # stable: two equal words must not leave the order to the sorting algorithm


def class_quotas(counts: np.ndarray, balance: Balance, places: int, epoch: int = 0) -> np.ndarray:
    """Return how many of an epoch's places each class has, (K,) int64; they sum to ``places``.

    counts: (K,), samples of each class; a class without samples has no place. What is left after rounding down goes to
    one class after another, from epoch to epoch, those with the largest remainders first: where there are fewer places
    than classes, each has its turn.
    """
    return _places_before(counts, balance, places, epoch + 1) - _places_before(counts, balance, places, epoch)


def _places_before(counts: np.ndarray, balance: Balance, places: int, epoch: int) -> np.ndarray:
    """How many places each class has in all epochs before this one, (K,) int64."""
    shares = np.where(counts > 0, np.maximum(counts, 1) ** EXPONENTS[balance], 0.0)
    exact = shares / shares.sum() * places
    each_epoch = np.floor(exact).astype(np.int64)
    rest, present = places - int(each_epoch.sum()), int((counts > 0).sum())
    turns = np.empty(len(counts), np.int64)
    turns[np.argsort(np.where(counts > 0, each_epoch - exact, 1.0), kind="stable")] = np.arange(len(counts))
    # The places left over in all these epochs are dealt out in turn.
    dealt = np.where(counts > 0, (epoch * rest + present - 1 - turns) // max(present, 1), 0)
    return epoch * each_epoch + dealt


def balanced_samples(
    labels: np.ndarray, balance: Balance, seed: int, epoch: int, places: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the samples of one epoch by class, and the number of each one's occurrence in it: (places,) each, int64.

    Each class goes through its samples in one shuffled order after another, and an epoch takes up where the one before
    it stopped: no sample is seen a second time more than any other of its class. labels: (N,).
    """
    counts = np.bincount(labels)
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    first = _places_before(counts, balance, places, epoch).tolist()
    end = _places_before(counts, balance, places, epoch + 1).tolist()
    drawn, occurrences = [], []
    for label, members in enumerate(by_class):
        quota, count = end[label] - first[label], len(members)
        if not quota:
            continue
        rounds, place = np.divmod(np.arange(first[label], end[label]), count)
        picked = np.empty(quota, np.int64)
        for number in np.unique(rounds).tolist():
            here = rounds == number
            picked[here] = members[permutation(count, seed, number, label, CLASS_TAG)[place[here]]]
        drawn.append(picked)
        occurrences.append(_occurrences(picked))
    return np.concatenate(drawn), np.concatenate(occurrences)


def _occurrences(samples: np.ndarray) -> np.ndarray:
    """For each place, how often its sample stands before it."""
    by_sample = np.argsort(samples, kind="stable")
    ordered = samples[by_sample]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    numbers = np.arange(len(samples)) - np.repeat(starts, np.diff(np.append(starts, len(samples))))
    occurrences = np.empty(len(samples), np.int64)
    occurrences[by_sample] = numbers
    return occurrences


def repeat_spread(version: int, group_size: int | None) -> int:
    """Positions between two repeats of a sample: two mixing groups. version: of the order; 1 had SPREAD always.

    The smallest distance at which mixing cannot blend two repeats of an image, so that even small batches have some.
    group_size: None: each micro-batch is a group, and only large batches have repeats.
    """
    return SPREAD if version == 1 or group_size is None else 2 * group_size


def epoch_order(
    num_samples: int, seed: int, epoch: int, repeats: int = 1, spread: int = SPREAD
) -> tuple[np.ndarray, np.ndarray]:
    """Return the order of one epoch: samples (N,) and repeats (N,), both int64.

    With repeats=1 every sample occurs once. With more, each of the first N / repeats samples of the permutation occurs
    `repeats` times, numbered 0 ... repeats-1: the epoch keeps its length and shows fewer images more often (repeated
    augmentation, arXiv:1902.05509, sampled as in DeiT).

    A run of ``spread`` different samples is repeated ``repeats`` times, so the repeats of a sample are near each other,
    most of them in one global batch (``share_together`` says how many), but no neighbours: mixup and cutmix would mix
    neighbouring repeats of an image with each other. (DeiT gives the repeats of an image to different ranks.)

    Raises ValueError for repeats below 1.
    """
    places, repeat = _spread_repeats(num_samples, repeats, spread)
    return permutation(num_samples, seed, epoch, ORDER_TAG)[places], repeat


def balanced_order(
    labels: np.ndarray,
    balance: Balance,
    places: int,
    seed: int,
    epoch: int,
    repeats: int = 1,
    spread: int = SPREAD,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the order of one epoch with the quotas of ``class_quotas``: samples (places,) and repeats, both int64.

    labels: (N,). places: of the epoch's complete global batches. Samples of rare classes stand in the epoch several
    times, each time augmented anew, and some of frequent ones not. With repeats the quotas are those of the different
    places, each of which occurs ``repeats`` times, but for the last ones of an epoch that is no multiple.
    """
    order, repeat = _spread_repeats(places, repeats, spread)
    different = int(order.max()) + 1
    drawn, occurrences = balanced_samples(labels, balance, seed, epoch, different)
    shuffled = permutation(different, seed, epoch, ORDER_TAG)[order]
    return drawn[shuffled], occurrences[shuffled] * repeats + repeat


def share_together(samples: np.ndarray, global_batch_size: int) -> float:
    """Share of an epoch's repeated places whose sample stands in the same global batch again; 0 if none is repeated.

    samples: (N,), of an order.
    """
    whole = samples[: len(samples) // global_batch_size * global_batch_size]
    _, which, times = np.unique(whole, return_inverse=True, return_counts=True)
    in_batch = which + len(times) * (np.arange(len(whole)) // global_batch_size)
    _, place, times_in_batch = np.unique(in_batch, return_inverse=True, return_counts=True)
    repeated = times[which] > 1
    return float((times_in_batch[place] > 1)[repeated].mean()) if repeated.any() else 0.0


def _spread_repeats(places: int, repeats: int, spread: int) -> tuple[np.ndarray, np.ndarray]:
    """For each place of an epoch, which of the different samples stands there, and the number of its repetition."""
    if repeats < 1:
        raise ValueError(f"repeats={repeats} is below 1, so no sample would occur in an epoch; use 1 or more")
    # Fewer samples than spread x repeats make one shorter run, so that its last repeats are not cut off.
    spread = min(spread, -(-places // repeats))
    # A chunk is one run with all its repeats; the place in it gives sample and repeat.
    chunk, place = np.divmod(np.arange(places), spread * repeats)
    return chunk * spread + place % spread, place // spread


def rank_slice(
    order: tuple[np.ndarray, np.ndarray],
    samples_seen: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
) -> MicroBatches:
    """Return one rank's micro-batches of the global batch that starts at position `samples_seen` of the epoch.

    order: the result of `epoch_order`.
    Raises ValueError unless global_batch_size is a multiple of micro_batch_size x world_size.
    """
    per_micro_step = micro_batch_size * world_size
    if global_batch_size % per_micro_step:
        raise ValueError(
            f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size x world_size = "
            f"{micro_batch_size} x {world_size} = {per_micro_step}; "
            f"the next one that is: {-(-global_batch_size // per_micro_step) * per_micro_step}"
        )
    share = global_batch_size // world_size
    positions = np.arange(rank * share, (rank + 1) * share).reshape(-1, micro_batch_size)
    samples, repeats = order
    return MicroBatches(positions, samples[samples_seen + positions], repeats[samples_seen + positions])
