"""How fast memory is copied: within the GPU and to it, or within the CPU's memory."""

from __future__ import annotations

import torch

from cit_scale.bench.measure import copy_bytes_per_s, take_turns
from cit_scale.doctor.devices import all_devices
from cit_scale.doctor.findings import Asked, Finding, ok, worst

GIGA = 1e9
ROUNDS = 5
SLOW_LINK = 4.0  # GB/s from page-locked memory to a GPU: PCIe 3 with 16 lanes does 12, with 4 lanes 3


def check(asked: Asked) -> Finding:
    """Time copies of 256 MiB."""
    return worst({str(device): look_at(device) for device in all_devices()})


def look_at(device: torch.device) -> Finding:
    own = copy_bytes_per_s(device, ROUNDS) / GIGA
    if device.type == "cpu":
        return ok(f"{own:.0f} GB/s read and written by a copy in the CPU's memory", figures={"copy_gb_per_s": own})
    return judge(own, link_bytes_per_s(device) / GIGA)


def link_bytes_per_s(device: torch.device) -> float:
    """Rate of a copy of 256 MiB of page-locked memory to the GPU."""
    source = torch.zeros(2**28, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device=device)
    (times,) = take_turns({"to the GPU": lambda: target.copy_(source, non_blocking=True)}, ROUNDS, device).values()
    return source.nbytes / (min(times) / 1e3)


def judge(own: float, link: float) -> Finding:
    """Both in GB/s: a copy within the GPU, counted twice, and one to it."""
    says, figures = (
        f"{own:.0f} GB/s within the GPU, {link:.1f} GB/s to it",
        {"copy_gb_per_s": own, "link_gb_per_s": link},
    )
    if link < SLOW_LINK:
        return Finding(
            "warning", says, "the link to the GPU is slow: see its lanes with nvidia-smi -q, under PCI", {}, figures
        )
    return ok(says, figures=figures)
