"""What the process imports from which the checks are forked: whatever comes of it, each check says so by itself.

Nothing that asks CUDA for anything, as DeepSpeed's import does: the forks could not use a GPU any more.
"""

import atexit
import contextlib
import importlib
import os
import signal

LONGEST_S = 120

# A library that hangs ends this process, and the checks do without it. An interruption is the doctor's to answer.
signal.alarm(LONGEST_S)
interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)
for name in ("numpy", "torch", "cit_scale.bench.step_ways"):
    with contextlib.suppress(Exception):
        importlib.import_module(name)
signal.signal(signal.SIGINT, interrupted)
signal.alarm(0)
atexit.register(os._exit, 0)  # without the libraries' farewells, which take seconds
