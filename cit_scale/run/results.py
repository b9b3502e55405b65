"""The results of a run: the environment it ran in, its weights as files, their accuracy, the table at its end."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cit_scale.batch import Batch
from cit_scale.checkpoint.store import SCORES, SCORES_EMA, saved_scores
from cit_scale.config import REPOSITORY
from cit_scale.distributed.slurm_job import job_record
from cit_scale.distributed.world import World, run_on_all_ranks
from cit_scale.evaluate import HEADS_MEAN, evaluate
from cit_scale.files import sync
from cit_scale.models.arithmetic import set_arithmetic
from cit_scale.models.weights import load_weights
from cit_scale.run.setup import PreparedRun
from cit_scale.run_folder import (
    CHECKPOINTS,
    REPORT,
    STUDENT,
    STUDENT_BEST,
    STUDENT_EMA,
    STUDENT_EMA_BEST,
    is_current_report,
    step_path,
)

# Weights that a finished run leaves in its folder, by the name in results.json: files of its last checkpoint.
EXPORTS = {"student": STUDENT, "student ema": STUDENT_EMA}

# Likewise, of the checkpoint that was best: the file of scores that says which, and the name in the run folder.
BEST = {"student": (SCORES, STUDENT_BEST), "student ema": (SCORES_EMA, STUDENT_EMA_BEST)}

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
    """Returns what a reader needs to repeat the run's figures: command, commit, versions, host, device, ranks, job."""
    return {
        "command": command_line(sys.argv),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "host": socket.gethostname(),
        "device": device_name(world.device),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "tf32": {
            "matmul": torch.backends.cuda.matmul.allow_tf32,
            "convolution": torch.backends.cudnn.allow_tf32,
        },
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "world_size": world.world_size,
        "slurm": job_record(os.environ),
    }


def command_line(argv: Sequence[str]) -> str:
    """The command of a process as it would be typed, without what a launcher has added."""
    script = Path(argv[0])
    program = f"python {script.parent.name}/{script.name}" if script.suffix == ".py" else script.name
    if script.name in ("__main__.py", "cit-scale"):
        program = "cit-scale"
    return " ".join([program, *(shlex.quote(each) for each in argv[1:] if not each.startswith("--local_rank"))])


def device_name(device: torch.device) -> str:
    """Name of the GPU, or architecture of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout, with -dirty if files differ from it; None without git or outside a repository."""
    if not (REPOSITORY / "pyproject.toml").is_file():  # an installed package may lie in the repository of its user
        return None
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


def export_weights(run_dir: Path, step: int) -> dict[str, str]:
    """On rank 0. Copy the weights of a checkpoint into the run folder. Returns the files by the names of EXPORTS."""
    return {name: file for name, file in EXPORTS.items() if _copy_weights(run_dir, step, file, file)}


def export_best(run_dir: Path, last_step: int, accuracy: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """On rank 0. Copy the weights of the best checkpoints that are there into the run folder.

    last_step, accuracy: of the last checkpoint, which is evaluated by its files: from results.json. Returns file, step
    and top-1 in percent, by the names of EXPORTS.
    """
    best = {}
    for name, (scores_file, file) in BEST.items():
        if name not in accuracy:
            continue
        last = accuracy[name]["top1"]
        scores = {**saved_scores(run_dir, scores_file), last_step: last.get(HEADS_MEAN, last["cls"])}
        step = max(scores, key=lambda step: (scores[step], step))
        if _copy_weights(run_dir, step, EXPORTS[name], file):
            best[name] = {"file": file, "step": step, "top1": scores[step]}
    return best


def _copy_weights(run_dir: Path, step: int, saved_name: str, name: str) -> bool:
    """Copy a file of a checkpoint into the run folder. False if the checkpoint has none."""
    saved = step_path(run_dir / CHECKPOINTS, step) / saved_name
    if not saved.exists():
        return False
    unfinished = run_dir / f"{name}.partial"
    shutil.copyfile(saved, unfinished)
    sync(unfinished)
    unfinished.replace(run_dir / name)
    return True


def measure(
    prepared: PreparedRun, files: Mapping[str, str], eval_batches: Callable[[], Iterator[Batch]]
) -> dict[str, Any]:
    """Collective. Evaluate the weights in the run folder. Returns that part of results.json.

    files: weight files by the names of EXPORTS. In float32 and nothing less, as who loads them computes.
    """
    world, accuracy = prepared.world, {}
    set_arithmetic(world.device, deterministic=prepared.config.engine.deterministic)
    network = prepared.build_student_without_weights().eval()
    for name, file in files.items():
        run_on_all_ranks(world, partial(load_weights, network, prepared.config.run_dir / file))
        network.to(world.device)
        accuracy[name] = evaluate(network, eval_batches(), world)
    return {
        "eval_images": next(iter(accuracy.values())).images,
        "accuracy": {
            name: {"top1": found.top1, "top5": found.top5, "class_mean": found.class_mean}
            for name, found in accuracy.items()
        },
    }


def print_table(run_dir: Path, results: Mapping[str, Any]) -> None:
    """Print accuracies, speed and run folder. results: contents of results.json; keys may be missing."""
    title = f"{results.get('model', 'the student')} after {results.get('steps')} steps"
    table = Table(title=title, title_justify="left")
    table.add_column("network")
    table.add_column("top-1 %", justify="right")
    table.add_column("top-5 %", justify="right")
    table.add_column("class mean %", justify="right")  # top-1 as the mean over classes
    for name, teacher in results.get("teachers", {}).items():
        accuracy = (_percent(teacher.get(which)) for which in ("top1", "top5", "class_mean"))
        table.add_row(f"teacher {name} ({teacher.get('model')})", *accuracy)
    for student, accuracy in results.get("accuracy", {}).items():
        table.add_section()
        for head, top1 in accuracy.get("top1", {}).items():
            emphasis = "bold" if head == "average" else None
            others = (_percent(accuracy.get(which, {}).get(head)) for which in ("top5", "class_mean"))
            table.add_row(f"{student}, {head}", _percent(top1), *others, style=emphasis)
    # Without highlighting, which would colour every number.
    console = Console(highlight=False)
    console.print(table)
    speed = results.get("images_per_s")
    console.print(f"held-out images   {results.get('eval_images', 'not recorded')}")
    console.print(
        f"training speed    {f'{speed:.0f} images/s' if speed else 'not measured: too few steps ran in this process'}"
    )
    for best in results.get("best", {}).values():
        console.print(f"best weights      {best['file']}, {best['top1']:.2f} % at step {best['step']}", soft_wrap=True)
    console.print(f"run folder        {run_dir}", soft_wrap=True)
    if is_current_report(run_dir):
        console.print(f"report            {run_dir / REPORT}", soft_wrap=True, markup=False)
    folder = shlex.quote(str(run_dir))
    console.print(f"what is next      cit-scale predict {folder} IMAGES", soft_wrap=True, markup=False)
    console.print(f"                  cit-scale export {folder} --to onnx", soft_wrap=True, markup=False)


def _percent(value: float | None) -> str:
    """Two decimals; empty for a value that an older version did not measure."""
    return "" if value is None else f"{value:.2f}"
