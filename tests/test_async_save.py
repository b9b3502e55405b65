import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks

from cit_scale.checkpoint import async_save
from cit_scale.checkpoint import store as checkpoint
from cit_scale.checkpoint.async_save import AsyncCheckpointer
from cit_scale.checkpoint.store import load_newest
from cit_scale.config import TrainConfig
from cit_scale.distributed.world import World
from cit_scale.errors import CannotWriteError, DivergedError


class CountingEngine:
    """A state that says which step it was copied at, and one step later is another."""

    def __init__(self) -> None:
        self.tensor = torch.zeros(3)

    def state_shapes(self) -> dict[str, torch.Size]:
        return {"weight/model.x": torch.Size([3]), "exp_avg/model.x": torch.Size([3])}

    def state(self, keys: Any) -> dict[str, torch.Tensor]:
        return {key: self.tensor.clone() for key in self.state_shapes() if key in keys}


class Told:
    """What the checkpointer says and reports."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.costs: list[tuple[int, dict[str, float]]] = []

    def report(self, step: int, costs: dict[str, float]) -> None:
        self.costs.append((step, costs))


ALONE = World()


def make_saver(
    run_dir: Path, world: World = ALONE, step: int = 0, **train: Any
) -> tuple[AsyncCheckpointer, CountingEngine, Told]:
    engine, told = CountingEngine(), Told()
    settings = TrainConfig(**{"save_every_steps": 4, "save_every_minutes": 0, **train})
    made = AsyncCheckpointer(engine, run_dir, settings, world, step=step, say=told.lines.append, report=told.report)
    return made, engine, told


def meta(step: int) -> dict[str, Any]:
    return {"made at": step}


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when the test says so."""
    now = [1000.0]
    monkeypatch.setattr(async_save.time, "monotonic", lambda: now[0])
    return now


def test_a_checkpoint_is_due_every_so_many_steps_and_not_where_the_run_began(tmp_path):
    made, *_ = make_saver(tmp_path, step=8)
    assert [step for step in range(8, 20) if made.is_due(step)] == [12, 16]


def test_steps_that_are_kept_for_good_are_due_whatever_the_others_are(tmp_path):
    made, *_ = make_saver(tmp_path, keep_every_steps=6)
    assert [step for step in range(1, 14) if made.is_due(step)] == [4, 6, 8, 12]


def test_a_checkpoint_is_due_when_the_last_one_is_older_than_so_many_minutes(tmp_path, clock):
    made, *_ = make_saver(tmp_path, save_every_steps=1000, save_every_minutes=2)
    assert not made.is_overdue
    clock[0] += 119
    assert not made.is_overdue
    clock[0] += 1
    assert made.is_overdue
    made.save(5, meta(5))
    assert not made.is_overdue
    clock[0] += 120
    assert made.is_overdue
    made.settle()


def test_training_goes_on_while_the_copy_of_the_boundary_is_written(tmp_path, monkeypatch):
    written = threading.Event()
    real = checkpoint.save

    def slow(*args: Any) -> int:
        assert written.wait(10)
        return real(*args)

    monkeypatch.setattr(checkpoint, "save", slow)
    made, engine, told = make_saver(tmp_path)
    engine.tensor += 4
    made.save(4, meta(4))  # returns although nothing is written yet
    assert load_newest(tmp_path, World()) is None
    engine.tensor += 1
    written.set()
    made.settle()
    found = load_newest(tmp_path, World())
    assert found.step == 4
    assert found.state["weight/model.x"].tolist() == [4.0, 4.0, 4.0]
    assert found.meta == meta(4)
    ((step, costs),) = told.costs
    assert step == 4
    assert costs["save_bytes"] == sum(file.stat().st_size for file in checkpoint.path(tmp_path, 4).iterdir()) - len(
        (checkpoint.path(tmp_path, 4) / "MANIFEST.json").read_bytes()
    )
    assert 0 <= costs["save_stall_s"] < 1
    assert costs["save_write_s"] > 0


def test_the_next_save_waits_for_the_one_before(tmp_path, monkeypatch):
    real = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args: (time.sleep(0.3), real(*args))[1])
    made, _, told = make_saver(tmp_path)
    made.save(4, meta(4))
    made.save(8, meta(8))
    made.settle(insist=True)
    assert [step for step, _ in told.costs] == [4, 8]
    assert told.costs[1][1]["save_stall_s"] > 0.25
    assert load_newest(tmp_path, World()).step == 8


def test_saving_a_step_again_does_nothing(tmp_path):
    made, engine, told = make_saver(tmp_path)
    made.save(4, meta(4))
    engine.tensor += 1
    made.save(4, meta(5))
    made.settle(insist=True)
    assert len(told.costs) == 1
    assert load_newest(tmp_path, World()).meta == meta(4)


def test_a_disk_that_is_full_is_announced_and_tried_again(tmp_path, monkeypatch, clock):
    real = checkpoint.save

    def full(*args: Any) -> int:
        raise CannotWriteError("no space left")

    monkeypatch.setattr(checkpoint, "save", full)
    made, _, told = make_saver(tmp_path, save_every_steps=1000, save_every_minutes=60)
    made.save(1000, meta(1000))
    while not made.has_failed:
        time.sleep(0.01)
    made.settle()
    assert told.lines == ["no space left; training goes on, and tries again in 60 s at the latest"]
    assert not made.has_failed
    assert not made.is_overdue
    assert made.is_due(1000), "the very step may be saved again"
    clock[0] += async_save.RETRY_S
    assert made.is_overdue
    monkeypatch.setattr(checkpoint, "save", real)
    made.save(1001, meta(1001))
    made.settle(insist=True)
    assert load_newest(tmp_path, World()).step == 1001


def test_the_last_checkpoint_has_to_be_written(tmp_path, monkeypatch):
    def full(*args: Any) -> int:
        raise CannotWriteError("no space left")

    monkeypatch.setattr(checkpoint, "save", full)
    made, *_ = make_saver(tmp_path)
    made.save(5, meta(5))
    with pytest.raises(CannotWriteError):
        made.settle(insist=True)


def test_a_state_that_is_not_finite_ends_the_run(tmp_path):
    made, engine, _ = make_saver(tmp_path)
    engine.tensor[1] = float("inf")
    made.save(4, meta(4))
    with pytest.raises(DivergedError, match=r"weight/model.x and 1 more is no longer finite at step 4"):
        made.settle()


def test_two_ranks_write_beside_their_training(tmp_path):
    for steps in run_on_ranks(2, save_while_training, tmp_path):
        assert steps == [4, 8, 12]
    assert load_newest(tmp_path, World()).state["exp_avg/model.x"].tolist() == [12.0] * 3


def save_while_training(world: World, run_dir: Path) -> list[int]:
    made, engine, told = make_saver(run_dir, world)
    for step in range(1, 14):
        if made.is_due(step - 1):
            made.save(step - 1, meta(step - 1))
        engine.tensor += 1
        # Training's own collectives, at the same time as those of the writers.
        total = torch.ones(10_000)
        torch.distributed.all_reduce(total)
        assert total.sum() == 20_000
    made.settle(insist=True)
    return [step for step, _ in told.costs]
