"""Reads weights from files of many trainers, and loads them into a network. Notes say what was chosen on the way.

A safetensors or PyTorch file holds a state dict, bare or inside a trainer's checkpoint, under names that wrappers have
lengthened. Nothing in a file is executed.
"""

from __future__ import annotations

import argparse
import inspect
import pickle
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from cit_scale.errors import ConfigError, MissingInputError, RefusedError, one_line, os_error
from cit_scale.models.advised import ADVISED
from cit_scale.models.advised import PREFIX as TRUNK_PREFIX
from cit_scale.models.cit import CiT
from cit_scale.models.classes import rows_of_classes
from cit_scale.models.convert_checkpoint import convert, rename
from cit_scale.models.network import MOST, Network, head_names, pretrained_cfg_of
from cit_scale.models.pretrained import Pretrained, find_pretrained
from cit_scale.models.rednet import RedNet

# Where trainers keep a state dict in a checkpoint; the first that is there is taken. A moving average comes first, as
# in timm: it is what its trainer evaluates and releases.
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
PLACES = (*AVERAGES, "state_dict", "model_state_dict", "model", "module")  # module: DeepSpeed's

# Wrappers that lengthen names. DistributedDataParallel's stands at the beginning, the others anywhere.
WRAPPERS = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")

# A pickle may hold objects of these types beside tensors: they run nothing when they are loaded. timm's and DeiT's
# checkpoints have the arguments of their command lines.
HARMLESS: list[Any] = [argparse.Namespace]

# Saves the tensors of a file, at any depth and those of modules too, under another name.
STRIP = (
    "import sys, torch; f = lambda v: f(v.state_dict()) if hasattr(v, 'state_dict') else {k: t for k, e in v.items() "
    "if (t := f(e)) is not None} if isinstance(v, dict) else torch.as_tensor(v) if getattr(v, 'ndim', 0) or "
    "isinstance(v, torch.Tensor) else None; "
    "torch.save(f(torch.load(sys.argv[1], 'cpu', weights_only=False)), sys.argv[2])"
)


# How much has to fit of weights from which a network can start: of its parameters or of theirs, without heads. Stems
# that are new are most of a small CiT; a projection that is left out is most of some self-supervised network's file.
LEAST_SHARE = 0.25

# Of safetensors' names of types. Any other is one that no weights are of.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}

STATISTICS = (".running_mean", ".running_var")  # ends of the names of BatchNorm's buffers that training changes

POSITIONS = ("pos_embed", "relative_position_bias_table")  # ends of the names of what timm resamples

HEAD_STD = 0.001  # of the weights of a new head on features that are trained


