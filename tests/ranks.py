"""Run a function on several ranks, each a process of its own, fast.

A fork server imports the slow libraries once for the whole test session; a rank is a fork of it and starts in a
fraction of a second instead of ten. Ranks find each other through a file, so no port can be in use.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cit_scale.distributed.world import World

TIMEOUT_S = 120

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["warm"])


def start_process(function: Callable[..., None], *args: Any) -> BaseProcess:
    """A process of the warm server's that runs ``function(*args)``."""
    # Before Python 3.13 the server does not look where the tests stand.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))
    try:
        process = _context.Process(target=function, args=args, daemon=True)
        process.start()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return process


def run_on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(world, *args)`` on every rank of a started world. Returns the ranks' results in order.

    Results travel pickled; bring tensors home as numpy arrays. Raises AssertionError with a rank's traceback if one
    fails or its exit code if it dies, and after TIMEOUT_S, when each rank prints where it stands.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], []
        for rank in range(world_size):
            receiver, sender = _context.Pipe(duplex=False)
            world = World(rank, rank, world_size, world_size)
            processes.append(start_process(_run_rank, world, folder, sender, function, args))
            sender.close()
            pipes.append(receiver)
        try:
            return _results(pipes, processes)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _results(pipes: list[Connection], processes: list[BaseProcess]) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=TIMEOUT_S + 10)
        assert ready, f"ranks {[pipes.index(pipe) for pipe in waiting]} neither finished nor failed"
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                succeeded, result = pipe.recv()
            except EOFError:
                processes[rank].join()
                raise AssertionError(f"rank {rank} died with exit code {processes[rank].exitcode}") from None
            assert succeeded, f"rank {rank} failed:\n{result}"
            results[rank] = result
    return [results[rank] for rank in range(len(pipes))]


def _run_rank(world: World, folder: str, pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    # What was imported stays: DeepSpeed collects garbage often, and walking over all of that takes half a second.
    gc.freeze()
    faulthandler.enable(sys.__stderr__)
    faulthandler.dump_traceback_later(TIMEOUT_S, exit=True, file=sys.__stderr__)
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world.world_size)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.world_size)
    try:
        result = (True, function(world, *args))
    except BaseException:
        result = (False, traceback.format_exc())
    pipe.send(result)
    pipe.close()
    # Leave without the libraries' farewells: an interpreter with a process group still open can take seconds to close.
    os._exit(0)
