"""DeepSpeed ZeRO, stages 0 to 3, on any number of ranks.

DeepSpeed shards, reduces and updates. What it leaves undone, or does at some stages only, is done here: a step that is
not finite is skipped at every stage and undone in the buffers, BatchNorm's statistics are the same on all ranks, and
the state has the portable form of ``TrainingState`` instead of DeepSpeed's own checkpoints.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from cit_scale.batch import StudentLogits
from cit_scale.config import REPOSITORY, EngineConfig, OptimConfig, RunConfig
from cit_scale.engines.base import Hosted, StepResult, clip_gradients
from cit_scale.engines.state import Layout, TrainingState, WholeParameters
from cit_scale.errors import ConfigError
from cit_scale.optim import adamw, set_learning_rate
from cit_scale.world import World

if not torch.cuda.is_available():
    # DeepSpeed looks for an accelerator while it is imported, and each rank would warn that there is none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

DS_CONFIGS = REPOSITORY / "ds_configs"

# What a ds_config may set: how to shard and communicate, and what DeepSpeed prints. Any other key is refused, because
# DeepSpeed ignores a misspelt one without a word.
SHARDING_KEYS = (
    "zero_optimization", "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
    "zero_allow_untested_optimizer", "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state",
    "log_level", "comms_logger", "flops_profiler",
)  # fmt: skip

# Sections of zero_optimization whose checkpoints and parity are not tested here yet.
UNTESTED_SECTIONS = ("offload_param", "offload_optimizer", "zenflow")

# Options that shard otherwise than over the whole world, or change the gradient: not tested here either.
UNTESTED_OPTIONS = (
    "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
)  # fmt: skip


class ZeroEngine:
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
        self.module = module
        self.micro_steps = micro_steps
        self._stage = ds_config["zero_optimization"]["stage"]
        self._clip_norm = optim.clip_norm
        self._world = world
        self._backwards = 0
        hosted = Hosted(module, engine.precision, world.device)
        if engine.compile:
            module.compile()
        self._optimizer = adamw(module, optim)
        self._deepspeed = _initialize(hosted, self._optimizer, ds_config, world)
        layout = _layout(self._stage, module, self._deepspeed.optimizer, world)
        self._state = TrainingState(module, self._optimizer, layout, optim.ema_decay)
        self._statistics = [
            statistic
            for layer in module.modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.track_running_stats
            for statistic in (layer.running_mean, layer.running_var)
        ]

    def forward(self, images: Tensor) -> StudentLogits:
        # The boundary has to be known in the forward already, and says whether the backward after it closes the update.
        self._deepspeed.set_gradient_accumulation_boundary(self._backwards == self.micro_steps - 1)
        return self._deepspeed(images)

    def backward(self, loss: Tensor) -> None:
        self._deepspeed.backward(loss)  # divides by the micro-steps itself
        self._backwards += 1

    def step(self, lr: float) -> StepResult:
        if self._backwards != self.micro_steps:
            raise RuntimeError(f"step after {self._backwards} backward calls, an update takes {self.micro_steps}")
        self._backwards = 0
        set_learning_rate(self._optimizer, lr)
        if self._stage == 0:
            # DeepSpeed would apply a step that is not finite, so the check and the clipping are ours.
            grad_norm = clip_gradients(self.module.parameters(), self._clip_norm)
            skipped = not math.isfinite(grad_norm)
            if skipped:
                self._deepspeed.zero_grad()
            else:
                self._deepspeed.step()
        else:
            self._deepspeed.step()
            skipped = self._deepspeed.optimizer.overflow
            grad_norm = math.inf if skipped else float(self._deepspeed.get_global_grad_norm())
        if skipped:
            self._state.reject()
        else:
            self._average_statistics()
            self._state.accept()
        return StepResult(grad_norm, lr, skipped)

    def state(self) -> dict[str, Tensor]:
        return self._state.whole(self._world.is_main)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._state.load(state)

    @torch.no_grad()
    def _average_statistics(self) -> None:
        """Collective. Replace BatchNorm's running statistics by their mean over ranks.

        Each rank normalises with the statistics of its own images, as under DDP without SyncBatchNorm. Left alone, the
        running ones would drift apart, and a checkpoint would hold those of whichever rank wrote it. They are a linear
        average of what was seen, so the mean after every update is just the running average of the ranks' mean: one
        state for every rank, evaluation and checkpoint, for one small message an update.
        """
        if self._world.world_size == 1 or not self._statistics:
            return
        flat = torch.cat([statistic.flatten() for statistic in self._statistics])
        dist.all_reduce(flat)
        means = (flat / self._world.world_size).split([statistic.numel() for statistic in self._statistics])
        torch._foreach_copy_(self._statistics, list(means))


def _initialize(
    hosted: Hosted, optimizer: torch.optim.AdamW, ds_config: dict[str, Any], world: World
) -> deepspeed.DeepSpeedEngine:
    os.environ["LOCAL_RANK"] = str(world.local_rank)  # DeepSpeed reads its device from here, and srun does not set it
    if world.device.type == "cpu":
        # Without a GPU DeepSpeed would compile a C++ collective at its start, for inference only: a minute of compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(model=hosted, optimizer=optimizer, config=ds_config)
    return engine


# ---------------------------------------------------------------------------------------------------------------------
# Where the parameters lie


def _layout(stage: int, module: nn.Module, optimizer: Any, world: World) -> Layout:
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

    def cut(self, whole: Mapping[str, Tensor]) -> Iterator[Tensor]:
        for places, piece in zip(self._places, self.pieces, strict=True):
            flat = torch.zeros(self._world.world_size, piece.numel())
            for name, offset in places:
                flat.view(-1)[offset : offset + whole[name].numel()] = whole[name].flatten()
            yield flat[self._world.rank]

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

    def cut(self, whole: Mapping[str, Tensor]) -> Iterator[Tensor]:
        for places in self._places:
            parts = []
            for name, size in places:
                padded = torch.zeros(self._world.world_size, size)
                padded.view(-1)[: whole[name].numel()] = whole[name].flatten()
                parts.append(padded[self._world.rank])
            yield torch.cat(parts)

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
    to change them, if it is not, and for a key that is unknown, at any depth of zero_optimization.
    """
    path = _find(config.engine.ds_config)
    try:
        sharding = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"engine.ds_config: {path} cannot be read as JSON: {error}") from error
    if not isinstance(sharding, dict):
        raise ConfigError(f"engine.ds_config: {path} holds a {type(sharding).__name__}, not an object")

    recipe = _recipe_values(config, world_size, micro_steps)
    recipe_sections = {key.split(".")[0] for key in recipe}
    for key in sharding:
        if key not in SHARDING_KEYS and key not in recipe_sections:
            raise ConfigError(f"{path}: unknown key {_suggest(key, (*SHARDING_KEYS, *recipe_sections))}")
    for key, value in _leaves(sharding):
        section = key.split(".")[0]
        if key in recipe:
            wanted, home = recipe[key]
            if value not in ("auto", wanted):
                raise ConfigError(
                    f"{path} sets {key}={json.dumps(value)}, the recipe says {json.dumps(wanted)}; "
                    f'remove it from the file or write "auto"{f", or set {home}" if home else ""}'
                )
        elif section in recipe_sections and section not in SHARDING_KEYS and value != "auto":
            raise ConfigError(f"{path} sets {key}={json.dumps(value)}, which the recipe does not have; remove it")

    zero = _check_zero(path, sharding.get("zero_optimization", {}))
    if zero["stage"] == 3 and config.engine.compile:
        # It gives the right numbers, after compiling DeepSpeed's hooks around every layer for minutes.
        raise ConfigError(f"engine.compile is of no use at ZeRO stage 3 ({path}); turn it off, or take stage 0, 1 or 2")
    return {
        **{key: value for key, value in sharding.items() if key in SHARDING_KEYS and value != "auto"},
        "zero_optimization": zero,
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.global_batch_size // (world_size * micro_steps),
        "gradient_accumulation_steps": micro_steps,
        # At stage 0 the engine clips, in the pass in which it checks.
        "gradient_clipping": config.optim.clip_norm if zero["stage"] > 0 else 0.0,
    }


