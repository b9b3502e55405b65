"""What a check finds, and the numbers and names of it that can be compared with another machine's."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from cit_scale.errors import one_line

Status = Literal["ok", "n/a", "warning", "failed"]

MOST = 300  # characters of a library's error message


def message_of(error: BaseException) -> str:
    """What an error of any library says, in one line, with its kind."""
    return f"{type(error).__name__}: {one_line(error, MOST)}"


@dataclass(frozen=True)
class Finding:
    """What one check says. Made by ``ok``, ``not_here``, ``warning`` and ``failed``.

    says: one line, with the values. advice: what to do; for a warning or a failure. facts: names and versions, the same
    on machines of one kind. figures: what was measured, larger is better, such as images_per_s.
    """

    status: Status
    says: str
    advice: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)


def ok(says: str, facts: Mapping[str, str] | None = None, figures: Mapping[str, float] | None = None) -> Finding:
    return Finding("ok", says, "", facts or {}, figures or {})


def not_here(reason: str, facts: Mapping[str, str] | None = None) -> Finding:
    """The check does not apply to this machine."""
    return Finding("n/a", reason, "", facts or {})


def warning(says: str, advice: str, facts: Mapping[str, str] | None = None) -> Finding:
    """Training works, slower than it could or with something left out."""
    return Finding("warning", says, advice, facts or {})


def failed(says: str, advice: str, facts: Mapping[str, str] | None = None) -> Finding:
    """Training would fail, or learn from wrong numbers."""
    return Finding("failed", says, advice, facts or {})


def worst(findings: Mapping[str, Finding]) -> Finding:
    """The finding of the device that is worst off: failed, warned, or furthest behind the others in some figure. It is
    named where there are several, and the figures are the lowest of each kind. findings: by device.
    """
    order: tuple[Status, ...] = ("failed", "warning", "ok", "n/a")
    by_kind: dict[str, list[float]] = {}
    for found in findings.values():
        for kind, value in found.figures.items():
            by_kind.setdefault(kind, []).append(value)

    def key(device: str) -> tuple[int, float]:
        found = findings[device]
        shares = [value / (statistics.median(by_kind[kind]) or 1.0) for kind, value in found.figures.items()]
        return order.index(found.status), min(shares, default=1.0)

    name = min(findings, key=key)
    found = findings[name]
    if len(findings) == 1:
        return found
    lowest = {kind: min(values) for kind, values in by_kind.items()}
    return replace(found, says=f"{name}, slowest or worst of {len(findings)}: {found.says}", figures=lowest)


@dataclass(frozen=True)
class Asked:
    """What the command line asks for, and what was found before.

    quick: seconds count. runs_dir: where runs are to lie. found: by name, the checks before this one.
    """

    quick: bool = False
    runs_dir: Path = Path("runs")
    found: Mapping[str, Finding] = field(default_factory=dict)
