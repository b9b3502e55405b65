"""Freezes parts of a network: their parameters become buffers, and their BatchNorms keep their statistics.

As buffers they are outside of what an engine shards, updates and keeps moments of, and still in the state dict, under
the same names.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cit_scale.errors import ConfigError
from cit_scale.models.network import Network, head_names

# Words among the patterns: everything but the heads, and the BatchNorms wherever they are, if there are any.
TRUNK = "trunk"
BATCH_NORM = "batch_norm"


def freeze(network: Network, patterns: Sequence[str]) -> None:
    """Freeze the parameters of ``network.model`` that a pattern names, in place.

    patterns: names of parameters or modules, with the wildcards of a shell, or one of the words above.
    Raises ConfigError for a pattern that names nothing, and if nothing would be left to train.
    """
    model = network.model
    names = [name for name, _ in model.named_parameters()]
    heads = head_names(model)
    norms = {path: layer for path, layer in model.named_modules() if isinstance(layer, _BatchNorm)}
    frozen: set[str] = set()
    for pattern in patterns:
        if pattern == TRUNK:
            found = {name for name in names if not name.startswith(heads)}
        elif pattern == BATCH_NORM:
            found = {name for name in names if name.rpartition(".")[0] in norms}
        else:
            found = {name for name in names if _matches(name, pattern)}
        if not found and pattern != BATCH_NORM:
            parts = ", ".join([TRUNK, BATCH_NORM, *dict.fromkeys(name.split(".")[0] for name in names)])
            raise ConfigError(f"train.freeze={pattern!r} names no parameter; the network's parts are {parts}")
        frozen |= found
    if len(frozen) == len(names):
        raise ConfigError(f"train.freeze={','.join(patterns)} freezes every parameter, and leaves nothing to train")
    for name in frozen:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        value = getattr(module, attribute).detach()
        delattr(module, attribute)
        module.register_buffer(attribute, value)
    statistics: set[str] = set()
    for path, layer in norms.items():
        own = {f"{path}.weight", f"{path}.bias"} & set(names)
        # A BatchNorm without weights of its own is frozen with what it lies in.
        if own <= frozen if own else any(_matches(path, pattern) for pattern in patterns):
            network.frozen_norms.append(layer)
            statistics |= {f"{path}.{name}" for name, _ in layer.named_buffers()}
    network.frozen = frozenset(f"model.{name}" for name in frozen | statistics)
    network.train(network.training)


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern names a parameter, or a module that it lies in."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:count]), pattern) for count in range(1, len(parts) + 1))


def frozen_norms(module: nn.Module) -> list[nn.Module]:
    """The BatchNorms of a network whose statistics stay as they are."""
    return list(getattr(module, "frozen_norms", ()))
