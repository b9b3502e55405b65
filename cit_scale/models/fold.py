"""Folds BatchNorm with fixed statistics into the convolution before it, for networks that are only evaluated."""

from __future__ import annotations

import copy
import inspect
from collections import Counter

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.nn.utils import fuse_conv_bn_weights

from cit_scale.distributed.world import warn_once_per_job

# Largest accepted difference of the outputs, relative to the largest output. Rounding in float32 makes 1e-6, folding a
# wrong pair 1e-1.
TOLERANCE = 1e-3


@torch.no_grad()
def fold_batch_norm(network: nn.Module, example: Tensor) -> nn.Module:
    """Return a copy of the network in which BatchNorm2d layers are folded into the convolutions before them.

    A pair is folded if the BatchNorm is the only reader of the convolution's output. The convolution takes over scale
    and shift, computed in float64; the activation of a BatchNormAct2d stays in the place of the BatchNorm.
    torch.fx finds the pairs. It cannot see everything in a model's code, such as a branch on the type of an input, so
    the outputs of both networks for `example` are compared.

    network: in evaluation mode; it is not changed. example: an input, (B, 3, H, W).
    Returns `network` itself, with a warning, if it cannot be traced or the outputs differ by more than TOLERANCE.
    Raises ValueError for a network in training mode, in which the statistics still change.
    """
    if any(module.training for module in network.modules()):
        raise ValueError("BatchNorm can be folded in evaluation mode only; call eval() first")
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network
    kept = f"{type(network).__name__} keeps its BatchNorms"
    try:
        folded = copy.deepcopy(network)
        pairs = _find_pairs(copy.deepcopy(network))  # a copy, as a model that caches tensors would keep fx's proxies
    except Exception as error:  # a model's code may raise anything when it gets proxies instead of tensors
        warn_once_per_job(f"{kept}, as torch.fx cannot trace it: {error}")
        return network
    for conv_name, norm_name in pairs:
        conv, norm = folded.get_submodule(conv_name), folded.get_submodule(norm_name)
        rest = _without_statistics(norm)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        assert rest is not None
        _fold(conv, norm)
        folded.set_submodule(norm_name, rest)
    expected, answer = network(example), folded(example)
    # Written with `not`, so that NaN counts as different.
    if not (answer - expected).abs().max() <= TOLERANCE * expected.abs().max():
        warn_once_per_job(f"{kept}: folding them changes its output by {(answer - expected).abs().max():.1e}")
        return network
    return folded


class _Tracer(fx.Tracer):
    """Traces into all modules except those of torch.nn and subclasses of Conv2d and BatchNorm2d."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Conv2d | nn.BatchNorm2d) or super().is_leaf_module(module, name)


def _find_pairs(network: nn.Module) -> list[tuple[str, str]]:
    """Return (convolution, BatchNorm) pairs by name: the BatchNorm directly follows, and both are called only once."""
    # Default arguments are passed as constants: fx would trace them as proxies, and a branch on one would fail.
    parameters = inspect.signature(network.forward).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
    graph = _Tracer().trace(network, concrete_args=defaults)
    modules = dict(network.named_modules(remove_duplicate=False))
    # A module that is called twice, or known by two names, cannot be replaced in one place alone.
    names = Counter(map(id, modules.values()))
    calls = Counter(id(modules[node.target]) for node in graph.nodes if node.op == "call_module")
    pairs = []
    for node in graph.nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not (isinstance(source, fx.Node) and source.op == "call_module" and len(source.users) == 1):
            continue
        conv, norm = modules[source.target], modules[node.target]
        # Exact types: a subclass may compute something else.
        if type(conv) is not nn.Conv2d or _without_statistics(norm) is None:
            continue
        if all(calls[id(each)] == names[id(each)] == 1 and not _has_hooks(each) for each in (conv, norm)):
            pairs.append((str(source.target), str(node.target)))  # names of modules already
    return pairs


def _has_hooks(module: nn.Module) -> bool:
    """Whether a module has forward hooks. Pruning and the older weight_norm are such hooks, and change the weights."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _without_statistics(norm: nn.Module) -> nn.Module | None:
    """Return what remains of a BatchNorm once its normalization is folded: an identity, or dropout and activation.

    Returns None for other modules and for a BatchNorm without running statistics: these cannot be folded.
    """
    if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
        return None
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    if type(norm) is BatchNormAct2d:
        return nn.Sequential(norm.drop, norm.act)
    return None


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Set weight and bias of `conv` so that it computes conv and norm, with the arithmetic in float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = fuse_conv_bn_weights(
        conv.weight.double(),
        _double(conv.bias),
        norm.running_mean.double(),
        norm.running_var.double(),
        norm.eps,
        _double(norm.weight),
        _double(norm.bias),
    )
    for name, tensor in {"weight": weight, "bias": bias}.items():
        parameter = nn.Parameter(tensor.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)
        setattr(conv, name, parameter)


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()
