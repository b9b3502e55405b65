"""Mixup (arXiv:1710.09412) and cutmix (arXiv:1905.04899) over groups of neighbours in the global batch.

A group of `group_size` neighbouring images shares one mode and one lambda, drawn from (seed, step, group). Image i of a
group of n is mixed with its partner, image n - 1 - i, as timm's Mixup mixes a batch with its flip. Ranks and
micro-steps hold complete groups, so the mixed global batch is the same for every number of them. Without a group size
each micro-batch is one group, as in timm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cit_scale.batch import Batch, MixedBatch
from cit_scale.config import MixingConfig
from cit_scale.data.transfer import to_device

MIXING_TAG = 0x313C  # keeps the seed of mixing apart from all other seeds made from (seed, step)


@dataclass(frozen=True)
class GroupMix:
    """How one group is mixed. lam: each image's own share of its target; 1 - lam is the share of its partner."""

    lam: float
    box: tuple[slice, slice] | None
    """Rows and columns that cutmix takes from the partner; None for mixup."""


def draw_group(mixing: MixingConfig, seed: int, step: int, group: int, height: int, width: int) -> GroupMix:
    """Draw mode, lambda and box of one group, with the distributions of timm's Mixup for a batch.

    step: global step. group: number of the group in the global batch. height, width: of the images, in pixels.
    The cutmix box is cut off at the border of the image; lambda then follows from the remaining area.
    """
    random = np.random.default_rng(np.random.SeedSequence([seed, step, group, MIXING_TAG]))
    alphas = mixing.mixup_alpha, mixing.cutmix_alpha
    if max(alphas) == 0 or random.random() >= mixing.prob:
        return GroupMix(1.0, None)  # lambda 1: not mixed
    is_cutmix = random.random() < (mixing.switch_prob if min(alphas) > 0 else float(mixing.cutmix_alpha > 0))
    lam = random.beta(alphas[is_cutmix], alphas[is_cutmix])
    if not is_cutmix:
        return GroupMix(lam, None)
    cut_h, cut_w = int(height * np.sqrt(1 - lam)), int(width * np.sqrt(1 - lam))
    y, x = int(random.integers(height)), int(random.integers(width))  # the centre of the box
    top, bottom = max(y - cut_h // 2, 0), min(y + (cut_h + 1) // 2, height)
    left, right = max(x - cut_w // 2, 0), min(x + (cut_w + 1) // 2, width)
    area = (bottom - top) * (right - left)
    return GroupMix(1 - area / (height * width), (slice(top, bottom), slice(left, right)))


def smooth_one_hot(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Return smoothed targets, (B, K) float32. labels: (B,).

    `smoothing` is spread evenly over all K classes; the label gets the remaining 1 - smoothing in addition.
    """
    targets = torch.full((len(labels), num_classes), smoothing / num_classes, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + smoothing / num_classes)


def mix(batch: Batch, mixing: MixingConfig, num_classes: int, seed: int, step: int) -> MixedBatch:
    """Return the mixed images (B, 3, H, W) in [0, 1] and targets (B, K) of a micro-batch of global step `step`.

    `batch` itself is not changed. Raises ValueError unless the micro-batch consists of complete groups. The host waits
    for nothing: it sends what it has drawn to the device, where all groups are mixed at once.
    """
    size = mixing.group_size or len(batch.positions)
    first = int(batch.positions.numpy()[0])
    if first % size or len(batch.positions) % size:
        raise ValueError(
            f"a micro-batch of {len(batch.positions)} images from position {first} does not hold whole groups; "
            f"make micro_batch_size a multiple of mixing.group_size={size}"
        )
    height, width = batch.images.shape[-2:]
    groups = range(first // size, (first + len(batch.positions)) // size)
    drawn = [draw_group(mixing, seed, step, group, height, width) for group in groups]
    lam, weights = _weights(drawn, height, width, batch.images.device)
    images = batch.images.unflatten(0, (len(groups), size))  # (G, n, 3, H, W)
    targets = smooth_one_hot(batch.labels, num_classes, mixing.smoothing).unflatten(0, (len(groups), size))
    return MixedBatch(
        torch.lerp(images.flip(1), images, weights[:, None, None]).flatten(0, 1),
        torch.lerp(targets.flip(1), targets, lam[:, None, None]).flatten(0, 1),
    )


def _weights(drawn: Sequence[GroupMix], height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights that each image has in its group's mix; the partner has the rest. Of the target (G,), and of each pixel
    (G, H, W): lambda, or 0 in the box and 1 outside of it.
    """
    table = np.zeros((len(drawn), 2 + height + width), np.float32)  # one table, for one copy to the device
    for row, how in zip(table, drawn, strict=True):
        row[0], row[1] = how.lam, how.lam if how.box is None else 1.0
        if how.box is not None:
            rows, columns = how.box
            row[2:][:height][rows] = 1
            row[2 + height :][columns] = 1
    lam, outside, rows, columns = to_device(torch.from_numpy(table), device).split([1, 1, height, width], dim=1)
    return lam[:, 0], torch.addcmul(outside[:, :, None], rows[:, :, None], columns[:, None], value=-1)
