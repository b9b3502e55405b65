"""The devices that are tried, and how a rank on one of them shares the machine."""

from __future__ import annotations

import os

import torch

FEWEST_THREADS, MOST_THREADS = 4, 12  # of a rank on a GPU that decodes, as data.decode_threads has it


def all_devices() -> list[torch.device]:
    """Every GPU, or the CPU."""
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())] or [torch.device("cpu")]


def share_of_threads() -> int | None:
    """For data.decode_threads, of one rank on each GPU; None, for the setting's own choice, without a GPU."""
    gpus = torch.cuda.device_count()
    return min(max(len(os.sched_getaffinity(0)) // gpus, FEWEST_THREADS), MOST_THREADS) if gpus else None
