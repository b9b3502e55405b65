import errno
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from ranks import run_on_ranks
from torch import Tensor

from cit_scale.checkpoint import store as checkpoint
from cit_scale.checkpoint.layout import share_out
from cit_scale.checkpoint.store import Retention, add_score, load_newest, save
from cit_scale.distributed.world import World
from cit_scale.errors import MissingInputError, RefusedError, TransientError

ALONE = World()

# A training state: its keys and shapes, and where two ranks, or one, write each tensor.
SHAPES = {
    "weight/model.head": (5, 3),
    "buffer/model.seen": (),
    "ema/model.head": (5, 3),
    "exp_avg/model.head": (5, 3),
    "exp_avg_sq/model.head": (5, 3),
    "optimizer_step": (),
}
KEEP_TWO = Retention(last=2)


def state_of(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    state = {key: torch.randn(*shape, generator=generator) for key, shape in SHAPES.items() if shape}
    state["weight/model.head"][0] = torch.tensor([-0.0, 1e-45, torch.pi])
    return state | {key: torch.tensor(step) for key, shape in SHAPES.items() if not shape}


def meta_of(step: int) -> dict[str, Any]:
    return {"cursor": [1, step]}


def save_step(
    run_dir: Path, step: int, world: World = ALONE, *, retention: Retention = KEEP_TWO, loss: float = 1.5
) -> int:
    shares = share_out({key: torch.Size(shape) for key, shape in SHAPES.items()}, world.world_size)
    state = {key: tensor for key, tensor in state_of(step).items() if key in shares[world.rank]}
    return save(run_dir, step, state, shares, meta_of(step) | {"loss": loss}, world, retention)


def save_steps(run_dir: Path, *steps: int, keep: int = 2) -> None:
    for step in steps:
        save_step(run_dir, step, retention=Retention(last=keep))


def assert_is_step(found: checkpoint.Checkpoint | None, step: int) -> None:
    assert found is not None
    assert found.step == step
    assert found.meta == meta_of(step) | {"loss": 1.5}
    expected = state_of(step)
    assert found.state.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found.state[key].dtype == tensor.dtype
        assert found.state[key].shape == tensor.shape
        assert found.state[key].numpy().tobytes() == tensor.numpy().tobytes()


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "ckpt").iterdir())


def test_the_newest_comes_back_bit_for_bit(tmp_path):
    save_steps(tmp_path, 9, 10, 100)
    assert_is_step(load_newest(tmp_path, ALONE), 100)


def test_steps_of_seven_digits_are_newer_than_those_of_six(tmp_path):
    save_steps(tmp_path, 999_999, 1_000_000)
    assert_is_step(load_newest(tmp_path, ALONE), 1_000_000)


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert load_newest(tmp_path, ALONE) is None
    (tmp_path / "ckpt").mkdir()
    assert load_newest(tmp_path, ALONE) is None


def test_a_first_save_that_was_killed_leaves_a_run_without_checkpoints(tmp_path):
    (tmp_path / "ckpt" / "step_000001.partial").mkdir(parents=True)
    assert load_newest(tmp_path, ALONE) is None


def test_the_newest_are_kept_and_leftovers_go(tmp_path):
    save_steps(tmp_path, 1, 2)
    (tmp_path / "ckpt" / "step_000007.partial").mkdir()
    (tmp_path / "ckpt" / "step_000001.deleted").mkdir()
    (tmp_path / "ckpt" / "step_000000.broken").mkdir()
    save_steps(tmp_path, 3, 4, keep=2)
    assert names(tmp_path) == ["step_000000.broken", "step_000003", "step_000004"]


def test_saving_a_step_again_leaves_it_as_it_was_committed(tmp_path):
    save_steps(tmp_path, 3)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert save_step(tmp_path, 3) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert_is_step(load_newest(tmp_path, ALONE), 3)


def test_saving_a_step_that_is_damaged_writes_it_anew(tmp_path):
    save_steps(tmp_path, 3)
    (tmp_path / "ckpt" / "step_000003" / "meta.json").unlink()
    save_steps(tmp_path, 3)
    assert_is_step(load_newest(tmp_path, ALONE), 3)
    assert names(tmp_path) == ["step_000003", "step_000003.broken"]