@dataclass(frozen=True)
class Weights:
    """A state dict, and what has to be said of it: which of several was taken, what was left out."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def read_weights(path: str | Path, device: str = "cpu") -> Weights:
    """Return the state dict in a safetensors file or a PyTorch file, without the prefixes of wrappers.

    A PyTorch file may hold plain values and tensors only (weights_only=True): other objects in a pickle can execute
    code. device: "cpu", or "meta" for names and shapes without memory.
    Raises MissingInputError, RefusedError for a pickle with other objects, ConfigError, and OSError.
    """
    path = Path(path).expanduser()
    try:
        if not path.is_file():
            raise MissingInputError(f"weights {path} do not exist; give a .safetensors file or a PyTorch state dict")
        content = _read_safetensors(path, device) if _is_safetensors(path) else _read_pickle(path, device)
    except MissingInputError:
        raise
    except PermissionError as error:
        raise MissingInputError(f"weights {path} may not be read by this user: {error.strerror}") from error
    except pickle.UnpicklingError as error:
        raise _refuse_objects(path) from error
    except Exception as error:  # each file format raises its own exceptions for damage
        message = (
            f"weights {path} cannot be read: {type(error).__name__}: {one_line(error, MOST)}; if it is whole, it is "
            "neither a safetensors file nor one of torch.save"
        )
        raise os_error(error, message, lasting=MissingInputError) from error
    return _unwrap(content, path)


def _is_safetensors(path: Path) -> bool:
    """By its name, or by its beginning: caches of downloads keep files under other names.

    Opens the file in either case: its OSError has a number, and safetensors reports every error as "no such file".
    """
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _read_safetensors(path: Path, device: str) -> dict[str, Tensor]:
    if device != "meta":
        return safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {
            key: torch.empty(each.get_shape(), dtype=DTYPES.get(each.get_dtype(), torch.uint8), device=device)
            for key, each in slices.items()
        }


def _read_pickle(path: Path, device: str) -> Any:
    with torch.serialization.safe_globals(HARMLESS):
        return torch.load(path, map_location=device, weights_only=True)


def _refuse_objects(path: Path) -> RefusedError | MissingInputError:
    """What to raise for a pickle with other objects, or for a file that is none."""
    keep = (
        f'where you trust the file, keep its tensors alone: python -c "{STRIP}" {shlex.quote(str(path))} stripped.pth'
    )
    with path.open("rb") as file:
        is_pickle = file.read(4).startswith((b"PK\x03\x04", b"\x80"))
    if not is_pickle:
        return MissingInputError(f"weights {path} are neither a safetensors file nor one of torch.save")
    try:
        others = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # a file of before PyTorch 1.6, of another protocol of pickle's, or a damaged one
        return RefusedError(
            f"weights {path} hold more than tensors, are of a protocol of pickle's that torch.save does not write by "
            f"itself, or are damaged; as such a file can execute code when it is loaded, it is not; {keep}"
        )
    others -= {f"{each.__module__}.{each.__qualname__}" for each in HARMLESS}
    named = ", ".join(sorted(others)[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
    return RefusedError(
        f"weights {path} hold objects of {named} beside the tensors, which can execute code when "
        f"they are loaded; {keep}"
    )


def _unwrap(content: Any, path: Path) -> Weights:
    """The state dict in what a file holds."""
    if not isinstance(content, Mapping):
        raise ConfigError(f"weights {path} hold no state dict, but a {type(content).__name__}")
    states = {"": content} if _is_state(content) else dict(_states_in(content))
    taken = next((place for place in ("", *PLACES) if place in states), None)
    unread = next((key for key in AVERAGES if content.get(key) and "" not in states and key not in states), None)
    if unread is not None:
        hint = _entries_without_tensors(unread, content[unread]) or f"what stands under {unread!r} is no state dict"
        raise ConfigError(f"weights {path}: {hint}")
    if taken is None:
        hints = [_entries_without_tensors(place, value) for place, value in {"": content, **content}.items()]
        if states:
            hints.insert(0, f"there are some under {', '.join(states)}: save one of them by itself")
        hint = next((f"; {hint}" for hint in hints if hint), "")
        raise ConfigError(f"weights {path} hold no state dict, bare or under {', '.join(PLACES)}{hint}")
    others = " or ".join(place for place in states if place != taken)
    notes = []
    if taken in AVERAGES:
        notes.append(f"the moving average is taken: {taken}{others and f', not {others}'}")
    elif others:
        notes.append(f"{taken} is taken, not {others}")
    tensors = {_without_wrappers(key): value for key, value in states[taken].items()}
    if len(tensors) < len(states[taken]):
        raise ConfigError(
            f"weights {path} hold names with and without {' or '.join(WRAPPERS)}; save one network by itself"
        )
    tensors.pop("n_averaged", None)  # the count of torch's AveragedModel
    return Weights(tensors, tuple(notes))


def _states_in(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """State dicts of networks inside a dictionary, at any depth, by the names under which they stand.

    One inside a moving average, as a trainer's object for it saves itself, stands under the average's name.
    """
    for key, value in content.items():
        name = f"{prefix}{key}"
        if not isinstance(value, Mapping) or not isinstance(key, str) or "optim" in key:
            continue
        if _is_state(value):
            if any(tensor.is_floating_point() and tensor.ndim > 1 for tensor in value.values()):
                yield name, value
            continue
        inner = list(_states_in(value, f"{name}."))
        yield from [(name, inner[0][1])] if name in AVERAGES and len(inner) == 1 else inner


def _is_state(value: Mapping[Any, Any]) -> bool:
    """Whether a dictionary is a state dict: text to tensors."""
    return bool(value) and all(isinstance(key, str) and isinstance(each, Tensor) for key, each in value.items())


def _entries_without_tensors(place: Any, value: Any) -> str:
    """Names the entries without which a dictionary would be a state dict. Empty for any other value."""
    if not isinstance(value, Mapping):
        return ""
    others = {key: type(each).__name__ for key, each in value.items() if not isinstance(each, Tensor)}
    if not others or len(others) > len(value) / 2:
        return ""
    named = ", ".join(f"{key!r} ({kind})" for key, kind in list(others.items())[:3])
    under = f" under {place!r}" if place else ""
    return f"what stands{under} is no state dict because of entries that are no tensors: {named}; save it without them"


def _without_wrappers(key: str) -> str:
    while key.startswith(WRAPPERS):
        key = key.split(".", 1)[1]
    for wrapper in WRAPPERS[1:]:
        key = key.replace(f".{wrapper}", ".")
    return key


# ---------------------------------------------------------------------------------------------------------------------
# Into a network


def load_weights(network: Network, name: str | Path, *, values: bool = False) -> tuple[str, ...]:
    """Load weights into the network's model. All names and shapes must match. Returns what is to be said of them.

    name: as ``find_pretrained`` takes it, such as a file.

    The model may be a part of what was saved, such as a Lightning module's attribute. Released checkpoints of CiT and
    RedNet are converted to our names. A CiT resamples the position embedding of another image size. For a network on
    the meta device only names, types and shapes are compared; with ``values`` what is not finite is found, too.
    Raises ConfigError for weights that do not fit, and the exceptions of `read_weights`.
    """
    model, found = network.model, find_pretrained(str(name))
    path = found.file
    weights = read_weights(path, "cpu" if values else _device_of(model))
    state, notes = _part_that_fits(weights.tensors, model, _rename_for(model))
    before = {key: tensor.shape for key, tensor in state.items()}
    if _is_ours(model):
        try:
            state = convert(state)
        except ValueError as error:
            raise ConfigError(f"weights {path} do not fit: {error}") from error
    else:
        state = _adapt(state, model, found)
    _refuse_other_classes(state, model, path, is_mapped=network.columns is not None)
    _refuse_other_numbers(state, model, path)
    resized = _resized(before, {key: tensor for key, tensor in state.items() if key.endswith(POSITIONS)})
    state = _with_shared_names(state, model)
    try:
        model.load_state_dict(_on_device_of(model, state))
    except RuntimeError as error:
        raise ConfigError(
            f"weights {path} do not fit {type(model).__name__}; name the network and the arguments that they are of: "
            f"{one_line(error, MOST)}"
        ) from error
    return (*weights.notes, *notes, *([f"resampled: {', '.join(resized)}"] if resized else []))


@dataclass(frozen=True)
class Start:
    """What pretrained weights have made of a network.

    new: names of the model's tensors that were not in the weights. notes: what is to be said.
    """

    new: frozenset[str]
    notes: tuple[str, ...]


def start_from(network: Network, name: str, *, classes: Sequence[str] = (), values: bool = False) -> Start:
    """Load what fits of pretrained weights into the network's model.

    name: as ``find_pretrained`` takes it. Heads of other classes start anew; where the weights come with names of
    theirs, and ``classes``, the data's, are all among these, their rows are taken in the data's order.

    Position embeddings, and whatever else timm's model knows to adapt (its ``checkpoint_filter_fn``), are adapted to
    the network's size. values: as in ``load_weights``. Raises ConfigError if less than LEAST_SHARE of both, the network
    and the weights, fits, and the exceptions of ``read_weights`` and ``find_pretrained``.
    """
    model, found = network.model, find_pretrained(name)
    weights = read_weights(found.file, "cpu" if values else _device_of(model))
    renamed = _rename_for(model)
    state, notes = _part_that_fits(weights.tensors, model, renamed)
    state = {renamed(key): tensor for key, tensor in state.items()}
    before = {key: tensor.shape for key, tensor in state.items()}
    state = _with_shared_names(_adapt(state, model, found), model)
    heads, expected = head_names(model), model.state_dict()
    if found.architecture:
        theirs = _trunk(found.architecture, found.arguments or {})
        notes += _other_model(theirs, _trunk(network.architecture, network.arguments))
    rows = rows_of_classes(classes, found.description) if classes else None
    notes += _take_rows(state, expected, heads, rows, found.description.get("label_names") or ())
    fitting = {key: tensor for key, tensor in state.items() if key in expected and tensor.shape == expected[key].shape}
    _refuse_another_network(state, fitting, model, found.file)
    _refuse_other_numbers(fitting, model, found.file)
    model.load_state_dict(_on_device_of(model, fitting), strict=False)
    new = frozenset(expected.keys() - fitting.keys())
    for head in heads:
        _init_last_layers(model, head, new)
    return Start(new, (*weights.notes, *notes, *_table(state, before, expected, fitting, heads)))


def _refuse_another_network(
    state: Mapping[str, Tensor], fitting: Mapping[str, Tensor], model: nn.Module, path: Path
) -> None:
    """Raise ConfigError if less than LEAST_SHARE of both, the network and the weights, fits. Heads do not count."""
    heads = head_names(model)
    ours = {key: each.numel() for key, each in model.named_parameters() if not key.startswith(heads)}
    theirs = {key: each.numel() for key, each in state.items() if not key.startswith(heads)}
    of_ours, of_theirs = (
        sum(size for key, size in sizes.items() if key in fitting) / max(sum(sizes.values()), 1)
        for sizes in (ours, theirs)
    )
    if max(of_ours, of_theirs) < LEAST_SHARE:
        raise ConfigError(
            f"weights {path} are of another network: of their numbers {of_theirs:.0%} fit into {type(model).__name__}, "
            f"where they would be {of_ours:.0%}; name the network that they are of"
        )


def _other_model(theirs: str, ours: str) -> list[str]:
    """What to say of weights of a network that timm knows by another name; empty for the same."""
    theirs, ours = theirs.split(".")[0], ours.split(".")[0]
    return [f"they are of {theirs}, and the network is {ours}"] if theirs != ours else []


def _trunk(architecture: str, arguments: Mapping[str, Any]) -> str:
    """The model's name; of an advised one, that of its trunk."""
    return str(arguments.get("trunk")) if architecture == ADVISED else architecture


