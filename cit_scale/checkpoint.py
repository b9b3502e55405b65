"""Checkpoints that are either whole or not there: written aside, checked by sums, committed by one rename.

    run_dir/ckpt/step_000123/state.safetensors   the training state, as ``Engine.state`` returns it
                             meta.json           what else the run needs to go on
                             MANIFEST.json       size and SHA-256 of both, written last

No file says which one is the latest: a folder that bears its final name is complete, and the newest that verifies is
it. Other names are not checkpoints: ``.partial`` is being written, or was when the run was killed, ``.deleted`` is on
its way out, ``.broken`` did not verify and is kept for a person to look at. Nothing in a checkpoint can be executed.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from cit_scale.errors import ConfigError
from cit_scale.files import file_sha256, sync
from cit_scale.world import World, agree_any, broadcast

STATE = "state.safetensors"
META = "meta.json"
MANIFEST = "MANIFEST.json"
FORMAT = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """step: updates done. tensors: the training state, on the CPU. meta: what ``save`` was given."""

    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def save(
    run_dir: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any], world: World, *, keep: int = 2
) -> None:
    """Collective. Commit a checkpoint after update ``step``, then delete all but the ``keep`` newest.

    Rank 0 brings the tensors and writes. A step that is committed already is left as it is. Raises OSError on every
    rank if rank 0 cannot write, and ConfigError if the folder holds a later step, which is another run's.
    """
    failure: Exception | None = None
    if world.is_main:
        try:
            _save(Path(run_dir) / "ckpt", step, tensors, meta, keep)
        except ConfigError as error:
            failure = error
        except (OSError, safetensors.SafetensorError) as error:
            failure = OSError(f"checkpoint of step {step} in {run_dir} was not written: {error}")
    failure = broadcast(world, failure)
    if failure is not None:
        raise failure


def load_newest(run_dir: Path, world: World) -> Checkpoint | None:
    """Collective. The newest checkpoint that verifies, on every rank; None where there is none at all.

    One that does not verify is renamed aside, with the reason in the log, and the next older one is tried. Raises
    ConfigError if there are checkpoints and none verifies: a run must not start over by accident.
    """
    folder = Path(run_dir) / "ckpt"
    steps = broadcast(world, sorted(_committed(folder), reverse=True) if world.is_main else None)
    reasons = []
    for step in steps:
        reason = broadcast(world, _verify(_folder(folder, step), step) if world.is_main else None)
        if reason is None:
            return _read(_folder(folder, step), step, world)
        reasons.append(f"step {step}: {reason}")
        if world.is_main:
            aside = _set_aside(_folder(folder, step))
            log.warning("checkpoint of step %d does not verify (%s); kept as %s", step, reason, aside)
    broken = broadcast(world, _is_broken_only(folder) if world.is_main else None)
    if broken:
        raise ConfigError(
            f"{folder} holds checkpoints and none verifies ({'; '.join(reasons) or 'all were set aside before'}); "
            "bring a good one back, or start over with another name or --no-resume"
        )
    return None


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file that others may read as far as the user's umask lets them; the library's own are private."""
    safetensors.torch.save_file(dict(tensors), path)
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def _save(folder: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any], keep: int) -> None:
    """On rank 0. Every rename comes after everything it stands for has reached the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in [*folder.glob("*.partial"), *folder.glob("*.deleted")]:
        shutil.rmtree(leftover)
    committed = _committed(folder)
    if committed and max(committed) > step:
        raise ConfigError(
            f"{folder} holds step {max(committed)}, later than the step {step} to be saved; "
            "another run writes there: give this one another name"
        )
    final = _folder(folder, step)
    if final.exists():
        if _verify(final, step) is None:
            return
        _set_aside(final)

    partial = final.with_name(f"{final.name}.partial")
    partial.mkdir()
    write_tensors(tensors, partial / STATE)
    (partial / META).write_text(json.dumps(meta, indent=1, allow_nan=False))
    sums = {}
    for name in (STATE, META):
        path = partial / name
        sync(path)
        sums[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    (partial / MANIFEST).write_text(_manifest(step, sums))
    sync(partial / MANIFEST)
    sync(partial)
    partial.rename(final)
    sync(folder)
    sync(folder.parent)

    for old in sorted(_committed(folder))[:-keep]:
        deleted = _folder(folder, old).rename(folder / f"step_{old:06d}.deleted")
        shutil.rmtree(deleted)


def _read(folder: Path, step: int, world: World) -> Checkpoint:
    """Collective. A verified checkpoint, read by every rank for itself."""
    failure = None
    try:
        tensors = safetensors.torch.load_file(folder / STATE)
        meta = json.loads((folder / META).read_text())
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        failure = error
    if any(agree_any(world, failure is not None)):
        raise ConfigError(
            f"{folder} verifies on rank 0 but a rank cannot read it ({failure or 'another rank'}); "
            "runs_dir has to be on a file system that all nodes share"
        ) from failure
    return Checkpoint(step, tensors, meta)


def _verify(folder: Path, step: int) -> str | None:
    """None if every byte is as it was written, otherwise what is wrong."""
    try:
        text = (folder / MANIFEST).read_text()
        sums = json.loads(text)["files"]
        # Written anew from what was read, the manifest is the same text, or a bit of it is not ours.
        if text != _manifest(step, sums) or set(sums) != {STATE, META}:
            return f"{MANIFEST} is damaged"
        for name, expected in sums.items():
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if file_sha256(folder / name) != expected["sha256"]:
                return f"{name} has another SHA-256 than when it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _manifest(step: int, sums: dict[str, dict[str, Any]]) -> str:
    return json.dumps({"format": FORMAT, "step": step, "files": sums}, indent=1, sort_keys=True) + "\n"


def _committed(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in no order."""
    if not folder.is_dir():
        return []
    matches = (re.fullmatch(r"step_(\d{6,})", path.name) for path in folder.iterdir())
    return [int(match[1]) for match in matches if match]


def _is_broken_only(folder: Path) -> bool:
    return not _committed(folder) and any(folder.glob("step_*.broken*"))


def _folder(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}"


def _set_aside(path: Path) -> Path:
    """Rename to path.broken, or .broken2 and so on where that is taken."""
    names = itertools.chain([".broken"], (f".broken{i}" for i in itertools.count(2)))
    aside = next(new for name in names if not (new := path.with_name(path.name + name)).exists())
    return path.rename(aside)
