"""Computing a network's blocks again in the backward pass instead of keeping what is inside them."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from cit_scale.errors import ConfigError
from cit_scale.models.freeze import frozen_norms
from cit_scale.models.network import Network


def blocks_of(module: Network) -> list[nn.Module]:
    """The transformer blocks of a network's model, by timm's name for them; none where it has no such name."""
    return list(getattr(module.model, "blocks", ()))


def checkpoint_activations(module: Network) -> None:
    """Have the model compute its blocks again in the backward pass, or ConfigError where it cannot."""
    model = module.model
    way_out = "set engine.activation_checkpointing=false"
    # Computing a BatchNorm again would move its running statistics twice. What stands outside the blocks is not.
    inside = blocks_of(module) or [model]
    kept = set(frozen_norms(module))
    norms = [
        layer for block in inside for layer in block.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    ]
    if set(norms) - kept:
        raise ConfigError(f"{type(model).__name__} has BatchNorm where it would be computed twice; {way_out}")
    try:
        cast(Any, model).set_grad_checkpointing(True)  # timm's method, which nn.Module does not have
    except (AttributeError, AssertionError) as error:  # timm asserts where a model has the method alone
        raise ConfigError(f"{type(model).__name__} cannot checkpoint its activations; {way_out}") from error