def _find(name: str) -> Path:
    named = DS_CONFIGS / f"{name}.json"
    path = named if named.is_file() else Path(name).expanduser()
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in DS_CONFIGS.glob("*.json")))
        raise ConfigError(f"engine.ds_config={name} is neither a file nor one of {known}")
    return path


def _recipe_values(config: RunConfig, world_size: int, micro_steps: int) -> dict[str, tuple[Any, str | None]]:
    """What the recipe owns, by DeepSpeed's key: the value, and the setting to change, if there is one."""
    optim, train = config.optim, config.train
    # bf16 of this trainer is autocast over float32 weights, under DeepSpeed's three names for mixed precision.
    is_bf16 = config.engine.precision == "bf16"
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
        "fp16.enabled": (False, "engine.precision"),
        "bf16.enabled": (is_bf16, "engine.precision"),
        "torch_autocast.enabled": (is_bf16, "engine.precision"),
        "data_types.grad_accum_dtype": ("fp32", "engine.precision"),
        "gradient_allreduce_op": ("mean", None),
        "managed_gradient_accumulation": (True, None),
        "zero_optimization.compute_grad_norm": (True, None),
    }


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its dotted key."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_zero(path: Path, zero: Any) -> dict[str, Any]:
    """The section zero_optimization with the defaults that this engine needs."""
    if not isinstance(zero, dict):
        raise ConfigError(f'{path}: zero_optimization={json.dumps(zero)} must be an object, such as {{"stage": 1}}')
    try:
        checked = DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error)}") from error
    for name in UNTESTED_SECTIONS:
        section = getattr(checked, name)
        if section is not None and getattr(section, "device", None) != "none":
            raise ConfigError(f"{path}: zero_optimization.{name} is not supported yet; remove it")
    for option in UNTESTED_OPTIONS:
        if getattr(checked, option) != DeepSpeedZeroConfig.model_fields[option].default:
            raise ConfigError(f"{path}: zero_optimization.{option} is not supported yet; remove it")
    # memory_efficient_linear would replace torch.nn.functional.linear in the whole process, for the teachers too.
    return {"memory_efficient_linear": False, **zero, "stage": checked.stage}


def _explain(error: ValidationError) -> str:
    """The first of DeepSpeed's complaints in one line; for a key it does not know, with the nearest that it does."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]  # empty where several keys do not go together
    if first["type"] == "extra_forbidden":
        *section, key = place
        return f"{'.'.join(['zero_optimization', *section])}: unknown key {_suggest(key, _known_keys(section))}"
    value = f"={json.dumps(first['input'], default=str)}" if place else ""
    return f"{'.'.join(['zero_optimization', *place])}{value}: {first['msg']}"


def _known_keys(section: Sequence[str]) -> list[str]:
    """What may stand in a section of zero_optimization, in both of DeepSpeed's spellings where there are two."""
    model: type[BaseModel] = DeepSpeedZeroConfig
    for key in section:
        kinds = get_args(model.model_fields[key].annotation) or (model.model_fields[key].annotation,)
        model = next(kind for kind in kinds if issubclass(kind, BaseModel))
    return [name for field, info in model.model_fields.items() for name in (field, info.alias) if name]


def _suggest(key: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(key, sorted(known), n=3, cutoff=0.0)
    return f"{key!r}; the nearest known ones are {', '.join(nearest)}"
