import contextlib
import errno
import io
import json
import math
import re
import time

import pytest
import sabotage
import torch
from ranks import run_on_ranks
from rich.console import Console

from cit_scale.distributed.world import World
from cit_scale.run import metrics
from cit_scale.run.metrics import RunLog, RunningMeans, StepClock


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def open_log(folder, step=0):
    return RunLog(folder, World(), title="t", step=step, total_steps=10)


def test_means_are_over_what_came_since_the_last_drain():
    means = RunningMeans()
    means.add({"loss": torch.tensor(1.0), "label": torch.tensor(4.0)})
    means.add({"loss": torch.tensor(3.0), "label": torch.tensor(4.0)})
    assert means.drain(World()) == {"loss": 2.0, "label": 4.0}
    means.add({"loss": torch.tensor(7.0), "label": torch.tensor(0.0)})
    assert means.drain(World()) == {"loss": 7.0, "label": 0.0}
    assert means.drain(World()) == {}


def test_a_resumed_log_drops_the_lines_past_its_step_and_a_torn_last_line(tmp_path):
    log = open_log(tmp_path)
    for step in (2, 4, 6):
        log.record(step, {"loss": float(step)})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    log = open_log(tmp_path, step=4)
    log.record(6, {"loss": 60.0})
    log.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(2, 2.0), (4, 4.0), (6, 60.0)]


def test_a_run_from_the_start_begins_a_new_log(tmp_path):
    for value in (1.0, 2.0):
        log = open_log(tmp_path)
        log.record(2, {"loss": value})
        log.close()
    assert [line["loss"] for line in lines(tmp_path)] == [2.0]


def test_a_loss_that_is_not_a_number_is_still_valid_json(tmp_path):
    log = open_log(tmp_path)
    log.record(1, {"loss": math.nan, "images_per_s": None})
    log.close()

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {"step": 1, "loss": "nan", "images_per_s": None}


def test_curves_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = open_log(tmp_path)
    log.record(3, {"loss": 0.5})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.5)]


