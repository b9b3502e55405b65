"""Records the environment of a run, and prints the table of results at its end."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cit_scale.config import REPOSITORY
from cit_scale.distributed.slurm_job import job_record
from cit_scale.distributed.world import World

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "deepspeed",
    # One of the two, by CUDA version.
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "numpy",
    "safetensors",
)


def environment_record(world: World) -> dict[str, Any]:
    """Returns what a reader needs to repeat the run's figures: commit, versions, host, device, ranks, Slurm job."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "host": socket.gethostname(),
        "device": device_name(world.device),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "world_size": world.world_size,
        "slurm": job_record(os.environ),
    }


def device_name(device: torch.device) -> str:
    """Name of the GPU, or architecture of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout, with -dirty if files differ from it; None without git or outside a repository."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # git is missing, or the package is not in a git repository
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def print_table(run_dir: Path, results: Mapping[str, Any]) -> None:
    """Print accuracies, speed and run folder. results: contents of results.json; keys may be missing."""
    title = f"{results.get('model', 'the student')} after {results.get('steps')} steps"
    table = Table(title=title, title_justify="left")
    table.add_column("network")
    table.add_column("top-1 %", justify="right")
    table.add_column("top-5 %", justify="right")
    for name, teacher in results.get("teachers", {}).items():
        accuracy = (_percent(teacher.get(which)) for which in ("top1", "top5"))
        table.add_row(f"teacher {name} ({teacher.get('model')})", *accuracy)
    for student, accuracy in results.get("accuracy", {}).items():
        table.add_section()
        for head, top1 in accuracy.get("top1", {}).items():
            emphasis = "bold" if head == "average" else None
            top5 = accuracy.get("top5", {}).get(head)
            table.add_row(f"{student}, {head}", _percent(top1), _percent(top5), style=emphasis)
    # Without highlighting, which would colour every number.
    console = Console(highlight=False)
    console.print(table)
    speed = results.get("images_per_s")
    console.print(f"held-out images   {results.get('eval_images', 'not recorded')}")
    console.print(
        f"training speed    {f'{speed:.0f} images/s' if speed else 'not measured: too few steps ran in this process'}"
    )
    console.print(f"run folder        {run_dir}", soft_wrap=True)


def _percent(value: float | None) -> str:
    """Two decimals; empty for a value that an older version did not measure."""
    return "" if value is None else f"{value:.2f}"
