"""What a ds_config may say, and what DeepSpeed is told: how to shard comes from the file, numbers from the recipe."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError

from cit_scale.config import BatchSplit, RunConfig, find_ds_config
from cit_scale.errors import ConfigError, os_error
from cit_scale.settings import flatten

if not torch.cuda.is_available():
    # DeepSpeed looks for an accelerator while it is imported, and each rank would warn that there is none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig


class FlopsProfilerConfig(BaseModel):
    """DeepSpeed's keys of flops_profiler, which it reads without a model of its own."""

    model_config = ConfigDict(extra="forbid", strict=True)

    enabled: bool = False
    recompute_fwd_factor: float = 0.0
    profile_step: int = 1
    module_depth: int = -1
    top_modules: int = 1
    detailed: bool = True
    output_file: str | None = None


class ShardingConfig(BaseModel):
    """What a ds_config may set: how to shard, and what DeepSpeed prints.

    Any other key is refused, because DeepSpeed ignores a misspelt one without a word.
    """

    model_config = ConfigDict(extra="forbid")

    zero_optimization: DeepSpeedZeroConfig = DeepSpeedZeroConfig()
    steps_per_print: Annotated[int, Field(gt=0, strict=True)] | None = None
    wall_clock_breakdown: StrictBool = False
    comms_logger: CommsLoggerConfig = CommsLoggerConfig()
    flops_profiler: FlopsProfilerConfig = FlopsProfilerConfig()


# The stages at which a section of zero_optimization that sends something to the CPU's memory is tested here.
OFFLOAD_STAGES = {"offload_optimizer": (2, 3), "offload_param": (3,)}

# What such a section may set. The rest is of NVMe, or divides the update between the devices.
OFFLOAD_KEYS = ("device", "pin_memory")

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

# Options that shard otherwise than over the whole world, change the gradient or update on the side: not tested here.
UNTESTED_OPTIONS = (
    "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients", "zenflow",
)  # fmt: skip


def read_ds_config(config: RunConfig, batch_split: BatchSplit) -> dict[str, Any]:
    """What DeepSpeed is told: how to shard, from the file that engine.ds_config names, and the recipe's numbers.

    What the recipe owns may stand in the file if it is equal, or "auto". Raises ConfigError, with both values and where
    to change them, if it is not, and for a key that is unknown, at any depth.
    """
    path = find_ds_config(config.engine.ds_config)
    try:
        sharding = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        message = f"engine.ds_config: {path} cannot be read as JSON: {error}"
        raise os_error(error, message, lasting=ConfigError) from error
    if not isinstance(sharding, dict):
        raise ConfigError(f"engine.ds_config: {path} holds a {type(sharding).__name__}, not an object")

    recipe = _recipe_values(config, batch_split)
    recipe_sections = {key.split(".")[0] for key in recipe} - ShardingConfig.model_fields.keys()
    _check_recipe(path, sharding, recipe, recipe_sections)
    sharding = {key: value for key, value in sharding.items() if key not in recipe_sections and value != "auto"}
    zero = _check_sharding(path, sharding, recipe_sections)
    if zero.stage == 3 and config.engine.compile:
        # It gives the right numbers, after compiling DeepSpeed's hooks around every layer for minutes.
        raise ConfigError(f"engine.compile is of no use at ZeRO stage 3 ({path}); turn it off, or take stage 0, 1 or 2")
    return {
        **sharding,
        # memory_efficient_linear would replace torch.nn.functional.linear in the whole process, for the teachers too.
        "zero_optimization": {
            "memory_efficient_linear": False,
            **sharding.get("zero_optimization", {}),
            "stage": zero.stage,
        },
        # An offloaded update is that of torch's AdamW, fused on the CPU too. DeepSpeed's own would have to be compiled.
        "zero_force_ds_cpu_optimizer": False,
        **{key: recipe[key][0] for key in BATCH_KEYS},
        # At stage 0 the engine clips, in the pass in which it checks.
        "gradient_clipping": recipe["gradient_clipping"][0] if zero.stage > 0 else 0.0,
    }


