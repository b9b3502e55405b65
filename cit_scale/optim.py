"""AdamW: which parameters decay, clipping, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cit_scale.config import OptimConfig
from cit_scale.errors import ConfigError


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups in the order of ``module.named_parameters()``: matrices and convolutions, which decay, then the rest.

    The rest is one-dimensional parameters, biases, and whatever ``module.no_weight_decay()`` names where there is such
    a method.

    Raises ConfigError if a parameter is frozen: the engines' state and sharding assume that every parameter is trained.
    """
    exempt = getattr(module, "no_weight_decay", None)
    kept = set() if exempt is None else set(exempt())
    decayed, undecayed = [], []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            raise ConfigError(
                f"parameter {name} is frozen, and the engines train every parameter; choose another model"
            )
        if parameter.ndim <= 1 or name.endswith(".bias") or name in kept:
            undecayed.append(parameter)
        else:
            decayed.append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(module: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the module's two groups. The learning rate is set at each step; until then it is 0.

    Fused: one launch for all parameters on a GPU, one pass over memory on a CPU.
    """
    groups = parameter_groups(module, optim.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, eps=optim.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(parameters: Iterable[Tensor], clip_norm: float, loss_scale: float = 1.0) -> float:
    """Divide the gradients by ``loss_scale`` and scale them down to a global L2 norm of ``clip_norm``.

    Collective where parameters are DTensors. Returns the gradient norm before clipping. Nothing is clipped if clip_norm
    is 0 or the norm is not finite.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if loss_scale != 1:
        torch._foreach_mul_(gradients, 1 / loss_scale)
    total_norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(total_norm, DTensor):
        total_norm = total_norm.full_tensor()
    grad_norm = total_norm.item()
    if clip_norm > 0 and math.isfinite(grad_norm):
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, total_norm)
    return grad_norm


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
