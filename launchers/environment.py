"""The environment that a launcher was started with, without what its imports add. Imported before all others."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

# On a login node without GPUs some imports set variables, among them which accelerator DeepSpeed is to use, and sbatch
# would pass them on to nodes that have GPUs.
STARTED_WITH = frozenset(os.environ)


@contextlib.contextmanager
def own_environment() -> Iterator[None]:
    """Within it there are no variables but those that this process was started with."""
    added = {name: os.environ.pop(name) for name in os.environ.keys() - STARTED_WITH}
    try:
        yield
    finally:
        os.environ.update(added)
