"""Checkpoints that are either whole or not there: written aside by all ranks, checked by sums, committed by one rename.

    run_dir/ckpt/step_000123/*.safetensors   the tensors, each rank its files; layout.py says which lies where
                             meta.json       what else the run needs to go on
                             index.json      which file each tensor of the training state lies in, and its key there
                             MANIFEST.json   size and SHA-256 of all of them, written last

No file says which one is the latest: a folder that bears its final name is complete, and the newest that verifies is
it. Neither clocks nor file times are asked. ``scores.json`` beside the folders says which are the best. Other names are
not checkpoints: ``.partial`` is being written, or was when the run was killed, ``.deleted`` is on its way out,
``.broken`` did not verify and is kept for a person to look at.
Nothing in a checkpoint can be executed.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import safetensors.torch
from torch import Tensor

from cit_scale.checkpoint.layout import Place, SavedState, by_file
from cit_scale.distributed.world import World, broadcast, gather, run_on_all_ranks
from cit_scale.errors import (
    CannotWriteError,
    ConfigError,
    DivergedError,
    MissingInputError,
    RefusedError,
    RunError,
    os_error,
)
from cit_scale.files import file_sha256, rename_to_free, sync, write_text
from cit_scale.run_folder import CHECKPOINTS, saved_steps, step_path

META = "meta.json"
INDEX = "index.json"
MANIFEST = "MANIFEST.json"
SCORES = "scores.json"
FORMAT = 2

Sums = dict[str, dict[str, Any]]
"""By file: its bytes and sha256."""

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """step: updates done. state: the training state, read tensor by tensor. meta: what ``save`` was given."""

    step: int
    state: Mapping[str, Tensor]
    meta: dict[str, Any]


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the ``last`` newest, multiples of ``every`` steps, the ``best`` by ``add_score``."""

    last: int = 2
    every: int | None = None
    best: int = 0

    def outdated(self, steps: Sequence[int], scores: Mapping[int, float]) -> list[int]:
        """Which of ``steps`` to delete. scores: of those that were evaluated."""
        scored = sorted((scores[step], step) for step in steps if step in scores)
        best = [step for _, step in scored[len(scored) - self.best :]]
        newest = sorted(steps)[-self.last :]
        return [
            step
            for step in sorted(steps)
            if step not in newest and step not in best and not (self.every and step % self.every == 0)
        ]


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def save(
    run_dir: Path,
    step: int,
    state: Mapping[str, Tensor],
    shares: list[dict[str, Place]],
    meta: Mapping[str, Any],
    world: World,
    retention: Retention,
) -> int:
    """Collective. Commit a checkpoint after update ``step``, then delete what need not be kept. Returns its bytes.

    state: this rank's part, on the CPU, as shares[rank] says. meta: rank 0's counts; JSON, numbers finite. A step that
    is committed already is left as it is. Touches no tensor of the module: it may run while training goes on, in a
    thread, if ``world`` has a process group of its own.

    Raises, on every rank, CannotWriteError or TransientError if any rank cannot write, DivergedError for a tensor that
    is not finite, and RefusedError if the folder holds a later step, which is another run's. Nothing is left of what
    was not committed.
    """
    folder = Path(run_dir) / CHECKPOINTS
    final = step_path(folder, step)
    partial = final.with_name(f"{final.name}.partial")
    if _agree(world, step, run_dir, lambda: _prepare(folder, final, partial, step)):
        return 0
    written: Sums | Exception
    try:
        _refuse_non_finite(state, step)
        written = _write(by_file(state, shares[world.rank]), partial)
    except Exception as error:  # raised again below, on every rank
        written = error
    everyone = gather(world, written)
    index = {key: place for share in shares for key, place in share.items()}
    return _agree(world, step, run_dir, lambda: _commit(partial, final, step, everyone, index, meta, retention))


