"""Run whole jobs of the real trainer on one or two ranks, as a launcher would, and do to them what nobody wants.

The ranks are forks of ``ranks``' warm server, so that a job of two takes a second or two. As under a launcher, the
first rank to end takes the others with it, and its exit code is the job's. What goes wrong in a rank is a function of
``sabotage``, called in it before ``main``: it changes this one process, at a point of the run that it names itself, so
that nothing depends on how fast the machine is.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import start_process

from cit_scale.distributed.world import World

TIMEOUT_S = 90
GRACE_S = 1.0
"""How long a launcher looks on when a rank has ended. Ranks that end by themselves do so within it, or are killed."""

Sabotage = tuple[Any, ...]
"""A function of ``(world, *args)`` that every rank can import, and the args."""


@dataclass(frozen=True)
class Ended:
    """code: of the rank that ended first; negative: the signal that killed it. codes, outputs: by rank; the output is
    that of both streams."""

    code: int
    codes: list[int]
    outputs: list[str]
    wall_s: float

    @property
    def output(self) -> str:
        return "\n".join(f"--- rank {rank}\n{text}" for rank, text in enumerate(self.outputs))


class Job:
    """A job that has been started. ``kill`` sends a signal to one rank; ``wait`` returns how the job ended.

    port: where the ranks are to meet, as under a launcher; without it they meet through a file, and no port is taken.
    """

    def __init__(
        self, argv: Sequence[str], *, ranks: int = 2, sabotage: Sabotage | None = None, port: int | None = None
    ) -> None:
        self._started = time.monotonic()
        self._folder = tempfile.TemporaryDirectory(prefix="job_")
        folder = Path(self._folder.name)
        self._outputs = [folder / f"rank_{rank}.txt" for rank in range(ranks)]
        self._processes: list[BaseProcess] = []
        for rank in range(ranks):
            world = World(rank, rank, ranks, ranks)
            self._processes.append(start_process(_run_rank, world, folder, list(argv), sabotage, port))

        # If the test fails before it waits. Left to multiprocessing, a rank that hangs would survive its SIGTERM.
        atexit.register(self._end)

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def kill(self, rank: int, signum: int) -> None:
        pid = self._processes[rank].pid
        assert pid is not None
        os.kill(pid, signum)

    def output(self, rank: int = 0) -> str:
        path = self._outputs[rank]
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, text: str, *, rank: int = 0) -> None:
        """Block until the rank has printed ``text``."""
        deadline = time.monotonic() + TIMEOUT_S
        while text not in self.output(rank):
            assert time.monotonic() < deadline, f"rank {rank} never printed {text!r}:\n{self.output(rank)}"
            assert self._processes[rank].is_alive(), f"rank {rank} ended without {text!r}:\n{self.output(rank)}"
            time.sleep(0.01)

    def wait(self, timeout_s: float = TIMEOUT_S) -> Ended:
        """Wait until a rank ends, give the others a moment, and end them."""
        by_sentinel = {process.sentinel: rank for rank, process in enumerate(self._processes)}
        ready = wait(list(by_sentinel), timeout=timeout_s)
        if not ready:
            for process in self._processes:
                os.kill(process.pid, signal.SIGQUIT)  # faulthandler writes where it stands
            time.sleep(0.5)
        wait_s, first = time.monotonic() - self._started, [by_sentinel[sentinel] for sentinel in ready]
        deadline = time.monotonic() + GRACE_S
        for process in self._processes:
            if ready:
                process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
        codes = [process.exitcode for process in self._processes]
        outputs = [self.output(rank) for rank in range(len(codes))]
        self._folder.cleanup()
        assert ready, f"the job did not end in {timeout_s} s:\n" + "\n---\n".join(outputs)
        # Where both have ended at the same time, the one that did not only follow.
        return Ended(codes[first[0]], codes, outputs, wait_s)


def run_job(
    argv: Sequence[str], *, ranks: int = 2, sabotage: Sabotage | None = None, timeout_s: float = TIMEOUT_S
) -> Ended:
    return Job(argv, ranks=ranks, sabotage=sabotage).wait(timeout_s)


def _run_rank(world: World, folder: Path, argv: list[str], sabotage: Sabotage | None, port: int | None) -> None:
    # What was imported stays: DeepSpeed collects garbage often, and walking over all of that takes half a second.
    gc.freeze()
    with (folder / f"rank_{world.rank}.txt").open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  as long as the process lives
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.enable(file=sys.stderr)
    faulthandler.register(signal.SIGQUIT, file=sys.stderr)
    os.environ |= {
        "RANK": str(world.rank),
        "LOCAL_RANK": str(world.local_rank),
        "WORLD_SIZE": str(world.world_size),
        "LOCAL_WORLD_SIZE": str(world.local_world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port or 1),
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    if port is None:
        store = dist.FileStore(str(folder / "store"), world.world_size)
        dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.world_size)
    code = 1
    try:
        from cit_scale.train import main

        if sabotage is not None:
            function, *args = sabotage
            function: Callable[..., None]
            function(world, *args)
        code = main(argv)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Leave without the libraries' farewells: an interpreter with a process group still open can take seconds.
        os._exit(code)
