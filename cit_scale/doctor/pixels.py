"""DALI's pipelines beside PIL, operation by operation, with the limits of ``bench.fidelity``."""

from __future__ import annotations

from collections.abc import Mapping

from cit_scale.bench.fidelity import Errors, measure
from cit_scale.config import DataConfig
from cit_scale.distributed.world import World
from cit_scale.doctor.findings import Asked, Finding, failed, ok
from cit_scale.doctor.photographs import photographs

PHOTOS = 4


def check(asked: Asked) -> Finding:
    """Compare some made-up photographs."""
    with photographs(PHOTOS) as source:
        return judge(measure(source, DataConfig(decode_threads=2), World().device))


def judge(found: Mapping[str, Errors]) -> Finding:
    """found: by what is compared."""
    judged = {name: errors for name, errors in found.items() if errors.allowed is not None}
    if wrong := [f"{name} {e.bilinear.mean():.2f}, allowed {e.allowed}" for name, e in judged.items() if e.is_broken]:
        return failed(
            f"mean differences of a byte from PIL, of 255: {'; '.join(wrong)}",
            "this version of nvidia-dali, or of Pillow, computes otherwise: take them as docs/measurements/versions.md "
            "has them, and see python -m cit_scale.bench.fidelity",
        )
    means = {name: errors.bilinear.mean() for name, errors in judged.items()}
    worst = max(means, key=lambda name: means[name])
    return ok(f"{len(means)} comparisons are within their limits; furthest is {worst}, {means[worst]:.2f} of 255")
