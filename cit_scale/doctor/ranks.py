"""The ranks of a check: a process for each GPU of this machine, two without a GPU."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from cit_scale.distributed.preflight import find_interface
from cit_scale.distributed.world import World
from cit_scale.doctor.findings import Asked
from cit_scale.errors import one_line

WITHOUT_GPU = 2
END_S = 5.0  # for the end of a rank that is killed: one that waits for a device in the kernel does not end at all
MOST = 200  # characters of a library's error message

Say = Callable[[Any], None]
Work = Callable[[World, dist.Store, Say], None]
"""What each rank does, and says bit by bit. The ranks can meet at the store."""


class Heard(NamedTuple):
    """What a rank has said, and why it says no more; None: it has done its work."""

    said: list[Any]
    problem: str | None


def gpu_count(asked: Asked) -> int:
    """As the check of the GPUs has found it. Not asked again: a process in which CUDA has begun cannot fork ranks."""
    return int(asked.found["GPUs"].facts.get("gpus", "0")) if "GPUs" in asked.found else 0


def run_ranks(ranks: int, work: Work, limit_s: float) -> list[Heard]:
    """What is heard of each rank, in order, within ``limit_s``. A rank is a fork of this process."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(ranks):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (World(rank, rank, ranks, ranks), Path(folder) / "store", work, sender)
            processes.append(context.Process(target=_rank, args=arguments, daemon=True))
            processes[-1].start()
            sender.close()
            pipes.append(receiver)
        deadline = time.monotonic() + limit_s
        try:
            return [_listen(pipe, deadline, limit_s) for pipe in pipes]
        finally:
            for process in processes:
                process.kill()
                process.join(END_S)


def _listen(pipe: Connection, deadline: float, limit_s: float) -> Heard:
    said: list[Any] = []
    try:
        while pipe.poll(max(deadline - time.monotonic(), 0)):
            is_last, piece = pipe.recv()
            if is_last:
                return Heard(said, piece)
            said.append(piece)
        return Heard(said, f"no answer within {limit_s:g} s")
    except EOFError:
        return Heard(said, "its process died")


def _rank(world: World, store: Path, work: Work, answer: Connection) -> None:
    interface = find_interface([])
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    problem = None
    try:
        work(world, dist.FileStore(str(store), world.world_size), lambda piece: answer.send((False, piece)))
    except Exception as error:  # of any library
        problem = f"{type(error).__name__}: {one_line(error, MOST)}"
    answer.send((True, problem))
    answer.close()
    os._exit(0)  # without the libraries' farewells
