"""Atomic checkpoints: all ranks write to a temporary folder, checksums are added, and one rename commits the folder.

    run_dir/ckpt/step_000123/*.safetensors   the tensors, one or more files per rank; see layout.py
                             meta.json       everything else that a run needs to continue
                             index.json      the file of each tensor of the training state, and the tensor's key there
                             MANIFEST.json   size and SHA-256 of all other files, written last

There is no file that names the latest checkpoint. A folder with a final name is complete, and the newest folder whose
checksums match is loaded; "newest" means the highest step, never a file's time. ``scores.json`` beside the folders
holds the accuracies by which the best are kept. Folders with other names are not checkpoints: ``.partial`` is being
written or was left by a killed run, ``.deleted`` is about to be removed, ``.broken`` failed verification and is kept
for inspection.

Loading a checkpoint never executes code: tensors are safetensors, everything else is JSON.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from cit_scale.run_folder import CHECKPOINTS, META, saved_steps, step_path

INDEX = "index.json"
MANIFEST = "MANIFEST.json"
SCORES = "scores.json"
SCORES_EMA = "scores_ema.json"  # of the moving average
FORMAT = 2  # of the files above; a checkpoint of another format is refused, not converted

Sums = dict[str, dict[str, Any]]
"""File name to {"bytes": size, "sha256": hexadecimal digest}."""

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    step: number of updates done. state: the training state; each look-up reads a tensor. meta: as passed to ``save``.
    """

    step: int
    state: Mapping[str, Tensor]
    meta: dict[str, Any]


