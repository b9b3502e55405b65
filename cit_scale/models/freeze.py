"""Freezes parts of a network: their parameters become buffers, and their BatchNorms keep their statistics.

As buffers they are outside of what an engine shards, updates and keeps moments of, and still in the state dict, under
the same names.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cit_scale.errors import ConfigError
from cit_scale.models.advised import PREFIX
from cit_scale.models.network import Network, head_names

# Words among the patterns: everything but the heads, and the BatchNorms wherever they are, if there are any.
TRUNK = "trunk"
BATCH_NORM = "batch_norm"


def freeze(network: Network, patterns: Sequence[str], new: Collection[str]) -> None:
    """Freeze the parameters of ``network.model`` that a pattern names, in place.

    patterns: names of parameters or modules, with the wildcards of a shell, or one of the words above. new: names of
    parameters and statistics that no training has made yet. BATCH_NORM leaves them out.
    Raises ConfigError for a pattern that names nothing or something new, and if nothing would be left to train.
    """
    if not patterns:
        return
    model = network.model
    names = [name for name, _ in model.named_parameters()]
    heads = head_names(model)
    norms = {path: layer for path, layer in model.named_modules() if isinstance(layer, _BatchNorm)}
    ready = {path for path in norms if not any(name.startswith(f"{path}.") for name in new)}
    frozen: set[str] = set()
    still = {path for path in ready if BATCH_NORM in patterns}
    for pattern in patterns:
        if pattern == BATCH_NORM:
            if norms and set(names) <= set(new):
                raise ConfigError(
                    f"train.freeze={BATCH_NORM}: the network starts from nothing, so that its BatchNorms have no "
                    "statistics to keep; start from weights (pretrained, weights), or set train.freeze=[]"
                )
            frozen |= {name for name in names if name.rpartition(".")[0] in ready}
            continue
        found = {name for name in names if _is_named(name, pattern, heads)}
        if not found:
            shown = dict.fromkeys(name.removeprefix(PREFIX).split(".")[0] for name in names)
            raise ConfigError(
                f"train.freeze={pattern!r} names no parameter; the network's parts are {TRUNK}, {BATCH_NORM}, "
                f"{', '.join(shown)}"
            )
        frozen |= found
        still |= {path for path in norms if _is_named(path, pattern, heads)}
    untrained = sorted(frozen & set(new))
    if untrained:
        raise ConfigError(
            f"train.freeze={','.join(patterns)} would freeze what nothing has trained, such as {untrained[0]}; start "
            "from weights that hold it (student.pretrained, student.weights), or freeze less"
        )
    if len(frozen) == len(names):
        raise ConfigError(f"train.freeze={','.join(patterns)} freezes every parameter, and leaves nothing to train")
    for name in frozen:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        value = getattr(module, attribute).detach()
        delattr(module, attribute)
        module.register_buffer(attribute, value)
    # A BatchNorm keeps its statistics where all its weights are frozen, or it has none and lies in what is.
    trained = set(names) - frozen
    still = {path for path in still if not {f"{path}.weight", f"{path}.bias"} & trained}
    network.frozen_norms += [norms[path] for path in still]
    statistics = {f"{path}.{name}" for path in still for name, _ in norms[path].named_buffers()}
    network.frozen = frozenset(f"model.{name}" for name in frozen | statistics)
    network.train(network.training)


def _is_named(name: str, pattern: str, heads: tuple[str, ...]) -> bool:
    """Whether a pattern names a parameter or module, or one that it lies in."""
    if pattern == TRUNK:
        return not f"{name}.".startswith(heads)
    return _matches(name.removeprefix(PREFIX), pattern)


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern names a parameter, or a module that it lies in."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:count]), pattern) for count in range(1, len(parts) + 1))


def frozen_norms(module: nn.Module) -> list[nn.Module]:
    """The BatchNorms of a network whose statistics stay as they are."""
    return list(getattr(module, "frozen_norms", ()))
