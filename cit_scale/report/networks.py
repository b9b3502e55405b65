"""The networks that a report asks: a run's student, and the teachers that advised it, if their weights are at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from cit_scale.config import RunConfig, TeacherConfig
from cit_scale.datasets.index import printable
from cit_scale.distributed.world import World, first_on_each_node
from cit_scale.errors import MissingInputError, RefusedError, error_line, is_out_of_memory
from cit_scale.evaluate import HEADS_MEAN, with_average
from cit_scale.inference.classifier import Classifier, OpenedNetwork, classifier_of, of_each_thread, open_network
from cit_scale.inference.turns import portable
from cit_scale.models.arithmetic import set_arithmetic
from cit_scale.models.network import Network
from cit_scale.models.pretrained import find_pretrained
from cit_scale.models.weights import load_weights
from cit_scale.run.folders import as_dict, dig, read_json
from cit_scale.run_folder import NETWORKS, RESULTS, STUDENT, TEACHERS
from cit_scale.settings import decided
from cit_scale.teachers import build_teacher_without_weights, freeze

HEAD, TEACHER, FEATURES_OF_HEAD, FEATURES_OF_TEACHER = "head", "teacher", "features of head", "features of teacher"
"""Kinds of what a report's classifier returns; the key of each tensor is the kind, a blank, and a name."""


@dataclass(frozen=True)
class RunNetworks:
    """A run's student with its teachers.

    student: as it was opened. teachers: by name, frozen. missing: by name, why a teacher is not there.
    models: names of all teachers' models.
    """

    student: OpenedNetwork
    teachers: Mapping[str, Network]
    missing: Mapping[str, str]
    models: Mapping[str, str]

    @property
    def whole(self) -> str:
        """The head that stands for the student: the mean over its heads, or its only one."""
        return HEADS_MEAN if len(self.student.interface.heads) > 1 else self.student.interface.heads[0]


def open_run_networks(name: str, run_dir: Path, config: RunConfig, world: World) -> RunNetworks:
    """Collective. Open a run's student and its teachers on this rank's device. Raises as ``open_network`` does.

    name: of the student's weights, as for ``open_network``. config: of the run in ``run_dir``. A teacher that cannot be
    opened, or that is no longer the one that advised, is missing.
    """
    set_arithmetic(world.device)
    student = open_network(name, world)
    teachers: dict[str, Network] = {}
    missing: dict[str, str] = {}
    for teacher, given in config.teachers.items():
        opening = partial(_open_teacher, teacher, given, config, student, run_dir, world)
        try:
            teachers[teacher] = first_on_each_node(world, opening)
        except Exception as error:  # whatever is wrong with one teacher, the others are still asked
            if is_out_of_memory(error):
                raise
            missing[teacher] = error_line(portable(error))
    return RunNetworks(student, teachers, missing, {name: teacher.model for name, teacher in config.teachers.items()})


def _open_teacher(
    name: str, teacher: TeacherConfig, config: RunConfig, student: OpenedNetwork, run_dir: Path, world: World
) -> Network:
    """The teacher as it advised: its precision, its BatchNorms folded. Not compiled, which takes minutes."""
    if teacher.advises_with is None:  # the run has trained it
        teacher = replace(teacher, weights=str(run_dir / TEACHERS / name / STUDENT))
    weights = cast(str, teacher.advises_with)
    found = find_pretrained(weights)
    if not found.file.exists():
        raise MissingInputError(f"its weights, {printable(weights)}, are gone")
    noted = as_dict(
        dig(as_dict(read_json(run_dir / RESULTS)) or as_dict(read_json(run_dir / NETWORKS)), "teachers", name)
    )
    if noted.get("sha256") not in (None, "", found.sha256):
        raise RefusedError(f"{printable(weights)} has changed since it advised the run (SHA-256 {found.sha256[:12]})")
    classes, size = student.interface.classes, student.interface.image_size
    network = build_teacher_without_weights(teacher, classes=classes, image_size=size)
    load_weights(network, weights)
    freeze(network, size, world.device, precision=decided(config.distill.teacher_precision), compile=False)
    return network


class Probe(nn.Module):
    """Asks all networks about the same images.

    Forward: (B, 3, H, W) in [0, 1] -> by key, logits (B, K) of each head and teacher, and features (B, C): what the
    classifier of each reads. Networks whose classifier is not one module with one input, (B, C), have no features.
    """

    def __init__(self, networks: RunNetworks) -> None:
        super().__init__()
        self.student = networks.student.network
        self.teachers = nn.ModuleDict(dict(networks.teachers))
        self._read: dict[str, Tensor] = {}
        classifiers = _classifiers(self.student)
        if len(classifiers) == len(networks.student.interface.heads):
            heads = zip(networks.student.interface.heads, classifiers, strict=True)
            self._listen({f"{FEATURES_OF_HEAD} {name}": module for name, module in heads})
        for name, network in networks.teachers.items():
            modules = _classifiers(network)
            self._listen({f"{FEATURES_OF_TEACHER} {name}": module for module in modules[:1]})

    def _listen(self, modules: Mapping[str, nn.Module]) -> None:
        for key, module in modules.items():
            # A bound method, which a copy of the probe has of its own (``of_each_thread``), and so has the module.
            module.register_forward_pre_hook(_Listener(self, key).hear)

    def keep(self, key: str, features: Tensor) -> None:
        if features.ndim == 2:
            self._read[key] = features

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        self._read = {}
        heads = with_average(self.student(images)._asdict())
        found = {f"{HEAD} {name}": logits for name, logits in heads.items()}
        found |= {f"{TEACHER} {name}": network(images).cls for name, network in self.teachers.items()}
        found |= self._read
        self._read = {}
        return found


@dataclass
class _Listener:
    probe: Probe
    key: str

    def hear(self, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        self.probe.keep(self.key, given[0])


def _classifiers(network: Network) -> tuple[nn.Module, ...]:
    """The linear layers that turn features into logits, in the order of the heads; empty for a model of other build."""
    get = getattr(network.model, "get_classifier", None)
    if get is None:
        return ()
    found = get()
    modules = found if isinstance(found, tuple) else (found,)
    return modules if all(isinstance(module, nn.Linear) for module in modules) else ()


def probing_classifier(networks: RunNetworks, device: torch.device) -> Classifier:
    """A classifier whose answers are a ``Probe``'s: float32 on the CPU, by key."""
    network = of_each_thread(Probe(networks).to(device).eval())

    @torch.inference_mode()
    def classify(images: Tensor) -> dict[str, Tensor]:
        found = network()(images.to(device).float().div_(255))
        return {key: each.float().cpu() for key, each in found.items()}

    return replace(classifier_of(networks.student, device), classify=classify)
