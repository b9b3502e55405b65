"""The GPUs, their driver and their memory, and whether each computes."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cit_scale.distributed.preflight import cuda_versions, missing_gpus
from cit_scale.doctor.findings import Asked, Finding, failed, not_here, ok, warning
from cit_scale.errors import one_line

GIB = 2**30
MOST_USED, LEAST_USED_GIB = 0.1, 1.0  # of a GPU's memory, by others; a context takes half a GiB
CHOSEN = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")  # by Slurm or the user, and for a container
DRIVER = Path("/sys/module/nvidia/version")
NVIDIA, DISPLAY = "0x10de", "0x03"  # vendor, and how the class of a graphics device begins, as PCI numbers them


@dataclass(frozen=True)
class Gpu:
    """capability: as in sm_90, without the letters. problem: why it does not compute; None: it does."""

    name: str
    capability: str
    total_gib: float
    free_gib: float
    problem: str | None = None


def check(asked: Asked) -> Finding:
    """Look at each GPU that PyTorch sees, and compute on it."""
    gpus = [look_at(number) for number in range(torch.cuda.device_count())]
    built_for = torch.cuda.get_arch_list() if gpus else ()
    has_driver = any(Path("/dev").glob("nvidia[0-9]*"))
    plugged_in = 0 if any(os.environ.get(name) for name in CHOSEN) else count_plugged_in(Path("/sys"))
    if problem := missing_gpus(os.environ):
        return failed(problem, "see nvidia-smi and dmesg there; leave out the node with --exclude", facts_of(gpus))
    return judge(gpus, built_for, cuda_versions(), has_driver=has_driver, plugged_in=plugged_in)


def count_plugged_in(sys: Path) -> int:
    """GPUs of NVIDIA's that the machine has, whether there is a driver for them or not. sys: where sysfs is."""
    found = 0
    for device in sys.glob("bus/pci/devices/*"):
        with contextlib.suppress(OSError):
            is_gpu = (device / "class").read_text().startswith(DISPLAY)
            found += is_gpu and (device / "vendor").read_text().strip() == NVIDIA
    return found


def look_at(number: int) -> Gpu:
    device = torch.device("cuda", number)
    try:
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        computed = torch.arange(1000, device=device).sum().item()
    except RuntimeError as error:
        return Gpu(f"GPU {number}", "", 0.0, 0.0, one_line(error, 200))
    problem = None if computed == 499500 else f"the sum of 0 to 999 came out as {computed}, not 499500"
    return Gpu(properties.name, f"{properties.major}{properties.minor}", total / GIB, free / GIB, problem)


def facts_of(gpus: Sequence[Gpu]) -> dict[str, str]:
    """What nodes of a kind have in common."""
    names = dict.fromkeys(gpu.name for gpu in gpus)
    facts = {"gpus": str(len(gpus)), "gpu": ", ".join(names), "cuda": cuda_versions()}
    with contextlib.suppress(OSError):
        facts["driver"] = DRIVER.read_text().strip()
    return facts


def judge(
    gpus: Sequence[Gpu], built_for: Sequence[str], versions: str, *, has_driver: bool, plugged_in: int = 0
) -> Finding:
    """built_for: of torch.cuda.get_arch_list. versions: of CUDA. has_driver: whether its devices are there. plugged_in:
    GPUs of the machine; 0 where some of them were chosen.
    """
    facts = facts_of(gpus)
    if not gpus:
        if has_driver:
            advice = "take a PyTorch for the driver's CUDA or a newer driver, see CUDA_VISIBLE_DEVICES, and on Slurm "
            says = f"there are GPUs, and PyTorch sees none: {versions}"
            return failed(says, advice + "ask for them: --gpus-per-node", facts)
        if plugged_in:
            advice = "install NVIDIA's driver; start a container with --gpus all; on Slurm ask for --gpus-per-node"
            says = f"{plugged_in} are plugged in, and training would go by the CPU: {versions}"
            return warning(says, advice, facts)
        return not_here(f"none: {versions}", facts)
    kinds = dict.fromkeys(f"{gpu.name} {gpu.total_gib:.0f} GiB" if gpu.total_gib else gpu.name for gpu in gpus)
    says = f"{len(gpus)}: {', '.join(kinds)}; {versions}"
    problems = {gpu.problem for gpu in gpus}
    if len(gpus) > 1 and len(problems) == 1 and None not in problems:
        advice = "take a newer driver, or a PyTorch for its CUDA; with NVLink switches start nvidia-fabricmanager"
        return failed(f"{says}; none of them computes: {problems.pop()}", advice, facts)
    if broken := [f"{number} ({gpu.name}): {gpu.problem}" for number, gpu in enumerate(gpus) if gpu.problem]:
        return failed(f"{says}; does not compute: {'; '.join(broken)}", "see dmesg; reset or leave out that GPU", facts)
    if strange := sorted({gpu.capability for gpu in gpus if not runs_on(gpu.capability, built_for)}):
        advice = "take another build of PyTorch"
        return failed(f"{says}; this PyTorch has no code for sm_{', sm_'.join(strange)}", advice, facts)
    if plugged_in > len(gpus):
        advice = "see nvidia-smi and dmesg for the others"
        return warning(f"{says}; {plugged_in} are plugged in, and PyTorch sees {len(gpus)}", advice, facts)
    used = [
        number
        for number, gpu in enumerate(gpus)
        if gpu.total_gib - gpu.free_gib > max(MOST_USED * gpu.total_gib, LEAST_USED_GIB)
    ]
    if used:
        where = ", ".join(f"{number} ({gpus[number].free_gib:.0f} GiB free)" for number in used)
        return warning(f"{says}; in use: {where}", "see nvidia-smi for the processes that hold memory there", facts)
    return ok(says, facts)


def runs_on(capability: str, built_for: Sequence[str]) -> bool:
    """Whether code for one of these architectures runs there: binaries (sm_86) on the same major version from the same
    minor on, intermediate code (compute_80) on everything newer.
    """
    for each in built_for:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", each)
        if match is None:
            continue
        kind, major, minor = match[1], int(match[2]), int(match[3])
        here = int(capability[:-1]), int(capability[-1])
        if here >= (major, minor) and (kind == "compute" or here[0] == major):
            return True
    return False
