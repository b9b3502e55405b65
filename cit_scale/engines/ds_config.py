"""What a ds_config may say, and what DeepSpeed is told: how to shard comes from the file, numbers from the recipe."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Annotated, Any, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError
from pydantic_core import ErrorDetails

from cit_scale.config import BatchSplit, RunConfig, find_ds_config
from cit_scale.engines.loss_scale import GROWTH_STEPS
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
    steps_per_print: Annotated[float, Field(gt=0, strict=True)] | None = None
    wall_clock_breakdown: StrictBool = False
    comms_logger: CommsLoggerConfig = CommsLoggerConfig()
    flops_profiler: FlopsProfilerConfig = FlopsProfilerConfig()


SECTIONS = [name for name, field in ShardingConfig.model_fields.items() if isinstance(field.default, BaseModel)]

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


class _Any:
    """A container that has everything in it."""

    def __contains__(self, value: object) -> bool:
        return True


ANY = _Any()

# Of the recipe's sections: what DeepSpeed's users write beside the values, and which of it changes nothing here. The
# loss scale of fp16 is as in loss_scale.py. DeepSpeed's "Adam" decays weights as AdamW, unless adam_w_mode is false.
NO_EFFECT: dict[str, Sequence[Any]] = {
    "fp16.loss_scale": (0,),
    "fp16.initial_scale_power": (16,),
    "fp16.loss_scale_window": (GROWTH_STEPS,),
    "fp16.hysteresis": (1,),
    "fp16.consecutive_hysteresis": (False,),
    "fp16.min_loss_scale": (1,),
    "fp16.auto_cast": (False, True),
    "fp16.fp16_master_weights_and_grads": (False,),
    "bf16.immediate_grad_update": (False, True),
    "bfloat16.immediate_grad_update": (False, True),
    "optimizer.type": ("Adam",),
    "optimizer.params.torch_adam": (True,),
    "optimizer.params.adam_w_mode": (True,),
    "optimizer.params.bias_correction": (True,),
    "optimizer.params.amsgrad": (False,),
    "optimizer.params.fused": (False, True),
}

# Ways out for keys that are not passed on to DeepSpeed.
REMOVE = "remove it"
LOGGED = "remove it; metrics are in metrics.jsonl and in TensorBoard's files of the run folder"

# A section that DeepSpeed switches on by "enabled", and which is off without it.
OFF: Mapping[str, Any] = {}

# DeepSpeed's other keys, which are not passed on: the values that have no effect, and what to do with any other value.
# For a section, the values by key. None, false and "auto" never have an effect.
NOT_PASSED_ON: dict[str, tuple[Mapping[str, Any] | Container[Any], str]] = {
    "activation_checkpointing": ({}, "remove it, and set engine.activation_checkpointing"),
    "aio": (ANY, REMOVE),  # of NVMe, to which nothing is offloaded
    "amp": (OFF, "remove it, and set engine.precision"),
    "autotuning": (OFF, REMOVE),
    "checkpoint": (
        {"tag_validation": ("Warn", "WARN", "warn", "Ignore", "IGNORE", "ignore"), "checkpoint_serialization": (True,)},
        "remove it; train.save_every_steps and the other settings of train say when checkpoints are saved",
    ),
    "comet": (OFF, LOGGED),
    "communication_data_type": (("fp32",), "remove it; gradients are reduced in float32"),
    "compile": ({}, "remove it, and set engine.compile"),
    "compression_training": ({}, REMOVE),
    "csv_monitor": (OFF, LOGGED),
    "curriculum_learning": (OFF, REMOVE),
    "data_efficiency": (OFF, REMOVE),
    "dataloader_drop_last": (ANY, REMOVE),  # of DeepSpeed's own data loader
    "datastates_ckpt": ({}, REMOVE),
    "disable_allgather": ((), REMOVE),
    "disable_python_gc": ((), REMOVE),
    "dump_state": ((), REMOVE),
    "eigenvalue": (OFF, REMOVE),
    "elasticity": (OFF, "remove it; a checkpoint can be continued on any number of ranks"),
    "expert_parallel": (OFF, REMOVE),
    "gradient_predivide_factor": ((1,), REMOVE),
    "graph_harvesting": ((), REMOVE),
    "hybrid_engine": (OFF, REMOVE),
    "log_level": ((), REMOVE),
    "memory_breakdown": ((), "remove it; memory_gib is in the log"),
    "monitor_config": ({}, LOGGED),
    "nebula": (OFF, REMOVE),
    "pipeline": (ANY, REMOVE),  # of DeepSpeed's own PipelineModule
    "prescale_gradients": ((), REMOVE),
    "progressive_layer_drop": (OFF, REMOVE),
    "quantize_training": (OFF, REMOVE),
    "seq_parallel_communication_data_type": (("fp32",), REMOVE),
    "sequence_parallel_size": ((1,), REMOVE),
    "sparse_attention": ({}, REMOVE),
    "sparse_gradients": ((), REMOVE),
    "tensor_parallel": (
        {"autotp_size": (0, 1), "tp_size": (1,), "tensor_parallel": {"tp_size": (1,)}, "tp": {"tp_size": (1,)}},
        REMOVE,
    ),
    "tensorboard": (OFF, LOGGED),
    "timers": ({"throughput": {"enabled": (True,), "synchronized": (True,)}}, "remove it; images/s are in the log"),
    "use_data_before_expert_parallelism": ((), REMOVE),
    "vocabulary_size": (ANY, REMOVE),  # of a warning
    "wandb": (OFF, LOGGED),
    "weight_quantization": ({}, REMOVE),
    "zero_allow_untested_optimizer": (ANY, REMOVE),
    "zero_force_ds_cpu_optimizer": ((), "remove it; the optimizer is torch's AdamW"),
}


def read_ds_config(config: RunConfig, batch_split: BatchSplit) -> dict[str, Any]:
    """What DeepSpeed is told: how to shard, from the file that engine.ds_config names, and the recipe's numbers.

    What the recipe owns may stand in the file if it is equal, or "auto", and whatever changes nothing here. Raises
    ConfigError with all that may not: both values and where to change them, and keys that are unknown, at any depth.
    """
    path = find_ds_config(config.engine.ds_config)
    try:
        sharding = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_refuse_twice)
    except (OSError, ValueError, RecursionError) as error:
        message = f"engine.ds_config: {path} cannot be read as JSON: {error}"
        raise os_error(error, message, lasting=ConfigError) from error
    if not isinstance(sharding, dict):
        raise ConfigError(f"engine.ds_config: {path} holds a {type(sharding).__name__}, not an object")

    recipe = _recipe_values(config, batch_split)
    recipe_sections = {key.split(".")[0] for key in recipe} - ShardingConfig.model_fields.keys()
    complaints = _complaints_of_recipe(sharding, recipe, recipe_sections)
    complaints += _complaints_of_others(sharding)
    sharding = _without_unset(
        {
            key: value
            for key, value in sharding.items()
            if key not in recipe_sections and key not in NOT_PASSED_ON and not (value is False and key in SECTIONS)
        }
    )
    zero, more = _read_sharding(sharding, [*recipe_sections, *NOT_PASSED_ON])
    complaints += more
    if zero.stage == 3 and config.engine.compile is True:
        # It gives the right numbers, after compiling DeepSpeed's hooks around every layer for minutes.
        complaints.append("engine.compile is of no use at ZeRO stage 3; turn it off, or take stage 0, 1 or 2")
    if complaints:
        numbered = [f"({number}) {complaint}" for number, complaint in enumerate(complaints, 1)]
        raise ConfigError(f"{path}: {'; '.join(complaints if len(complaints) == 1 else numbered)}")
    steps_per_print = sharding.pop("steps_per_print", None)
    if steps_per_print is not None and math.isfinite(steps_per_print):  # Infinity: never
        sharding["steps_per_print"] = int(steps_per_print)
    return {
        **sharding,
        # overlap_comm stays False below stage 3, which is DeepSpeed's default: gradients are reduced after the backward
        # pass. Of CiT-S they are 103 MB in float32, under a millisecond between the GPUs of a node and some between
        # nodes, where a step takes 35 or more (docs/scaling.md). True reduces meanwhile, in a stream of its own, for
        # which DeepSpeed waits at each update; a ds_config may set it.
        # memory_efficient_linear would replace torch.nn.functional.linear in the whole process, for the teachers too.
        "zero_optimization": {
            "memory_efficient_linear": False,
            **sharding.get("zero_optimization", {}),
            "stage": zero.stage,
        },
        # An offloaded update is that of torch's AdamW, fused on the CPU too. DeepSpeed's own would have to be compiled.
        "zero_force_ds_cpu_optimizer": False,
        # It would wait for the device before every forward pass and after every update; images/s are in the log.
        "timers": {"throughput": {"enabled": False}},
        **{key: recipe[key][0] for key in BATCH_KEYS},
        # At stage 0 the engine clips, in the pass in which it checks.
        "gradient_clipping": recipe["gradient_clipping"][0] if zero.stage > 0 else 0.0,
    }


def _refuse_twice(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a key that it has twice: Python would keep the last one."""
    counts = Counter(key for key, _ in pairs)
    twice = [key for key, count in counts.items() if count > 1]
    if twice:
        raise ValueError(f"the key {twice[0]!r} stands twice")
    return dict(pairs)


