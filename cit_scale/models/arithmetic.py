"""What arithmetic means in this process: float32, the choice of algorithms, whether results may depend on timing."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, MutableMapping

import torch

from cit_scale.errors import ConfigError

WORKSPACES = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")
"""Values with which cuBLAS gives each stream workspaces of its own, by NVIDIA's documentation. The first is faster."""

NOT_DETERMINISTIC = re.compile(r"(\S+) does not have a deterministic implementation")
"""How torch refuses an operator."""


def set_arithmetic(device: torch.device, *, tf32: bool = False, deterministic: bool = False) -> None:
    """Say what this process computes with, until it is said again.

    tf32: whether matrix products and convolutions in float32 may round their inputs to TF32 on a GPU. PyTorch's own
    default is TF32 for convolutions and not for products.
    deterministic: whether the same inputs give the same bits on the same devices and versions. An operator that cannot
    do that raises RuntimeError (``naming_operator`` says it in a line). On a GPU it has to be said before the first
    matrix product. Raises ConfigError where the environment contradicts it.
    """
    if deterministic and device.type == "cuda":
        set_workspaces(os.environ)
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # imports Inductor's settings, nearly a second
        torch.use_deterministic_algorithms(deterministic)
    # Only a program that reads memory before it writes it would differ; torch fills every empty tensor by default.
    torch.utils.deterministic.fill_uninitialized_memory = not deterministic  # type: ignore[attr-defined]
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.deterministic = deterministic
        # cuDNN measures which of its algorithms is the fastest for each shape; a run has few shapes. Two starts can
        # measure otherwise, and algorithms differ in the order of their sums.
        torch.backends.cudnn.benchmark = not deterministic


def set_workspaces(env: MutableMapping[str, str]) -> None:
    """Have cuBLAS choose alike in each call, which it reads from the environment when its first handle is made."""
    given = env.setdefault(WORKSPACES, DETERMINISTIC_WORKSPACES[0])
    if given not in DETERMINISTIC_WORKSPACES:
        raise ConfigError(
            f"engine.deterministic=true, but the environment has {WORKSPACES}={given}, with which cuBLAS is not "
            f"deterministic; unset it, or set it to {' or '.join(DETERMINISTIC_WORKSPACES)}"
        )


@contextlib.contextmanager
def naming_operator() -> Iterator[None]:
    """Within it, ConfigError names the operator that engine.deterministic does not admit, instead of torch's error."""
    try:
        yield
    except RuntimeError as error:
        found = NOT_DETERMINISTIC.search(str(error))
        if found is None:
            raise
        raise ConfigError(
            f"engine.deterministic=true, and PyTorch has no deterministic {found[1]} on this device; choose networks "
            "that do without it, or engine.deterministic=false"
        ) from error
