"""How ``cit-scale evaluate``, ``predict`` and ``export`` begin and end: ranks, messages, exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from cit_scale.distributed.world import World, start
from cit_scale.errors import BadImageError, RunError, exit_code_of

INTERRUPTED = 130  # 128 + SIGINT, as a shell says it


def run_command(work: Callable[[World], None]) -> int:
    """Join the ranks, if there are several, and call ``work``. Prints what it raises; returns the exit code."""
    world: World | None = None
    try:
        world = World.from_env(os.environ)
        start(world)
        work(world)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (RunError, BadImageError, OSError, ValueError) as error:
        if world is None or world.is_main:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return exit_code_of(error) if isinstance(error, RunError | BadImageError | OSError) else 2
    return 0
