"""AdamW: which parameters decay, clipping, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cit_scale.config import OptimConfig
from cit_scale.errors import ConfigError
from cit_scale.models.advised import PREFIX as TRUNK_PREFIX
from cit_scale.models.network import head_names


def parameter_groups(
    module: nn.Module, weight_decay: float, layer_decay: float = 1.0, head_lr_scale: float = 1.0
) -> list[dict[str, Any]]:
    """Groups in the order of ``module.named_parameters()``: matrices and convolutions, which decay, then the rest.

    The rest is one-dimensional parameters, biases, and whatever ``module.no_weight_decay()`` names where there is such
    a method. With ``layer_decay`` or ``head_lr_scale``, which need a network of timm's, there are two groups for each
    layer, with the ``lr_scale`` by which it multiplies the learning rate.

    Raises ConfigError if a parameter is frozen: the engines' state and sharding assume that every parameter is trained.
    """
    exempt = getattr(module, "no_weight_decay", None)
    kept = set() if exempt is None else set(exempt())
    scales = {} if layer_decay == head_lr_scale == 1 else lr_scales(module, layer_decay, head_lr_scale)
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            raise ConfigError(
                f"parameter {name} is frozen, and the engines train every parameter; choose another model"
            )
        is_undecayed = parameter.ndim <= 1 or name.endswith(".bias") or name in kept
        groups.setdefault((is_undecayed, scales.get(name, 1.0)), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": 0.0 if is_undecayed else weight_decay, "lr_scale": scale}
        for (is_undecayed, scale), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def lr_scales(module: nn.Module, layer_decay: float, head_lr_scale: float) -> dict[str, float]:
    """What multiplies the learning rate of each parameter, by name: layer_decay to the number of layers above it.

    Layers are those of timm's ``group_matcher``, the heads are the last one. module: a ``Network``. Raises ConfigError
    for a model without one.
    """
    model = cast(Any, module).model
    heads = head_names(model)
    rates = {f"model.{name}": head_lr_scale if name.startswith(heads) else 1.0 for name, _ in model.named_parameters()}
    if layer_decay == 1:
        return rates
    trunk = getattr(model, "trunk", model)  # of an advised model
    prefix = "model." if trunk is model else f"model.{TRUNK_PREFIX}"
    try:
        layers = group_parameters(trunk, trunk.group_matcher(coarse=False), reverse=True)
    except AttributeError as error:
        raise ConfigError(
            f"{type(trunk).__name__} does not say what its layers are ({error}); set optim.layer_decay to 1"
        ) from error
    last = max(layers.values())
    return rates | {
        name: layer_decay ** (last - layer)
        for key, layer in layers.items()
        if (name := f"{prefix}{key}") in rates and not name.removeprefix("model.").startswith(heads)
    }


def adamw(module: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the module's groups. The learning rate is set at each step; until then it is 0.

    Fused: one launch for all parameters on a GPU, one pass over memory on a CPU.
    """
    groups = parameter_groups(module, optim.weight_decay, optim.layer_decay, optim.head_lr_scale)
    return torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, eps=optim.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def clip_gradients(parameters: Iterable[Tensor], clip_norm: float) -> Tensor:
    """Scale the gradients down to a global L2 norm of ``clip_norm``; 0 clips nothing.

    Collective where parameters are DTensors. Returns the gradient norm before clipping, a scalar on the device, which
    the host does not wait for. Where it is not finite, the gradients are not either.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    total_norm = torch.nn.utils.get_total_norm(gradients_of(parameters))
    if isinstance(total_norm, DTensor):
        total_norm = total_norm.full_tensor()
    if clip_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, total_norm)
    return total_norm


def gradients_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def skip_where(optimizer: torch.optim.AdamW, found_inf: Tensor) -> None:
    """Let the next step leave weights, moments and step counts as they are where ``found_inf`` is 1.

    found_inf: float32 scalar on the device. Fused AdamW reads it there, as torch's GradScaler would have it.
    """
    optimizer.found_inf = found_inf  # type: ignore[attr-defined]


def learning_rate(step: int, optim: OptimConfig, peak_lr: float, steps_per_epoch: int, epochs: int) -> float:
    """The learning rate of update ``step``, counted from 0.

    Linear from warmup_lr to peak_lr over warmup_epochs, then on the cosine that falls over all epochs, from peak_lr at
    step 0 to min_lr at the end. The warm-up covers the head of the cosine and does not push it back, as in DeiT's
    recipe, so the first value after it lies below the peak.
    """
    warmup_steps = optim.warmup_epochs * steps_per_epoch
    total_steps = epochs * steps_per_epoch
    if step < warmup_steps:
        return optim.warmup_lr + (peak_lr - optim.warmup_lr) * step / warmup_steps
    progress = min(step / total_steps, 1.0)
    return optim.min_lr + (peak_lr - optim.min_lr) * (1 + math.cos(math.pi * progress)) / 2
