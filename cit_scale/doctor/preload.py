"""What the process imports from which the checks are forked: whatever comes of it, each check says so by itself.

Nothing that asks CUDA for anything, as DeepSpeed's import does: the forks could not use a GPU any more.
"""

import contextlib
import signal

LONGEST_S = 120

signal.alarm(LONGEST_S)  # a library that hangs ends this process, and the checks do without it
for name in ("numpy", "torch", "cit_scale.bench.step_ways"):
    with contextlib.suppress(Exception):
        __import__(name)
signal.alarm(0)