def test_lines_that_could_not_be_written_come_when_the_disk_is_back(tmp_path, capsys):
    log = open_log(tmp_path)
    log.record(1, {"loss": 1.0})
    (tmp_path / "metrics.jsonl").rename(tmp_path / "before")
    (tmp_path / "metrics.jsonl").mkdir()  # nobody can write a line to a folder
    log.record(2, {"loss": 2.0})
    log.record(3, {"loss": 3.0})
    assert capsys.readouterr().out.count("metrics cannot be written") == 1
    (tmp_path / "metrics.jsonl").rmdir()
    (tmp_path / "before").rename(tmp_path / "metrics.jsonl")
    log.record(4, {"loss": 4.0})
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_a_half_written_line_is_taken_back(tmp_path, monkeypatch):
    log = open_log(tmp_path)
    log.record(1, {"loss": 1.0})
    monkeypatch.setattr("cit_scale.run.metrics.append", half_of_it)
    log.record(2, {"loss": 2.0})
    assert [line["step"] for line in lines(tmp_path)] == [1]
    monkeypatch.undo()
    log.record(3, {"loss": 3.0})
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def half_of_it(path, text):
    with path.open("a") as file:
        file.write(text[: len(text) // 2])
        file.flush()
        raise OSError(errno.ENOSPC, "No space left on device")


def test_curves_that_cannot_be_written_do_not_stop_the_lines(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    log = open_log(tmp_path)
    log.record(1, {"loss": 1.0})
    (tmp_path / "tensorboard").unlink()
    log.record(2, {"loss": 2.0})
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert capsys.readouterr().out.count("metrics cannot be written") == 1
    assert list((tmp_path / "tensorboard").iterdir())


def test_on_a_terminal_of_80_columns_the_bar_shows_steps_and_time_left_below_the_values(tmp_path, monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=80, highlight=False, legacy_windows=False)
    monkeypatch.setattr(metrics, "Console", lambda **options: terminal)
    log = RunLog(tmp_path, World(), title="digits/teachers/conv", step=0, total_steps=330)
    for step in range(1, 31):
        time.sleep(0.01)
        log.advance(step)
    values = {f"loss_{name}": 1.23456 for name in ("label", "conv", "inv", "swin", "fifth", "sixth")}
    log.record(30, {"loss": 2.0, **values})
    log.close()
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()))
    assert any(line.startswith("digits/teachers/conv  step 30/330  loss 2  loss_label 1.235") for line in lines)
    bars = [line for line in lines if re.search(r"30/330 0:00:\d\d left 0:00:\d\d", line)]
    assert bars
    assert all(line.startswith("digits/teachers/conv ") and len(line) <= 80 for line in bars)


def test_other_ranks_write_nothing(tmp_path):
    log = RunLog(
        tmp_path, World(rank=1, local_rank=1, world_size=2, local_world_size=2), title="t", step=0, total_steps=1
    )
    log.record(1, {"loss": 1.0})
    log.say("hello")
    log.close()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def passing(monkeypatch):
    """``passing(seconds)``: time goes on, and only then."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def go_on(seconds):
        now[0] += seconds

    return go_on


def test_throughput_is_that_of_the_interval_from_turn_to_turn_without_what_is_excluded(passing):
    clock = StepClock(64)
    assert clock.turn() == 0.0
    for _ in range(StepClock.WARMUP_TURNS):
        passing(50)
        assert clock.turn() == 50
    assert clock.turns == StepClock.WARMUP_TURNS
    assert clock.interval_costs(World()) == {"images_per_s": None, "step_ms": None, "data_share": None}
    assert clock.mean_images_per_s() is None
    for turn_s in (2, 2, 8):
        with clock.excluded():
            passing(100)  # evaluation, say
        passing(turn_s / 2)  # a step, and half of the turn in which the slowest rank is waited for
        with clock.excluded():
            passing(30)
        passing(turn_s / 2)
        assert clock.turn() == turn_s
    assert clock.interval_costs(World()) == {"images_per_s": 64 * 3 / 12, "step_ms": 4000.0, "data_share": 0.0}
    passing(4)
    clock.turn()
    assert clock.interval_costs(World())["images_per_s"] == 64 / 4
    assert clock.interval_costs(World())["images_per_s"] is None
    assert clock.mean_images_per_s() == 64 * 4 / 16


def test_what_breaks_off_while_it_is_excluded_does_not_count_either(passing):
    clock = StepClock(64)
    clock.turn()
    with contextlib.suppress(OSError), clock.excluded():
        passing(9)
        raise OSError("full")
    passing(1)
    assert clock.turn() == 1


def test_the_share_of_a_step_that_waits_for_data_is_measured_where_the_batch_is_asked_for(passing):
    def slow_batches():
        for number in range(9):
            passing(1.5)
            yield number

    clock = StepClock(8)
    batches = clock.waiting_for(slow_batches())
    clock.turn()
    for step in range(9):
        assert next(batches) == step
        passing(4.5)  # forward, backward, update
        clock.turn()
    assert clock.interval_costs(World()) == {"images_per_s": 8 / 6, "step_ms": 6000.0, "data_share": 0.25}


def test_closing_the_timed_batches_closes_the_stream():
    closed = []

    def batches():
        try:
            yield 1
            yield 2
        finally:
            closed.append(True)

    timed = StepClock(8).waiting_for(batches())
    assert next(timed) == 1
    timed.close()
    assert closed == [True]


def share_of_ranks_that_wait(world):
    """Rank 1 waits for its data in half of each turn, rank 0 in none of it."""
    now = [0.0]
    time.perf_counter = lambda: now[0]
    clock = StepClock(8)

    def batches():
        while True:
            now[0] += 2.0 * world.rank
            yield None

    timed = clock.waiting_for(batches())
    clock.turn()
    for _ in range(StepClock.WARMUP_TURNS + 2):
        next(timed)
        now[0] += 4.0 - 2.0 * world.rank
        clock.turn()
    return clock.interval_costs(world)["data_share"]


def test_the_share_is_that_of_the_rank_that_waits_longest():
    assert run_on_ranks(2, share_of_ranks_that_wait) == [0.5, 0.5]


@pytest.mark.fault
def test_the_speed_in_the_log_is_that_of_its_interval_and_waits_for_the_slowest_rank(tiny_run):
    slept_s = 1.5
    slow = (sabotage.at, 1, "applied", 9, time.sleep, slept_s)
    ended = tiny_run.run("--train.eval_every_epochs", "9", "--train.save_every_steps", "99", sabotage=slow)
    assert ended.codes == [0, 0], ended.output
    speed = {line["step"]: line["images_per_s"] for line in lines(tiny_run.run_dir) if "loss" in line}
    assert [step for step, images_per_s in speed.items() if images_per_s is None] == [1, 2, 3, 4, 5]
    # Rank 0 meets the slow rank in the next collective that it waits for, which may be in the next step.
    slowest = min(speed[9], speed[10])
    assert slowest < 8 / slept_s
    assert min(speed[8], speed[11]) > 2 * slowest
    mean = json.loads((tiny_run.run_dir / "results.json").read_text())["images_per_s"]
    counted = [images_per_s for images_per_s in speed.values() if images_per_s is not None]
    assert mean == pytest.approx(len(counted) / sum(1 / images_per_s for images_per_s in counted), rel=1e-6)
