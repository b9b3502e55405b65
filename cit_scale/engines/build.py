"""From a configuration to an engine."""

from __future__ import annotations

import importlib

import torch

from cit_scale.config import RunConfig, split_batch
from cit_scale.distributed.world import World
from cit_scale.engines.base import Engine, EngineSetup
from cit_scale.errors import ConfigError
from cit_scale.models.network import Network

# By engine.name: module and class, imported when needed, so that an engine runs where another one's library is missing.
ENGINES = {
    "zero": ("cit_scale.engines.zero", "ZeroEngine"),
    "fsdp2": ("cit_scale.engines.fsdp2", "Fsdp2Engine"),
    "plain": ("cit_scale.engines.plain", "PlainEngine"),
}


def prepare_engine(config: RunConfig, world: World) -> EngineSetup:
    """What ``build_engine`` takes, before there is a network. Raises ConfigError for what no engine can do."""
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
    batch_split = split_batch(config, world.world_size)
    ds_config = None
    if engine.name == "zero":
        from cit_scale.engines.ds_config import read_ds_config  # DeepSpeed's, which the other engines do without

        ds_config = read_ds_config(config, batch_split)
    return EngineSetup(config.optim, engine, batch_split, world, ds_config)


def build_engine(module: Network, setup: EngineSetup) -> Engine:
    """Collective. Host ``module``, which is the same on every rank, in the engine that the configuration names."""
    place, name = ENGINES[setup.engine.name]
    return getattr(importlib.import_module(place), name)(module, setup)