def _take_rows(
    state: dict[str, Tensor],
    expected: Mapping[str, Tensor],
    heads: tuple[str, ...],
    rows: list[int] | None,
    names: Sequence[str],
) -> list[str]:
    """Give the last layers of the heads in a state dict these rows, or drop them for none. Returns what to say.

    names: of the weights' classes, one for each row that there is.
    """
    if rows is None or rows == list(range(len(names))):
        return []
    last = [key for key in state if key.startswith(heads) and key in expected and state[key].shape[:1] == (len(names),)]
    if not last:
        return []
    if not rows:
        for key in last:
            del state[key]
        return [f"the head is of {len(names)} other classes ({', '.join(names[:3])}, ...) and is left out"]
    for key in last:
        state[key] = state[key][rows]
    return [f"of the head's {len(names)} classes the data's are taken, by name"]


def _init_last_layers(model: nn.Module, head: str, new: Collection[str]) -> None:
    """Let what is new of the last layers of a head, those with an output per class, begin with nearly equal logits.

    Some of timm's networks begin with large ones: with EfficientNet's own start, the loss over ten classes begins at
    5.5, and its gradients undo what the features had learned (docs/measurements/own_images.md).
    """
    num_classes = model.num_classes
    for name, layer in model.named_modules():
        is_new = f"{name}.".startswith(head) and f"{name}.weight" in new
        if is_new and isinstance(layer, nn.Linear | nn.Conv2d) and len(layer.weight) == num_classes:
            nn.init.trunc_normal_(layer.weight, std=HEAD_STD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _adapt(state: dict[str, Tensor], model: nn.Module, found: Pretrained) -> dict[str, Tensor]:
    """Adapt a state dict as timm does when it loads pretrained weights: names of other libraries, the size of position
    embeddings, a background class before all others. Raises ConfigError.
    """
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        # DeiT-III's files have other names for the scales of layers, which timm takes for its own models of it alone.
        takes_scales = adapt is not None and "adapt_layer_scale" in inspect.signature(adapt).parameters
        options = {"adapt_layer_scale": True} if takes_scales and any("gamma_" in key for key in state) else {}
        state = state if adapt is None else dict(adapt(state, model, **options))
    except Exception as error:  # for a state dict of another model, a filter can raise anything
        raise ConfigError(f"weights {found.file} do not fit: {one_line(error, MOST)}") from error
    offset, heads, expected = found.description.get("label_offset") or 0, head_names(model), model.state_dict()
    for key in [key for key in state if offset and key.startswith(heads) and key in expected]:
        if len(state[key]) == len(expected[key]) + offset:
            state[key] = state[key][offset:]
    return state


def _table(
    state: Mapping[str, Tensor],
    before: Mapping[str, torch.Size],
    expected: Mapping[str, Tensor],
    fitting: Mapping[str, Tensor],
    heads: tuple[str, ...],
) -> Iterator[str]:
    """Lines that say what was taken, what is new and what was left out, by the first part of the names.

    state: adapted. before: shapes in the file, under the names there. heads: from ``head_names``.
    """
    new, left = [key for key in expected if key not in fitting], [key for key in state if key not in expected]
    resized = [f"; {each}" for each in _resized(before, fitting)]
    taken = f"all {len(fitting)} tensors" if not new and not left else _counted(fitting)
    yield f"taken: {taken}{''.join(resized)}"
    replaced, others = [], []
    for key in new:
        other = state[key].shape if key in state else None
        if other is None or key.endswith(".bias"):
            others += [] if other is not None and key.startswith(heads) else [key]
        elif key.startswith(heads) and other[1:] == expected[key].shape[1:]:
            replaced.append(f"{_plain(key).removesuffix('.weight')}: {other[0]} -> {len(expected[key])} classes")
        else:
            replaced.append(f"{_plain(key)} (there {_shown(other)}, here {_shown(expected[key].shape)})")
    if new:
        yield f"new: {', '.join([*replaced, *([_counted(others)] if others else [])])}"
    if left:
        yield f"left out: {_counted(left)}"


def _resized(before: Mapping[str, torch.Size], state: Mapping[str, Tensor]) -> list[str]:
    """What adapting has given another shape, with both. before: shapes in the file, under the names there."""
    shapes = {key: before.get(key, before.get(key.removeprefix(TRUNK_PREFIX))) for key in state}
    return [
        f"{_plain(key)} {_shown(was)} -> {_shown(tensor.shape)}"
        for key, tensor in state.items()
        if (was := shapes[key]) is not None and was != tensor.shape
    ]


def _plain(key: str) -> str:
    return key.removeprefix(TRUNK_PREFIX)


def _counted(keys: Iterable[str]) -> str:
    counts = Counter(_plain(key).split(".")[0] for key in keys)
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.items())


