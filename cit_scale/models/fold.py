"""BatchNorm that will not change any more, folded into the convolution before it."""

from __future__ import annotations

import warnings
from collections import Counter

import torch
from timm.layers import BatchNormAct2d
from torch import fx, nn
from torch.nn.utils import fuse_conv_bn_weights


@torch.no_grad()
def fold_batch_norm(network: nn.Module) -> list[str]:
    """Fold, in place, each BatchNorm2d whose input comes from a convolution and is used by nothing else.

    The convolution takes over scale and shift, computed in float64, and what stood behind the statistics (an
    activation, or nothing) stays in their place.
    network: in evaluation mode; one that torch.fx cannot trace is left as it is, with a warning.
    Returns the names of the folded BatchNorms. Raises ValueError in training mode, where the statistics still move.
    """
    if network.training:
        raise ValueError("BatchNorm can be folded in evaluation mode only; call eval() first")
    try:
        graph = _Tracer().trace(network)
    except Exception as error:  # whatever a model's code raises when it meets fx's proxies in the place of tensors
        if any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
            warnings.warn(f"{type(network).__name__} keeps its BatchNorms: torch.fx says {error}", stacklevel=2)
        return []
    modules = dict(network.named_modules())
    calls = Counter(id(modules[node.target]) for node in graph.nodes if node.op == "call_module")
    folded = []
    for node in graph.nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not (isinstance(source, fx.Node) and source.op == "call_module" and len(source.users) == 1):
            continue
        conv, norm = modules[source.target], modules[node.target]
        rest = _without_statistics(norm)
        if rest is None or type(conv) is not nn.Conv2d or calls[id(conv)] > 1 or calls[id(norm)] > 1:
            continue
        _fold(conv, norm)
        network.set_submodule(node.target, rest)
        folded.append(node.target)
    return folded


class _Tracer(fx.Tracer):
    """Looks into every module but convolutions and BatchNorms, of timm's kind too, and those of torch.nn."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Conv2d | nn.BatchNorm2d) or super().is_leaf_module(module, name)


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
        setattr(conv, name, nn.Parameter(tensor.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad))
