"""Benchmark of the involution: every implementation against the unfold formulation in the same run.

    python -m cit_scale.bench.involution --shapes rednet101@224 rednet101@64x64 --dtype float32
    python -m cit_scale.bench.involution --device cuda --dtype bfloat16 --shapes rednet101@224x256

NAME@SIZExBATCH stands for every involution of the RedNet NAME on BATCH images of SIZE pixels; without xBATCH the batch
is 8. Measured for each: time of the forward pass and of forward and backward, peak memory, error against float64. The
row "copy" is the time to copy all inputs and outputs once. What is built, and on a GPU measured to choose the fastest
form for each shape, is kept in $XDG_CACHE_HOME/cit_scale: only with an empty one do the first calls include it.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
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
    add_device,
    copy_bytes_per_s,
    geometric_mean,
    machine_text,
    peak_extra_mib,
    ratio,
    seconds,
    spread,
    table,
    take_turns,
)
from cit_scale.models import involution_loop
from cit_scale.models.involution import Involution2d, involution
from cit_scale.text import positive

REFERENCE = "unfold"
COPY = "copy"


@dataclass(frozen=True)
class Case:
    """Shapes of one involution: a batch of images (batch, channels, height, width) in pixels, and its kernel."""

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
        """Draw x, a kernel and a gradient of the output, contiguous, in the shapes of ``shapes``."""
        torch.manual_seed(0)
        x, kernel, grad_out = (torch.randn(shape, device=device).to(dtype) for shape in self.shapes)
        return x, kernel, grad_out

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of x (B, C, H, W), the kernel (B, G, K, K, H', W') and the output (B, C, H', W')."""
        out_size = -(-self.height // self.stride), -(-self.width // self.stride)  # rounded up
        return (
            (self.batch, self.channels, self.height, self.width),
            (self.batch, self.groups, self.kernel_size, self.kernel_size, *out_size),
            (self.batch, self.channels, *out_size),
        )


TINY = Case(batch=1, channels=1, groups=1, kernel_size=1, stride=1, height=1, width=1)


def cases_of(network: str, image_size: int, batch: int) -> Counter[Case]:
    """The involutions that a RedNet computes for a batch of images, with the number of times that each occurs.

    The network runs on the meta device, which computes shapes only.
    """
    cases: Counter[Case] = Counter()

    def record(module: Involution2d, inputs: tuple[Tensor], _: Tensor) -> None:
        channels, height, width = inputs[0].shape[1:]
        cases[Case(batch, channels, module.groups, module.kernel_size, module.stride, height, width)] += 1

    with torch.device("meta"):
        model = timm.create_model(network).eval()
        for module in model.modules():
            if isinstance(module, Involution2d):
                module.register_forward_hook(record)
        model(torch.empty(batch, 3, image_size, image_size))
    return cases


# ---------------------------------------------------------------------------------------------------------------------
# Implementations


@dataclass(frozen=True)
class Way:
    """An implementation, and the memory layout of its inputs.

    forward: (x, kernel, stride) to out. gradients: (x, kernel, stride, grad_out) to (out, grad_x, grad_kernel).
    images_channels_last: layout of x and grad_out. kernel_channels_last: layout of the kernel.
    """

    forward: Callable[..., Tensor]
    gradients: Callable[..., tuple[Tensor, ...]]
    images_channels_last: bool = True
    kernel_channels_last: bool = True

    def laid_out(self, *tensors: Tensor) -> list[Tensor]:
        """Returns the tensors in the layout that the implementation expects."""
        wanted = {4: self.images_channels_last, 6: self.kernel_channels_last}  # by number of dimensions: images, kernel
        return [channels_last(tensor) if wanted[tensor.ndim] else tensor for tensor in tensors]


def channels_last(tensor: Tensor) -> Tensor:
    """Returns the same values with the channels of images, or the K x K weights of a kernel, contiguous in memory."""
    if tensor.ndim == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.permute(0, 4, 5, 1, 2, 3).contiguous().permute(0, 3, 4, 5, 1, 2)


def unfold(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """Involution as most PyTorch ports compute it, with a (B, G, C / G, K*K, H', W') buffer of patches.

    x: (B, C, H, W). kernel: (B, G, K, K, H', W'). Returns (B, C, H', W').
    """
    batch, channels = x.shape[:2]
    groups, size, _, height, width = kernel.shape[1:]
    patches = F.unfold(x, size, padding=size // 2, stride=stride)
    patches = patches.view(batch, groups, channels // groups, size * size, height, width)
    return (patches * kernel.reshape(batch, groups, 1, size * size, height, width)).sum(3).flatten(1, 2)


def by_autograd(forward: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Returns the ``gradients`` function of a ``forward`` that autograd can differentiate."""

    def gradients(x: Tensor, kernel: Tensor, stride: int, grad_out: Tensor) -> tuple[Tensor, ...]:
        inputs = x.detach().requires_grad_(), kernel.detach().requires_grad_()
        out = forward(*inputs, stride)
        return out, *torch.autograd.grad(out, inputs, grad_out)

    return gradients


def way_of(implementation: ModuleType) -> Way:
    """A module with forward, grad_x and grad_kernel, which write to given outputs, called without autograd."""

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
    """Returns name to implementation; the reference comes first.

    Each has the layout that suits it best; the operator also appears in other layouts.
    """
    operator = involution, by_autograd(involution)
    chosen = {REFERENCE: Way(unfold, by_autograd(unfold), False, False)}
    if inductor:
        compiled = torch.compile(unfold, dynamic=False)
        chosen["unfold, Inductor"] = Way(compiled, by_autograd(compiled), False, False)
    chosen["loop"] = way_of(involution_loop)
    if device.type == "cuda":
        chosen["operator, kernel channels last"] = Way(*operator)
        chosen["operator"] = Way(*operator, kernel_channels_last=False)
    else:
        chosen["operator"] = Way(*operator)
    chosen["operator, contiguous"] = Way(*operator, False, False)
    return chosen


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


@dataclass(frozen=True)
class Figures:
    """Figures of one implementation in one case. Pairs hold the forward pass, then forward and backward together.

    times: milliseconds, one figure per round. first_s: seconds of the first two calls together. peaks_mib: peak memory,
    outputs included. error: relative root mean square error against float64, the largest of output and gradients.
    """

    times: tuple[list[float], list[float]]
    first_s: float
    peaks_mib: tuple[float, float]
    error: float

    @property
    def medians_s(self) -> tuple[float, float]:
        """Median seconds of the forward pass, and of forward and backward together."""
        return statistics.median(self.times[0]) / 1e3, statistics.median(self.times[1]) / 1e3


def measure(
    case: Case, ways: dict[str, Way], dtype: torch.dtype, device: torch.device, rounds: int
) -> dict[str, Figures]:
    """Returns name to figures; under COPY the figures of copying all inputs and outputs once."""
    x, kernel, grad_out = case.draw(dtype, device)
    forward: dict[str, Callable[[], object]] = {}
    both: dict[str, Callable[[], object]] = {}
    for name, way in ways.items():
        inputs = (*way.laid_out(x, kernel), case.stride)
        forward[name] = partial(torch.no_grad()(way.forward), *inputs)
        both[name] = partial(way.gradients, *inputs, *way.laid_out(grad_out))
    # Forward reads x and kernel and writes out, which has grad_out's shape. Both passes together also read grad_out and
    # write gradients in the shapes of x and kernel.
    forward[COPY] = copy_all([x, kernel, grad_out])
    both[COPY] = copy_all([x, kernel, grad_out, grad_out, x, kernel])
    first_s = {name: seconds(forward[name], device) + seconds(both[name], device) for name in forward}
    times = take_turns(forward, rounds, device), take_turns(both, rounds, device)
    return {
        name: Figures(
            times=(times[0][name], times[1][name]),
            first_s=first_s[name],
            peaks_mib=(peak_extra_mib(forward[name], device), peak_extra_mib(both[name], device)),
            error=error_of(ways[name], case, x, kernel, grad_out) if name in ways else 0.0,
        )
        for name in forward
    }


def copy_all(tensors: Sequence[Tensor]) -> Callable[[], None]:
    """Returns a function that copies all ``tensors`` to memory allocated beforehand."""
    targets = [torch.empty_like(tensor) for tensor in tensors]

    def copy() -> None:
        for target, tensor in zip(targets, tensors, strict=True):
            target.copy_(tensor)

    return copy


def error_of(way: Way, case: Case, x: Tensor, kernel: Tensor, grad_out: Tensor) -> float:
    """Relative error on the first image of the batch, against unfold in float64 on the same rounded inputs.

    ||actual - expected|| / ||expected||, the largest of output and both gradients.
    """
    x, kernel, grad_out = x[:1], kernel[:1], grad_out[:1]
    expected = by_autograd(unfold)(x.double(), kernel.double(), case.stride, grad_out.double())
    actual = way.gradients(*way.laid_out(x, kernel), case.stride, *way.laid_out(grad_out))
    return max(
        ((one.double() - other).norm() / other.norm()).item() for one, other in zip(actual, expected, strict=True)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Tables

HEADER = (
    "case", "way", "forward, ms", "unfold / it", "it / copy", "MiB", "% of bandwidth",
    "with backward, ms", "unfold / it", "it / copy", "MiB", "backward, % of bandwidth", "first calls, s", "error",
)  # fmt: skip


def row(case: str, name: str, by_way: dict[str, Figures], shares: tuple[float, float]) -> list[str]:
    """Cells of one line under HEADER. shares: from ``bandwidth_shares``."""
    figures = by_way[name]
    cells = [case, name]
    for which, share in enumerate(shares):
        lead, behind, _ = compare(by_way, name, which)
        cells += [spread(figures.times[which]), f"{lead:.1f}", f"{behind:.2f}", f"{figures.peaks_mib[which]:.1f}"]
        cells.append(f"{100 * share:.0f}" if name != COPY else "")
    return [*cells, f"{figures.first_s:.2f}", f"{figures.error:.1e}" if name != COPY else ""]


def compare(by_way: dict[str, Figures], name: str, which: int) -> tuple[float, float, float]:
    """Returns speed-up over unfold, slow-down against a copy, and memory as a share of unfold's.

    which: 0 for the forward pass, 1 for forward and backward.
    """
    times = {way: figures.times[which] for way, figures in by_way.items()}
    memory = by_way[name].peaks_mib[which] / by_way[REFERENCE].peaks_mib[which]
    return ratio(times[REFERENCE], times[name]), ratio(times[name], times[COPY]), memory


def bandwidth_shares(case: Case, figures: Figures, itemsize: int, copy_bandwidth: float) -> tuple[float, float]:
    """Bytes moved / time / copy_bandwidth, of the forward pass and of the backward pass alone.

    Bytes moved: each input read once and each output written once. copy_bandwidth counts the same way: a copy reads and
    writes each of its bytes.
    """
    x, kernel, out = (itemsize * math.prod(shape) for shape in case.shapes)
    forward_s, both_s = figures.medians_s
    moved = x + kernel + out, out + x + kernel + x + kernel
    # Backward alone is a difference of two medians, which noise can make negative.
    return moved[0] / forward_s / copy_bandwidth, moved[1] / max(both_s - forward_s, 1e-9) / copy_bandwidth


def summary(results: dict[Case, dict[str, Figures]], ways: Iterable[str]) -> str:
    """Table of geometric means over all cases, with the least favourable case in brackets."""
    rows = []
    for name in ways:
        cells = [name]
        for which in (0, 1):
            comparisons = [compare(by_way, name, which) for by_way in results.values()]
            leads, behind, memory = zip(*comparisons, strict=True)
            cells += [
                f"{geometric_mean(leads):.1f} ({min(leads):.1f})",
                f"{geometric_mean(behind):.2f} ({max(behind):.2f})",
                f"{geometric_mean(memory):.3f} ({max(memory):.3f})",
            ]
        rows.append([*cells, f"{max(by_way[name].error for by_way in results.values()):.1e}"])
    figures = ("unfold / it", "it / copy", "its MiB / unfold's")
    header = [*(f"forward: {figure}" for figure in figures), *(f"with backward: {figure}" for figure in figures)]
    return table(["way", *header, "largest error"], rows)


def main() -> None:
    """Run the benchmark and print two tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    parser.add_argument("--shapes", nargs="+", type=parse_shapes, metavar="NAME@SIZE[xBATCH]",
                        default=[parse_shapes("rednet101@224"), parse_shapes("rednet101@64x64")])  # fmt: skip
    parser.add_argument("--rounds", type=positive, default=7, help="rounds to take the median of (default: 7)")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default: 1, the least noisy)")
    parser.add_argument("--inductor", action="store_true", help="add unfold under Inductor, which compiles each shape")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, dtype = arguments.device, getattr(torch, arguments.dtype)

    print(
        f"{machine_text(device)}; {arguments.dtype}; median (minimum to maximum) of {arguments.rounds} rounds in turns"
    )
    # Called before the cases: the first call builds the C++ library, which is no cost of the first case. Kernels of a
    # GPU are built for each case.
    x, kernel, _ = (torch.ones(shape, device=device) for shape in TINY.shapes)
    first_s = seconds(partial(involution, x, kernel), device)
    print(f"the operator's very first call, which builds what is not cached: {first_s:.2f} s")
    copy_bandwidth = copy_bytes_per_s(device, arguments.rounds)
    print(f"bandwidth of a large copy: {copy_bandwidth / 1e9:.1f} GB/s read and written\n")
    print(table(HEADER, []), flush=True)

    ways = choose_ways(device, arguments.inductor)
    results = {}
    for case, count in sum(arguments.shapes, Counter()).items():
        # Without a reset torch.compile gives up after eight shapes of one function and runs the rest eager.
        torch.compiler.reset()
        results[case] = measure(case, ways, dtype, device, arguments.rounds)
        for name in (COPY, *ways):
            shares = bandwidth_shares(case, results[case][name], dtype.itemsize, copy_bandwidth)
            cells = row(f"{case} ({count} times)", name, results[case], shares)
            print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\nGeometric mean over {len(results)} cases (the least favourable case):\n")
    print(summary(results, ways))


def parse_shapes(text: str) -> Counter[Case]:
    """Parse NAME@SIZE[xBATCH]. Returns the cases of that network. Raises ArgumentTypeError with the known names."""
    match = re.fullmatch(r"(\w+)@(\d+)(?:x(\d+))?", text)
    known = timm.list_models(module="rednet")
    if match is None or match[1] not in known:
        names = ", ".join(known)
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME@SIZE[xBATCH], such as rednet101@224x8; names: {names}")
    return cases_of(match[1], int(match[2]), int(match[3] or 8))


if __name__ == "__main__":
    main()
