"""Wraps timm models for the trainer: images in [0, 1] in, logits per head out. Builds them and loads their weights."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

import cit_scale.models  # noqa: F401  registers ours with timm
from cit_scale.batch import StudentLogits, student_logits_type
from cit_scale.errors import ConfigError, MissingInputError, RefusedError, one_line, os_error
from cit_scale.models.convert_checkpoint import convert

MOST = 400  # characters of a library's error message: one about a state dict that does not fit lists every key

# Arguments of timm.create_model that a run's kwargs may not set, and the setting that determines each.
RUN_OWNS = {
    "num_classes": "it follows from the data set",
    "img_size": "data.image_size sets it for every network",
    "in_chans": "images have three channels",
    "teachers": "the run's own setting teachers names them",
}


Precision = Literal["float32", "bf16", "fp16"]

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Network(nn.Module):
    """Normalizes images for a timm model, runs the model in ``precision`` and names its logits.

    Students and teachers have the same wrapper under every engine. A model with ``forward_heads`` (a CiT) gives the
    logits of every head, in training and in evaluation mode; any other model gives ``cls`` only.

    model: reads mean and standard deviation for the images from its ``pretrained_cfg``.
    Forward: (B, 3, H, W) in [0, 1] -> StudentLogits, each (B, K) float32.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.precision: Precision = "float32"
        """bf16 and fp16 mean autocast with float32 weights. Autocast is entered in `forward`, inside all wrappers: on a
        GPU, DeepSpeed disables an autocast around its engine, with one line in the log."""

        self._single_head = student_logits_type(())  # looked up here: torch.compile does not trace a cached function
        statistics = _pretrained_cfg(model)
        # Not persistent: the statistics belong to the model's configuration, not to its weights.
        self.register_buffer("mean", torch.tensor(statistics["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(statistics["std"]).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> StudentLogits:
        """Return the logits of every head, each (B, K) float32. images: (B, 3, H, W) in [0, 1]."""
        # Channels last: on two CPU cores a training step takes 0.48 of the time for the small RedNet, 0.82 for
        # RegNetY-200MF and 0.88 for the small CiT (docs/measurements/first_light.md).
        normalised = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        dtype = AUTOCAST.get(self.precision)
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            forward_heads = getattr(self.model, "forward_heads", None)
            logits: StudentLogits
            if forward_heads is not None:
                logits = forward_heads(normalised)
            else:
                logits = self._single_head(self.model(normalised))
        return type(logits)(*(head.float() for head in logits))

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that the model exempts from weight decay."""
        no_weight_decay = getattr(self.model, "no_weight_decay", None)
        exempt = () if no_weight_decay is None else no_weight_decay()
        return {f"model.{name}" for name in exempt}

    @property
    def heads(self) -> tuple[str, ...]:
        """``cls``, then the teachers' names."""
        return ("cls", *getattr(self.model, "teachers", ()))


def build_network(
    name: str,
    kwargs: Mapping[str, Any],
    *,
    num_classes: int,
    image_size: int,
    teachers: tuple[str, ...] = (),
) -> Network:
    """Build a newly initialized network.

    name, kwargs: arguments of timm.create_model. teachers: names of a CiT's tokens and heads.
    Raises ConfigError for an unknown model, for teachers of a model without tokens for them, for kwargs that the run
    determines (RUN_OWNS), and for arguments that timm refuses.
    """
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:8] or timm.list_models(module="cit")
        raise ConfigError(f"no model is called {name!r}; known ones include {', '.join(near)}")
    try:
        pretrained_cfg = timm.get_pretrained_cfg(name)  # None for a model that is registered without one
    except RuntimeError:  # an unknown tag after the model's name
        model = name.partition(".")[0]
        known = [model, *timm.list_pretrained(f"{model}.*")[:8]]
        raise ConfigError(f"no model is called {name!r}; known ones include {', '.join(known)}") from None
    is_cit = timm.models.is_model_in_modules(name, ["cit"])
    if teachers and not is_cit:
        raise ConfigError(
            f"{name} has no token for a teacher, but the run has the teachers {', '.join(teachers)}; "
            f"choose one of {', '.join(timm.list_models(module='cit'))} or drop the teachers"
        )
    owned = [key for key in kwargs if key in RUN_OWNS]
    if owned:
        raise ConfigError(
            f"the kwargs of {name} set {owned[0]}={kwargs[owned[0]]!r}, but {RUN_OWNS[owned[0]]}; remove it"
        )
    arguments: dict[str, Any] = {"num_classes": num_classes, **kwargs}
    if is_cit:
        arguments["teachers"] = teachers
    # Models of a fixed input size take img_size; the others, such as a RedNet, do not know the argument.
    if pretrained_cfg is not None and pretrained_cfg.fixed_input_size:
        arguments["img_size"] = image_size
    try:
        return Network(timm.create_model(name, **arguments))
    except (TypeError, ValueError, AssertionError) as error:
        call = f"timm.create_model({name!r}, {_spelled(arguments)})"
        raise ConfigError(f"{call} refuses: {one_line(error, MOST)}") from error


def _pretrained_cfg(model: nn.Module) -> Mapping[str, Any]:
    """timm's description of a model: mean and std of its images, the name of its classifier, and more."""
    return cast(Any, model).pretrained_cfg  # timm sets it, and nn.Module's types know parameters and modules only


def _spelled(arguments: Mapping[str, Any]) -> str:
    """Return arguments as they are written in a call."""
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items())


def read_weights(path: str | Path, device: str = "cpu") -> dict[str, Tensor]:
    """Return the state dict in a safetensors file or a PyTorch file.

    A PyTorch file may contain tensors only (weights_only=True), as other objects in a pickle can execute code. The
    state dict may be wrapped in a dictionary under 'model' or 'state_dict'.
    device: "cpu", or "meta" for names and shapes without memory.
    Raises MissingInputError, RefusedError for a pickle with other objects, ConfigError, and OSError.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise MissingInputError(f"weights {path} do not exist; give a .safetensors file or a PyTorch state dict")
    try:
        path.open("rb").close()  # its OSError has a number; safetensors reports every error as "no such file"
        if path.suffix != ".safetensors":
            state = torch.load(path, map_location=device, weights_only=True)
        elif device == "meta":
            with safetensors.safe_open(path, "pt") as file:
                state = {key: torch.empty(file.get_slice(key).get_shape(), device=device) for key in file.keys()}  # noqa: SIM118
        else:
            state = safetensors.torch.load_file(path)
    except pickle.UnpicklingError as error:
        raise RefusedError(
            f"weights {path} hold more than tensors, or are damaged; other objects in a pickle can execute code, so "
            "the file is not loaded; save a bare state dict, best as safetensors"
        ) from error
    except Exception as error:  # each file format raises its own exceptions for damage
        raise os_error(error, f"weights {path} cannot be read: {one_line(error, MOST)}", lasting=ConfigError) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"weights {path} hold no state dict, bare or under 'model' or 'state_dict'")
    return state


def load_weights(network: Network, path: str | Path) -> None:
    """Load weights into the network's model. All names and shapes must match.

    Released checkpoints of CiT and RedNet are converted to our names. A CiT resamples the position embedding of another
    image size. For a network on the meta device only names and shapes are compared.
    Raises ConfigError for weights that do not fit, and the exceptions of `read_weights`.
    """
    model = network.model
    is_meta = any(parameter.is_meta for parameter in model.parameters())
    state = read_weights(path, "meta" if is_meta else "cpu")
    if type(model).__module__.startswith("cit_scale."):
        try:
            state = convert(state)  # keys of released checkpoints become ours, our own keys stay
        except ValueError as error:
            raise ConfigError(f"weights {path} do not fit: {error}") from error
    # Weights for another number of classes are the likeliest mistake, so they get a message of their own.
    classifier = _pretrained_cfg(model)["classifier"]  # timm's convention: one name, or a tuple of several
    key = f"{classifier if isinstance(classifier, str) or classifier is None else classifier[0]}.weight"
    found, expected = state.get(key), model.state_dict().get(key)
    if found is not None and expected is not None and len(found) != len(expected):
        raise ConfigError(
            f"weights {path} have {len(found)} classes, the data set has {len(expected)}; "
            f"use weights trained on this data set, or give a recipe that trains them"
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"weights {path} do not fit: {one_line(error, MOST)}") from error
