"""DeepSpeed ZeRO, stages 0 to 3, on any number of ranks.

DeepSpeed shards, reduces and updates. What it leaves undone, or does at some stages only, is done here and in
``HostingEngine``: a step that is not finite is skipped at every stage, and the state has the portable form of
``TrainingState`` instead of DeepSpeed's own checkpoints.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError
from torch import Tensor, nn

from cit_scale.batch import StudentLogits
from cit_scale.config import EngineConfig, OptimConfig, RunConfig, find_ds_config
from cit_scale.distributed.world import ENDLESS_S, World
from cit_scale.engines.hosted import Hosted, HostingEngine, clip_gradients
from cit_scale.engines.state import ParameterPlacement, WholeParameters
from cit_scale.errors import ConfigError, os_error
from cit_scale.optim import adamw, set_learning_rate

if not torch.cuda.is_available():
    # DeepSpeed looks for an accelerator while it is imported, and each rank would warn that there is none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import groups


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

# Options that shard otherwise than over the whole world, change the gradient or update on the side: not tested here.
UNTESTED_OPTIONS = (
    "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients", "zenflow",
)  # fmt: skip


class ZeroEngine(HostingEngine):
    """The ``Engine`` over ``deepspeed.initialize``. Collective to build.

    ds_config: what ``read_ds_config`` returned.
    """

    def __init__(
        self,
        module: nn.Module,
        optim: OptimConfig,
        engine: EngineConfig,
        micro_steps: int,
        world: World,
        ds_config: dict[str, Any],
    ) -> None:
        super().__init__(module, optim, engine, micro_steps, world)
        self._stage = ds_config["zero_optimization"]["stage"]
        hosted = Hosted(module, engine.precision, world.device)
        if engine.compile:
            module.compile()
        self._optimizer = adamw(module, optim)
        self._deepspeed = _initialize(hosted, self._optimizer, ds_config, world)
        self._keep_state(self._optimizer, _placement(self._stage, module, self._deepspeed.optimizer, world))

    def forward(self, images: Tensor) -> StudentLogits:
        # The boundary has to be known in the forward already, and says whether the backward after it closes the update.
        self._deepspeed.set_gradient_accumulation_boundary(self._is_last)
        return self._deepspeed(images)

    def _backward(self, loss: Tensor) -> None:
        self._deepspeed.backward(loss)  # divides by the micro-steps itself

    def _update(self, lr: float, loss_scale: float) -> float:
        set_learning_rate(self._optimizer, lr)
        return self._update_whole(loss_scale) if self._stage == 0 else self._update_partitions(loss_scale)

    def _update_whole(self, loss_scale: float) -> float:
        """Stage 0. DeepSpeed would apply a step that is not finite, so the check and the clipping are ours."""
        grad_norm = clip_gradients(self.module.parameters(), self._clip_norm, loss_scale)
        if math.isfinite(grad_norm):
            self._deepspeed.step()
        else:
            self._deepspeed.zero_grad()
        return grad_norm

    def _update_partitions(self, loss_scale: float) -> float:
        """Stages 1 to 3. DeepSpeed's optimizer divides by its scale, checks and clips where it has the gradients."""
        partitioned = self._deepspeed.optimizer
        # Only for the step: in a backward pass it would scale the loss, which has been done.
        partitioned.loss_scale = loss_scale
        self._deepspeed.step()
        partitioned.loss_scale = 1.0
        return math.inf if partitioned.overflow else float(self._deepspeed.get_global_grad_norm())


def _initialize(
    hosted: Hosted, optimizer: torch.optim.AdamW, ds_config: dict[str, Any], world: World
) -> deepspeed.DeepSpeedEngine:
    # DeepSpeed reads its device from here, and srun does not set it.
    os.environ["LOCAL_RANK"] = str(world.device.index or 0)
    if world.device.type == "cpu":
        # Without a GPU DeepSpeed would compile a C++ collective at its start, for inference only: a minute of compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if groups._WORLD_GROUP is None:
        # DeepSpeed's own clone of the world gives up after half an hour, in which a suspended job may not have run.
        groups._WORLD_GROUP = dist.new_group(range(world.world_size), timeout=timedelta(seconds=ENDLESS_S))
    engine, *_ = deepspeed.initialize(model=hosted, optimizer=optimizer, config=ds_config)
    return engine


# ---------------------------------------------------------------------------------------------------------------------
# Where the parameters lie


def _placement(stage: int, module: nn.Module, optimizer: Any, world: World) -> ParameterPlacement:
    match stage:
        case 0:
            return WholeParameters(module)
        case 1 | 2:
            return FlatPartitions(module, optimizer, world)
        case _:
            return ShardedParameters(module, optimizer, world)