def _recipe_values(config: RunConfig, batch_split: BatchSplit) -> dict[str, tuple[Any, str | None]]:
    """What the recipe owns, by DeepSpeed's key: the value, and the setting to change, if there is one."""
    optim, train = config.optim, config.train
    # Mixed precision is autocast over float32 weights, under DeepSpeed's three names for it.
    precision = config.engine.precision
    return {
        "train_batch_size": (train.global_batch_size, "train.global_batch_size"),
        "train_micro_batch_size_per_gpu": (batch_split.micro_batch_size, "train.micro_batch_size"),
        "gradient_accumulation_steps": (batch_split.micro_steps, "train.micro_batch_size"),
        "gradient_clipping": (optim.clip_norm, "optim.clip_norm"),
        "optimizer.type": ("AdamW", None),
        "optimizer.params.lr": (config.peak_lr, "optim.lr"),
        "optimizer.params.betas": (list(optim.betas), "optim.betas"),
        "optimizer.params.eps": (optim.eps, "optim.eps"),
        "optimizer.params.weight_decay": (optim.weight_decay, "optim.weight_decay"),
        "scheduler.type": ("warm-up and cosine", "optim.warmup_epochs and optim.min_lr"),
        "fp16.enabled": (precision == "fp16", "engine.precision"),
        "bf16.enabled": (precision == "bf16", "engine.precision"),
        "torch_autocast.enabled": (precision != "float32", "engine.precision"),
        "data_types.grad_accum_dtype": ("fp32", "engine.precision"),
        "gradient_allreduce_op": ("mean", None),
        "managed_gradient_accumulation": (True, None),
        "zero_optimization.compute_grad_norm": (True, None),
    }


def _check_recipe(
    path: Path, sharding: Mapping[str, Any], recipe: Mapping[str, tuple[Any, str | None]], sections: Container[str]
) -> None:
    """Raise ConfigError for the first value of the recipe's that is neither equal to it nor "auto".

    sections: the top-level keys that are wholly the recipe's.
    """
    for key, value in flatten(sharding).items():
        if key in recipe:
            wanted, home = recipe[key]
            if value not in ("auto", wanted):
                raise ConfigError(
                    f"{path} sets {key}={json.dumps(value)}, the recipe says {json.dumps(wanted)}; "
                    f'remove it from the file or write "auto"{f", or set {home}" if home else ""}'
                )
        elif key.split(".")[0] in sections and value != "auto":
            raise ConfigError(f"{path} sets {key}={json.dumps(value)}, which the recipe does not have; remove it")


def _check_sharding(path: Path, sharding: dict[str, Any], others: Iterable[str]) -> DeepSpeedZeroConfig:
    """Read every key at every depth; what is unknown, badly typed or not tested here is a ConfigError.

    others: keys that may stand in the file beside these.
    """
    try:
        zero = ShardingConfig(**sharding).zero_optimization
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error, others)}") from error
    for name, stages in OFFLOAD_STAGES.items():
        section = getattr(zero, name)
        if section is None or section.device == "none":
            continue
        place = f"{path}: zero_optimization.{name}"
        if section.device != "cpu":
            raise ConfigError(f"{place}.device={section.device} is not supported; the devices are cpu and none")
        if zero.stage not in stages:
            known = " and ".join(map(str, stages))
            raise ConfigError(f"{place} is not supported at stage {zero.stage}; it is at {known}")
        for key in section.model_fields_set - set(OFFLOAD_KEYS):
            if getattr(section, key) != type(section).model_fields[key].default:
                raise ConfigError(f"{place}.{key} is not supported; remove it")
    for option in UNTESTED_OPTIONS:
        if getattr(zero, option) != DeepSpeedZeroConfig.model_fields[option].default:
            raise ConfigError(f"{path}: zero_optimization.{option} is not supported; remove it")
    return zero


def _explain(error: ValidationError, others: Iterable[str]) -> str:
    """The first of the complaints in one line; for a key that is unknown, with the nearest known ones."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        *section, key = place
        known = [*_known_keys(section), *(() if section else others)]
        return f"{'.'.join(section)}{': ' if section else ''}unknown key {_suggest(key, known)}"
    # Where several keys do not go together, the input is the whole section.
    is_section = isinstance(first["input"], BaseModel | dict)
    value = "" if is_section else f"={json.dumps(first['input'])}"
    return f"{'.'.join(place)}{value}: {first['msg']}"


def _known_keys(section: Sequence[str]) -> list[str]:
    """What may stand in a section, in both of DeepSpeed's spellings where there are two."""
    model: type[BaseModel] = ShardingConfig
    for key in section:
        kinds = get_args(model.model_fields[key].annotation) or (model.model_fields[key].annotation,)
        model = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return [name for field, info in model.model_fields.items() for name in (field, info.alias) if name]


def _suggest(key: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(key, sorted(known), n=3, cutoff=0.0)
    return f"{key!r}; the nearest known ones are {', '.join(nearest)}"
