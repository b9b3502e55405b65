"""Whether ranks can add up tensors: NCCL between the GPUs of this machine, gloo between two processes without one."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from cit_scale.distributed.preflight import find_interface, sum_ones, within
from cit_scale.distributed.world import World
from cit_scale.doctor.findings import Asked, Finding, failed, ok

LIMIT_S = 100.0
ANSWER_S = 5.0  # from a rank that gave up to its answer
ROUNDS = 5
CPU_BYTES, GPU_BYTES = 2**24, 2**28
ADVICE = {
    "nccl": "try again with NCCL_DEBUG=INFO; if GPUs cannot reach each other, NCCL_P2P_DISABLE=1 is slower and works",
    "gloo": "the machine's name should resolve (getent hosts $(hostname)); or name an interface, GLOO_SOCKET_IFNAME=lo",
}


def check(asked: Asked) -> Finding:
    """Start a rank for each GPU, two without a GPU, and add up a tensor."""
    # Not asked here: a process in which CUDA has begun cannot fork the ranks.
    gpus = int(asked.found["GPUs"].facts.get("gpus", "0")) if "GPUs" in asked.found else 0
    return judge(run_ranks(gpus or 2), "nccl" if gpus else "gloo")


def judge(answers: Sequence[float | str], backend: str) -> Finding:
    """answers: of each rank, seconds for one sum of many values, or what went wrong."""
    ranks = len(answers)
    if wrong := [f"rank {rank}: {answer}" for rank, answer in enumerate(answers) if isinstance(answer, str)]:
        return failed(f"{backend}, {ranks} ranks: {'; '.join(wrong)}", ADVICE[backend])
    seconds = max(each for each in answers if isinstance(each, float))
    # Bus bandwidth as nccl-tests has it: what passes each link in a ring.
    moved = (GPU_BYTES if backend == "nccl" else CPU_BYTES) * 2 * (ranks - 1) / ranks
    rate = moved / seconds / 1e9
    if ranks == 1:
        return ok(f"{backend} works on the one GPU; between GPUs nothing could be tried")
    return ok(
        f"{backend}, {ranks} ranks: the sum is right; bus bandwidth {rate:.3g} GB/s", figures={"sum_gb_per_s": rate}
    )


def run_ranks(ranks: int) -> list[float | str]:
    """The answers of all ranks, in order."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = []
        for rank in range(ranks):
            receiver, sender = context.Pipe(duplex=False)
            context.Process(target=_rank, args=(rank, ranks, Path(folder) / "store", sender), daemon=True).start()
            sender.close()
            pipes.append(receiver)
        deadline = time.monotonic() + LIMIT_S + ANSWER_S
        return [_answer_of(pipe, deadline) for pipe in pipes]


def _answer_of(pipe: Connection, deadline: float) -> float | str:
    try:
        if pipe.poll(max(deadline - time.monotonic(), 0)):
            return pipe.recv()
        return f"no sum within {LIMIT_S:g} s"
    except EOFError:
        return "its process died"


def _rank(rank: int, ranks: int, store: Path, answer: Connection) -> None:
    world = World(rank, rank, ranks, ranks)
    interface = find_interface([])
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    found: list[float] = []

    def add_up() -> str | None:
        problem = sum_ones(world, dist.FileStore(str(store), ranks))
        if problem is None:
            found.append(time_sum(world))
        return problem

    problem = within(LIMIT_S, "the sum over the ranks", add_up)
    answer.send(found[0] if problem is None else problem)
    answer.close()
    os._exit(0)


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
