"""What a run learns from is missing, does not fit, or has changed since it began."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sabotage
import torch
from safetensors.torch import load_file, save_file
from tiny_run import (
    CLASSES,
    LAYOUTS,
    RECIPE,
    STEPS,
    TinyRun,
    assert_same_end,
    assert_same_tensors,
    write_idx,
    write_teacher,
)

from cit_scale.models.network import build_network

pytestmark = pytest.mark.fault

REPOSITORY = Path(__file__).parents[1]
TEACHER = RECIPE["teachers"]["conv"]
STOPPED_AT = 6


@pytest.fixture(scope="module")
def stopped_once(tiny_inputs, tmp_path_factory):
    """A run with inputs of its own, stopped in the middle."""
    inputs = tmp_path_factory.mktemp("own") / "inputs"
    shutil.copytree(tiny_inputs, inputs)
    recipe = inputs / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace(str(tiny_inputs), str(inputs)))
    run = TinyRun(inputs, tmp_path_factory.mktemp("stopped"))
    ended = run.run(sabotage=(sabotage.at, 1, "forward", STOPPED_AT, sabotage.send, 15))
    assert ended.codes == [75, 75], ended.output
    return run


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A copy of it. The inputs are in their place, and put back after the test."""
    good = tmp_path / "good"
    shutil.copytree(stopped_once.inputs, good)
    yield stopped_once.copy(tmp_path / "runs")
    shutil.rmtree(stopped_once.inputs)
    shutil.copytree(good, stopped_once.inputs)


def assert_refused(ended, code, *expected):
    assert ended.codes == [code] * len(ended.codes), ended.output
    assert ended.output.count("error:") == 1
    line = next(line for line in ended.outputs[0].splitlines() if line.startswith("error:"))
    for text in expected:
        assert text in line
    assert "Traceback" not in ended.output


def damaged(path):
    path.write_bytes(path.read_bytes()[:-1000])


TEACHERS = {
    "missing": (lambda path: path.unlink(), 3, ["do not exist"]),
    "of another architecture": (lambda path: write_teacher(path, "resnet10t", {"stem_width": 8}), 2, ["do not fit"]),
    "of another class count": (
        lambda path: write_teacher(path, TEACHER["model"], TEACHER["kwargs"], classes=7),
        2,
        ["have 7 classes, the data set has 3"],
    ),
    "damaged": (damaged, 3, ["cannot be read"]),
}


@pytest.mark.parametrize("how", TEACHERS)
@pytest.mark.parametrize("is_begun", [False, True])
def test_a_teacher_that_cannot_teach_is_one_line_and_nothing_is_written(how, is_begun, stopped, tmp_path, calm):
    run = stopped if is_begun else dataclasses.replace(stopped, runs_dir=tmp_path / "new")
    weights = run.inputs / "conv.safetensors"
    good = weights.read_bytes()
    harm, code, expected = TEACHERS[how]
    harm(weights)
    before = run.checkpoints()
    assert_refused(run.run(), code, str(weights), *expected)
    assert run.checkpoints() == before
    assert run.run_dir.exists() == is_begun
    weights.write_bytes(good)
    if is_begun:
        run.finish()
        assert_same_end(run, calm())


def retrain(run):
    write_teacher(run.inputs / "conv.safetensors", TEACHER["model"], TEACHER["kwargs"], seed=2)


def relabel(run):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 8, 8), np.uint8)
    write_idx(run.inputs / "train", pixels, (np.arange(48) + 1) % CLASSES)


def set_lr(run):
    recipe = run.inputs / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("lr: 0.002", "lr: 0.003"))


