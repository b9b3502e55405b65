"""BatchNorm over several ranks: whose images it normalises with, and running statistics that are one for all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce  # differentiable, and torch.compile traces it
from torch.nn.modules.batchnorm import _BatchNorm

from cit_scale.distributed.world import World
from cit_scale.errors import ConfigError
from cit_scale.models.freeze import frozen_norms

# Why engine.batch_norm is local by default. BatchNorm stands only in the student's stems, early, where a channel is
# normalised over every position of every image: at 224 pixels and 64 images a rank over 64 x 112 x 112 values, ample
# for a mean and a variance. It is what DDP does unless told otherwise. Synchronizing costs two small messages a layer
# in every forward pass and two in every backward, each of which waits for the slowest rank. It is for micro-batches of
# a few images, and for comparing runs on different numbers of ranks to the last digits.


def prepare_batch_norm(module: nn.Module, batch_norm: Literal["local", "synchronized"], world: World) -> None:
    """Make every BatchNorm in ``module`` what ``engine.batch_norm`` says, in place; names of parameters stay.

    Raises ConfigError for a kind of BatchNorm that cannot be synchronized.
    """
    if batch_norm == "local" or world.world_size == 1:
        return
    for name, layer in module.named_modules():
        if any(layer is each for each in frozen_norms(module)):
            continue
        if type(layer) in SYNCHRONIZED:
            # Only forward changes: parameters, buffers, hooks and whoever refers to the layer stay as they are.
            layer.__class__ = SYNCHRONIZED[type(layer)]
        elif isinstance(layer, _BatchNorm):
            raise ConfigError(
                f"engine.batch_norm=synchronized, but {name} is a {type(layer).__name__}, which cannot be; "
                f"those that can: {', '.join(kind.__name__ for kind in SYNCHRONIZED)}; set it to local"
            )


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the images of all ranks, which bring equally many. On any device, unlike nn.SyncBatchNorm."""

    def forward(self, images: Tensor) -> Tensor:
        """Collective in training mode. (B, C, H, W) -> (B, C, H, W)."""
        return _normalise(self, images) if self.training else super().forward(images)


class SynchronizedBatchNormAct2d(BatchNormAct2d):
    """timm's BatchNorm with the activation that follows it."""

    def forward(self, images: Tensor) -> Tensor:
        """Collective in training mode. (B, C, H, W) -> (B, C, H, W)."""
        return self.act(self.drop(_normalise(self, images))) if self.training else super().forward(images)


SYNCHRONIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: SynchronizedBatchNorm2d,
    BatchNormAct2d: SynchronizedBatchNormAct2d,
}


def _normalise(layer: nn.BatchNorm2d, images: Tensor) -> Tensor:
    """Collective. With the mean and variance over (B, H, W) of all ranks, which the running statistics follow.

    Two passes, mean and then mean of squared deviations: E[x^2] - E[x]^2 would lose the digits of a small variance.
    """
    with torch.autocast(images.device.type, enabled=False):
        exact = images.float()
        mean = _mean_over_ranks(exact.mean(dim=(0, 2, 3)))  # (C,)
        centred = exact - mean[:, None, None]
        variance = _mean_over_ranks(centred.square().mean(dim=(0, 2, 3)))  # (C,)
        if layer.track_running_stats:
            count = images.numel() // images.shape[1] * dist.get_world_size()
            _follow(layer, mean.detach(), variance.detach() * count / (count - 1))
        normalised = centred * torch.rsqrt(variance + layer.eps)[:, None, None]
        if layer.affine:
            normalised = normalised * layer.weight[:, None, None] + layer.bias[:, None, None]
    return normalised.to(images.dtype)


def _mean_over_ranks(values: Tensor) -> Tensor:
    everyone = dist.group.WORLD
    assert everyone is not None  # several ranks have joined the process group before they train
    return all_reduce(values, "sum", everyone) / dist.get_world_size()


@torch.no_grad()
def _follow(layer: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """Move the running statistics, as nn.BatchNorm2d does; without a momentum they are the mean of all batches."""
    assert layer.num_batches_tracked is not None  # they are None together, without track_running_stats
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.num_batches_tracked.add_(1)
    weight = 1 / layer.num_batches_tracked if layer.momentum is None else layer.momentum
    layer.running_mean.lerp_(mean, weight)
    layer.running_var.lerp_(variance, weight)


class RunningStatistics:
    """The running statistics of local BatchNorm layers, which each rank moves by its own images.

    Left alone they would drift apart, and a checkpoint would hold those of whichever rank wrote it. They are a linear
    average of what was seen, so their mean over ranks after every update is just the running average of the ranks'
    mean: one state for every rank, evaluation and checkpoint, for one small message an update.
    """

    def __init__(self, module: nn.Module, world: World) -> None:
        self._world = world
        self._statistics = list(_local_statistics(module)) if world.world_size > 1 else []

    @torch.no_grad()
    def average(self) -> None:
        """Collective. Replace each by its mean over ranks."""
        if not self._statistics:
            return
        flat = torch.cat([statistic.flatten() for statistic in self._statistics])
        dist.all_reduce(flat)
        means = (flat / self._world.world_size).split([statistic.numel() for statistic in self._statistics])
        torch._foreach_copy_(self._statistics, list(means))


def _local_statistics(module: nn.Module) -> Iterator[Tensor]:
    kept = set(frozen_norms(module))  # which do not move, and whose mean over three ranks would differ in the last bit
    for layer in module.modules():
        is_synchronized = type(layer) in SYNCHRONIZED.values()
        if isinstance(layer, _BatchNorm) and layer.track_running_stats and not is_synchronized and layer not in kept:
            yield from (statistic for statistic in (layer.running_mean, layer.running_var) if statistic is not None)