def _shown(shape: torch.Size) -> str:
    return "x".join(map(str, shape))


def _device_of(model: nn.Module) -> str:
    return "meta" if any(parameter.is_meta for parameter in model.parameters()) else "cpu"


def _with_shared_names(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Give a tensor that the model has under several names, as a CoaT has, under all of them. A checkpoint has one."""
    names_of: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names_of.setdefault(id(tensor), []).append(name)
    shared = dict(state)
    for names in names_of.values():
        found = next((state[name] for name in names if name in state), None)
        if found is not None:
            shared.update({name: found for name in names if name not in state})
    return shared


def _on_device_of(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict for a model on the meta device without its values, about which torch warns."""
    device = _device_of(model)
    return {key: tensor.to("meta") if device == "meta" else tensor for key, tensor in state.items()}


def _is_ours(model: nn.Module) -> bool:
    return isinstance(model, CiT | RedNet)


def _rename_for(model: nn.Module) -> Callable[[str], str]:
    """The renaming of the keys of released checkpoints, for the models that there are such of."""
    return rename if _is_ours(model) else str


def _part_that_fits(
    state: dict[str, Tensor], model: nn.Module, renamed: Callable[[str], str]
) -> tuple[dict[str, Tensor], list[str]]:
    """The part of a state dict that belongs to the model, under names without its prefix, and what is to be said."""
    keys = model.state_dict().keys()
    expected = {*keys, *(key.removeprefix(TRUNK_PREFIX) for key in keys)}  # the trunk of an advised model, by itself
    beginnings = {
        ".".join(key.split(".")[:depth]) + "." for key in state for depth in (1, 2) if key.count(".") >= depth
    }
    parts = {
        prefix: {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        for prefix in ("", *sorted(beginnings))
    }
    fitting = {prefix: len({renamed(key) for key in part} & expected) for prefix, part in parts.items()}
    best, *others_as_good = [prefix for prefix, count in fitting.items() if count == max(fitting.values())]
    if best == "":
        return state, []
    if others_as_good:
        among = ", ".join(repr(prefix[:-1])[:60] for prefix in (best, *others_as_good)[:5])
        raise ConfigError(f"weights hold several networks that fit, under {among}; save one of them by itself")
    left = len(state) - len(parts[best])
    others = f"; {left} others belong to something else and are left out" if left else ""
    return parts[best], [f"the tensors under {best[:-1]!r} are taken{others}"]


def _refuse_other_numbers(state: Mapping[str, Tensor], model: nn.Module, path: str | Path) -> None:
    """Raise ConfigError for quantized or complex weights, and for weights that are not finite."""
    expected = model.state_dict()
    # Other buffers are constants of the model, and may be infinite: the limits of Gemma's activations.
    learned = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    learned |= {name for name in expected if name.endswith(STATISTICS)}
    for key, tensor in state.items():
        if key not in learned or not expected[key].is_floating_point():
            continue
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ConfigError(
                f"weights {path} hold {key} in {str(tensor.dtype).removeprefix('torch.')}, from which the weights "
                "cannot be told; convert them to float32 first"
            )
        if not tensor.is_meta and not torch.isfinite(tensor).all():
            raise ConfigError(f"weights {path} are not finite, in {key}; take an earlier checkpoint")


def _refuse_other_classes(state: Mapping[str, Tensor], model: nn.Module, path: str | Path, *, is_mapped: bool) -> None:
    """Raise ConfigError for weights of another number of classes: the likeliest mistake has a message of its own.

    is_mapped: the network has as many classes as there are names of the weights' classes, and not as the data set.
    """
    classifier = pretrained_cfg_of(model)["classifier"]  # timm's convention: one name, or a tuple of several
    key = f"{classifier if isinstance(classifier, str) or classifier is None else classifier[0]}.weight"
    found, expected = state.get(key), model.state_dict().get(key)
    if found is not None and expected is not None and len(found) != len(expected):
        if is_mapped:
            raise ConfigError(
                f"weights {path} have {len(found)} classes, and there are names of {len(expected)}; give one for each "
                "class of the weights, in their order"
            )
        raise ConfigError(
            f"weights {path} have {len(found)} classes, the data set has {len(expected)}; "
            f"use weights trained on this data set, or give a recipe that trains them"
        )