@dataclass(frozen=True)
class Retention:
    """Rule for deleting checkpoints. A checkpoint is kept if any of the three applies.

    last: the number of newest checkpoints to keep. every: keep multiples of this many steps; None keeps none for this
    reason. best: the number of checkpoints with the highest scores (``add_score``) to keep, of the student and, where
    it is evaluated, of its moving average.
    """

    last: int = 2
    every: int | None = None
    best: int = 0

    def outdated(self, steps: Sequence[int], *scores: Mapping[int, float]) -> list[int]:
        """Returns those of ``steps`` to delete, in ascending order.

        scores: step to top-1, by which each time the best are kept; a step without a score is never among them.
        """
        best: set[int] = set()
        for each in scores:
            # The step breaks ties between equal scores: the newer checkpoint counts as the better one.
            scored = sorted((each[step], step) for step in steps if step in each)
            best.update(step for _, step in scored[len(scored) - self.best :])  # [-0:] would be all of them
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
    """Collective. Write and commit a checkpoint of ``step``, then delete outdated ones. Returns the checkpoint's bytes.

    state: the tensors of shares[rank], on the CPU. shares: for each rank, state key to place (``layout.share_out``).
    meta: contents of meta.json, JSON values with finite numbers; only rank 0's is written.

    Returns 0 and writes nothing if the step is committed already. The function reads only ``state``, not the module, so
    it may run in a thread beside training if ``world`` has a process group of its own.

    Raises on every rank: CannotWriteError or TransientError if any rank cannot write, DivergedError if a tensor is not
    finite, RefusedError if the folder holds a later step, which only another run can have written. An uncommitted
    checkpoint is removed before the exception is raised.
    """
    folder = Path(run_dir) / CHECKPOINTS
    final = step_path(folder, step)
    partial = final.with_name(f"{final.name}.partial")
    if _agree(world, step, run_dir, lambda: _prepare(folder, final, partial, step)):
        return 0
    # No rank raises before the gather: the others would wait there for it. Rank 0 raises for all of them in _commit.
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
    """Collective. Call ``function`` on rank 0 only. Returns its result, or raises its exception, on every rank.

    An error of the disk becomes CannotWriteError or TransientError and names the checkpoint.
    """
    result: T | None = None
    failure: Exception | None = None
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
    """On rank 0. Create the temporary folder. Returns whether the step is committed already."""
    folder.mkdir(parents=True, exist_ok=True)
    # Of a save that was killed; the lock of the run folder excludes another writer. A file is a half-written
    # scores.json.
    for leftover in folder.glob("*.partial"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    committed = saved_steps(folder)
    if committed and max(committed) > step:
        raise RefusedError(
            f"{folder} holds step {max(committed)}, later than the step {step} to be saved; "
            "another run writes there: give this one another --name"
        )
    # The folder exists if an earlier attempt failed after its rename, such as in the sync. Keep it if it verifies.
    if final.exists():
        if _verify(final, step, World()) is None:
            return True
        _set_aside(final)
    partial.mkdir()
    return False


def _refuse_non_finite(state: Mapping[str, Tensor], step: int) -> None:
    """Raise DivergedError with the name of the first tensor that is not finite."""
    bad = [key for key, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise DivergedError(
            f"{bad[0]}{more} is no longer finite at step {step}, so this step is not saved; the checkpoints before it "
            "are good: continue from the newest with a lower optim.lr and --override-resume"
        )


def _write(files: Mapping[str, Mapping[str, Tensor]], partial: Path) -> Sums:
    """Write this rank's files to the temporary folder and sync them. Returns their sizes and checksums."""
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
    """On rank 0. Write index, meta and manifest, and commit by renaming ``partial`` to ``final``. Returns the bytes.

    everyone: for each rank the checksums of its files, or its exception, which is raised here.
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
        # The order matters: everything in the folder must be on the disk before the rename gives it its final name.
        # Otherwise a power cut could leave a folder with a final name and half its content.
        (partial / MANIFEST).write_text(_manifest(step, sums))
        sync(partial / MANIFEST)
        sync(partial)
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # frees the space again if the disk was full
        raise
    # The rename itself is an entry in ckpt/, and ckpt/ is an entry in the run folder: both must reach the disk.
    sync(final.parent)
    sync(final.parent.parent)
    # Only now delete: until here the older checkpoints were the newest good ones.
    try:
        _retain(final.parent, retention)
    except OSError as error:  # the new checkpoint is committed all the same; the next save tries again to delete
        log.warning("outdated checkpoints in %s were not deleted: %s", final.parent, error)
    return sum(numbers["bytes"] for numbers in sums.values())


def _retain(folder: Path, retention: Retention) -> None:
    """Delete outdated checkpoints."""
    # Rename first: a deletion that is cut short must not leave half a folder with a final name.
    scores = (_scores(folder / file) for file in (SCORES, SCORES_EMA))
    for step in retention.outdated(saved_steps(folder), *scores):
        step_path(folder, step).rename(folder / f"step_{step:06d}.deleted")
    for deleted in folder.glob("*.deleted"):
        shutil.rmtree(deleted)


def add_score(run_dir: Path, step: int, top1: float, top1_ema: float | None = None) -> None:
    """Store the student's top-1 accuracy in percent after ``step``, for ``Retention.best``, and its moving average's.

    The checkpoint of that step may be written later, or never.
    """
    folder = Path(run_dir) / CHECKPOINTS
    folder.mkdir(parents=True, exist_ok=True)
    for file, score in ((SCORES, top1), (SCORES_EMA, top1_ema)):
        if score is not None:
            write_text(folder / file, json.dumps({**_scores(folder / file), step: score}))


def saved_scores(run_dir: Path, file: str) -> dict[int, float]:
    """Step to top-1, of the steps whose checkpoints are there. file: SCORES or SCORES_EMA."""
    folder = Path(run_dir) / CHECKPOINTS
    steps = saved_steps(folder)
    return {step: top1 for step, top1 in _scores(folder / file).items() if step in steps}


def _scores(path: Path) -> dict[int, float]:
    """Step to top-1. Empty if the file is missing or damaged; no checkpoint is then kept for its score."""
    try:
        return {int(step): float(top1) for step, top1 in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _sum(path: Path) -> dict[str, Any]:
    """Sync a file to the disk, then return its size and SHA-256."""
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the permissions of the user's umask.

    safetensors itself creates files that only the user may read.
    """
    path.touch()  # has the permissions of the umask
    mode = path.stat().st_mode
    safetensors.torch.save_file(dict(tensors), path)
    path.chmod(mode)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load_newest(run_dir: Path, world: World) -> Checkpoint | None:
    """Collective. Load the newest checkpoint whose checksums match. Returns it on every rank; None if there is none.

    Each rank verifies a share of the files, and the ranks combine their results. A checkpoint that fails is skipped for
    the next older one. Once a good one is found, the skipped ones are renamed to ``.broken`` and the reasons are
    logged.

    Raises on every rank: RefusedError if there are checkpoints but none verifies, because a run must not start over by
    accident; MissingInputError or TransientError if a checkpoint cannot be read, which does not mean that it is
    damaged; ConfigError if only some ranks see the folder.
    """
    folder = Path(run_dir) / CHECKPOINTS
    steps = broadcast(world, sorted(saved_steps(folder), reverse=True) if world.is_main else None)
    _refuse_private_folder(folder, steps, world)
    reasons: dict[int, str] = {}
    for step in steps:
        path = step_path(folder, step)
        verdicts = gather(world, run_on_all_ranks(world, partial(_verify, path, step, world)))
        reason = next((verdict for verdict in verdicts if verdict), None)
        if reason is None:
            # Renamed only now: if no checkpoint verifies, all of them stay where they are.
            run_on_all_ranks(world, lambda: _set_all_aside(folder, reasons) if world.is_main else None)
            return run_on_all_ranks(world, partial(_read, path, step))
        reasons[step] = reason
    # Folders set aside by an earlier start also show that this run has trained, so it must not start over.
    were_there = broadcast(world, any(folder.glob("step_*.broken*")) if world.is_main else None)
    if reasons or were_there:
        listed = "; ".join(f"step {step}: {reason}" for step, reason in reasons.items())
        raise RefusedError(
            f"{folder} holds checkpoints and none verifies ({listed or 'all were set aside before'}); "
            "restore a good one, or set the run aside and start over with --fresh"
        )
    return None


def _set_all_aside(folder: Path, reasons: Mapping[int, str]) -> None:
    for step, reason in reasons.items():
        aside = _set_aside(step_path(folder, step))
        log.warning("checkpoint of step %d does not verify (%s); kept as %s", step, reason, aside)


def _refuse_private_folder(folder: Path, steps: list[int], world: World) -> None:
    """Collective. Raise ConfigError if the folder exists on rank 0 only: the disk is not shared, nothing is damaged."""
    blind = [rank for rank, sees in enumerate(gather(world, folder.is_dir())) if steps and not sees]
    if blind:
        raise ConfigError(
            f"{folder} exists on rank 0 but not on rank {blind[0]}; "
            "runs_dir must be on a file system that all nodes share"
        )


def _read(folder: Path, step: int) -> Checkpoint:
    """Open a checkpoint that has been verified. Raises ConfigError, MissingInputError or TransientError."""
    try:
        places = {key: (file, inner) for key, (file, inner) in json.loads((folder / INDEX).read_text()).items()}
        return Checkpoint(step, SavedState(folder, places), json.loads((folder / META).read_text()))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise os_error(error, f"{folder} verifies but cannot be loaded: {error}", lasting=ConfigError) from error


def _verify(folder: Path, step: int, world: World) -> str | None:
    """Verify this rank's share of a checkpoint's files. Returns None if every byte is as written, else the reason.

    Raises MissingInputError or TransientError if a file cannot be read: a failing disk or a wrong permission is no
    damage and may be repaired.
    """
    try:
        text = (folder / MANIFEST).read_text()
        manifest = json.loads(text)
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} says format {manifest['format']}, this version reads {FORMAT}"
        sums: Sums = manifest["files"]
        # The manifest has no checksum of its own. Writing it again from the parsed values must give the same text;
        # otherwise a bit of it was changed.
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
        message = f"checkpoint of step {step} cannot be read ({error}); repair the cause, or move {folder} away to use "
        raise os_error(error, f"{message}an older one", lasting=MissingInputError) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # the manifest is not JSON, or lacks a key
        return f"{type(error).__name__}: {error}"
    return None


def _manifest(step: int, sums: Sums) -> str:
    """The text of MANIFEST.json. The same values always give the same text, which ``_verify`` relies on."""
    return json.dumps({"format": FORMAT, "step": step, "files": sums}, indent=1, sort_keys=True) + "\n"


def path(run_dir: Path, step: int) -> Path:
    """Path of the checkpoint of ``step``, whether or not it exists."""
    return step_path(Path(run_dir) / CHECKPOINTS, step)


def _set_aside(path: Path) -> Path:
    """Rename to path.broken, or path.broken2 and so on if that exists. Returns the new path."""
    return rename_to_free(path, itertools.chain([".broken"], (f".broken{i}" for i in itertools.count(2))))
