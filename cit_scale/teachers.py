"""The frozen teachers: build, check, compile, run. They live outside the engine and never enter a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cit_scale.batch import TeacherLogits, teacher_logits_type
from cit_scale.config import DistillConfig, TeacherConfig
from cit_scale.errors import ConfigError
from cit_scale.models.classes import class_columns, refuse_other_order
from cit_scale.models.compiling import compile_module
from cit_scale.models.fold import fold_batch_norm
from cit_scale.models.network import Network, Precision, build_network
from cit_scale.models.pretrained import description_of, find_pretrained
from cit_scale.models.weights import load_weights
from cit_scale.settings import decided


@dataclass(frozen=True)
class Teacher:
    """name: of its token. forward: images (B, 3, H, W) in [0, 1] to logits (B, K), float32, without autograd.
    network: what runs in it, frozen and in evaluation mode. sha256: of the weights file."""

    name: str
    network: Network
    forward: Callable[[Tensor], Tensor]
    sha256: str


def build_teacher_without_weights(config: TeacherConfig, *, classes: Sequence[str], image_size: int) -> Network:
    """The teacher's network for these classes, newly initialized. Raises ConfigError if their columns are not found."""
    description = description_of(config.weights, config.start)
    columns, num_classes = None, len(classes)
    if config.classes is not None and config.advises_with is not None:
        columns, num_classes = class_columns(classes, config.classes, description)
    elif config.advises_with is not None:
        refuse_other_order(classes, description)
    return build_network(
        config.model,
        config.kwargs,
        num_classes=num_classes,
        image_size=image_size,
        description=description,
        own_size=config.image_size,
        columns=columns,
    )


def load_teacher(
    name: str,
    config: TeacherConfig,
    distill: DistillConfig,
    *,
    classes: Sequence[str],
    image_size: int,
    device: torch.device,
) -> Teacher:
    """Build the teacher with the weights that it advises with, and freeze it.

    classes: of the data. image_size: of the student's images. Raises ConfigError where weights are missing or do not
    fit.
    """
    weights = config.advises_with
    if weights is None:
        raise ConfigError(f"teacher {name} has neither weights nor a recipe; give teachers.{name}.weights or .recipe")
    network = build_teacher_without_weights(config, classes=classes, image_size=image_size)
    load_weights(network, weights)
    return frozen_teacher(name, network, distill, image_size, device, sha256=find_pretrained(weights).sha256)


def frozen_teacher(
    name: str, network: Network, distill: DistillConfig, image_size: int, device: torch.device, *, sha256: str = ""
) -> Teacher:
    """Freeze a network by a run's settings, in which nothing is ``auto`` any more. sha256: empty for any weights."""
    forward = freeze(
        network,
        image_size,
        device,
        precision=decided(distill.teacher_precision),
        compile=decided(distill.compile),
        cuda_graphs=distill.cuda_graphs,
    )
    return Teacher(name, network, forward, sha256)


def freeze(
    network: Network,
    image_size: int,
    device: torch.device,
    *,
    precision: Precision,
    compile: bool,
    cuda_graphs: bool = False,
) -> Callable[[Tensor], Tensor]:
    """Turn a network into a fixed function: on the device, without gradients, BatchNorm folded, compiled.

    network: changed in place. precision: float32, or bf16 under autocast. cuda_graphs: of what is compiled, on a GPU.
    Returns ``Teacher.forward``.
    """
    network.requires_grad_(False).eval()
    network.precision = precision
    size = network.image_size or image_size
    example = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    network.model = fold_batch_norm(network.model, example)
    network.to(device).to(memory_format=torch.channels_last)

    # Fixed batch shapes: each rank sees micro-batches of one size, and evaluation pads its last one.
    replays = compile and cuda_graphs and device.type == "cuda"
    if compile:
        compile_module(network, mode="reduce-overhead" if replays else None)

    @torch.no_grad()
    def forward(images: Tensor) -> Tensor:
        logits = network(images).cls
        # A graph's output lies where its next replay writes: the loss may read it later, in another micro-step.
        return logits.clone() if replays else logits

    return forward


def run_teachers(teachers: Sequence[Teacher], images: Tensor) -> TeacherLogits:
    """Each teacher's logits, (B, K) without autograd, for the student's images, (B, 3, H, W) in [0, 1]."""
    names = tuple(teacher.name for teacher in teachers)
    return teacher_logits_type(names)(*(teacher.forward(images) for teacher in teachers))
