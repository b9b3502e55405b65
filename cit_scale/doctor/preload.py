"""What the process imports from which the checks are forked: whatever comes of it, each check says so by itself."""

import contextlib
import signal

LONGEST_S = 60

signal.alarm(LONGEST_S)  # a library that hangs ends this process, and the checks do without it
with contextlib.suppress(Exception):
    import numpy  # noqa: F401
    import torch  # noqa: F401
signal.alarm(0)
