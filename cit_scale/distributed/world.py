"""The process group of a run: this process's rank, and the collectives that the trainer needs."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from cit_scale.distributed.ranks import Ranks

T = TypeVar("T")

# Time-out of every collective: 30 days, in effect none. The watchdog ends a hang. A time-out of the process group would
# also count the time in which a job was suspended, and end the job when it wakes.
ENDLESS_S = 30 * 24 * 3600.0


@dataclass(frozen=True)
class World:
    """This process's place among all processes of a run.

    rank is in [0, world_size), local_rank in [0, local_world_size). group: the process group of the collectives below;
    None: the default process group.
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
        """Read the variables of DeepSpeed, torchrun, submitit or srun; without any, world size 1. Raises ValueError."""
        return cls(*Ranks.from_env(env))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The GPU of this rank, or the CPU if PyTorch sees no GPU."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # Clusters that bind GPUs to tasks show each rank only its own GPU, as cuda:0.
        return torch.device("cuda", self.local_rank if torch.cuda.device_count() > 1 else 0)

    @property
    def backend(self) -> str:
        """gloo for CPU tensors and NCCL for GPU tensors; gloo alone without a GPU."""
        # gloo stays beside NCCL for collectives on CPU tensors, such as those of Votes.
        return "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"

    @property
    def num_nodes(self) -> int:
        return self.world_size // self.local_world_size

    def with_own_group(self) -> World:
        """Collective. Returns the same ranks with a process group of their own, for use in another thread.

        Collectives of two threads in one group would be matched in the order in which they happen to start.
        """
        if self.world_size == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=ENDLESS_S))
        assert isinstance(group, dist.ProcessGroup)  # other values are for ranks outside of the group
        return dataclasses.replace(self, group=group)


def start(world: World, timeout_s: float = ENDLESS_S, store: dist.Store | None = None) -> None:
    """Collective. Set up threads and device of this rank and join the default process group.

    timeout_s: how long a collective waits for the slowest rank. store: where the ranks meet; None: at MASTER_ADDR and
    MASTER_PORT. Does nothing if the process group exists already.
    """
    if dist.is_initialized():
        return
    if "OMP_NUM_THREADS" not in os.environ:
        # By default each rank starts a thread per core, and the ranks of a node then compete for the same cores.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_world_size))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if world.world_size == 1:
        # DeepSpeed insists on a process group even for a single process; with a HashStore it needs no port.
        store = dist.HashStore()
    dist.init_process_group(
        world.backend,
        store=store,
        rank=world.rank,
        world_size=world.world_size,
        timeout=timedelta(seconds=timeout_s),
        # Without it PyTorch binds NCCL to GPU LOCAL_RANK or, where that is not set (srun, submitit), to the rank modulo
        # the number of GPUs: another than world.device if a node has more GPUs than ranks. It also connects at once,
        # in communicators that block: the trial has shown that they come up, and a watchdog watches. Alone, a process
        # connects to nobody, and needs no communicator until it asks for one.
        device_id=world.device if world.device.type == "cuda" and world.world_size > 1 else None,
    )


def barrier(world: World) -> None:
    """Collective. Wait until every rank has called this function."""
    if world.world_size > 1:
        dist.barrier(group=world.group)


def broadcast(world: World, value: Any) -> Any:
    """Collective. Returns rank 0's ``value`` on every rank. The value is pickled."""
    if world.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=world.group)
    return box[0]


class Votes:
    """What the ranks agree on, again and again, without waiting for one another: flags, combined by logical or.

    ``cast`` begins an agreement and ``read`` ends it, a turn later, when its message has long arrived. Where there is
    one rank alone, ``read`` gives what holds now.
    """

    def __init__(self, world: World, flags: Callable[[], Sequence[bool]]) -> None:
        """flags: this rank's, as they are when it is called; as many at every call and on every rank."""
        self._world = world
        self._flags = flags
        self._votes: torch.Tensor | None = None
        self._work: dist.Work | None = None

    def cast(self) -> None:
        """Collective. Begin to agree on the flags as they are now. To be read before the next one."""
        if self._world.world_size > 1:
            assert self._work is None
            self._votes = torch.tensor(self._flags(), dtype=torch.int32)
            self._work = dist.all_reduce(self._votes, dist.ReduceOp.MAX, group=self._world.group, async_op=True)

    def read(self) -> tuple[bool, ...]:
        """Collective. The flags that any rank had at the last ``cast``, equal on every rank; all false before it."""
        if self._world.world_size == 1:
            return tuple(self._flags())
        if self._work is None or self._votes is None:
            return (False,) * len(self._flags())
        self._work.wait()
        self._work = None
        return tuple(bool(vote) for vote in self._votes.numpy())


def gather(world: World, value: T) -> list[T]:
    """Collective. Returns every rank's ``value``, in the order of the ranks, on every rank. The values are pickled."""
    values = [value] * world.world_size
    if world.world_size > 1:
        dist.all_gather_object(values, value, group=world.group)
    return values


def gather_on_main(world: World, value: T) -> list[T] | None:
    """Collective. Returns every rank's ``value``, in the order of the ranks, on rank 0; None on the others."""
    if world.world_size == 1:
        return [value]
    values = [value] * world.world_size if world.is_main else None
    dist.gather_object(value, values, dst=0, group=world.group)
    return values


def deal(world: World, values: Sequence[T] | None) -> T:
    """Collective. Returns this rank's of the ``values`` that rank 0 has, one for each rank. They are pickled."""
    if world.world_size == 1:
        assert values is not None
        return values[0]
    box: list[T | None] = [None]
    dist.scatter_object_list(box, list(values) if values is not None else None, src=0, group=world.group)
    return cast(T, box[0])


def sum_over_ranks(world: World, values: torch.Tensor) -> torch.Tensor:
    """Collective. Returns the elementwise sum over ranks, on every rank, in the shape of ``values``."""
    if world.world_size > 1:
        values = values.clone()  # all_reduce works in place and would overwrite the caller's tensor
        dist.all_reduce(values, group=world.group)
    return values


def warn_once_per_job(message: str) -> None:
    """Warn on rank 0, or before the ranks have joined a process group. Python shows a repeated warning once."""
    if not (dist.is_initialized() and dist.get_rank() > 0):
        warnings.warn(message, stacklevel=2)


def run_on_all_ranks(world: World, function: Callable[[], T]) -> T:
    """Collective. Call ``function`` on every rank. Returns its result on this rank.

    An exception on any rank is raised on all ranks; otherwise the others would wait in the next collective for a rank
    that has left. ``function`` must not call collectives itself.
    """
    result: T | None = None
    failure: Exception | None = None
    try:
        result = function()
    except Exception as error:  # raised again below, on every rank
        failure = error
    for failure_of_rank in gather(world, failure):
        if failure_of_rank is not None:
            raise failure_of_rank
    return cast(T, result)


def first_on_each_node(world: World, function: Callable[[], T]) -> T:
    """Collective. Call ``function`` on rank 0, then on one rank of each other node, then on the remaining ranks.

    For functions that fill a cache on disk: a cache on a shared disk is filled once, and a cache on local disks once
    per node. Returns the result on this rank. An exception on any rank is raised on all ranks.
    """
    turn = 0 if world.is_main else 1 if world.local_rank == 0 else 2
    # Every rank takes part in all three turns, since run_on_all_ranks is collective, and calls function in one of them.

    def call_in(now: int) -> T | None:
        return function() if now == turn else None

    results = [run_on_all_ranks(world, partial(call_in, now)) for now in range(3)]
    return cast(T, results[turn])
