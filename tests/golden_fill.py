"""What the golden runs were fed. Every tensor is a function of its released name, so renaming proves itself."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def stream(tag: str, count: int) -> np.ndarray:
    """count numbers, uniform in [0, 1), that follow from the tag alone."""
    return np.random.Generator(np.random.Philox(zlib.crc32(tag.encode()))).random(count)


def unit_variance(uniform: np.ndarray) -> np.ndarray:
    """Uniform in [0, 1) to zero mean and unit variance."""
    return (2 * uniform - 1) * math.sqrt(3)


def fill(key: str, shape: list[int], gain: float) -> Tensor:
    """The tensor of this released name: float32 values, float64 dtype."""
    if key.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    value = unit_variance(stream(key, math.prod(shape))).reshape(shape)
    if key.endswith("running_var"):
        value = np.exp(0.1 * value)
    elif key.endswith(("running_mean", "bias")):
        value = 0.1 * value
    elif len(shape) <= 1:
        value = 1 + 0.1 * value
    elif key.endswith(("cls_token", "pos_embed")):
        value = 0.02 * value
    else:
        value = gain * value / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(value.astype(np.float32)).double()


def released_state_dict(name: str, gain: float) -> dict[str, Tensor]:
    """The released checkpoint `name` ('cit_small' or 'rednet26') as the golden runs filled it."""
    shapes = json.loads((GOLDEN / f"{name}.keys.json").read_text())
    return {key: fill(key, shape, gain) for key, shape in shapes.items()}


def golden(name: str) -> dict[str, Tensor]:
    """The recorded values of tests/golden/{name}.npz."""
    with np.load(GOLDEN / f"{name}.npz") as recorded:
        return {key: torch.from_numpy(recorded[key]) for key in recorded.files}


def golden_images() -> Tensor:
    """The input of the recorded logits: (2, 3, 224, 224)."""
    uniform = np.random.Generator(np.random.Philox(7)).random(2 * 3 * 224 * 224)
    return torch.from_numpy(unit_variance(uniform).reshape(2, 3, 224, 224).astype(np.float32)).double()
