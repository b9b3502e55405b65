"""Tools of the benchmarks: timing in turns, peak memory, a line on the machine, tables in Markdown."""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from cit_scale.distributed.world import World
from cit_scale.run.results import environment_record

PAGE_KIB = 4  # the smallest figure of peak_extra_mib on a CPU


def output_file(text: str) -> Path:
    """A type of argparse: a file that can be written, which is said before anything is measured."""
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return path


CPU = torch.device("cpu")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device, whose value is a torch.device that is here."""
    parser.add_argument("--device", type=_device, default=CPU, metavar="cpu|cuda", help="default: cpu")


def _device(text: str) -> torch.device:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither cpu nor cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("PyTorch sees no GPU; leave it out to measure the CPU")
    return torch.device(text)


def take_turns(
    functions: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, at_least_ms: float = 5.0
) -> dict[str, list[float]]:
    """Time functions in turns: A B C, A B C, ... Returns name to milliseconds per call, one figure per round.

    In turns, because the speed of a machine drifts: all functions of a round are affected alike. A figure is the mean
    of as many calls as take at_least_ms. Each function is called once before to warm up.
    """
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
    """Seconds of a call, the mean over ``calls`` calls; on a GPU until its kernels have finished."""
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
    """Median over rounds of times / reference_times. Both hold one figure per round, of the same rounds."""
    return statistics.median(one / other for one, other in zip(times, reference_times, strict=True))


def geometric_mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(list(values))


def spread(times: Sequence[float]) -> str:
    """Text "median (minimum to maximum)", with three significant digits."""
    median, low, high = (
        f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
        for value in (statistics.median(times), min(times), max(times))
    )
    return f"{median} ({low} to {high})"


def peak_extra_mib(function: Callable[[], Any], device: torch.device) -> float:
    """Peak memory of a call in MiB, beyond the memory in use before it, including its results.

    On a GPU, memory allocated by PyTorch. On a CPU, resident memory of the process, which covers every allocator. In a
    process with a large, fragmented heap the figure may be too high, because freed memory is not always reused first.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with suppress(OSError, AttributeError):
        # Return freed memory to the kernel: reused by the call, it would not show as additional memory.
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # 5 resets the peak, VmHWM; see proc(5)
    before = resident_kib("VmRSS")
    result = function()
    peak = resident_kib("VmHWM")
    del result  # kept until here, so that the peak includes it
    # The kernel counts pages in batches, so the difference may miss a few and even be 0.
    return max(peak - before, PAGE_KIB) / 1024


def resident_kib(field: str) -> int:
    """Memory of this process in KiB. field: VmRSS, or VmHWM for its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def copy_bytes_per_s(device: torch.device, rounds: int) -> float:
    """Bandwidth of a copy of 256 MiB: bytes read plus bytes written per second."""
    source = torch.zeros(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    (times,) = take_turns({"copy": lambda: target.copy_(source)}, rounds, device).values()
    return 2 * source.nbytes / (statistics.median(times) / 1e3)


def machine_text(device: torch.device) -> str:
    """Commit, hardware and versions in one line."""
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
    """A table in Markdown, with the first column aligned left and the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