def _agree(world: World, step: int, run_dir: Path, function: Callable[[], T]) -> T:
    """Collective. What ``function`` returns on rank 0, on every rank; likewise what it raises."""
    result, failure = None, None
    if world.is_main:
        try:
            result = function()
        except RunError as error:
            failure = error
        except (OSError, safetensors.SafetensorError) as error:
            message = f"checkpoint of step {step} in {run_dir} was not written: {error}"
            failure = os_error(error, message, lasting=CannotWriteError)
        except Exception as error:  # raised again below, on every rank
            failure = error
    result, failure = broadcast(world, (result, failure))
    if failure is not None:
        raise failure
    return cast(T, result)


def _prepare(folder: Path, final: Path, partial: Path, step: int) -> bool:
    """On rank 0. Make room to write in. Returns whether the step is committed already."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.partial"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    committed = saved_steps(folder)
    if committed and max(committed) > step:
        raise RefusedError(
            f"{folder} holds step {max(committed)}, later than the step {step} to be saved; "
            "another run writes there: give this one another --name"
        )
    if final.exists():
        if _verify(final, step, World()) is None:
            return True
        _set_aside(final)
    partial.mkdir()
    return False


def _refuse_non_finite(state: Mapping[str, Tensor], step: int) -> None:
    bad = [key for key, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise DivergedError(
            f"{bad[0]}{more} is no longer finite at step {step}, and no checkpoint is made of that; the ones before "
            "are good: go on from there with a lower optim.lr and --override-resume"
        )


def _write(files: Mapping[str, Mapping[str, Tensor]], partial: Path) -> Sums:
    sums = {}
    for name, tensors in files.items():
        write_tensors(tensors, partial / name)
        sums[name] = _sum(partial / name)
    return sums


def _commit(
    partial: Path,
    final: Path,
    step: int,
    everyone: list[Sums | Exception],
    index: Mapping[str, Place],
    meta: Mapping[str, Any],
    retention: Retention,
) -> int:
    """On rank 0. Every rename comes after everything it stands for has reached the disk.

    everyone: by rank, what it wrote, or what went wrong there, which is raised.
    """
    try:
        sums: Sums = {}
        for written in everyone:
            if isinstance(written, Exception):
                raise written
            sums |= written
        for name, content in {INDEX: index, META: meta}.items():
            (partial / name).write_text(json.dumps(content, indent=1, allow_nan=False))
            sums[name] = _sum(partial / name)
        (partial / MANIFEST).write_text(_manifest(step, sums))
        sync(partial / MANIFEST)
        sync(partial)
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk is not kept full
        raise
    sync(final.parent)
    sync(final.parent.parent)
    try:
        _retain(final.parent, retention)
    except OSError as error:  # what was committed stands; the next save tries again
        log.warning("outdated checkpoints in %s were not deleted: %s", final.parent, error)
    return sum(numbers["bytes"] for numbers in sums.values())


def _retain(folder: Path, retention: Retention) -> None:
    for step in retention.outdated(saved_steps(folder), _scores(folder)):
        step_path(folder, step).rename(folder / f"step_{step:06d}.deleted")
    for deleted in folder.glob("*.deleted"):
        shutil.rmtree(deleted)


def add_score(run_dir: Path, step: int, top1: float) -> None:
    """Remember how good the student is after ``step``, whether or not there is a checkpoint of it yet."""
    folder = Path(run_dir) / CHECKPOINTS
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / SCORES, json.dumps({**_scores(folder), step: top1}))


def _scores(folder: Path) -> dict[int, float]:
    """By step; nothing where the file is damaged: then no checkpoint is among the best."""
    try:
        return {int(step): float(top1) for step, top1 in json.loads((folder / SCORES).read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _sum(path: Path) -> dict[str, Any]:
    """Of a file that has reached the disk."""
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file that others may read as far as the user's umask lets them; the library's own are private."""
    path.touch()
    mode = path.stat().st_mode
    safetensors.torch.save_file(dict(tensors), path)
    path.chmod(mode)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load_newest(run_dir: Path, world: World) -> Checkpoint | None:
    """Collective. The newest checkpoint that verifies, on every rank; None where there is none at all.

    Each rank checks the sums of a share of the files, and all go by one verdict. What does not verify is passed over
    for the next older one, and renamed aside, with the reason in the log, when there is a good one. Raises RefusedError
    if there are checkpoints and none verifies: a run must not start over by accident. Raises MissingInputError, or
    TransientError, if one cannot be read, which says nothing of what is in it.
    """
    folder = Path(run_dir) / CHECKPOINTS
    steps = broadcast(world, sorted(saved_steps(folder), reverse=True) if world.is_main else None)
    _refuse_private_folder(folder, steps, world)
    reasons: dict[int, str] = {}
    for step in steps:
        verdicts = gather(
            world, run_on_all_ranks(world, lambda step=step: _verify(step_path(folder, step), step, world))
        )
        reason = next((verdict for verdict in verdicts if verdict), None)
        if reason is None:
            run_on_all_ranks(world, lambda: _set_all_aside(folder, reasons) if world.is_main else None)
            return run_on_all_ranks(world, lambda step=step: _read(step_path(folder, step), step))
        reasons[step] = reason
    were_there = broadcast(world, any(folder.glob("step_*.broken*")) if world.is_main else None)
    if reasons or were_there:
        listed = "; ".join(f"step {step}: {reason}" for step, reason in reasons.items())
        raise RefusedError(
            f"{folder} holds checkpoints and none verifies ({listed or 'all were set aside before'}); "
            "bring a good one back, or set the run aside and start over with --fresh"
        )
    return None