def test_a_folder_with_a_later_step_is_another_runs(tmp_path):
    save_steps(tmp_path, 5)
    with pytest.raises(RefusedError, match="holds step 5, later than the step 4"):
        save_steps(tmp_path, 4)
    assert names(tmp_path) == ["step_000005"]


# Damage.


def flip_bit(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def say_format(manifest: Path, number: int) -> None:
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": number}))


def replace(folder: Path, other: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit in the tensors": (lambda f: flip_bit(f / "student.safetensors", -2), "has another SHA-256"),
    "a flipped bit in the meta data": (lambda f: flip_bit(f / "meta.json", 4), "meta.json has another SHA-256"),
    "a flipped bit in the manifest": (lambda f: flip_bit(f / "MANIFEST.json", -2, 3), "JSONDecodeError"),
    "a cut tensor file": (lambda f: truncate(f / "student.safetensors"), "bytes instead of"),
    "a cut manifest": (lambda f: truncate(f / "MANIFEST.json"), "JSONDecodeError"),
    "a blank in the manifest": (lambda f: (f / "MANIFEST.json").open("a").write(" "), "MANIFEST.json is damaged"),
    "an empty manifest": (lambda f: (f / "MANIFEST.json").write_text(""), "JSONDecodeError"),
    "no tensor file": (lambda f: (f / "student.safetensors").unlink(), "student.safetensors is missing"),
    "no meta data": (lambda f: (f / "meta.json").unlink(), "meta.json is missing"),
    "a cut moment file": (lambda f: truncate(f / "optimizer_000.safetensors"), "bytes instead of"),
    "no index": (lambda f: (f / "index.json").unlink(), "index.json is missing"),
    "an earlier format": (lambda f: say_format(f / "MANIFEST.json", 1), "format 1, this version reads 2"),
    "no manifest": (lambda f: (f / "MANIFEST.json").unlink(), "MANIFEST.json is missing"),
    "another step's files": (lambda f: replace(f, f.with_name("step_000001")), "MANIFEST.json is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_with_the_reason_and_the_older_one_taken(damage, tmp_path, caplog):
    save_steps(tmp_path, 1, 2)
    harm, reason = DAMAGE[damage]
    harm(tmp_path / "ckpt" / "step_000002")
    assert_is_step(load_newest(tmp_path, ALONE), 1)
    assert names(tmp_path) == ["step_000001", "step_000002.broken"]
    assert "checkpoint of step 2 does not verify" in caplog.text
    assert reason in caplog.text


def test_any_flipped_bit_is_noticed(tmp_path):
    save_steps(tmp_path / "good", 1)
    files = sorted((tmp_path / "good" / "ckpt" / "step_000001").iterdir())
    bits = [(file, position, bit) for file in files for position in range(file.stat().st_size) for bit in range(8)]
    for file, position, bit in random.Random(0).sample(bits, 200):
        damaged = tmp_path / "damaged"
        shutil.copytree(tmp_path / "good", damaged)
        flip_bit(damaged / file.relative_to(tmp_path / "good"), position, bit)
        with pytest.raises(RefusedError):
            load_newest(damaged, ALONE)
        shutil.rmtree(damaged)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(tmp_path):
    save_steps(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / "ckpt" / f"step_00000{step}" / "MANIFEST.json").unlink()
    for _ in range(2):
        with pytest.raises(RefusedError, match=r"none verifies \(step 2: MANIFEST.json is missing; step 1: "):
            load_newest(tmp_path, ALONE)
    assert names(tmp_path) == ["step_000001", "step_000002"], "there is nothing to make room for"


def test_a_run_of_another_version_is_left_as_it_is(tmp_path):
    save_steps(tmp_path, 1, 2)
    for step in (1, 2):
        say_format(tmp_path / "ckpt" / f"step_00000{step}" / "MANIFEST.json", 3)
    with pytest.raises(RefusedError, match="says format 3, this version reads 2"):
        load_newest(tmp_path, ALONE)
    assert names(tmp_path) == ["step_000001", "step_000002"]


def test_checkpoints_that_a_person_set_aside_are_not_forgotten(tmp_path):
    save_steps(tmp_path, 1)
    (tmp_path / "ckpt" / "step_000001").rename(tmp_path / "ckpt" / "step_000001.broken")
    with pytest.raises(RefusedError, match="all were set aside before"):
        load_newest(tmp_path, ALONE)


def test_a_checkpoint_that_breaks_twice_is_kept_twice(tmp_path):
    save_steps(tmp_path, 1)
    for _ in range(2):
        save_steps(tmp_path, 2)
        (tmp_path / "ckpt" / "step_000002" / "meta.json").write_text("")
        assert_is_step(load_newest(tmp_path, ALONE), 1)
    assert names(tmp_path) == ["step_000001", "step_000002.broken", "step_000002.broken2"]


# Kills.


@pytest.mark.slow
def test_a_save_killed_at_any_point_loses_at_most_itself(tmp_path):
    save_steps(tmp_path / "before", 1, 2)
    point, reached_the_end = 0, False
    survivors = []
    while not reached_the_end:
        for moment in ("before", "within", "after"):
            run_dir = tmp_path / f"{point} {moment}"
            shutil.copytree(tmp_path / "before", run_dir)
            exit_code = exit_code_of_fork(save_and_die, run_dir, point, moment)
            assert exit_code in (0, -signal.SIGKILL), f"at {point} {moment}"
            reached_the_end = exit_code == 0
            found = load_newest(run_dir, ALONE)
            assert_is_step(found, 3 if found.step == 3 else 2)
            survivors.append(found.step)
            assert not any("broken" in name for name in names(run_dir)), f"at {point} {moment}"
            save_steps(run_dir, found.step + 1)
            assert names(run_dir) == [f"step_{step:06d}" for step in (found.step, found.step + 1)], (
                f"at {point} {moment}"
            )
        point += 1
    assert point == 19  # 18 calls that touch the disk, and none
    assert survivors == sorted(survivors), "once committed, always committed"
    assert {2, 3} == set(survivors)


def exit_code_of_fork(function: Callable[..., None], *args: Any) -> int:
    """A fork is enough, and fast, for what only writes files."""
    pid = os.fork()
    if pid == 0:
        try:
            function(*args)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def save_and_die(run_dir: Path, point: int, moment: str) -> None:
    """Save step 3, and die by SIGKILL before, within or after call number ``point`` of those that touch the disk."""
    calls = 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def dying(function: Callable[..., Any], half: Callable[..., Any] | None = None) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            is_here, calls = calls == point, calls + 1
            if is_here and moment == "before":
                die()
            if is_here and moment == "within":
                if half is not None:
                    half(*args, **kwargs)
                die()
            result = function(*args, **kwargs)
            if is_here:
                die()
            return result

        return call

    def half_of_save_file(tensors: dict[str, Tensor], path: Path) -> None:
        data = safetensors.torch.save(tensors)
        path.write_bytes(data[: len(data) // 2])

    def half_of_write_text(path: Path, text: str) -> None:
        path.write_bytes(text.encode()[: len(text) // 2])

    def half_of_rmtree(path: Path) -> None:
        next(iter(path.iterdir())).unlink()

    Path.write_text = dying(Path.write_text, half_of_write_text)
    Path.rename = dying(Path.rename)
    safetensors.torch.save_file = dying(safetensors.torch.save_file, half_of_save_file)
    shutil.rmtree = dying(shutil.rmtree, half_of_rmtree)
    os.fsync = dying(os.fsync)
    save_steps(run_dir, 3)


def test_nothing_is_renamed_before_it_and_its_manifest_are_on_the_disk(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename

    def recording_fsync(descriptor: int) -> None:
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def recording_rename(path: Path, target: Path) -> Path:
        events.append(("rename", path.name))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "rename", recording_rename)
    save_steps(tmp_path, 1)
    assert events == [
        ("sync", "student.safetensors"),
        ("sync", "student_ema.safetensors"),
        ("sync", "optimizer_000.safetensors"),
        ("sync", "index.json"),
        ("sync", "meta.json"),
        ("sync", "MANIFEST.json"),
        ("sync", "step_000001.partial"),
        ("rename", "step_000001.partial"),
        ("sync", "ckpt"),
        ("sync", tmp_path.name),
    ]


# Many ranks.


def test_two_ranks_save_together_and_agree_on_the_older_one_when_the_newest_is_damaged(tmp_path):
    for step in run_on_ranks(2, save_damage_and_load, tmp_path):
        assert step == 1
    assert names(tmp_path) == ["step_000001", "step_000002.broken"]


def save_damage_and_load(world: World, run_dir: Path) -> int:
    for step in (1, 2):
        save_step(run_dir, step, world)
    assert len(list((run_dir / "ckpt" / "step_000002").glob("*.safetensors"))) == 4  # student, average, a file per rank
    if world.is_main:
        flip_bit(run_dir / "ckpt" / "step_000002" / "optimizer_001.safetensors", 100)
    found = load_newest(run_dir, world)
    assert_is_step(found, 1)
    return found.step


def test_a_rank_0_that_cannot_write_raises_on_every_rank(tmp_path):
    (tmp_path / "ckpt").write_text("a file where the folder should be")
    for kind, message in run_on_ranks(2, failing_save, tmp_path):
        assert kind == "CannotWriteError"
        assert "checkpoint of step 1" in message


def test_a_rank_1_that_cannot_write_raises_on_every_rank_and_leaves_nothing(tmp_path):
    save_steps(tmp_path, 1)
    for kind, message in run_on_ranks(2, save_on_a_disk_that_is_full_for_rank_1, tmp_path):
        assert kind == "CannotWriteError"
        assert "checkpoint of step 2" in message
        assert "No space left" in message
    assert names(tmp_path) == ["step_000001"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_state_that_is_not_finite_on_one_rank_is_not_saved(rank, tmp_path):
    for kind, message in run_on_ranks(2, save_not_a_number, tmp_path, rank):
        assert kind == "DivergedError"
        assert "no longer finite at step 1" in message
    assert names(tmp_path) == []


def test_a_rank_that_cannot_read_raises_on_every_rank(tmp_path):
    save_steps(tmp_path, 1)
    for kind, message in run_on_ranks(2, load_with_one_blind_rank, tmp_path):
        assert kind == "ConfigError"
        assert "a file system that all nodes share" in message


def outcome(function: Callable[[], Any]) -> tuple[str, str]:
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def failing_save(world: World, run_dir: Path) -> tuple[str, str]:
    return outcome(lambda: save_step(run_dir, 1, world))


def save_on_a_disk_that_is_full_for_rank_1(world: World, run_dir: Path) -> tuple[str, str]:
    def fail(tensors: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    if world.rank == 1:
        safetensors.torch.save_file = fail
    return outcome(lambda: save_step(run_dir, 2, world))


def save_not_a_number(world: World, run_dir: Path, rank: int) -> tuple[str, str]:
    shares = share_out({key: torch.Size(shape) for key, shape in SHAPES.items()}, world.world_size)
    state = {key: tensor for key, tensor in state_of(1).items() if key in shares[world.rank]}
    if world.rank == rank:
        next(tensor for tensor in state.values() if tensor.is_floating_point()).view(-1)[1] = float("nan")
    return outcome(lambda: save(run_dir, 1, state, shares, meta_of(1), world, KEEP_TWO))


def load_with_one_blind_rank(world: World, run_dir: Path) -> tuple[str, str]:
    return outcome(lambda: load_newest(run_dir if world.is_main else run_dir / "elsewhere", world))


def test_what_json_cannot_hold_is_refused_before_a_checkpoint_is_committed(tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        save_step(tmp_path, 1, loss=float("nan"))
    assert load_newest(tmp_path, ALONE) is None


def test_a_checkpoint_can_be_read_with_nothing_but_safetensors_and_json(tmp_path):
    save_steps(tmp_path, 1)
    folder = tmp_path / "ckpt" / "step_000001"
    expected = state_of(1)
    student = safetensors.torch.load_file(folder / "student.safetensors")
    assert student.keys() == {"head", "seen"}
    assert torch.equal(student["head"], expected["weight/model.head"])
    assert torch.equal(
        safetensors.torch.load_file(folder / "student_ema.safetensors")["head"], expected["ema/model.head"]
    )
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert manifest["step"] == 1
    assert manifest["files"]["meta.json"]["bytes"] == (folder / "meta.json").stat().st_size


# Retention.


def test_the_best_and_every_so_many_are_kept_beside_the_newest(tmp_path):
    retention = Retention(last=1, every=10, best=2)
    for step, top1 in [(4, 50.0), (8, 70.0), (10, None), (12, 60.0), (16, 10.0), (20, None), (24, None)]:
        if top1 is not None:
            add_score(tmp_path, step, top1)
        save_step(tmp_path, step, retention=retention)
    assert names(tmp_path) == ["scores.json", *(f"step_{step:06d}" for step in (8, 10, 12, 20, 24))]


def test_of_two_equally_good_the_later_is_kept(tmp_path):
    for step in (1, 2, 3):
        if step < 3:
            add_score(tmp_path, step, 50.0)
        save_step(tmp_path, step, retention=Retention(last=1, best=1))
    assert names(tmp_path) == ["scores.json", "step_000002", "step_000003"]


def test_a_score_may_come_after_its_checkpoint(tmp_path):
    """A run that is stopped in an evaluation saves first, and evaluates when it goes on."""
    save_step(tmp_path, 1)
    add_score(tmp_path, 1, 50.0)
    for step in (2, 3):
        save_step(tmp_path, step, retention=Retention(last=1, best=1))
    assert names(tmp_path) == ["scores.json", "step_000001", "step_000003"]


def test_damaged_scores_keep_nothing_and_harm_nothing(tmp_path):
    save_step(tmp_path, 1)
    (tmp_path / "ckpt" / "scores.json").write_text('{"1": ')
    save_step(tmp_path, 2, retention=Retention(last=1, best=1))
    add_score(tmp_path, 2, 7.0)
    assert names(tmp_path) == ["scores.json", "step_000002"]
    assert_is_step(load_newest(tmp_path, ALONE), 2)


def test_what_cannot_be_deleted_does_not_stop_the_saving(tmp_path, monkeypatch, caplog):
    """Over NFS a file that somebody has open stays, and its folder with it."""

    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    monkeypatch.setattr(shutil, "rmtree", busy)
    save_steps(tmp_path, 1, 2, 3, 4, keep=1)
    assert_is_step(load_newest(tmp_path, ALONE), 4)
    assert "were not deleted" in caplog.text
    monkeypatch.undo()
    save_steps(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["step_000005"]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.EIO, TransientError),
        (errno.EACCES, MissingInputError),
        (errno.ENOMEM, TransientError),
        (errno.EMFILE, TransientError),
    ],
)
def test_what_cannot_be_read_is_not_taken_for_damage(code, expected, tmp_path, monkeypatch):
    save_steps(tmp_path, 1, 2)

    def failing(path: Path) -> str:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(checkpoint, "file_sha256", failing)
    with pytest.raises(expected, match="step 2 cannot be read"):
        load_newest(tmp_path, ALONE)
    monkeypatch.undo()
    assert names(tmp_path) == ["step_000001", "step_000002"]
    assert_is_step(load_newest(tmp_path, ALONE), 2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_tensor_is_written_by_one_rank_and_the_ranks_share_the_work(world_size):
    names = [f"model.block{i}" for i in range(40)]
    kinds = ("weight", "exp_avg", "exp_avg_sq", "ema")
    shapes = {f"{kind}/{name}": torch.Size([7, 1 + i]) for kind in kinds for i, name in enumerate(names)}
    shares = share_out(shapes, world_size)
    assert sorted(key for share in shares for key in share) == sorted(shapes)
    bytes_of = [sum(shapes[key].numel() for key in share) for share in shares]
    # The student and its average are one file each, a quarter of all: more than four ranks cannot share evenly.
    assert max(bytes_of) <= max(sum(bytes_of) / world_size * 1.05, sum(bytes_of) / 4)


def test_written_tensors_are_as_readable_as_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        checkpoint.write_tensors({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_score_that_was_half_written_does_not_stop_the_checkpoints(tmp_path):
    folder = tmp_path / "ckpt"
    folder.mkdir()
    (folder / "scores.json.partial").write_text("{")
    save_steps(tmp_path, 1)
    assert names(tmp_path) == ["step_000001"]
    assert not list(folder.glob("*.partial"))
