"""Who this process is among the others, and the few collectives the trainer needs."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from cit_scale.distributed.ranks import Ranks

T = TypeVar("T")

# For the slowest rank in a collective. The watchdog ends what hangs: a time-out here would also count the hours in
# which a suspended job did not run.
ENDLESS_S = 30 * 24 * 3600.0


@dataclass(frozen=True)
class World:
    """rank in [0, world_size), local_rank in [0, local_world_size).

    group: whom the collectives below go through; None is everybody, in the training's own turn.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        Ranks(self.rank, self.local_rank, self.world_size, self.local_world_size).check()

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> World:
        """Read DeepSpeed's, torchrun's, submitit's or srun's variables; without any, one process alone."""
        return cls(*Ranks.from_env(env))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # Some clusters show each rank one GPU only, its own.
        return torch.device("cuda", self.local_rank if torch.cuda.device_count() > 1 else 0)

    @property
    def backend(self) -> str:
        """NCCL beside gloo where there is a GPU, gloo alone elsewhere."""
        return "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"

    @property
    def num_nodes(self) -> int:
        return self.world_size // self.local_world_size

    def with_own_group(self) -> World:
        """Collective. The same ranks, whose collectives do not mix with those of this one: for another thread."""
        timeout = timedelta(seconds=ENDLESS_S)
        group = dist.new_group(backend="gloo", timeout=timeout) if self.world_size > 1 else None
        return dataclasses.replace(self, group=group)


def start(world: World, timeout_s: float = ENDLESS_S, store: dist.Store | None = None) -> None:
    """Collective. Join the process group.

    timeout_s: how long a collective waits for the slowest rank. store: where the ranks meet; without it MASTER_ADDR and
    MASTER_PORT say it.
    """
    if dist.is_initialized():
        return
    if "OMP_NUM_THREADS" not in os.environ:
        # Two ranks that each start a thread per core spin in each other's way.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_world_size))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if world.world_size == 1:
        store = dist.HashStore()  # a process alone needs no port, and DeepSpeed still finds the group it insists on
    dist.init_process_group(
        world.backend, store=store, rank=world.rank, world_size=world.world_size, timeout=timedelta(seconds=timeout_s)
    )


def barrier(world: World) -> None:
    """Collective."""
    if world.world_size > 1:
        dist.barrier(group=world.group)


def broadcast(world: World, value: Any) -> Any:
    """Collective. Rank 0's value, on every rank."""
    if world.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=world.group)
    return box[0]


def agree_any(world: World, *flags: bool) -> tuple[bool, ...]:
    """Collective. Each flag: true on every rank if it is true on any."""
    if world.world_size == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=world.group)
    return tuple(bool(vote) for vote in votes)


def gather(world: World, value: T) -> list[T]:
    """Collective. Every rank's value, in the order of the ranks, on every rank."""
    values = [value] * world.world_size
    if world.world_size > 1:
        dist.all_gather_object(values, value, group=world.group)
    return values


def sum_over_ranks(world: World, values: torch.Tensor) -> torch.Tensor:
    """Collective. Elementwise sum, the same on every rank."""
    if world.world_size > 1:
        values = values.clone()
        dist.all_reduce(values, group=world.group)
    return values


def warn_once_per_job(message: str) -> None:
    """Warn on rank 0, or where there are no ranks; Python shows a warning once."""
    if not (dist.is_initialized() and dist.get_rank() > 0):
        warnings.warn(message, stacklevel=2)


def run_on_all_ranks(world: World, function: Callable[[], T]) -> T:
    """Collective. Every rank calls ``function``, in which no rank waits for another.

    An exception on any rank is raised on all of them, so that none waits for one that has gone.
    """
    result: T | None = None
    failure: Exception | None = None
    try:
        result = function()
    except Exception as error:  # raised again below, on every rank
        failure = error
    for error in gather(world, failure):
        if error is not None:
            raise error
    return cast(T, result)


def first_on_each_node(world: World, function: Callable[[], T]) -> T:
    """Collective. Rank 0 calls ``function``, which may fill caches, then one rank on each node, then the others.

    So a cache that all nodes share is filled once, and one that each node has for itself once a node. An exception on
    any rank is raised on all of them.
    """
    turn = 0 if world.is_main else 1 if world.local_rank == 0 else 2
    results = [run_on_all_ranks(world, lambda now=now: function() if now == turn else None) for now in range(3)]
    return cast(T, results[turn])