def _set_all_aside(folder: Path, reasons: Mapping[int, str]) -> None:
    for step, reason in reasons.items():
        aside = _set_aside(step_path(folder, step))
        log.warning("checkpoint of step %d does not verify (%s); kept as %s", step, reason, aside)


def _refuse_private_folder(folder: Path, steps: list[int], world: World) -> None:
    """Collective. What a rank does not see at all is not damage."""
    blind = [rank for rank, sees in enumerate(gather(world, folder.is_dir())) if steps and not sees]
    if blind:
        raise ConfigError(
            f"{folder} is there on rank 0 and not on rank {blind[0]}; "
            "runs_dir has to be on a file system that all nodes share"
        )


def _read(folder: Path, step: int) -> Checkpoint:
    """A verified checkpoint."""
    try:
        places = {key: (file, inner) for key, (file, inner) in json.loads((folder / INDEX).read_text()).items()}
        return Checkpoint(step, SavedState(folder, places), json.loads((folder / META).read_text()))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise os_error(error, f"{folder} verifies and cannot be read: {error}", lasting=ConfigError) from error


def _verify(folder: Path, step: int, world: World) -> str | None:
    """None if every byte of this rank's share of the files is as it was written, otherwise what is wrong.

    Raises MissingInputError or TransientError where the bytes cannot be read: a disk or a permission may come back.
    """
    try:
        text = (folder / MANIFEST).read_text()
        manifest = json.loads(text)
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} says format {manifest['format']}, this version reads {FORMAT}"
        sums: Sums = manifest["files"]
        # Written anew from what was read, the manifest is the same text, or a bit of it is not ours.
        if text != _manifest(step, sums) or not {META, INDEX} < set(sums):
            return f"{MANIFEST} is damaged"
        for name in sorted(sums)[world.rank :: world.world_size]:
            expected = sums[name]
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if file_sha256(folder / name) != expected["sha256"]:
                return f"{name} has another SHA-256 than when it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        message = f"checkpoint of step {step} cannot be read ({error}); mend that, or move {folder} away to go on from "
        raise os_error(error, f"{message}an older one", lasting=MissingInputError) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _manifest(step: int, sums: Sums) -> str:
    return json.dumps({"format": FORMAT, "step": step, "files": sums}, indent=1, sort_keys=True) + "\n"


def path(run_dir: Path, step: int) -> Path:
    """The folder of a committed checkpoint."""
    return step_path(Path(run_dir) / CHECKPOINTS, step)


def _set_aside(path: Path) -> Path:
    """Rename to path.broken, or .broken2 and so on where that is taken."""
    return rename_to_free(path, itertools.chain([".broken"], (f".broken{i}" for i in itertools.count(2))))
