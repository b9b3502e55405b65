"""Opens anything that classifies: a run, weights, a repository of the hub, a model of timm's, an exported file."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cit_scale.datasets.encoded import EXTENSIONS
from cit_scale.datasets.index import printable
from cit_scale.distributed.world import World, broadcast, first_on_each_node, run_on_all_ranks
from cit_scale.errors import ConfigError, MissingInputError
from cit_scale.evaluate import with_average
from cit_scale.inference.exported import Exported, kind_of, open_exported
from cit_scale.inference.images import prepare_image
from cit_scale.inference.interface import Interface
from cit_scale.inference.judges import imagenet_words
from cit_scale.models.arithmetic import set_arithmetic
from cit_scale.models.classes import class_names
from cit_scale.models.network import Network, build_network, described_model, tensors_of
from cit_scale.models.pretrained import FOLDER, GIVEN_SIZE, Pretrained, find_pretrained, own_crop_ratio
from cit_scale.models.weights import load_weights
from cit_scale.run_folder import CHECKPOINTS, CONFIG, DESCRIPTION, RESULTS, STUDENT, saved_steps, step_path

TRIES = 5  # at the newest checkpoint of a run that goes on, and deletes old ones meanwhile


@dataclass(frozen=True)
class OpenedNetwork:
    """A network with its weights, in evaluation mode, and how images are made ready for it.

    name: as it was given. file: its weights. interface: what goes in and comes out. run_dir: of the run that it is of.
    notes: what is to be said of it.
    """

    name: str
    file: Path
    network: Network
    interface: Interface
    description: Mapping[str, Any]
    run_dir: Path | None
    notes: tuple[str, ...]

    @property
    def weights(self) -> str:
        """The file's name, with its checkpoint's where it is in one."""
        in_checkpoint = self.file.parent.parent.name == CHECKPOINTS
        return f"{self.file.parent.name}/{self.file.name}" if in_checkpoint else self.file.name


@dataclass(frozen=True)
class Classifier:
    """What classifies images.

    classify: images (B, 3, H, W) uint8 as ``interface`` says, on any device, to logits by head, each (B, K) float32 on
    the CPU; with several heads their mean is among them, as ``average``.
    """

    name: str
    interface: Interface
    description: Mapping[str, Any]
    classify: Callable[[Tensor], dict[str, Tensor]]
    run_dir: Path | None = None
    notes: tuple[str, ...] = ()
    prepare_otherwise: Callable[[bytes], Tensor] | None = None
    """From an encoded image to what ``classify`` takes, where that is not as ``interface`` says."""

    def prepare(self, data: bytes) -> Tensor:
        """From an encoded image to what ``classify`` takes, (3, H, W). Raises BadImageError."""
        return (self.prepare_otherwise or partial(prepare_image, interface=self.interface))(data)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.interface.classes


def open_classifier(name: str, world: World) -> Classifier:
    """Collective. Open a classifier by name on this rank's device. Raises ConfigError and MissingInputError.

    name: a run folder, of which the last weights are taken, or those of the newest checkpoint if it is not finished;
    what ``find_pretrained`` takes; or a file of ``cit-scale export``.
    """
    set_arithmetic(world.device)
    exported = first_on_each_node(world, lambda: open_exported(Path(name).expanduser(), world.device))
    if exported is not None:
        return classifier_of_file(name, exported)
    return classifier_of(open_network(name, world), world.device)


def classifier_of_file(name: str, exported: Exported) -> Classifier:
    """An exported file as a classifier. It is of the run in whose folder it lies."""
    classes, folder = exported.interface.classes, Path(name).expanduser().parent
    # The network that it is of was found by these words, and by WordNet ids.
    description = {"num_classes": len(classes)} if list(classes) == imagenet_words() else {"label_names": classes}
    run_dir = folder if (folder / CONFIG).is_file() else None
    return Classifier(name, exported.interface, description, exported.classify, run_dir)


def classifier_of(opened: OpenedNetwork, device: torch.device) -> Classifier:
    """The network as a classifier, on a device."""
    network = of_each_thread(opened.network.to(device))

    @torch.inference_mode()
    def classify(images: Tensor) -> dict[str, Tensor]:
        heads = network()(images.to(device).float().div_(255))._asdict()
        return with_average({head: logits.cpu() for head, logits in heads.items()})

    return Classifier(opened.name, opened.interface, opened.description, classify, opened.run_dir, opened.notes)


def of_each_thread(network: nn.Module) -> Callable[[], nn.Module]:
    """A function that returns the calling thread's own copy of a network, which shares all tensors with the others.

    What a module keeps during a call (``Advised``) would be another thread's otherwise.
    """
    shared = {id(tensor): tensor for tensor in tensors_of(network).values()}
    of_thread = threading.local()

    def own() -> nn.Module:
        if not hasattr(of_thread, "network"):
            of_thread.network = copy.deepcopy(network, dict(shared))
        found: nn.Module = of_thread.network
        return found

    return own


def open_network(name: str, world: World) -> OpenedNetwork:
    """Collective. Open a network by name, on the CPU. Raises ConfigError and MissingInputError.

    Rank 0 decides which checkpoint of a run that goes on is taken; the notes have it.
    """
    if not name:
        raise ConfigError("the model's name is empty; give a run folder, weights, or an exported file")
    tried: set[int] = set()
    for attempt in range(TRIES):
        source, notes = broadcast(
            world, run_on_all_ranks(world, lambda: _source(name, tried) if world.is_main else None)
        )
        try:
            return first_on_each_node(world, partial(_open, name, source, notes))
        except MissingInputError:
            if not notes or attempt == TRIES - 1:
                raise
    raise AssertionError


def _source(name: str, tried: set[int]) -> tuple[str, tuple[str, ...]]:
    """The name of the weights, and what is to be said of them.

    tried: steps of a run that goes on whose checkpoints could not be read; the one that is taken is added.
    """
    folder = Path(name.removeprefix(FOLDER)).expanduser()
    if not folder.is_dir() or not (folder / CONFIG).is_file() or (folder / RESULTS).exists():
        return name, ()
    steps = saved_steps(folder / CHECKPOINTS)
    if not steps:
        raise MissingInputError(
            f"the run in {printable(folder)} has no checkpoint yet; wait until one is written, or until the run ends"
        )
    step = max(set(steps) - tried or steps)
    tried.add(step)
    file = step_path(folder / CHECKPOINTS, step) / STUDENT
    return str(file), (f"the run in {printable(folder)} is not finished: its checkpoint of step {step} is taken",)


def _open(name: str, source: str, notes: tuple[str, ...]) -> OpenedNetwork:
    found = find_pretrained(source)
    if not found.file.exists():
        raise MissingInputError(f"{printable(name)} does not exist")
    if found.architecture is None:
        if found.file.suffix.lower() in EXTENSIONS:
            raise ConfigError(f"{printable(name)} is an image; MODEL comes first, and images behind it")
        if found.file.name == DESCRIPTION:
            raise ConfigError(f"{printable(name)} describes weights; give the folder in which both lie")
        if kind_of(found.file) is not None:
            raise ConfigError(f"{printable(name)} is an exported file, and no network; give its run, or weights")
        raise ConfigError(
            f"{printable(name)} comes without a config.json in timm's form, which says what model it is and how "
            "images are made ready for it; copy its run's beside it, or give a run folder or a repository of the hub"
        )
    interface, odd = interface_of(found)
    seen = int(found.description.get("input_size", (3, interface.image_size))[-1])
    architecture, kwargs = described_model(name, found, {})
    network = build_network(
        architecture,
        kwargs,
        num_classes=len(interface.classes),
        image_size=interface.image_size,
        teachers=found.teachers,
        description=found.description,
        own_size=seen if seen != interface.image_size else None,
    )
    said = load_weights(network, source, values=True)
    # The file's folder, that of a timm folder which was exported there, that of a checkpoint.
    folders = (folder for folder in found.file.absolute().parents[:3] if (folder / CONFIG).is_file())
    return OpenedNetwork(
        name,
        found.file,
        network.eval(),
        Interface(interface.classes, network.heads, interface.image_size, interface.crop_ratio),
        found.description,
        next(folders, None),
        (*notes, *odd, *said),
    )


def interface_of(found: Pretrained) -> tuple[Interface, list[str]]:
    """How images are made ready for described weights, and what is to be said of it. Raises ConfigError."""
    described = found.description
    _, height, width = described.get("input_size", (3, 224, 224))
    if height != width:
        raise ConfigError(
            f"{found.file} takes images of {height} x {width} pixels; only square ones can be made ready here"
        )
    size = int(described.get(GIVEN_SIZE, height))
    guessed = [key for key in ("input_size", "crop_pct", "mean") if key not in described]
    notes = [f"its config.json does not say {', '.join(guessed)}; timm's defaults are taken"] if guessed else []
    notes += [
        f"its {key} is {described[key]}; images are made ready with {ours} here"
        for key, ours in (("interpolation", "bicubic"), ("crop_mode", "center"))
        if described.get(key, ours) != ours
    ]
    crop_pct = float(described.get("crop_pct", 0.875))
    if crop_pct > 1:
        notes.append(f"its crop_pct is {crop_pct:g}; images are made ready with 1 here, without a frame around them")
    ratio = own_crop_ratio(size, min(crop_pct, 1.0))
    return Interface(class_names(described), ("cls",), size, ratio), notes
