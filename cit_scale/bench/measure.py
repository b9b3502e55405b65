"""What the benchmarks share: times taken in turns, peak memory, the machine they were taken on, tables."""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from cit_scale.distributed.world import World
from cit_scale.run.results import environment_record

PAGE_KIB = 4


def take_turns(
    functions: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, at_least_ms: float = 5.0
) -> dict[str, list[float]]:
    """Milliseconds a call of each function, one figure a round: A B C, A B C ..., so that a machine whose speed drifts
    is equally unfair to all. After one call to warm up, a figure is the mean of as many calls as fill at_least_ms."""
    calls = {}
    for name, function in functions.items():
        function()
        calls[name] = max(1, math.ceil(at_least_ms / (1e3 * seconds(function, device))))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(1e3 * seconds(function, device, calls[name]))
    return times


def seconds(function: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """How long a call takes, the mean of so many."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _synchronize(device)
    return (time.perf_counter() - start) / calls


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(times: Sequence[float], reference_times: Sequence[float]) -> float:
    """The median over rounds of how much longer one took than the other."""
    return statistics.median(one / other for one, other in zip(times, reference_times, strict=True))


def geometric_mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(list(values))


def spread(times: Sequence[float]) -> str:
    """Median (minimum to maximum)."""
    median, low, high = (
        f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
        for value in (statistics.median(times), min(times), max(times))
    )
    return f"{median} ({low} to {high})"


def peak_extra_mib(function: Callable[[], Any], device: torch.device) -> float:
    """What a call needs at its peak beyond what is held before it, its results included.

    On a GPU what PyTorch allocates; on a CPU the resident memory of the process, so that no allocator escapes. In a
    process with a large, fragmented heap that can come out too high: freed memory is not always the next to be taken.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # or memory that was freed, but kept for later, would hide what is asked for
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident_kib("VmRSS")
    result = function()
    peak = _resident_kib("VmHWM")
    del result
    return max(peak - before, PAGE_KIB) / 1024  # the kernel counts in batches of pages, so a few can go missing


def _resident_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def copy_bytes_per_s(device: torch.device, rounds: int) -> float:
    """Bytes read and written a second by a copy of 256 MiB."""
    source = torch.zeros(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    (times,) = take_turns({"copy": lambda: target.copy_(source)}, rounds, device).values()
    return 2 * source.nbytes / (statistics.median(times) / 1e3)


def machine_text(device: torch.device) -> str:
    """Commit, hardware and versions in a line."""
    about = environment_record(World())
    cpu = _cpu_model() or about["device"]
    hardware = about["device"] if device.type == "cuda" else f"{cpu}, {about['cpus']} cores"
    versions = ", ".join(f"{name} {about['packages'][name]}" for name in ("torch", "timm"))
    return (
        f"commit {about['commit']}; {hardware}, {about['torch_threads']} threads; Python {about['python']}, {versions}"
    )


def _cpu_model() -> str | None:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return None


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, the first column left and the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
