"""A tiny network, its batches and every engine, for the tests of the engines."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cit_scale.batch import StudentLogits, student_logits_type
from cit_scale.config import EngineConfig, MixingConfig, OptimConfig, RunConfig, TrainConfig
from cit_scale.distributed.world import World
from cit_scale.engines.base import Engine, StepResult
from cit_scale.engines.build import build_engine, prepare_engine
from cit_scale.models.network import Network, build_network

GLOBAL_BATCH_SIZE = 16
LR = 1e-2

# The engines that shard: the shipped files of ZeRO, two more that reach what a network this small does not, flat
# partitions in another order with gaps, and shards that are really apart, in several groups; and FSDP2.
SHARDINGS = {
    "zero0": "zero0",
    "zero1": "zero1",
    "zero2": "zero2",
    "zero3": "zero3",
    "zero2_offload": "zero2_offload",
    "zero3_offload": "zero3_offload",
    "zero2 in another order": {"stage": 2, "round_robin_gradients": True, "parameter_alignment": True},
    "zero3 all apart": {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 50},
    "fsdp2": None,
}

State = dict[str, np.ndarray]


class TinyModel(nn.Module):
    """A convolution, BatchNorm, linear layers, an exempt token; no size is a multiple of two."""

    pretrained_cfg: ClassVar = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, bias=False)
        self.norm = nn.BatchNorm2d(5)
        self.hidden = nn.Linear(5, 7)
        self.token = nn.Parameter(torch.randn(1, 7))
        self.cls = nn.Linear(7, 3)
        self.advised = nn.Linear(7, 3)

    def forward_heads(self, images: Tensor) -> StudentLogits:
        features = torch.relu(self.norm(self.conv(images))).mean(dim=(2, 3))  # (B, 5)
        features = torch.tanh(self.hidden(features)) + self.token
        return student_logits_type(("conv",))(self.cls(features), self.advised(features))

    def no_weight_decay(self) -> set[str]:
        return {"token"}


def tiny_network() -> Network:
    return Network(TinyModel())


def tiny_cit(**options: Any) -> Network:
    """An aligned CiT for the same images, one patch for each four pixels."""
    sizes = {"patch_size": 2, "depth": 2, "embed_dim": 24, "num_heads": 2, **options}
    return build_network("cit_tiny_patch16_224", sizes, num_classes=3, image_size=6, teachers=("conv",))


def make_engine(
    world: World,
    sharding: str,
    micro_steps: int,
    ds_configs: str,
    make_network: Callable[[], Network] = tiny_network,
    settings: Mapping[str, Any] = MappingProxyType({}),
    **optim: Any,
) -> Engine:
    """A fresh engine with the same initial weights each time.

    sharding: a row of SHARDINGS, or plain. ds_configs: the folder of the rows that are not shipped. settings: more of
    EngineConfig's.
    """
    config = RunConfig(
        optim=OptimConfig(**{"weight_decay": 0.1, "clip_norm": 0.3, "ema_decay": 0.7, **optim}),
        engine=dataclasses.replace(engine_config(sharding, ds_configs), **settings),
        mixing=MixingConfig(group_size=1),
        train=TrainConfig(
            global_batch_size=GLOBAL_BATCH_SIZE, micro_batch_size=GLOBAL_BATCH_SIZE // world.world_size // micro_steps
        ),
    )
    torch.manual_seed(0)
    return build_engine(make_network(), prepare_engine(config, world))


def engine_config(sharding: str, ds_configs: str) -> EngineConfig:
    if sharding in ("plain", "fsdp2"):
        return EngineConfig(name=sharding)
    if isinstance(SHARDINGS[sharding], str):
        return EngineConfig(ds_config=sharding)
    return EngineConfig(ds_config=f"{ds_configs}/{sharding}.json")


def shardings_on(world_size: int) -> list[str]:
    """Every engine that runs on so many ranks."""
    return [*SHARDINGS, *(["plain"] if world_size == 1 else [])]


def write_ds_configs(folder: Path) -> None:
    """The rows of SHARDINGS that are not shipped, as files."""
    for name, zero in SHARDINGS.items():
        if isinstance(zero, dict):
            (folder / f"{name}.json").write_text(json.dumps({"zero_optimization": zero}))


def micro_batch(step: int, part: int, parts: int) -> tuple[Tensor, Tensor]:
    """Part ``part`` of the global batch of ``step``, cut into ``parts``: images and labels."""
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(GLOBAL_BATCH_SIZE, 3, 6, 6, generator=generator)
    labels = torch.randint(3, (GLOBAL_BATCH_SIZE,), generator=generator)
    return images.chunk(parts)[part], labels.chunk(parts)[part]


def loss_of(logits: StudentLogits, labels: Tensor) -> Tensor:
    return cross_entropy(logits.cls, labels) + cross_entropy(logits.conv, labels)


def update(engine: Engine, world: World, step: int, poison: str | None = None) -> tuple[list[float], StepResult]:
    """One update on this rank's part of the global batch. Returns the loss of each micro-step and the result.

    poison: what goes wrong in the first micro-step of the last rank.
    """
    losses = []
    for micro_step in range(engine.micro_steps):
        part = world.rank * engine.micro_steps + micro_step
        images, labels = micro_batch(step, part, world.world_size * engine.micro_steps)
        poisoned = poison if world.rank == world.world_size - 1 and micro_step == 0 else None
        if poisoned == "images":
            images = torch.full_like(images, math.nan)
        loss = loss_of(engine.forward(images), labels)
        if poisoned == "loss":
            loss = loss * math.inf
        engine.backward(loss)
        losses.append(loss.item())
    return losses, engine.step(LR)


def numpy_state(engine: Engine) -> State:
    """Collective. All of it, on every rank."""
    return {key: tensor.numpy() for key, tensor in engine.state(engine.state_shapes()).items()}


def local_buffers(engine: Engine) -> State:
    """This rank's own, without a word to the others."""
    return {f"local/{name}": buffer.numpy().copy() for name, buffer in engine.module.named_buffers()}


def tensors(state: State) -> dict[str, Tensor]:
    return {key: torch.from_numpy(array) for key, array in state.items()}


def differences(left: State, right: State) -> list[str]:
    """Keys whose bits differ."""
    keys = left.keys() | right.keys()
    return sorted(
        key for key in keys if key not in left or key not in right or left[key].tobytes() != right[key].tobytes()
    )
