"""From a configuration to an engine."""

from __future__ import annotations

import torch
from torch import nn

from cit_scale.config import RunConfig, split_batch
from cit_scale.distributed.world import World
from cit_scale.engines.base import Engine
from cit_scale.errors import ConfigError


def check_engine(config: RunConfig, world: World) -> None:
    """Raise ConfigError for what ``build_engine`` would refuse, before there is a network."""
    engine = config.engine
    for setting, precision, others in (
        ("engine.precision", engine.precision, "fp16 or float32"),
        ("distill.teacher_precision", config.distill.teacher_precision, "float32"),
    ):
        if precision == "bf16" and world.device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
            raise ConfigError(
                f"{setting}=bf16, but {torch.cuda.get_device_name(world.device)} has no bfloat16; set it to {others}"
            )
    if engine.name == "plain" and world.world_size > 1:
        raise ConfigError(
            f"engine.name=plain is for one process and there are {world.world_size}; set engine.name to zero or fsdp2"
        )
    if engine.name == "zero":
        from cit_scale.engines.zero import read_ds_config

        read_ds_config(config, world.world_size, split_batch(config, world.world_size).micro_steps)


def build_engine(module: nn.Module, config: RunConfig, world: World, micro_steps: int) -> Engine:
    """Collective. Host ``module``, which is the same on every rank, in the engine that the configuration names.

    Each builder is imported in its branch, so that an engine runs where the library of another is missing.
    """
    check_engine(config, world)
    match config.engine.name:
        case "plain":
            from cit_scale.engines.plain import PlainEngine

            return PlainEngine(module, config.optim, config.engine, micro_steps, world)
        case "fsdp2":
            from cit_scale.engines.fsdp2 import Fsdp2Engine

            return Fsdp2Engine(module, config.optim, config.engine, micro_steps, world)
        case "zero":
            from cit_scale.engines.zero import ZeroEngine, read_ds_config

            ds_config = read_ds_config(config, world.world_size, micro_steps)
            return ZeroEngine(module, config.optim, config.engine, micro_steps, world, ds_config)
        case name:
            raise ConfigError(f"engine.name={name} is unknown; the engines are zero, fsdp2 and plain")
