"""Mixup and cutmix over groups of neighbours in the global batch.

A group of `group_size` neighbours shares one mode and one lambda, drawn from (seed, step, group), and every image in it
mixes with its mirror, as a batch mixes with its flip in timm's Mixup. Ranks and micro-steps hold whole groups, so the
mixed global batch is the same at every layout. Without a group size each micro-batch is one group, which is timm's way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cit_scale.batch import Batch, MixedBatch
from cit_scale.config import MixingConfig

MIXING_TAG = 0x313C  # keeps the seed of mixing apart from every other use of (seed, step)


@dataclass(frozen=True)
class GroupMix:
    """How one group is mixed: `lam` is each image's own share of its target, 1 - lam its mirror's."""

    lam: float
    box: tuple[slice, slice] | None
    """Rows and columns that cutmix takes from the mirror; None for mixup."""


def draw_group(mixing: MixingConfig, seed: int, step: int, group: int, height: int, width: int) -> GroupMix:
    """Draw mode, lambda and box of one group as timm's Mixup does for a batch.

    The area of cutmix's box may be cut off at the border; lambda then follows the area that is left.
    """
    random = np.random.default_rng(np.random.SeedSequence([seed, step, group, MIXING_TAG]))
    alphas = mixing.mixup_alpha, mixing.cutmix_alpha
    if max(alphas) == 0 or random.random() >= mixing.prob:
        return GroupMix(1.0, None)
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
    """labels (B,) -> (B, K) float32: `smoothing` is spread evenly over all classes, the rest stands on the label."""
    targets = torch.full((len(labels), num_classes), smoothing / num_classes, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + smoothing / num_classes)


def mix(batch: Batch, mixing: MixingConfig, num_classes: int, seed: int, step: int) -> MixedBatch:
    """Mix the images and labels of a micro-batch of global step `step`.

    The images stay in [0, 1]; the batch is left as it was. Raises ValueError unless the batch holds whole groups.
    """
    size = mixing.group_size or len(batch.positions)
    first = int(batch.positions[0])
    if first % size or len(batch.positions) % size:
        raise ValueError(
            f"a micro-batch of {len(batch.positions)} images from position {first} does not hold whole groups; "
            f"make micro_batch_size a multiple of mixing.group_size={size}"
        )
    height, width = batch.images.shape[-2:]
    targets = smooth_one_hot(batch.labels, num_classes, mixing.smoothing)
    mixed = MixedBatch(torch.empty_like(batch.images), torch.empty_like(targets))
    # One group at a time: a kernel over several groups may round differently, and how many of them a rank holds must
    # not show in the images.
    for start in range(0, len(targets), size):
        group = slice(start, start + size)
        how = draw_group(mixing, seed, step, (first + start) // size, height, width)
        images, mirrored = batch.images[group], batch.images[group].flip(0)
        if how.box is None:
            torch.lerp(mirrored, images, how.lam, out=mixed.images[group])
        else:
            mixed.images[group] = images
            mixed.images[group][:, :, *how.box] = mirrored[:, :, *how.box]
        torch.lerp(targets[group].flip(0), targets[group], how.lam, out=mixed.targets[group])
    return mixed
