"""Involution, every way to compute it, against the unfold formulation in the same run.

    python -m cit_scale.bench.involution --shapes rednet101@224x8 rednet101@64x64 --dtype float32
    python -m cit_scale.bench.involution --device cuda --dtype bfloat16 --shapes rednet101@224x256

NAME@SIZExBATCH stands for each involution of a RedNet at that image size. For each: time of the forward pass and of
forward and backward, peak memory, error against float64; beside them the time of copying all inputs and outputs once.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import cit_scale.models  # noqa: F401  registers RedNet with timm
from cit_scale.bench.measure import (
    copy_bytes_per_s,
    describe,
    geometric_mean,
    peak_extra_mib,
    ratio,
    spread,
    table,
    take_turns,
)
from cit_scale.models import involution_loop
from cit_scale.models.involution import Involution2d, involution

REFERENCE = "unfold"
COPY = "copy"


@dataclass(frozen=True)
class Case:
    """One involution of a network."""

    batch: int
    channels: int
    groups: int
    kernel_size: int
    stride: int
    height: int
    width: int

    def __str__(self) -> str:
        kind = f"{self.kernel_size}x{self.kernel_size}" + (f" stride {self.stride}" if self.stride > 1 else "")
        return f"{self.batch} x {self.channels} x {self.height} x {self.width}, {kind}"

    def draw(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """x, a kernel and a gradient of the output, contiguous."""
        torch.manual_seed(0)
        out_size = -(-self.height // self.stride), -(-self.width // self.stride)
        shapes = (
            (self.batch, self.channels, self.height, self.width),
            (self.batch, self.groups, self.kernel_size, self.kernel_size, *out_size),
            (self.batch, self.channels, *out_size),
        )
        return tuple(torch.randn(shape, device=device).to(dtype) for shape in shapes)


def cases_of(network: str, image_size: int, batch: int) -> Counter[Case]:
    """The involutions that a RedNet computes for a batch of images, and how often each; nothing is computed."""
    cases: Counter[Case] = Counter()

    def record(module: Involution2d, inputs: tuple[Tensor], _: Tensor) -> None:
        _, channels, height, width = inputs[0].shape
        cases[Case(batch, channels, module.groups, module.kernel_size, module.stride, height, width)] += 1

    with torch.device("meta"):
        model = timm.create_model(network).eval()
        for module in model.modules():
            if isinstance(module, Involution2d):
                module.register_forward_hook(record)
        model(torch.empty(batch, 3, image_size, image_size))
    return cases


# ---------------------------------------------------------------------------------------------------------------------
# Ways to compute it


@dataclass(frozen=True)
class Way:
    """forward: (x, kernel, stride) to out. gradients: (x, kernel, stride, grad_out) to out, grad_x, grad_kernel.
    channels_last: which of its tensors it is given so, by their number of dimensions."""

    forward: Callable[..., Tensor]
    gradients: Callable[..., tuple[Tensor, ...]]
    channels_last: tuple[int, ...] = (4, 6)

    def laid_out(self, *tensors: Tensor) -> list[Tensor]:
        return [channels_last(tensor) if tensor.ndim in self.channels_last else tensor for tensor in tensors]


def channels_last(tensor: Tensor) -> Tensor:
    """The same values with channels, or the taps of a kernel, side by side in memory."""
    if tensor.ndim == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.permute(0, 4, 5, 1, 2, 3).contiguous().permute(0, 3, 4, 5, 1, 2)


def unfold(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """The usual port: a (B, G, C / G, K*K, H', W') buffer of patches, weighted and summed."""
    batch, channels = x.shape[:2]
    groups, size, _, height, width = kernel.shape[1:]
    patches = F.unfold(x, size, padding=size // 2, stride=stride)
    patches = patches.view(batch, groups, channels // groups, size * size, height, width)
    return (patches * kernel.reshape(batch, groups, 1, size * size, height, width)).sum(3).flatten(1, 2)


def by_autograd(forward: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    def gradients(x: Tensor, kernel: Tensor, stride: int, grad_out: Tensor) -> tuple[Tensor, ...]:
        inputs = x.detach().requires_grad_(), kernel.detach().requires_grad_()
        out = forward(*inputs, stride)
        return out, *torch.autograd.grad(out, inputs, grad_out)

    return gradients


def way_of(implementation: ModuleType) -> Way:
    def forward(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
        out = channels_last(x.new_empty(*x.shape[:2], *kernel.shape[4:]))
        implementation.forward(x, kernel, stride, out)
        return out

    def gradients(x: Tensor, kernel: Tensor, stride: int, grad_out: Tensor) -> tuple[Tensor, ...]:
        grad_x, grad_kernel = torch.empty_like(x), torch.empty_like(kernel)
        out = forward(x, kernel, stride)
        implementation.grad_x(grad_out, kernel, stride, grad_x)
        implementation.grad_kernel(grad_out, x, stride, grad_kernel)
        return out, grad_x, grad_kernel

    return Way(forward, gradients)


def choose_ways(device: torch.device, inductor: bool) -> dict[str, Way]:
    """By name; the reference first. Each gets the layout that suits it, the operator others too."""
    operator = involution, by_autograd(involution)
    chosen = {REFERENCE: Way(unfold, by_autograd(unfold), ())}
    if inductor:
        compiled = torch.compile(unfold, dynamic=False)
        chosen["unfold, Inductor"] = Way(compiled, by_autograd(compiled), ())
    chosen["loop"] = way_of(involution_loop)
    if device.type == "cuda":
        chosen["operator, kernel channels last"] = Way(*operator)
        chosen["operator"] = Way(*operator, (4,))
    else:
        chosen["operator"] = Way(*operator)
    chosen["operator, contiguous"] = Way(*operator, ())
    return chosen


# ---------------------------------------------------------------------------------------------------------------------
# Figures


@dataclass(frozen=True)
class Figures:
    """Of one way to compute one case. Times in ms, one a round; all without, then with the gradients."""

    times: tuple[list[float], list[float]]
    peaks_mib: tuple[float, float]
    moved_bytes: tuple[int, int]  # each input read once, each output written once
    error: float  # relative root mean square against float64, the worst of output and gradients

    def bandwidth(self, which: int) -> float:
        return self.moved_bytes[which] / (statistics.median(self.times[which]) / 1e3)


def measure(
    case: Case, ways: dict[str, Way], dtype: torch.dtype, device: torch.device, rounds: int
) -> dict[str, Figures]:
    """By way; under COPY what it takes to copy all inputs and outputs once."""
    x, kernel, grad_out = case.draw(dtype, device)
    without, with_gradients = {}, {}
    for name, way in ways.items():
        inputs = (*way.laid_out(x, kernel), case.stride)
        without[name] = partial(torch.no_grad()(way.forward), *inputs)
        with_gradients[name] = partial(way.gradients, *inputs, *way.laid_out(grad_out))
    moved = (x, kernel, grad_out), (x, kernel, grad_out, grad_out, x, kernel)  # outputs are of these shapes again
    without[COPY], with_gradients[COPY] = (copy_all(tensors) for tensors in moved)
    times = [take_turns(functions, rounds, device) for functions in (without, with_gradients)]
    return {
        name: Figures(
            times=(times[0][name], times[1][name]),
            peaks_mib=(peak_extra_mib(without[name], device), peak_extra_mib(with_gradients[name], device)),
            moved_bytes=tuple(sum(tensor.nbytes for tensor in tensors) for tensors in moved),
            error=error_of(ways[name], case, x, kernel, grad_out) if name != COPY else 0.0,
        )
        for name in without
    }


def copy_all(tensors: Sequence[Tensor]) -> Callable[[], None]:
    targets = [torch.empty_like(tensor) for tensor in tensors]

    def copy() -> None:
        for target, tensor in zip(targets, tensors, strict=True):
            target.copy_(tensor)

    return copy


def error_of(way: Way, case: Case, x: Tensor, kernel: Tensor, grad_out: Tensor) -> float:
    """On the first image of the batch, against unfold in float64 on the same rounded inputs."""
    x, kernel, grad_out = x[:1], kernel[:1], grad_out[:1]
    expected = by_autograd(unfold)(x.double(), kernel.double(), case.stride, grad_out.double())
    actual = way.gradients(*way.laid_out(x, kernel), case.stride, *way.laid_out(grad_out))
    return max(
        ((one.double() - other).norm() / other.norm()).item() for one, other in zip(actual, expected, strict=True)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Tables

HEADER = (
    "case", "way", "forward, ms", "unfold / it", "it / copy", "% of bandwidth", "MiB",
    "with gradients, ms", "unfold / it", "it / copy", "% of bandwidth", "MiB", "error",
)  # fmt: skip


def row(case: str, name: str, by_way: dict[str, Figures], copy_bandwidth: float) -> list[str]:
    figures = by_way[name]
    cells = [case, name]
    for which in (0, 1):
        lead, behind = (ratio(by_way[REFERENCE].times[which], figures.times[which]),
                        ratio(figures.times[which], by_way[COPY].times[which]))  # fmt: skip
        cells += [spread(figures.times[which]), f"{lead:.1f}", f"{behind:.2f}"]
        # A copy reads and writes each byte that it copies; an operator reads or writes each that is counted here.
        share = figures.bandwidth(which) * (2 if name == COPY else 1) / copy_bandwidth
        cells += [f"{100 * share:.0f}", f"{figures.peaks_mib[which]:.1f}"]
    return [*cells, f"{figures.error:.1e}" if name != COPY else ""]


def summary(results: dict[Case, dict[str, Figures]], ways: Iterable[str]) -> str:
    """Over all cases: geometric means, and the least favourable case in brackets."""
    rows = []
    for name in ways:
        cells = [name]
        for which in (0, 1):
            leads = [ratio(by[REFERENCE].times[which], by[name].times[which]) for by in results.values()]
            behind = [ratio(by[name].times[which], by[COPY].times[which]) for by in results.values()]
            memory = [by[name].peaks_mib[which] / by[REFERENCE].peaks_mib[which] for by in results.values()]
            cells += [
                f"{geometric_mean(leads):.1f} ({min(leads):.1f})",
                f"{geometric_mean(behind):.2f} ({max(behind):.2f})",
                f"{geometric_mean(memory):.3f} ({max(memory):.3f})",
            ]
        rows.append([*cells, f"{max(by[name].error for by in results.values()):.1e}"])
    header = [f"{figure}{kind}" for kind in ("", ", with gradients") for figure in (
        "unfold / it", "it / copy", "its MiB / unfold's")]  # fmt: skip
    return table(["way", *header, "largest error"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    parser.add_argument("--shapes", nargs="+", type=parse_shapes, metavar="NAME@SIZExBATCH",
                        default=[parse_shapes("rednet101@224x8"), parse_shapes("rednet101@64x64")])  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7, help="figures that a median is of (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1, the least noisy)")
    parser.add_argument("--inductor", action="store_true", help="also unfold under Inductor, which compiles each shape")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)

    print(f"{describe(device)}; {arguments.dtype}; median (minimum to maximum) of {arguments.rounds} rounds in turns")
    start = time.perf_counter()
    involution(torch.ones(1, 1, 1, 1, device=device), torch.ones(1, 1, 1, 1, 1, 1, device=device))
    first_s = time.perf_counter() - start
    print(f"the operator's first call, with what it builds where nothing is cached: {first_s:.2f} s")
    copy_bandwidth = copy_bytes_per_s(device, arguments.rounds)
    print(f"bandwidth of a large copy: {copy_bandwidth / 1e9:.1f} GB/s read and written\n")
    print(table(HEADER, []), flush=True)

    ways = choose_ways(device, arguments.inductor)
    results = {}
    for case, count in sum(arguments.shapes, Counter()).items():
        results[case] = measure(case, ways, dtype, device, arguments.rounds)
        for name in (COPY, *ways):
            cells = row(f"{case} ({count} times)", name, results[case], copy_bandwidth)
            print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\nGeometric mean over {len(results)} cases (the least favourable case):\n")
    print(summary(results, ways))


def parse_shapes(text: str) -> Counter[Case]:
    match = re.fullmatch(r"(\w+)@(\d+)x(\d+)", text)
    if match is None or not timm.is_model(match[1]):
        known = ", ".join(timm.list_models(module="rednet"))
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME@SIZExBATCH, such as rednet101@224x8; names: {known}")
    return cases_of(match[1], int(match[2]), int(match[3]))


if __name__ == "__main__":
    main()
