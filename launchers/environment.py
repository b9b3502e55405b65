"""The environment variables that a launcher was started with. Imported first, before an import can add others."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

# On a login node without GPUs some imports set variables, such as DeepSpeed's choice of an accelerator. sbatch would
# pass these variables on to nodes that have GPUs.
STARTED_WITH = frozenset(os.environ)


@contextlib.contextmanager
def own_environment() -> Iterator[None]:
    """Inside the with block, hide the variables that were added since this process started."""
    added = {name: os.environ.pop(name) for name in os.environ.keys() - STARTED_WITH}
    try:
        yield
    finally:
        os.environ.update(added)
