"""Copies from host to device that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor's copy on `device`, without waiting for it; on the CPU the tensor itself.

    A GPU copies asynchronously from page-locked memory only: from any other, ``non_blocking=True`` still waits until
    all that its stream has to do is done. torch keeps the page-locked copy until the GPU has read it.
    """
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
