"""The devices that are tried, and how a rank on one of them shares the machine."""

from __future__ import annotations

import torch

from cit_scale.data.stream import default_threads


def all_devices() -> list[torch.device]:
    """Every GPU, or the CPU."""
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())] or [torch.device("cpu")]


def share_of_threads() -> int | None:
    """For data.decode_threads, of one rank on each GPU; None, for the setting's own choice, without a GPU."""
    gpus = torch.cuda.device_count()
    return default_threads(gpus, "cuda") if gpus else None
