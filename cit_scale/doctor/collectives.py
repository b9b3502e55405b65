"""Whether ranks can add up tensors: NCCL between the GPUs of this machine, gloo between two processes without one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from cit_scale.distributed.preflight import sum_ones
from cit_scale.distributed.world import World
from cit_scale.doctor.findings import Asked, Finding, failed, ok
from cit_scale.doctor.ranks import WITHOUT_GPU, Heard, Say, gpu_count, run_ranks

LIMIT_S = 100.0
ROUNDS = 5
CPU_BYTES, GPU_BYTES = 2**24, 2**28
ADVICE = {
    "nccl": "try again with NCCL_DEBUG=INFO; if GPUs cannot reach each other, NCCL_P2P_DISABLE=1 is slower and works",
    "gloo": "the machine's name should resolve (getent hosts $(hostname)); or name an interface, GLOO_SOCKET_IFNAME=lo",
}


def check(asked: Asked) -> Finding:
    """Start the ranks, and add up a tensor."""
    gpus = gpu_count(asked)
    return judge(run_ranks(gpus or WITHOUT_GPU, add_up, LIMIT_S), "nccl" if gpus else "gloo")


def judge(heard: Sequence[Heard], backend: str) -> Finding:
    """heard: of each rank, the seconds of one sum of many values, or its problem."""
    ranks = len(heard)
    if wrong := [f"rank {rank}: {each.problem}" for rank, each in enumerate(heard) if each.problem is not None]:
        return failed(f"{backend}, {ranks} ranks: {'; '.join(wrong)}", ADVICE[backend])
    seconds = max(each.said[0] for each in heard)
    # Bus bandwidth as nccl-tests has it: what passes each link in a ring.
    moved = (GPU_BYTES if backend == "nccl" else CPU_BYTES) * 2 * (ranks - 1) / ranks
    rate = moved / seconds / 1e9
    if ranks == 1:
        return ok(f"{backend} works on the one GPU; between GPUs nothing could be tried")
    return ok(
        f"{backend}, {ranks} ranks: the sum is right; bus bandwidth {rate:.3g} GB/s", figures={"sum_gb_per_s": rate}
    )


def add_up(world: World, store: dist.Store, say: Say) -> None:
    """Collective. Say the seconds; raises where a sum is wrong."""
    problem = sum_ones(world, store)
    if problem is not None:
        raise RuntimeError(problem)
    say(time_sum(world))


def time_sum(world: World) -> float:
    """Collective. Seconds for a sum of many values over the ranks, the median of some; raises where it is wrong."""
    is_gpu = world.device.type == "cuda"
    values = torch.ones((GPU_BYTES if is_gpu else CPU_BYTES) // 4, device=world.device)
    times = []
    for _ in range(1 + ROUNDS):
        values.fill_(world.rank)
        if is_gpu:
            torch.cuda.synchronize(world.device)
        start = time.perf_counter()
        dist.all_reduce(values)
        if is_gpu:
            torch.cuda.synchronize(world.device)
        times.append(time.perf_counter() - start)
    expected = world.world_size * (world.world_size - 1) / 2
    if not torch.all(values == expected):
        raise RuntimeError(
            f"a sum over the ranks has {int((values != expected).sum())} wrong values of {values.numel()}"
        )
    return statistics.median(times[1:])
