"""The smallest run that does all that a real one does: advised, on two ranks, evaluated in the middle, saved often."""

from __future__ import annotations

import copy
import json
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jobs import Ended, Job, Sabotage
from safetensors.torch import load_file, save_file

from cit_scale.models.network import build_network
from cit_scale.run.metrics import COSTS

STEPS_PER_EPOCH = 6
STEPS = 2 * STEPS_PER_EPOCH
SAVE_EVERY = 4
CLASSES = 3

# A student has no stem without a teacher, and no BatchNorm without a stem. No two of the fields that are learned from
# are at rest: drop path, erasing, mixing, warm-up and decay all have to come back as they were.
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "student": {
        "name": "cit_tiny_patch16_224",
        "kwargs": {"patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2, "drop_path_rate": 0.2},
    },
    "teachers": {"conv": {"model": "resnet10t", "kwargs": {"channels": [8, 8, 16, 16], "stem_width": 8}}},
    "data": {"image_size": 16, "crop_ratio": 1.0, "decode_threads": 1},
    "augment": {"crop_scale": [0.5, 1.0], "flip_prob": 0.0, "policy": None, "erase_prob": 0.3},
    "mixing": {"group_size": 2},
    "distill": {"compile": False},
    "optim": {"lr": 2e-3, "lr_batch_size": 8, "warmup_epochs": 0.5, "ema_decay": 0.9},
    "train": {
        "epochs": 2,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "log_every_steps": 1,
        "save_every_steps": SAVE_EVERY,
        "keep_best": 0,
        "report": False,
        "eval_every_epochs": 1,
    },
}

TINY_CIT: dict[str, Any] = {
    name: RECIPE["student"]["kwargs"][name] for name in ("patch_size", "depth", "embed_dim", "num_heads")
}
"""What makes a CiT small, as arguments of timm.create_model."""


def recipe_with(**sections: Any) -> dict[str, Any]:
    """The tiny recipe with other settings: section by section, a dict's values over those of the recipe's."""
    changed = copy.deepcopy(RECIPE)
    for name, values in sections.items():
        changed[name] = changed[name] | values if isinstance(values, dict) and name != "teachers" else values
    return changed


LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "plain": (1, ["--engine.name", "plain"]),
    "zero1": (2, []),
    "zero3": (2, ["--engine.ds_config", "zero3"]),
    "fsdp2": (2, ["--engine.name", "fsdp2"]),
}
"""Ranks and arguments."""


@dataclass(frozen=True)
class TinyRun:
    """The recipe's files in ``inputs``, a run folder below ``runs_dir``, a row of LAYOUTS, further arguments."""

    inputs: Path
    runs_dir: Path
    layout: str = "zero1"
    more: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        return LAYOUTS[self.layout][0]

    @property
    def argv(self) -> list[str]:
        folders = ["--runs_dir", str(self.runs_dir), "--data.cache_dir", str(self.inputs / "cache")]
        return ["--config", str(self.inputs / "tiny.yaml"), *folders, *LAYOUTS[self.layout][1], *self.more]

    @property
    def run_dir(self) -> Path:
        return self.runs_dir / RECIPE["name"]

    def start(self, *more: str, sabotage: Sabotage | None = None) -> Job:
        return Job([*self.argv, *more], ranks=self.ranks, sabotage=sabotage)

    def run(self, *more: str, sabotage: Sabotage | None = None) -> Ended:
        return self.start(*more, sabotage=sabotage).wait()

    def checkpoint(self, step: int) -> Path:
        return self.run_dir / "ckpt" / f"step_{step:06d}"

    def checkpoints(self) -> list[str]:
        folder = self.run_dir / "ckpt"
        return sorted(path.name for path in folder.glob("step_*"))

    def copy(self, runs_dir: Path) -> TinyRun:
        """The same run elsewhere, with all that is in its folder."""
        shutil.copytree(self.runs_dir, runs_dir)
        return replace(self, runs_dir=runs_dir)

    def finish(self, *more: str) -> Ended:
        """The same command once more, which has to reach the end."""
        ended = self.run(*more)
        assert ended.codes == [0] * self.ranks, ended.output
        return ended


def make_inputs(folder: Path) -> None:
    """A recipe with a data set and a teacher that has weights: whatever a run reads."""
    generator = np.random.default_rng(0)
    recipe = recipe_with()
    for name, count in {"train": 6 * 8, "eval": 9}.items():
        pixels = generator.integers(0, 256, (count, 8, 8), np.uint8)
        write_idx(folder / name, pixels, np.arange(count) % CLASSES)
        recipe["data"][name] = str(folder / name / "images-idx3-ubyte")
    for name, teacher in recipe["teachers"].items():
        teacher["weights"] = str(folder / f"{name}.safetensors")
        write_teacher(Path(teacher["weights"]), teacher["model"], teacher["kwargs"])
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))


def write_idx(folder: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, *pixels.shape) + pixels.tobytes())
    (folder / "labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, len(labels)) + labels.astype("u1").tobytes())


def write_teacher(path: Path, model: str, kwargs: Mapping[str, Any], *, classes: int = CLASSES, seed: int = 1) -> None:
    torch.manual_seed(seed)
    save_file(build_network(model, kwargs, num_classes=classes, image_size=16).model.state_dict(), path)


# ---------------------------------------------------------------------------------------------------------------------
# What a run ended with


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def learned(run_dir: Path) -> list[dict[str, Any]]:
    """What each step's line says of the learning, in the order of the file."""
    return [_without_costs(line) for line in metrics(run_dir) if "loss" in line]


def evaluated(run_dir: Path) -> list[dict[str, Any]]:
    return [_without_costs(line) for line in metrics(run_dir) if "top1_cls" in line]


def _without_costs(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in COSTS}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in the files of a folder, by file and key; which rank wrote a moment does not matter."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = path.name if path.name.startswith("student") else "optimizer"
        found |= {f"{file}: {key}": tensor for key, tensor in load_file(path).items()}
    return found


def assert_same_tensors(found: Path, expected: Path) -> None:
    ours, theirs = tensors(found), tensors(expected)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 20
    different = [
        key
        for key, tensor in theirs.items()
        if ours[key].dtype != tensor.dtype or ours[key].numpy().tobytes() != tensor.numpy().tobytes()
    ]
    assert not different, f"{len(different)} of {len(ours)} tensors differ: {different[:5]}"


def assert_same_end(run: TinyRun, calm: TinyRun) -> None:
    """Bit for bit: the weights brought out, everything in the last checkpoint, the lines of every step."""
    assert_same_tensors(run.run_dir, calm.run_dir)
    assert_same_tensors(run.checkpoint(STEPS), calm.checkpoint(STEPS))
    assert [line["step"] for line in learned(run.run_dir)] == list(range(1, STEPS + 1))
    assert learned(run.run_dir) == learned(calm.run_dir)
    assert evaluated(run.run_dir) == evaluated(calm.run_dir)
    ours, theirs = (json.loads((each.run_dir / "results.json").read_text()) for each in (run, calm))
    assert ours["accuracy"] == theirs["accuracy"]
    leftovers = [path for path in run.run_dir.rglob("*") if path.suffix in (".partial", ".deleted")]
    assert not leftovers
