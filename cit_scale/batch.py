"""The data of a training step: batches, logits, loss terms.

B images on this rank, K classes. Images are (B, 3, H, W) in [0, 1] on the device.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Protocol, cast

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Images as the data pipeline hands them out.

    images: (B, 3, H, W) in [0, 1], float32. labels: (B,) int64.
    positions: (B,) int64 on the CPU, each image's place in the batch of all ranks; -1 marks padding in evaluation.
    samples: (B,) int64 on the CPU, each image's index in its source.
    """

    images: Tensor
    labels: Tensor
    positions: Tensor
    samples: Tensor


@dataclass(frozen=True)
class MixedBatch:
    """images: (B, 3, H, W). targets: (B, K), rows sum to 1."""

    images: Tensor
    targets: Tensor


class NamedLogits(Protocol):
    """A named tuple of (B, K) tensors. Named tuples pass through autograd hooks, torch.compile, DeepSpeed and FSDP2."""

    _fields: tuple[str, ...]

    def __init__(self, *logits: Tensor) -> None: ...

    def __iter__(self) -> Iterator[Tensor]: ...

    def _asdict(self) -> dict[str, Tensor]: ...


class StudentLogits(NamedLogits, Protocol):
    """Logits by head: ``cls``, then one field per teacher, named as the teacher is."""

    cls: Tensor


class TeacherLogits(NamedLogits, Protocol):
    """Logits by teacher: one field per teacher."""


@cache
def student_logits_type(teachers: tuple[str, ...]) -> type[StudentLogits]:
    """The named tuple ``StudentLogits(cls, *teachers)``."""
    # Type checkers cannot know a named tuple whose fields are known at run time only.
    return cast(type[StudentLogits], namedtuple("StudentLogits", ("cls", *teachers)))


@cache
def teacher_logits_type(teachers: tuple[str, ...]) -> type[TeacherLogits]:
    """The named tuple ``TeacherLogits(*teachers)``."""
    return cast(type[TeacherLogits], namedtuple("TeacherLogits", teachers))  # as above


@dataclass(frozen=True)
class LossTerms:
    """Means over the batch. total: label plus the weighted divergences. distillation: the divergence of each
    teacher, before weighting."""

    total: Tensor
    label: Tensor
    distillation: dict[str, Tensor]
