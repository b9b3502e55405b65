"""The ranks of a check: a process for each GPU of this machine, two without a GPU."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from cit_scale.distributed.world import World
from cit_scale.doctor.findings import Asked, message_of

WITHOUT_GPU = 2
SHOW, SHOW_S = signal.SIGUSR1, 0.5  # tells a rank to print its stack, which takes it as long at most
STDERR = 2
AFTER_S = 10.0  # for the other ranks when one has a problem
END_S = 5.0  # for the end of all ranks when they are killed: one that waits for a device in the kernel does not end

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
    """What is heard of each rank, in order, within ``limit_s``. A rank is a fork of this process.

    Once one of them has a problem, the others have AFTER_S to say theirs: they may wait for it.
    """
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
        try:
            heard = _listen(pipes, limit_s)
            if any(each.problem is not None for each in heard):
                _print_stacks(processes)
            return heard
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join(END_S / ranks)


def _listen(pipes: Sequence[Connection], limit_s: float) -> list[Heard]:
    said: list[list[Any]] = [[] for _ in pipes]
    problems: list[str | None] = [None for _ in pipes]
    talking = {pipe: rank for rank, pipe in enumerate(pipes)}
    start = time.monotonic()
    deadline = start + limit_s
    while talking and (ready := wait(list(talking), max(deadline - time.monotonic(), 0))):
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = talking[pipe]
            try:
                is_last, piece = pipe.recv()
            except EOFError:
                is_last, piece = True, "its process died"
            if not is_last:
                said[rank].append(piece)
                continue
            del talking[pipe]
            problems[rank] = piece
            if piece is not None:
                deadline = min(deadline, time.monotonic() + AFTER_S)
    for rank in talking.values():
        problems[rank] = f"no answer within {time.monotonic() - start:.0f} s"
    return [Heard(*each) for each in zip(said, problems, strict=True)]


def _print_stacks(processes: Iterable[BaseProcess]) -> None:
    """Each says where it stands, if it does not end first."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid or 0, SHOW)
    time.sleep(SHOW_S)


def _rank(world: World, store: Path, work: Work, answer: Connection) -> None:
    # Not dump_traceback_later: this process's parent has called it, and after a fork it waits for its thread for ever.
    faulthandler.register(SHOW, file=STDERR)
    problem = None
    try:
        work(world, dist.FileStore(str(store), world.world_size), lambda piece: answer.send((False, piece)))
    except (Exception, SystemExit) as error:  # of any library
        problem = message_of(error)
    answer.send((True, problem))
    answer.close()
    os._exit(0)  # without the libraries' farewells
