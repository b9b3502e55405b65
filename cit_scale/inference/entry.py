"""How ``cit-scale evaluate``, ``predict`` and ``export`` begin and end: ranks, messages, exit codes."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable

import torch.distributed as dist

from cit_scale.cli import read_ranks
from cit_scale.distributed.world import World, start
from cit_scale.errors import (
    BadImageError,
    ConfigError,
    RunError,
    error_line,
    exit_code_of,
    is_out_of_memory,
    one_line,
)

ON_THE_CPU = "compute on the CPU by CUDA_VISIBLE_DEVICES= before the command"
SMALLER_BATCHES = f"give a smaller --batch-size, or {ON_THE_CPU}"
"""Ways out where the device's memory is used up."""


def run_command(work: Callable[[World], None], *, needs_less_memory: str) -> int:
    """Join the ranks, if there are several, and call ``work``. Prints what it raises; returns the exit code.

    needs_less_memory: the way out where the device's memory is used up.
    """
    world: World | None = None
    try:
        ranks = read_ranks(os.environ)
        world = World(ranks.rank, ranks.local_rank, ranks.world_size, ranks.local_world_size)
        start(world)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's of an image, torch's of its formats: nothing to act on here
            work(world)
    except (RunError, BadImageError, OSError, ValueError) as error:
        if world is None or world.is_main:
            print(f"error: {error_line(error)}", file=sys.stderr, flush=True)
        return exit_code_of(error) if isinstance(error, RunError | BadImageError | OSError) else 2
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            # On the rank that meets it, or on all to which it was sent; the launcher ends those that wait for it.
            rank = 0 if world is None else world.rank
            print(f"error: rank {rank}: {one_line(error, 300)}; {needs_less_memory}", file=sys.stderr, flush=True)
            return ConfigError.exit_code
        if world is None or world.world_size == 1:
            raise
        print(f"error: rank {world.rank}: {one_line(error, 300)}", file=sys.stderr, flush=True)  # another has left
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0
