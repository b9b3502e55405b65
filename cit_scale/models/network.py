"""Wraps timm models for the trainer: images in [0, 1] in, logits per head out. Builds and tries them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, cast

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

import cit_scale.models  # noqa: F401  registers ours with timm
from cit_scale.batch import StudentLogits, student_logits_type
from cit_scale.errors import ConfigError, one_line
from cit_scale.models.advised import ADVISED, Advised, UnadvisableError
from cit_scale.models.pretrained import (
    FOLDER,
    GIVEN_SIZE,
    HUB,
    OTHER_LICENCE,
    Pretrained,
    find_pretrained,
    nearest_models,
    timms_crop_ratio,
)

MOST = 400  # characters of a library's error message: one about a state dict that does not fit lists every key

# Arguments of timm.create_model that a run's kwargs may not set, and the setting that determines each.
RUN_OWNS = {
    "num_classes": "it follows from the data set",
    "img_size": "data.image_size sets it, or image_size beside the network's name",
    "in_chans": "images have three channels",
    "teachers": "the run's own setting teachers names them",
    "pretrained": "the settings pretrained and weights beside it say what is loaded",
    "checkpoint_path": "the settings pretrained and weights beside it say what is loaded",
    "device": "the launcher says which",
}


Precision = Literal["float32", "bf16", "fp16"]

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Network(nn.Module):
    """Normalizes images for a timm model, runs the model in ``precision`` and names its logits.

    Students and teachers have the same wrapper under every engine. A model with ``forward_heads`` (a CiT) gives the
    logits of every head, in training and in evaluation mode; any other model gives ``cls`` only.

    statistics: mean and standard deviation of the images, as in timm's ``pretrained_cfg``; None: the model's own.
    image_size: images of another size are resized to it, with antialiasing; None: none are resized.
    columns: the columns of the model's logits that are returned, in this order; None: all.
    Forward: (B, 3, H, W) in [0, 1] -> StudentLogits, each (B, K) float32.
    """

    mean: Tensor
    std: Tensor

    columns: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        statistics: Mapping[str, Any] | None = None,
        image_size: int | None = None,
        columns: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.image_size = image_size
        self.new: frozenset[str] = frozenset()
        """Names of the model's tensors that the weights from which it starts do not have."""
        self.frozen: frozenset[str] = frozenset()
        """Names of buffers that were parameters, or statistics, until ``freeze`` froze them."""
        self.architecture, self.arguments = type(model).__name__, dict[str, Any]()
        """Name and arguments by which timm.create_model makes the model, without the number of classes."""
        self.frozen_norms: list[nn.Module] = []
        """BatchNorms that compute with their running statistics in training mode, too."""
        self.precision: Precision = "float32"
        """bf16 and fp16 mean autocast with float32 weights. Autocast is entered in `forward`, inside all wrappers: on a
        GPU, DeepSpeed disables an autocast around its engine, with one line in the log."""

        self._single_head = student_logits_type(())  # looked up here: torch.compile does not trace a cached function
        statistics = pretrained_cfg_of(model) if statistics is None else statistics
        # Not persistent: the statistics belong to the model's configuration, not to its weights.
        for name in ("mean", "std"):
            values = torch.tensor(statistics[name], dtype=torch.float32)  # (3,), or (1,) of a model of grey images
            self.register_buffer(name, values.expand(3).clone().view(3, 1, 1), persistent=False)
        self.register_buffer("columns", None if columns is None else torch.tensor(columns), persistent=False)

    def forward(self, images: Tensor) -> StudentLogits:
        """Return the logits of every head, each (B, K) float32. images: (B, 3, H, W) in [0, 1]."""
        size = self.image_size
        if size is not None and images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False)
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
        if self.columns is not None:
            logits = type(logits)(*(head[:, self.columns] for head in logits))
        return type(logits)(*(head.float() for head in logits))

    def train(self, mode: bool = True) -> Network:
        super().train(mode)
        for layer in self.frozen_norms:
            layer.eval()
        return self

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that the model exempts from weight decay."""
        no_weight_decay = getattr(self.model, "no_weight_decay", None)
        exempt = () if no_weight_decay is None else no_weight_decay()
        return {f"model.{name}" for name in exempt}

    @property
    def statistics(self) -> dict[str, list[float]]:
        """Mean and standard deviation of the images, each (3,), in [0, 1]."""
        return {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}

    @property
    def heads(self) -> tuple[str, ...]:
        """``cls``, then the teachers' names."""
        return ("cls", *getattr(self.model, "teachers", ()))


