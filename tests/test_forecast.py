"""How long a run will take, by trial steps: the arithmetic by hand, and a run that says it."""

import re

import pytest
from tiny_run import TINY_CIT, TinyRun

from cit_scale.config import (
    EngineConfig,
    OptimConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from cit_scale.data.reader import Reader
from cit_scale.distributed.world import World
from cit_scale.engines.build import prepare_engine
from cit_scale.run import forecast
from cit_scale.run.setup import PreparedRun


def never():
    return False


@pytest.fixture
def prepared(tiny_digits, tmp_path):
    def prepare(ema_decay=None, teachers=None):
        config = RunConfig(
            runs_dir=str(tmp_path),
            student=StudentConfig(name="cit_tiny_patch16_224", kwargs=TINY_CIT),
            teachers=teachers or {},
            optim=OptimConfig(ema_decay=ema_decay),
            engine=EngineConfig(name="plain"),
            train=TrainConfig(epochs=5, eval_every_epochs=2, global_batch_size=64, micro_batch_size=32),
        )
        reader = Reader(tiny_digits)
        return PreparedRun(config, prepare_engine(config, World()), reader, reader, {})

    return prepare


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_steps_and_evaluations_are_counted(ema_decay, prepared, monkeypatch):
    """Each part takes a second: data, forward pass, update. No teachers, but their (empty) part is asked for."""
    monkeypatch.setattr(forecast, "_median_s", lambda function, device, asked_to_stop: 1.0)
    run = prepared(ema_decay)
    found = forecast.forecast(run, never)
    networks = 1 if ema_decay is None else 2
    evaluation_s = networks * 57 * (1 + 1)  # 1797 images in batches of 32: forward pass and data
    epoch_s = 28 * 2 * (1 + 1 + 1)  # 28 steps of two micro-steps: data, update, the teachers' part
    assert found.total_s == 5 * epoch_s + 3 * evaluation_s
    assert found.first_evaluation_s == 2 * epoch_s + evaluation_s


def test_teachers_take_part_in_each_step_and_are_evaluated_once(prepared, monkeypatch):
    monkeypatch.setattr(forecast, "_median_s", lambda function, device, asked_to_stop: 1.0)
    teacher = TeacherConfig("resnet10t", {"channels": [8, 8, 16, 16], "stem_width": 8})
    alone, advised = (forecast.forecast(prepared(teachers=teachers), never) for teachers in (None, {"conv": teacher}))
    assert advised.total_s - alone.total_s == 57 * (1 + 1)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.94, "0.9 s"),
        (59, "59 s"),
        (119, "119 s"),
        (121, "2.0 min"),
        (5400, "90 min"),
        (7300, "2.0 h"),
        (2e5, "2.3 days"),
    ],
)
def test_durations_are_said_in_units_that_fit(seconds, shown):
    assert forecast.shown_s(seconds) == shown


def test_a_forecast_ends_with_the_trial_in_which_the_run_is_asked_to_stop(prepared, monkeypatch):
    tried = []
    monkeypatch.setattr(forecast, "_timed_s", lambda function, device: tried.append(function) or 1.0)
    assert forecast.forecast_lines(prepared(), lambda: len(tried) == 6) == []
    assert len(tried) == 6
    assert len(forecast.forecast_lines(prepared(), never)) == 1


def test_a_forecast_that_fails_costs_a_line_and_no_run(prepared, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(forecast, "forecast", fail)
    (line,) = forecast.forecast_lines(prepared(), never)
    assert line == "how long the run takes is not known: MemoryError in a trial step"


def test_a_run_says_beforehand_how_long_it_takes_and_once(tiny_inputs, tmp_path):
    run = TinyRun(tiny_inputs, tmp_path, more=("--train.forecast=true",))
    ended = run.finish()
    said = (
        r"tiny  takes about [\d.]+ (s|min) on this machine \(the student .*\), by 3 trial steps; "
        r"the first evaluation comes after about [\d.]+ s\ntiny  starts in"
    )
    assert re.search(said, ended.outputs[0])
    assert "takes about" not in ended.outputs[1]
    assert "takes about" not in run.finish().outputs[0]