CHANGES = {
    "teacher": (retrain, "teacher conv: "),
    "data": (relabel, "data: "),
    "settings": (set_lr, "optim.lr: 0.002 -> 0.003"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_changed_since_the_start_is_refused_with_the_difference_and_can_be_insisted_on(what, stopped):
    change, expected = CHANGES[what]
    change(stopped)
    before = stopped.checkpoints()
    assert_refused(stopped.run(), 7, expected, "--override-resume", "--fresh")
    assert stopped.checkpoints() == before
    again = stopped.finish("--override-resume")
    assert f"continues after step {STOPPED_AT}" in again.outputs[0]
    assert f"continues although this changed: {expected}" in again.outputs[0]


def test_a_finished_run_does_not_answer_for_other_data(stopped):
    stopped.finish()
    relabel(stopped)
    before = (stopped.run_dir / "results.json").read_text()
    assert_refused(stopped.run(), 7, "holds a run of other files (data: ", "--name", "--fresh", "--override-resume")
    assert (stopped.run_dir / "results.json").read_text() == before
    taken = stopped.finish("--override-resume")
    assert "is finished, and is not trained again although this changed: data" in taken.outputs[0]
    assert (stopped.run_dir / "results.json").read_text() == before
    results = json.loads(before)
    del results["inputs"]  # as an early version left it
    shutil.rmtree(stopped.run_dir / "ckpt")
    (stopped.run_dir / "results.json").write_text(json.dumps(results))
    stopped.finish()


def test_a_finished_run_does_not_answer_for_another_teacher(stopped):
    stopped.finish()
    retrain(stopped)
    assert_refused(stopped.run(), 7, "holds a run of other files (teacher conv: ", "--name", "--fresh")


def test_a_run_does_not_answer_for_another_start_of_its_student(stopped, tmp_path):
    def begin(seed):
        torch.manual_seed(seed)
        kwargs = RECIPE["student"]["kwargs"]
        student = build_network(
            RECIPE["student"]["name"], kwargs, num_classes=CLASSES, image_size=16, teachers=("conv",)
        )
        save_file(student.model.state_dict(), tmp_path / "start.safetensors")

    begin(1)
    run = dataclasses.replace(
        stopped, runs_dir=tmp_path / "new", more=(f"--student.weights={tmp_path}/start.safetensors",)
    )
    run.finish()
    shutil.copy(tmp_path / "start.safetensors", tmp_path / "moved.safetensors")
    dataclasses.replace(run, more=(f"--student.weights={tmp_path}/moved.safetensors",)).finish()
    begin(2)
    assert_refused(run.run(), 7, "holds a run of other files (the student's first weights: ", "--name", "--fresh")


def test_what_is_said_of_a_teachers_weights_is_said_by_one_rank(stopped, tmp_path):
    state = load_file(stopped.inputs / "conv.safetensors")
    torch.save({"model_ema": state, "model": state}, tmp_path / "conv.pth")
    run = dataclasses.replace(stopped, runs_dir=tmp_path / "new").finish(
        f"--teachers.conv.weights={tmp_path / 'conv.pth'}"
    )
    said = "teachers.conv.weights: the moving average is taken: model_ema, not model"
    assert [output.count(said) for output in run.outputs] == [1, 0]


def more_eval_images(run):
    pixels = np.random.default_rng(7).integers(0, 256, (15, 8, 8), np.uint8)
    write_idx(run.inputs / "eval", pixels, np.arange(15) % CLASSES)


def test_a_finished_run_is_evaluated_again_on_other_evaluation_data(stopped, tmp_path):
    stopped.finish()
    before = json.loads((stopped.run_dir / "results.json").read_text())
    more_eval_images(stopped)
    again = stopped.finish()
    assert "is finished; its evaluation data changed, so it is evaluated again" in again.outputs[0]
    results = json.loads((stopped.run_dir / "results.json").read_text())
    assert (before["eval_images"], results["eval_images"]) == (9, 15)
    assert json.loads((stopped.run_dir / "results.json.1").read_text()) == before
    of_weights = ("accuracy", "teachers", "eval_images", "inputs")
    assert "best" not in results  # it was so on the images of before
    assert {key: results[key] for key in results if key not in of_weights} == {
        key: before[key] for key in before if key not in (*of_weights, "best")
    }
    # As by a run that had these data from the beginning: they do not reach the weights.
    other = dataclasses.replace(stopped, runs_dir=tmp_path / "other")
    other.finish()
    measured = json.loads((other.run_dir / "results.json").read_text())
    assert {key: results[key] for key in of_weights} == {key: measured[key] for key in of_weights}
    assert "evaluated again" not in stopped.finish().output


def test_a_finished_run_without_its_weights_takes_them_from_its_last_checkpoint_or_says_so(stopped):
    stopped.finish()
    before = (stopped.run_dir / "results.json").read_text()
    more_eval_images(stopped)
    for file in ("student.safetensors", "student_ema.safetensors"):
        (stopped.run_dir / file).unlink()
    shutil.move(stopped.run_dir / "ckpt", stopped.run_dir / "elsewhere")
    assert_refused(stopped.run(), 3, "because student.safetensors and student_ema.safetensors are gone", "--fresh")
    assert (stopped.run_dir / "results.json").read_text() == before
    shutil.move(stopped.run_dir / "elsewhere", stopped.run_dir / "ckpt")
    stopped.finish()
    found = json.loads((stopped.run_dir / "results.json").read_text())
    assert set(found["accuracy"]) == {"student", "student ema"}


def test_a_finished_run_without_one_of_its_networks_takes_it_from_its_last_checkpoint(stopped):
    stopped.finish()
    more_eval_images(stopped)
    (stopped.run_dir / "student_ema.safetensors").unlink()
    stopped.finish()
    found = json.loads((stopped.run_dir / "results.json").read_text())
    assert set(found["accuracy"]) == {"student", "student ema"}
    assert json.loads((stopped.run_dir / "results.json").read_text())["eval_images"] == 15


def test_a_teacher_of_other_data_is_refused_before_another_is_trained(stopped, tmp_path):
    recipe = tmp_path / "teacher.yaml"
    recipe.write_text(
        "{train: {epochs: 1, global_batch_size: 8}, optim: {lr_batch_size: 8, warmup_epochs: 0}, "
        "mixing: {group_size: 2}}"
    )
    teachers = {"conv": {"weights": None, "recipe": str(recipe)}, "late": {**TEACHER, "recipe": str(recipe)}}
    options = [f"--teachers={json.dumps(teachers)}", "--student.kwargs.stems={late: patch}"]
    run = TinyRun(stopped.inputs, tmp_path / "advised", "plain", tuple(options))
    run.finish()
    shutil.rmtree(run.run_dir / "teachers" / "conv")
    relabel(run)
    assert_refused(run.run(), 7, "teachers/late holds a run of other files (data: ")
    assert not (run.run_dir / "teachers" / "conv").exists()


def test_a_change_that_is_taken_back_leaves_no_trace(stopped, calm):
    recipe = (stopped.inputs / "tiny.yaml").read_text()
    set_lr(stopped)
    assert_refused(stopped.run(), 7, "optim.lr")
    (stopped.inputs / "tiny.yaml").write_text(recipe)
    stopped.finish()
    assert_same_end(stopped, calm())


@pytest.mark.parametrize("layout", ["zero3", "fsdp2", "plain"])
def test_another_layout_is_no_change_and_starts_from_the_same_state(layout, stopped):
    """Bit for bit what was saved: saved again at once, it is the same."""
    run = dataclasses.replace(stopped, layout=layout)
    assert LAYOUTS[layout] != LAYOUTS[stopped.layout]
    saved = run.copy(stopped.runs_dir.with_name("saved"))
    ended = run.run(sabotage=(save_again, STOPPED_AT))
    assert ended.codes == [75] * run.ranks, ended.output
    assert f"continues after step {STOPPED_AT}" in ended.outputs[0]
    again = STOPPED_AT + (1 if run.ranks == 1 else 2)  # several ranks vote first
    assert_same_tensors(run.checkpoint(again), saved.checkpoint(STOPPED_AT))


def save_again(world, step):
    """Two more steps that change nothing, and a stop in the first."""
    from test_fault_bad_steps import leave_out

    leave_out(world, step + 1, step + 2)
    sabotage.at(world, 0, "batch", step + 1, sabotage.send, 15)


def test_a_run_begun_before_a_setting_existed_goes_on_under_the_version_that_adds_it(tmp_path, tiny_inputs, calm):
    """The version that adds it is this one with a line more, in a folder of its own."""
    run = TinyRun(tiny_inputs, tmp_path / "runs", "plain")
    ended = run.run(sabotage=(sabotage.at, 0, "forward", STOPPED_AT, sabotage.send, 15))
    assert ended.code == 75, ended.output
    shutil.copytree(REPOSITORY / "cit_scale", tmp_path / "next" / "cit_scale")
    # What may be missing in the files of a version that knew less.
    from test_fault_planted import seal

    meta = run.checkpoint(STOPPED_AT) / "meta.json"
    known = json.loads(meta.read_text())
    meta.write_text(json.dumps({key: known[key] for key in ("step", "evaluated", "config")}))
    seal(meta.parent)
    added = {
        "config.py": (
            "class EngineConfig:\n",
            '    novel: str = "float32"\n    """A setting of the next version."""\n\n',
        ),
        "run/progress.py": ("    useful_s: float = 0.0\n", "    novel_count: int = 0\n"),
    }
    for file, (where, line) in added.items():
        path = tmp_path / "next" / "cit_scale" / file
        text = path.read_text()
        assert text.count(where) == 1
        path.write_text(text.replace(where, where + line))
    command = [sys.executable, str(tmp_path / "next" / "cit_scale" / "train.py"), *run.argv]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert f"continues after step {STOPPED_AT}" in done.stdout
    assert "novel: float32" in (run.run_dir / "config.yaml").read_text()
    assert '"novel_count": 0' in (run.checkpoint(STEPS) / "meta.json").read_text()
    assert_same_end(run, calm("plain"))