def _without_unset(tree: dict[str, Any]) -> dict[str, Any]:
    """``tree`` without null and "auto" at any depth, which leave a key at DeepSpeed's default."""
    kept = {key: value for key, value in tree.items() if value is not None and value != "auto"}
    return {key: _without_unset(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _recipe_values(config: RunConfig, batch_split: BatchSplit) -> dict[str, tuple[Any, str | None]]:
    """What the recipe owns, by DeepSpeed's key: the value, and the setting to change, if there is one."""
    optim, train = config.optim, config.train
    # Mixed precision is autocast over float32 weights, under DeepSpeed's names for it.
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
        "scheduler.type": ("a warm-up and a cosine", None),
        "fp16.enabled": (precision == "fp16", "engine.precision"),
        "bf16.enabled": (precision == "bf16", "engine.precision"),
        "bfloat16.enabled": (precision == "bf16", "engine.precision"),
        "torch_autocast.enabled": (precision != "float32", "engine.precision"),
        "torch_autocast.dtype": ({"bf16": "bfloat16", "fp16": "float16"}.get(precision), "engine.precision"),
        "data_types.grad_accum_dtype": ("fp32", "engine.precision"),
        "gradient_allreduce_op": ("mean", None),
        "managed_gradient_accumulation": (True, None),
        "zero_optimization.compute_grad_norm": (True, None),
    }


def _complaints_of_recipe(
    sharding: Mapping[str, Any], recipe: Mapping[str, tuple[Any, str | None]], sections: Container[str]
) -> list[str]:
    """A line for each value of the recipe's that is neither equal to it nor "auto" nor of no effect.

    sections: the top-level keys that are wholly the recipe's.
    """
    complaints = []
    for key, value in flatten({key: value for key, value in sharding.items() if "." not in key}).items():
        if value in ("auto", None, *NO_EFFECT.get(key, ())):
            continue
        section = key.split(".")[0]
        if section == "scheduler" and key != section:
            if key == "scheduler.type" or "type" not in sharding[section]:
                complaints.append(
                    f"{key}={json.dumps(value)}: remove the section; the schedule is a warm-up and a cosine "
                    "(optim.warmup_epochs and optim.min_lr)"
                )
            continue
        wanted, home = recipe.get(key, (None, None))
        if wanted is not None:
            if value != wanted:
                complaints.append(
                    f"{key}={json.dumps(value)}, the recipe says {json.dumps(wanted)}: remove it from the file or "
                    f'write "auto"{f", or set {home}" if home else ""}'
                )
        elif key == section and section in sections:
            if value is not False:
                complaints.append(f"{key}={json.dumps(value)}, where DeepSpeed has a section: remove it")
        elif section in sections:
            wanted, _ = recipe.get(f"{section}.enabled", (True, None))
            if sharding[section].get("enabled", wanted) is not False and wanted is not False:
                complaints.append(f"{key}={json.dumps(value)}, which the recipe does not have: remove it")
    return complaints


def _complaints_of_others(sharding: Mapping[str, Any]) -> list[str]:
    """A line for each key that is not passed on to DeepSpeed and has a value with an effect."""
    return [
        f"{key}={json.dumps(sharding[key])} would do nothing here: {way_out}"
        for key, (neutral, way_out) in NOT_PASSED_ON.items()
        if not _has_no_effect(sharding.get(key), neutral)
    ]


def _has_no_effect(value: Any, neutral: Mapping[str, Any] | Container[Any]) -> bool:
    """Whether a value asks for nothing. neutral: as in NOT_PASSED_ON."""
    if value in (None, False, "auto"):
        return True
    by_key = neutral if isinstance(neutral, Mapping) else {}
    if neutral is ANY or not isinstance(value, dict):
        return neutral is not by_key and value in neutral
    if value.get("enabled", True) in (False, "auto") or ("enabled" not in value and neutral is OFF):
        return True
    return all(_has_no_effect(inner, by_key.get(key, ())) for key, inner in value.items())


def _read_sharding(sharding: dict[str, Any], others: Iterable[str]) -> tuple[DeepSpeedZeroConfig, list[str]]:
    """Read every key at every depth. Returns a complaint for each that is unknown, badly typed or not tested here.

    others: keys that may stand in the file beside these.
    """
    complaints, readable = [], sharding
    while True:
        try:
            zero = ShardingConfig(**readable).zero_optimization
            break
        except ValidationError as error:
            for each in error.errors():
                complaints.append(_explain(each, others))
                readable = _without(readable, each["loc"])
    is_stage_known = ("stage" in _section(readable)) == ("stage" in _section(sharding))
    for name, stages in OFFLOAD_STAGES.items():
        section = getattr(zero, name)
        if section is None or section.device == "none":
            continue
        place = f"zero_optimization.{name}"
        if section.device != "cpu":
            complaints.append(f"{place}.device={section.device} is not supported; the devices are cpu and none")
        if is_stage_known and zero.stage not in stages:
            known = " and ".join(map(str, stages))
            complaints.append(f"{place} is not supported at stage {zero.stage}; it is at {known}")
        for key in section.model_fields_set - set(OFFLOAD_KEYS):
            if getattr(section, key) != type(section).model_fields[key].default:
                complaints.append(f"{place}.{key} is not supported; remove it")
    for option in UNTESTED_OPTIONS:
        if getattr(zero, option) != DeepSpeedZeroConfig.model_fields[option].default:
            complaints.append(f"zero_optimization.{option} is not supported; remove it")
    return zero, complaints


def _section(sharding: Mapping[str, Any]) -> Container[str]:
    section = sharding.get("zero_optimization")
    return section if isinstance(section, dict) else ()


def _without(tree: dict[str, Any], place: Sequence[int | str]) -> dict[str, Any]:
    """``tree`` without the innermost key that ``place``, a path of pydantic's, leads to."""
    key, *inner = map(str, place)
    section = tree.get(key)
    if inner and isinstance(section, dict) and inner[0] in section:
        return tree | {key: _without(section, inner)}
    return {name: value for name, value in tree.items() if name != key}


def _explain(found: ErrorDetails, others: Iterable[str]) -> str:
    """One complaint of pydantic's in one line; for a key that is unknown, with the nearest known ones."""
    place = [str(part) for part in found["loc"]]
    if found["type"] == "extra_forbidden":
        *section, key = place
        known = [*_known_keys(section), *(() if section else others)]
        return f"{'.'.join(section)}{': ' if section else ''}unknown key {_suggest(key, known)}"
    # Where several keys do not go together, the input is the whole section.
    is_section = isinstance(found["input"], BaseModel | dict)
    value = "" if is_section else f"={json.dumps(found['input'])}"
    return f"{'.'.join(place)}{value}: {found['msg'].replace('2, 3 or 3', '2 or 3')}"  # its stages have a last one, too


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
