"""Accuracy per head and averaged, exact over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from cit_scale.batch import Batch, NamedLogits
from cit_scale.distributed.world import World, sum_over_ranks

HEADS_MEAN = "average"


@dataclass(frozen=True)
class Accuracy:
    """Accuracy in percent, by head; with several heads, ``average`` is the accuracy of their mean logits.

    images: number of images evaluated.
    """

    images: int
    top1: dict[str, float]
    top5: dict[str, float]


@torch.no_grad()
def evaluate(forward: Callable[[Tensor], NamedLogits], batches: Iterable[Batch], world: World) -> Accuracy:
    """Collective. Every rank passes the same number of batches; images at position -1 are padding and do not count.

    forward: images (B, 3, H, W) in [0, 1] to a named tuple of (B, K) logits, in evaluation mode.
    """
    counts: Tensor | None = None
    names: list[str] = []
    images = 0
    for batch in batches:
        logits = dict(forward(batch.images)._asdict())
        if len(logits) > 1:
            logits[HEADS_MEAN] = torch.stack(list(logits.values())).mean(dim=0)
        valid = (batch.positions >= 0).to(batch.labels.device)
        names = list(logits)
        correct = torch.stack([_correct(head, batch.labels, valid) for head in logits.values()])  # (heads, 2)
        counts = correct if counts is None else counts + correct
        images += int((batch.positions >= 0).sum())
    if counts is None:
        raise ValueError("nothing to evaluate: the evaluation set gave no batch")
    total = int(sum_over_ranks(world, torch.tensor(images)))
    percent = 100 * sum_over_ranks(world, counts.cpu()).double() / total
    top1, top5 = percent.unbind(dim=1)
    return Accuracy(
        images=total,
        top1=dict(zip(names, top1.tolist(), strict=True)),
        top5=dict(zip(names, top5.tolist(), strict=True)),
    )


def _correct(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """(2,): how many valid images have their label at the top, and among the top five (or all classes, if fewer)."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (ranked == labels[:, None]) & valid[:, None]
    return torch.stack([hits[:, 0].sum(), hits.sum()])
