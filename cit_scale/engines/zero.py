"""DeepSpeed ZeRO, stages 0 to 3, on any number of ranks.

DeepSpeed shards, reduces and updates. What it leaves undone, or does at some stages only, is done here and in
``Engine``: a step that is not finite is skipped at every stage, and the state has the one form of
``TrainingState`` instead of DeepSpeed's own checkpoints.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cit_scale.batch import StudentLogits
from cit_scale.distributed.world import ENDLESS_S, World
from cit_scale.engines.base import Engine, EngineSetup, Update
from cit_scale.engines.state import ParameterPlacement, WholeParameters
from cit_scale.models.compiling import compile_module
from cit_scale.models.network import Network
from cit_scale.optim import adamw, set_learning_rate

if not torch.cuda.is_available():
    # As in ds_config.py: DeepSpeed looks for an accelerator while it is imported, and warns on each rank without one.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.utils import groups

# torch 2.14 alone deprecates what DeepSpeed calls; 2.15 does not.
RENAMED = r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated"
warnings.filterwarnings("ignore", RENAMED, FutureWarning)


class ZeroEngine(Engine):
    """The ``Engine`` over ``deepspeed.initialize``. Collective to build."""

    def __init__(self, module: Network, setup: EngineSetup) -> None:
        assert setup.ds_config is not None
        self._stage = setup.ds_config["zero_optimization"]["stage"]
        super().__init__(module, setup, host_knows=self._stage > 0)
        # The order matters. The module is compiled in place, so its parameters keep their names. AdamW is built next:
        # from stage 1 on DeepSpeed puts this rank's part of the parameters into AdamW's groups. The placement is built
        # last: it reads where DeepSpeed has put each parameter.
        if setup.engine.compile is True:
            compile_module(module)
        self._optimizer = adamw(module, setup.optim)
        self._deepspeed = _initialize(module, self._optimizer, setup.ds_config, setup.world)
        self._build_state(self._optimizer, _placement(self._stage, module, self._deepspeed.optimizer, setup.world))

    def forward(self, images: Tensor) -> StudentLogits:
        # Whether this micro-step is the update's last: DeepSpeed reads it in the forward pass and the backward pass.
        self._deepspeed.set_gradient_accumulation_boundary(self._is_last_micro_step)
        return self._deepspeed(images)

    def _backward(self, loss: Tensor) -> None:
        self._deepspeed.backward(loss)  # divides by the micro-steps itself

    def _update(self, lr: float) -> Update:
        set_learning_rate(self._optimizer, lr)
        return self._update_whole() if self._stage == 0 else self._update_partitions()

    def _update_whole(self) -> Update:
        """Stage 0. DeepSpeed would apply a step that is not finite, so the check and the clipping are ours."""
        update = self._clip(list(self.module.parameters()), self._optimizer)
        self._deepspeed.step()
        return update

    def _update_partitions(self) -> Update:
        """Stages 1 to 3. DeepSpeed's optimizer divides by its scale, checks and clips where it has the gradients.

        It reads from the device whether they are finite, before it updates.
        """
        partitioned = self._deepspeed.optimizer
        # Only for the step: in a backward pass it would scale the loss, which has been done.
        partitioned.loss_scale = float(self._loss_scale.value.numpy())  # on the host at these stages
        self._deepspeed.step()
        partitioned.loss_scale = 1.0
        # A tensor on the device, or a number where the step was skipped. At stage 3 in float64.
        grad_norm = torch.as_tensor(self._deepspeed.get_global_grad_norm())
        return Update(grad_norm, is_skipped=bool(partitioned.overflow))


def _initialize(
    module: Network, optimizer: torch.optim.AdamW, ds_config: Mapping[str, Any], world: World
) -> deepspeed.DeepSpeedEngine:
    # DeepSpeed reads its device from here. srun does not set it, and a rank that sees only its own GPU has device 0
    # whatever the launcher has set.
    os.environ["LOCAL_RANK"] = str(world.device.index or 0)
    if world.device.type == "cpu":
        # Without a GPU DeepSpeed would compile a C++ collective at its start, for inference only: a minute of compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if groups._WORLD_GROUP is None:
        # DeepSpeed's own clone of the world gives up after half an hour, in which a suspended job may not have run.
        groups._WORLD_GROUP = dist.new_group(range(world.world_size), timeout=timedelta(seconds=ENDLESS_S))
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=dict(ds_config))
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
    """ZeRO 3: each rank holds an equal part of every parameter; the last rank's part is padded.

    The parts of a group's parameters lie in a row.

    optimizer: a DeepSpeedZeroOptimizer_Stage3.
    """

    def __init__(self, module: nn.Module, optimizer: Any, world: World) -> None:
        self._optimizer = optimizer
        self._world = world
        parameters: Iterable[tuple[str, Any]] = module.named_parameters()  # DeepSpeed has given each a ds_shape
        self.shapes: dict[str, torch.Size] = {name: parameter.ds_shape for name, parameter in parameters}
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
