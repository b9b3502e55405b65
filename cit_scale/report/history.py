"""The history of a run, from its folder alone: curves, stops and resumes, bad steps. Damaged lines are passed over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cit_scale.run.folders import Phase, as_dict, dig, is_number, number, parse_lines, read_text
from cit_scale.run_folder import METRICS

MOST_STEPS = 2**53  # that a float holds exactly
FLOAT32_MIN, FLOAT32_MAX = 1.1754943508222875e-38, 3.4028234663852886e38  # the smallest normal one, the largest

MOST_POINTS = 1000  # of a curve; more of them are drawn as means of neighbours


@dataclass(frozen=True)
class Curve:
    """Values by step, as metrics.jsonl has them: (P,) each. thinned: how many lines a point is the mean of."""

    name: str
    steps: np.ndarray
    values: np.ndarray
    thinned: int = 1


@dataclass(frozen=True)
class History:
    """Of one phase. curves: by name, in the order in which they were first written. resumed: steps after which the run
    went on, one per start. skipped: what is said of each bad step, by step.
    """

    curves: Mapping[str, Curve]
    resumed: Sequence[int]
    skipped: Mapping[int, str]

    def named(self, prefix: str) -> list[Curve]:
        """The curves whose names begin so, called by the rest of their names."""
        return [
            Curve(name.removeprefix(prefix), curve.steps, curve.values, curve.thinned)
            for name, curve in self.curves.items()
            if name.startswith(prefix)
        ]


def read_history(phase: Phase) -> History:
    points: dict[str, dict[int, float]] = {}
    skipped: dict[int, str] = {}
    for line in parse_lines(read_text(phase.folder / METRICS)):
        step = line.get("step")
        if step is None or not is_number(step) or not 0 <= step <= MOST_STEPS:
            continue
        if "skipped" in line:
            skipped[int(step)] = str(line["skipped"])
            continue
        for name, value in line.items():
            if name != "step" and (found := _value(value)) is not None:
                points.setdefault(name, {})[int(step)] = found  # of a step that was done twice, the second
    # The last accuracy is that of the files, which stands in the results.
    if (last := number(phase.results.get("steps"))) is not None and 0 <= last <= MOST_STEPS:
        for name, prefix in (("student", "top1_"), ("student ema", "top1_ema_")):
            for head, value in as_dict(dig(phase.results, "accuracy", name, "top1")).items():
                if (found := _value(value)) is not None:
                    points.setdefault(f"{prefix}{head}", {})[int(last)] = found
    again = (number(start.get("step")) for start in phase.starts[1:])
    return History(
        curves={name: _thinned(name, dict(sorted(values.items()))) for name, values in points.items()},
        resumed=[int(step) for step in again if step is not None and 0 <= step <= MOST_STEPS],
        skipped=dict(sorted(skipped.items())),
    )


def _value(value: Any) -> float | None:
    """A number; NaN for what is written as text because it is not finite.

    As in float32, in which the run computes: what that does not hold is NaN or 0, and no scale has to reach there.
    """
    if is_number(value):
        size = abs(value)
        return float("nan") if size > FLOAT32_MAX else float(value) if size >= FLOAT32_MIN else 0.0
    return float("nan") if value in ("nan", "inf", "-inf") else None


def _thinned(name: str, points: Mapping[int, float]) -> Curve:
    steps, values = np.array(list(points)), np.array(list(points.values()))
    each = -(-len(steps) // MOST_POINTS)
    if each == 1:
        return Curve(name, steps, values)
    groups = np.array_split(np.arange(len(steps)), -(-len(steps) // each))
    return Curve(
        name,
        np.array([steps[group[-1]] for group in groups]),
        np.array([values[group].mean() for group in groups]),
        each,
    )
