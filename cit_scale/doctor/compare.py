"""What the doctor found on several nodes: which are unfit, which did not answer, and which differ from the others."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

SLOWER = 0.7  # of the median of all nodes; in two runs on one node a disk's figures were 0.85 apart, the others nearer

Records = Mapping[str, Mapping[str, Any]]
"""By node, as ``show.as_record`` makes them."""


def lines_about(records: Records, missing: Iterable[str]) -> list[str]:
    """A line for each failure and warning of a node, and for each difference. missing: nodes without answer."""
    lines = [f"{node}: no answer; see its log, and run cit-scale doctor there" for node in missing]
    for node, record in records.items():
        for check in record["checks"]:
            if check["status"] in ("failed", "warning"):
                lines.append(
                    f"{node}: {check['status']}: {check['name']}: {check['says']}; what to do: {check['advice']}"
                )
    return [*lines, *_other_facts(records), *_slow_figures(records)]


def _by_name(records: Records, kind: str) -> dict[str, dict[str, Any]]:
    """What each node has under a check's name and that of the value. kind: facts or figures."""
    found: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for node, record in records.items():
        for check in record["checks"]:
            for name, value in check[kind].items():
                found[f"{check['name']}, {name}"][node] = value
    return found


def _other_facts(records: Records) -> list[str]:
    """Nodes with another name or version than most have. Where as many have one as the other, all are named."""
    lines = []
    for fact, values in _by_name(records, "facts").items():
        counts = Counter(values.values())
        (most, count), *others = counts.most_common()
        if not others:
            continue
        is_tie = others[0][1] == count
        here = {value: ", ".join(node for node in values if values[node] == value) for value in counts}
        odd = [f"{here[value]} {value}" for value in counts if is_tie or value != most]
        lines.append(f"differs: {fact}: {'; '.join(odd)}" + ("" if is_tie else f"; the others {most}"))
    return lines


def _slow_figures(records: Records) -> list[str]:
    lines = []
    for figure, values in _by_name(records, "figures").items():
        median = statistics.median(values.values())
        slow = [f"{node} {value:.3g}" for node, value in values.items() if value < SLOWER * median]
        if slow:
            lines.append(f"below the others: {figure}: {', '.join(slow)}; the median is {median:.3g}")
    return lines
