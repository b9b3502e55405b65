"""Accuracy per head and averaged, exact over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cit_scale.batch import Batch, NamedLogits
from cit_scale.distributed.world import World, sum_over_ranks

HEADS_MEAN = "average"


@dataclass(frozen=True)
class Accuracy:
    """Accuracy in percent, by head; with several heads, ``average`` is the accuracy of their mean logits.

    images: number of images evaluated. class_mean: top-1 as the mean over the classes that have images, in which a rare
    class counts as much as any other.
    """

    images: int
    top1: dict[str, float]
    top5: dict[str, float]
    class_mean: dict[str, float]


@torch.no_grad()
def evaluate(forward: Callable[[Tensor], NamedLogits], batches: Iterable[Batch], world: World) -> Accuracy:
    """Collective. Every rank passes the same number of batches; images at position -1 are padding and do not count.

    forward: images (B, 3, H, W) in [0, 1] to a named tuple of (B, K) logits, in evaluation mode.
    """
    counts: Tensor | None = None  # (heads, K, 3): images of each class, right at the top, right among the top five
    names: list[str] = []
    images = 0
    for batch in batches:
        logits = with_average(forward(batch.images)._asdict())
        valid = (batch.positions >= 0).to(batch.labels.device)
        names = list(logits)
        correct = torch.stack([_correct(head, batch.labels, valid) for head in logits.values()])
        counts = correct if counts is None else counts + correct
        images += int((batch.positions >= 0).sum())
    if counts is None:
        raise ValueError("nothing to evaluate: the evaluation set gave no batch")
    total = int(sum_over_ranks(world, torch.tensor(images)))
    seen, at_top, in_five = sum_over_ranks(world, counts.cpu()).double().unbind(dim=2)  # each (heads, K)
    class_mean = (at_top / seen.clamp(min=1)).sum(dim=1) / (seen > 0).sum(dim=1)
    return Accuracy(
        images=total,
        top1=_percent(names, at_top.sum(dim=1) / total),
        top5=_percent(names, in_five.sum(dim=1) / total),
        class_mean=_percent(names, class_mean),
    )


def with_average(logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the mean of all heads' logits where there are several. logits: by head, each (B, K)."""
    heads = dict(logits)
    if len(heads) > 1:
        heads[HEADS_MEAN] = torch.stack(list(heads.values())).mean(dim=0)
    return heads


def _percent(names: list[str], shares: Tensor) -> dict[str, float]:
    return dict(zip(names, (100 * shares).tolist(), strict=True))


def _correct(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """(K, 3), by class: valid images, those with their label at the top, and among the top five (or all classes)."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = ranked == labels[:, None]
    found = torch.stack([valid, hits[:, 0] & valid, hits.any(dim=1) & valid], dim=1).long()  # (B, 3)
    return found.new_zeros(logits.shape[1], 3).index_add_(0, labels, found)
