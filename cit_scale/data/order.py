"""Which sample comes next: for the whole job, then for one rank.

The order is a pure function of (seed, epoch). Positions 0 ... N-1 of an epoch are cut into global batches of G; the
incomplete last one is dropped, as DeiT does. Rank r of W owns positions [r * G / W, (r + 1) * G / W) of every global
batch, and its micro-steps cut that share in order, so the global batch is the same at every rank layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SPREAD = 64  # places between two repeats of a sample
ORDER_TAG = 0x0EDE  # keeps the order's seed apart from every other use of (seed, epoch)


@dataclass(frozen=True)
class Cursor:
    """The whole state of the training stream: `samples_seen` of `epoch` are done, counted over all ranks."""

    epoch: int = 0
    samples_seen: int = 0

    @classmethod
    def at_step(cls, step: int, num_samples: int, global_batch_size: int) -> Cursor:
        """Where the stream stands after `step` updates from the start of the run."""
        epoch, step_in_epoch = divmod(step, steps_per_epoch(num_samples, global_batch_size))
        return cls(epoch, step_in_epoch * global_batch_size)

    def step(self, num_samples: int, global_batch_size: int) -> int:
        """How many updates lead here: the inverse of `at_step`. Raises ValueError off a step's boundary."""
        if self.samples_seen % global_batch_size:
            raise ValueError(
                f"samples_seen={self.samples_seen} is not a multiple of global_batch_size={global_batch_size}; "
                f"a run can only continue with the global batch size it was started with"
            )
        return self.epoch * steps_per_epoch(num_samples, global_batch_size) + self.samples_seen // global_batch_size


@dataclass(frozen=True)
class MicroBatches:
    """One rank's share of one global batch: row i is micro-step i. All are (micro_steps, micro_batch_size) int64."""

    positions: np.ndarray
    """Places in the global batch."""

    samples: np.ndarray
    """Indices into the source."""

    repeats: np.ndarray
    """Which of its repetitions in this epoch a sample stands for; tells their augmentations apart."""


def steps_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Full global batches in one epoch. Raises ValueError when there is none."""
    if num_samples < global_batch_size:
        raise ValueError(
            f"{num_samples} training images do not fill one global batch of {global_batch_size}; "
            f"set train.global_batch_size to at most {num_samples}"
        )
    return num_samples // global_batch_size


def permutation(num_samples: int, *entropy: int) -> np.ndarray:
    """A permutation of 0 ... num_samples-1, (num_samples,) int64, that `entropy` fixes for good.

    Sorts raw generator bits: numpy promises those forever, but not what Generator.permutation makes of them.
    """
    bits = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(num_samples)
    return np.argsort(bits, kind="stable")


def epoch_order(num_samples: int, seed: int, epoch: int, repeats: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The order of one epoch: samples (N,) and repeats (N,), both int64.

    With repeats=1 every sample stands once. With more, the first N / repeats samples of the permutation stand `repeats`
    times each, numbered 0 ... repeats-1, so an epoch keeps its length and sees fewer images more often (repeated
    augmentation, arXiv:1902.05509, as DeiT samples it). They come in runs of SPREAD different samples, `repeats` times
    over: in one global batch, but not among the neighbours that mixup and cutmix would then mix with themselves. (DeiT
    hands an image's repeats to different ranks.)
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}; every sample stands at least once in the order, so use 1 or more")
    places = np.arange(num_samples)
    spread = min(SPREAD, -(-num_samples // repeats))
    chunk, place = np.divmod(places, spread * repeats)
    samples = permutation(num_samples, seed, epoch, ORDER_TAG)[chunk * spread + place % spread]
    return samples, place // spread


def rank_slice(
    order: tuple[np.ndarray, np.ndarray],
    samples_seen: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
) -> MicroBatches:
    """This rank's micro-batches of the global batch that starts at `samples_seen` of an `epoch_order`.

    Raises ValueError when the global batch is not a whole number of micro-steps on every rank.
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