def described_model(name: str, described: Pretrained, kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and arguments of timm.create_model for a network that is named by where it lies.

    name: as a user gave it. kwargs: come before what the description says. Raises ConfigError if it says no model.
    """
    if described.architecture is None:
        raise ConfigError(f"{name} has no config.json in timm's form, which says what model it is; name the model")
    architecture, theirs = described.architecture, dict(described.arguments or {})
    if architecture == ADVISED:  # the run gives the trunk heads for its own teachers
        architecture, theirs = str(theirs.get("trunk")), dict(theirs.get("trunk_args") or {})
    return architecture, {**{key: value for key, value in theirs.items() if key not in RUN_OWNS}, **kwargs}


def build_network(
    name: str,
    kwargs: Mapping[str, Any],
    *,
    num_classes: int,
    image_size: int,
    teachers: tuple[str, ...] = (),
    description: Mapping[str, Any] = MappingProxyType({}),
    own_size: int | Literal["own"] | None = None,
    columns: Sequence[int] | None = None,
) -> Network:
    """Build a newly initialized network.

    name, kwargs: arguments of timm.create_model. teachers: names of a CiT's tokens and heads, or of the heads beside
    that of any other model (``Advised``).
    description: of the weights that are to be loaded into it (``Pretrained``). Their mean and standard deviation
    normalize the images.
    image_size: of the images that the network is given. own_size: of those that it sees, where that is another;
    "own": the size that the weights were made for, if the description says it.
    columns: of the logits, as Network has them.
    Raises ConfigError for an unknown model, for teachers of a model that can have no heads for them, for kwargs that
    the run determines (RUN_OWNS), and for arguments that timm refuses.
    """
    if name.startswith((HUB, FOLDER)):
        name, kwargs = described_model(name, find_pretrained(name), kwargs)
    if not timm.is_model(name):
        raise ConfigError(f"no model is called {name!r}; the nearest are {nearest_models(name, timm.list_models())}")
    try:
        pretrained_cfg = timm.get_pretrained_cfg(name)  # None for a model that is registered without one
    except RuntimeError:  # an unknown tag after the model's name
        model = name.partition(".")[0]
        known = [model, *timm.list_pretrained(f"{model}.*")]
        raise ConfigError(f"no model is called {name!r}; the nearest are {nearest_models(name, known)}") from None
    is_cit = timm.models.is_model_in_modules(name, ["cit"])
    owned = [key for key in kwargs if key in RUN_OWNS]
    if owned:
        raise ConfigError(
            f"the kwargs of {name} set {owned[0]}={kwargs[owned[0]]!r}, but {RUN_OWNS[owned[0]]}; remove it"
        )
    for key, value in kwargs.items():
        # timm takes any number; the first step then raises, or computes with a negative probability.
        if key.startswith("drop") and key.endswith("_rate") and isinstance(value, int | float) and not 0 <= value < 1:
            raise ConfigError(f"the kwargs of {name} set {key}={value}, which must be from 0 to below 1")
    arguments: dict[str, Any] = {"num_classes": num_classes, **kwargs}
    if is_cit:
        arguments["teachers"] = teachers
    if own_size == "own":
        own_size = max(description["input_size"][1:]) if "input_size" in description else None
    # Models of a fixed input size take img_size; the others, such as a RedNet, do not know the argument.
    if pretrained_cfg is not None and pretrained_cfg.fixed_input_size:
        arguments["img_size"] = own_size or image_size
    try:
        built = timm.create_model(name, **arguments)
        described = name.split(".")[0], {key: value for key, value in arguments.items() if key != "num_classes"}
        if teachers and not is_cit:
            built = Advised(built, teachers)
            described = ADVISED, {"trunk": described[0], "trunk_args": described[1], "teachers": teachers}
        network = Network(built, description if "mean" in description else None, own_size, columns)
        network.architecture, network.arguments = described
        return network
    except UnadvisableError as error:
        raise ConfigError(str(error)) from error
    except Exception as error:  # of a wrong argument a model's code can raise anything
        call = f"timm.create_model({name!r}, {_spelled(arguments)})"
        if own_size is not None:
            call = f"image_size={own_size}: {call}"
        raise ConfigError(f"{call} refuses: {type(error).__name__}: {one_line(error, MOST)}") from error


UNTRIED = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    NotImplementedError,
)
"""What torch raises for a network that computes, but not without values."""


def try_forward(network: Network, *, batch_size: int, image_size: int, num_classes: int) -> None:
    """Raise ConfigError unless the network turns images of this size into logits.

    network: on the meta device, in the mode in which it is to be used. Nothing is computed and no memory is taken. A
    network whose shapes follow from the values in the images cannot be tried so, and passes.
    """
    called = f"images ({batch_size}, 3, {image_size}, {image_size})"
    try:
        # Torch logs the stack of what a model raises, beside raising it.
        with quiet("torch._subclasses.fake_tensor"), FakeTensorMode(), torch.device("cpu"), torch.no_grad():
            images = torch.empty(batch_size, 3, image_size, image_size)
            logits = torch.func.functional_call(network, fake_state(network), (images,))
    except UNTRIED:
        return
    except Exception as error:  # whatever a model of timm's raises when an image is too small for it
        way_out = "choose another model or data.image_size" + (", or a larger batch" if batch_size == 1 else "")
        raise ConfigError(
            f"it cannot take {called}: {type(error).__name__}: {one_line(error, MOST)}; {way_out}"
        ) from error
    for head, tensor in logits._asdict().items():
        if tuple(tensor.shape) != (batch_size, num_classes):
            raise ConfigError(
                f"it turns {called} into {tuple(tensor.shape)} and not into logits {(batch_size, num_classes)} "
                f"({head}); choose a model that classifies"
            )


@contextlib.contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Switch a logger of the logging module off."""
    log = logging.getLogger(logger)
    was_disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was_disabled


def fake_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers like the module's, within FakeTensorMode: on the CPU, and without memory.

    Not on the meta device, which autocast does not support.
    """
    return {
        name: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).requires_grad_(
            tensor.requires_grad
        )
        for name, tensor in tensors_of(module).items()
    }


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the model's classifiers, each with a dot at its end, in the order of the modules."""
    classifier = cast(Any, model).get_classifier()  # timm's contract
    heads = classifier if isinstance(classifier, tuple) else (classifier,)
    return tuple(f"{name}." for name, module in model.named_modules() if any(module is head for head in heads))


def pretrained_cfg_of(model: nn.Module) -> Mapping[str, Any]:
    """timm's description of a model: mean and std of its images, the name of its classifier, and more."""
    return cast(Any, model).pretrained_cfg  # timm sets it, and nn.Module's types know parameters and modules only


def describe(
    network: Network,
    *,
    given_size: int,
    crop_ratio: float,
    classes: Sequence[str],
    file: str,
    licence: str = OTHER_LICENCE,
) -> dict[str, Any]:
    """The content of a config.json beside a network's weights, in timm's form.

    given_size: height and width of the images that it is given in evaluation. crop_ratio: of the image's shorter side,
    in evaluation. classes: names of its classes, in the order of its logits. file: name of the weights, for a
    repository of the hub. licence: of the weights.
    """
    image_size = network.image_size or given_size
    about = pretrained_cfg_of(network.model)
    layers = {key: about.get(key) for key in ("first_conv", "classifier", "pool_size")}
    # The shortest numbers that are the same in float32.
    statistics = {key: [float(str(np.float32(value))) for value in each] for key, each in network.statistics.items()}
    description = {
        "architecture": network.architecture,
        "num_classes": len(classes),
        "label_names": list(classes),
        "model_args": dict(network.arguments),
        "pretrained_cfg": {
            "hf_hub_filename": file,
            "input_size": [3, image_size, image_size],
            "fixed_input_size": bool(about.get("fixed_input_size")),
            "interpolation": "bicubic",
            "crop_pct": timms_crop_ratio(given_size, crop_ratio),
            "crop_mode": "center",
            **statistics,
            "num_classes": len(classes),
            "license": licence,
            **{key: value for key, value in layers.items() if value is not None},
        },
    }
    return description if given_size == image_size else {**description, GIVEN_SIZE: given_size}


def _spelled(arguments: Mapping[str, Any]) -> str:
    """Return arguments as they are written in a call."""
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items())
