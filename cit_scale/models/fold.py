"""BatchNorm that will not change any more, folded into the convolution before it."""

from __future__ import annotations

import copy
import inspect
from collections import Counter

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.nn.utils import fuse_conv_bn_weights

from cit_scale.distributed.world import warn_once_per_job

# Largest difference of the outputs, relative to the largest output. Float32 makes 1e-6, a wrong pair 1e-1.
TOLERANCE = 1e-3


@torch.no_grad()
def fold_batch_norm(network: nn.Module, example: Tensor) -> nn.Module:
    """A copy in which each BatchNorm2d that alone reads a convolution's output has become part of that convolution.

    The convolution takes over scale and shift, computed in float64, and what stood behind the statistics (an
    activation, or nothing) stays in their place. torch.fx finds the pairs; what it cannot see of a model's code, such
    as a branch on the kind of its input, is caught by comparing what both answer to ``example``.
    network: in evaluation mode, and left as it is. example: what it takes, (B, 3, H, W).
    Returns the network itself, with a warning, where it cannot be traced or would answer otherwise.
    Raises ValueError in training mode, where the statistics still move.
    """
    if any(module.training for module in network.modules()):
        raise ValueError("BatchNorm can be folded in evaluation mode only; call eval() first")
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network
    kept = f"{type(network).__name__} keeps its BatchNorms"
    try:
        folded = copy.deepcopy(network)
        pairs = _find_pairs(copy.deepcopy(network))  # of a copy, as some models would keep fx's proxies
    except Exception as error:  # whatever a model's code raises when it meets proxies in the place of tensors
        warn_once_per_job(f"{kept}, as torch.fx cannot trace it: {error}")
        return network
    for conv_name, norm_name in pairs:
        norm = folded.get_submodule(norm_name)
        _fold(folded.get_submodule(conv_name), norm)
        folded.set_submodule(norm_name, _without_statistics(norm))
    expected, answer = network(example), folded(example)
    if not (answer - expected).abs().max() <= TOLERANCE * expected.abs().max():
        warn_once_per_job(f"{kept}: folded, it answers {(answer - expected).abs().max():.1e} away from what it did")
        return network
    return folded


class _Tracer(fx.Tracer):
    """Traces into every module but those of torch.nn and what derives from a convolution or a BatchNorm."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Conv2d | nn.BatchNorm2d) or super().is_leaf_module(module, name)


def _find_pairs(network: nn.Module) -> list[tuple[str, str]]:
    """Names of the convolutions and BatchNorms that follow each other and are called once."""
    parameters = inspect.signature(network.forward).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
    graph = _Tracer().trace(network, concrete_args=defaults)
    modules = dict(network.named_modules(remove_duplicate=False))
    names = Counter(map(id, modules.values()))
    calls = Counter(id(modules[node.target]) for node in graph.nodes if node.op == "call_module")
    pairs = []
    for node in graph.nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not (isinstance(source, fx.Node) and source.op == "call_module" and len(source.users) == 1):
            continue
        conv, norm = modules[source.target], modules[node.target]
        if type(conv) is not nn.Conv2d or _without_statistics(norm) is None:
            continue
        if all(calls[id(each)] == names[id(each)] == 1 and not _has_hooks(each) for each in (conv, norm)):
            pairs.append((source.target, node.target))
    return pairs


def _has_hooks(module: nn.Module) -> bool:
    """Pruning and the older weight_norm are hooks too."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _without_statistics(norm: nn.Module) -> nn.Module | None:
    """What a BatchNorm does after it has normalised; None for other modules and for those that keep no statistics."""
    if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
        return None
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    if type(norm) is BatchNormAct2d:
        return nn.Sequential(norm.drop, norm.act)
    return None


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    weight, bias = fuse_conv_bn_weights(
        *(None if tensor is None else tensor.double() for tensor in (conv.weight, conv.bias)),
        norm.running_mean.double(),
        norm.running_var.double(),
        norm.eps,
        *(None if tensor is None else tensor.double() for tensor in (norm.weight, norm.bias)),
    )
    for name, tensor in {"weight": weight, "bias": bias}.items():
        parameter = nn.Parameter(tensor.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)
        setattr(conv, name, parameter)