class FlatPartitions:
    """ZeRO 1 and 2: a group's parameters lie in a row in one flat tensor, and each rank updates a part of that.

    optimizer: a DeepSpeedZeroOptimizer.
    """

    def __init__(self, module: nn.Module, optimizer: Any, world: World) -> None:
        self._optimizer = optimizer
        self._world = world
        self.shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        self.pieces: list[Tensor] = optimizer.single_partition_of_fp32_groups
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        # By group: the parameters' names, in the order in which they lie there, and where each begins.
        self._places = [
            [(names[id(parameter)], offset) for parameter, offset in zip(parameters, offsets, strict=True)]
            for parameters, offsets in zip(
                optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets, strict=True
            )
        ]

    def assemble(self, pieces: Sequence[Tensor]) -> Iterable[tuple[str, Tensor]]:
        for places, piece in zip(self._places, pieces, strict=True):
            flat = _gather(piece, self._world).flatten()
            for name, offset in places:
                shape = self.shapes[name]
                yield name, flat[offset : offset + shape.numel()].view(shape)

    def cut(self, whole: Callable[[str], Tensor]) -> Iterator[Tensor]:
        for places, piece in zip(self._places, self.pieces, strict=True):
            part = torch.zeros(piece.numel())
            start = self._world.rank * piece.numel()  # of this rank's part in the group
            for name, offset in places:
                numel = self.shapes[name].numel()
                first, last = max(offset, start), min(offset + numel, start + piece.numel())
                if first < last:
                    part[first - start : last - start] = whole(name).flatten()[first - offset : last - offset]
            yield part

    def publish(self) -> None:
        self._optimizer.update_lp_params()


class ShardedParameters:
    """ZeRO 3: each rank holds an equal part of every parameter, the last one padded; a group's parts lie in a row.

    optimizer: a DeepSpeedZeroOptimizer_Stage3.
    """

    def __init__(self, module: nn.Module, optimizer: Any, world: World) -> None:
        self._optimizer = optimizer
        self._world = world
        self.shapes = {name: parameter.ds_shape for name, parameter in module.named_parameters()}
        self.pieces: list[Tensor] = optimizer.fp32_partitioned_groups_flat
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        # By group: the parameters' names and how many elements of each a rank holds.
        self._places = [
            [(names[id(parameter)], parameter.partition_numel()) for parameter in parameters]
            for parameters in optimizer.fp16_groups
        ]

    def assemble(self, pieces: Sequence[Tensor]) -> Iterable[tuple[str, Tensor]]:
        for places, piece in zip(self._places, pieces, strict=True):
            parts = _gather(piece, self._world).split([size for _, size in places], dim=1)
            for (name, _), part in zip(places, parts, strict=True):
                shape = self.shapes[name]
                yield name, part.flatten()[: shape.numel()].view(shape)

    def cut(self, whole: Callable[[str], Tensor]) -> Iterator[Tensor]:
        for places, piece in zip(self._places, self.pieces, strict=True):
            part = torch.zeros(piece.numel())
            for (name, size), here in zip(places, part.split([size for _, size in places]), strict=True):
                mine = whole(name).flatten()[self._world.rank * size :][:size]
                here[: mine.numel()] = mine
            yield part

    def publish(self) -> None:
        # As the optimizer does around an update: drop gathered copies, put the pieces where the module gathers from.
        self._optimizer._partition_all_parameters()
        for group in range(len(self.pieces)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(group)


def _gather(piece: Tensor, world: World) -> Tensor:
    """Collective. (n,) on each rank to (world_size, n)."""
    gathered = piece.new_empty(world.world_size * piece.numel())
    dist.all_gather_into_tensor(gathered, piece.detach())
    return gathered.view(world.world_size, -1)


# ---------------------------------------------------------------------------------------------------------------------
# How to shard


def read_ds_config(config: RunConfig, world_size: int, micro_steps: int) -> dict[str, Any]:
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

    recipe = _recipe_values(config, world_size, micro_steps)
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
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.global_batch_size // (world_size * micro_steps),
        "gradient_accumulation_steps": micro_steps,
        # At stage 0 the engine clips, in the pass in which it checks.
        "gradient_clipping": config.optim.clip_norm if zero.stage > 0 else 0.0,
    }


def _recipe_values(config: RunConfig, world_size: int, micro_steps: int) -> dict[str, tuple[Any, str | None]]:
    """What the recipe owns, by DeepSpeed's key: the value, and the setting to change, if there is one."""
    optim, train = config.optim, config.train
    # Mixed precision is autocast over float32 weights, under DeepSpeed's three names for it.
    precision = config.engine.precision
    return {
        "train_batch_size": (train.global_batch_size, "train.global_batch_size"),
        "train_micro_batch_size_per_gpu": (
            train.global_batch_size // (world_size * micro_steps),
            "train.micro_batch_size",
        ),
        "gradient_accumulation_steps": (micro_steps, "train.micro_batch_size"),
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
    for key, value in _leaves(sharding):
        if key in recipe:
            wanted, home = recipe[key]
            if value not in ("auto", wanted):
                raise ConfigError(
                    f"{path} sets {key}={json.dumps(value)}, the recipe says {json.dumps(wanted)}; "
                    f'remove it from the file or write "auto"{f", or set {home}" if home else ""}'
                )
        elif key.split(".")[0] in sections and value != "auto":
            raise ConfigError(f"{path} sets {key}={json.dumps(value)}, which the recipe does not have; remove it")


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its dotted key."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


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
