"""Benchmark of frozen teachers: as a run loads them, eager, and, for networks with involutions, eager with unfold.

python -m cit_scale.bench.teachers --image_size 224 --batch 8
python -m cit_scale.bench.teachers --device cuda --precision bf16 --batch 256
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from cit_scale.bench.involution import unfold
from cit_scale.bench.measure import add_device, machine_text, peak_extra_mib, ratio, seconds, spread, table, take_turns
from cit_scale.models import involution
from cit_scale.models.network import Precision, build_network
from cit_scale.teachers import freeze
from cit_scale.text import positive


def over_unfold(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Returns ``forward`` with every involution computed by unfold instead of our operator."""

    def forward_over_unfold(images: Tensor) -> Tensor:
        with mock.patch.object(involution, "involution", unfold):
            return forward(images)

    return forward_over_unfold


def ways(
    name: str, image_size: int, precision: Precision, device: torch.device
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Ways to run a teacher. Returns label in the table to its forward function; first the way in which a run loads it.

    The forward functions take images (B, 3, image_size, image_size).
    """

    def frozen(compile: bool) -> Callable[[Tensor], Tensor]:
        network = build_network(name, {}, num_classes=1000, image_size=image_size)
        return freeze(network, image_size, device, precision=precision, compile=compile)

    chosen = {f"{name}, as loaded": frozen(compile=True), f"{name}, eager": frozen(compile=False)}
    # On the meta device: only the types of the modules matter, so no weights are allocated.
    with torch.device("meta"):
        modules = build_network(name, {}, num_classes=1000, image_size=image_size).modules()
    if any(isinstance(module, involution.Involution2d) for module in modules):
        chosen[f"{name}, eager, over unfold"] = over_unfold(frozen(compile=False))
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=["rednet101", "regnety_040"], help="networks to time, each against the last"
    )
    add_device(parser)
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--image_size", type=positive, default=224)
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--rounds", type=positive, default=7, help="rounds to take the median of (default: 7)")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default: 1, the least noisy)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = arguments.device
    images = torch.rand(arguments.batch, 3, arguments.image_size, arguments.image_size, device=device)

    runs = {
        label: partial(forward, images)
        for name in arguments.models
        for label, forward in ways(name, arguments.image_size, arguments.precision, device).items()
    }
    # The first call compiles, so it is timed apart from the rounds.
    first_s = {label: seconds(run, device) for label, run in runs.items()}
    times = take_turns(runs, arguments.rounds, device)

    batch = f"{arguments.batch} images of {arguments.image_size} pixels, {arguments.precision}"
    print(f"{machine_text(device)}; {batch}; median (minimum to maximum) of {arguments.rounds} rounds in turns\n")
    peer = f"{arguments.models[-1]}, as loaded"
    rows = [
        [
            label,
            f"{1e3 * arguments.batch / statistics.median(times[label]):.1f}",
            spread(times[label]),
            f"{ratio(times[label], times[peer]):.2f}",
            f"{peak_extra_mib(run, device):.0f}",
            f"{first_s[label]:.1f}",
        ]
        for label, run in runs.items()
    ]
    print(table(["teacher", "images/s", "ms a batch", f"its time / {peer}", "MiB", "first call, s"], rows))


if __name__ == "__main__":
    main()
