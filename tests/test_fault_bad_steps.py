"""What is not finite changes nothing, is named, and too much of it ends the run with the means to look at it."""

import dataclasses
import json
import math

import pytest
import sabotage
import torch
from safetensors.torch import load_file
from tiny_run import STEPS, assert_same_end, assert_same_tensors, learned, metrics, tensors

from cit_scale import train
from cit_scale.batch import LossTerms
from cit_scale.checkpoint import store as checkpoint
from cit_scale.distributed.world import World
from cit_scale.engines.base import StepResult

pytestmark = pytest.mark.fault

BAD_STEP = 5


@pytest.fixture(scope="module")
def without(tiny_inputs, tmp_path_factory):
    """``without(layout, steps)``: an undisturbed run that leaves these updates out, once per module."""
    from tiny_run import TinyRun

    runs = {}

    def run(layout, *steps):
        key = layout, *steps
        if key not in runs:
            runs[key] = TinyRun(tiny_inputs, tmp_path_factory.mktemp("without"), layout)
            ended = runs[key].run(sabotage=(leave_out, *steps))
            assert ended.code == 0, ended.output
        return runs[key]

    return run


def leave_out(world, *steps):
    """Take the step's batches, and never show them to the engine."""
    inner = train.train_step

    def train_step(engine, teachers, batches, prepared, done, lr):
        if done + 1 not in steps:
            return inner(engine, teachers, batches, prepared, done, lr)
        samples = [next(batches).samples for _ in range(engine.micro_steps)]
        terms = [LossTerms(total=torch.tensor(0.0), label=torch.tensor(0.0), distillation={})] * engine.micro_steps
        return train.TrainedStep(StepResult(lr, torch.tensor(math.nan)), terms, samples)

    train.train_step = train_step


def spoil(world, rank, what, *steps):
    """Make the images, the loss or the gradient of one micro-step of one rank NaN."""
    if world.rank != rank:
        return
    inner, mix, loss_of = train.train_step, train.mix, train.co_advise_loss
    now = []

    def train_step(engine, teachers, batches, prepared, done, lr):
        now[:] = [done + 1]
        if what == "gradient" and done + 1 in steps:
            handle = engine.module.model.blocks[0].register_forward_hook(spoil_gradient)
            try:
                return inner(engine, teachers, batches, prepared, done, lr)
            finally:
                handle.remove()
        return inner(engine, teachers, batches, prepared, done, lr)

    def spoil_gradient(module, inputs, output):
        output.register_hook(lambda gradient: gradient * math.nan)

    def spoilt_mix(*args, **options):
        mixed = mix(*args, **options)
        if what == "images" and now[0] in steps:
            mixed.images[0] = math.nan
        return mixed

    def spoilt_loss(*args, **options):
        loss = loss_of(*args, **options)
        if what == "loss" and now[0] in steps:
            distillation = {name: term * math.nan for name, term in loss.distillation.items()}
            return dataclasses.replace(loss, total=loss.total * math.nan, distillation=distillation)
        return loss

    train.train_step, train.mix, train.co_advise_loss = train_step, spoilt_mix, spoilt_loss


def assert_all_finite(run):
    for folder in (run.run_dir / "ckpt").glob("step_*"):
        assert checkpoint._verify(folder, int(folder.name[-6:]), World()) is None
        bad = [key for key, tensor in tensors(folder).items() if not tensor.isfinite().all()]
        assert not bad


@pytest.mark.parametrize(
    ("layout", "rank", "what"),
    [
        ("zero1", 0, "images"),
        ("zero1", 1, "images"),
        ("zero1", 0, "loss"),
        ("zero1", 1, "gradient"),
        ("zero3", 1, "images"),
        ("fsdp2", 1, "gradient"),
        ("fsdp2", 0, "images"),
        ("plain", 0, "images"),
    ],
)
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(layout, rank, what, tiny_run, without):
    run = dataclasses.replace(tiny_run, layout=layout)
    ended = run.run(sabotage=(spoil, rank, what, BAD_STEP))
    assert ended.codes == [0] * run.ranks, ended.output
    other = without(layout, BAD_STEP)
    assert_same_tensors(run.checkpoint(STEPS), other.checkpoint(STEPS))
    assert_same_tensors(run.run_dir, other.run_dir)
    assert learned(run.run_dir) == learned(other.run_dir)
    assert_all_finite(run)
    assert json.loads((run.run_dir / "results.json").read_text())["bad_steps"] == 1

    (line,) = [line for line in metrics(run.run_dir) if "skipped" in line]
    assert line["step"] == BAD_STEP
    assert "changed nothing" in ended.outputs[0]
    if what == "gradient":
        # Summed over ranks before anybody looks at it: nobody knows whose it was.
        assert {culprit["rank"] for culprit in line["culprits"]} == set(range(run.ranks))
        assert not any(culprit["terms"] for culprit in line["culprits"])
        assert "the gradient, though not the loss, is not finite" in ended.outputs[0]
        return
    assert {culprit["rank"] for culprit in line["culprits"]} == {rank}
    expected = {"loss_label", "loss_conv", "loss"} if what == "images" else {"loss_conv", "loss"}
    for culprit in line["culprits"]:
        assert set(culprit["terms"]) == expected
        assert len(culprit["samples"]) == 2
        assert all(0 <= sample < 48 for sample in culprit["samples"])


def test_too_many_bad_steps_in_a_row_end_the_run_with_all_that_is_needed_to_look_at_it(tiny_run, without):
    run = dataclasses.replace(tiny_run, more=("--train.max_bad_steps", "3"))
    ended = run.run(sabotage=(spoil, 1, "images", 2, 4, 5, 6))
    assert ended.codes == [5, 5], ended.output
    assert ended.output.count("error: 3 steps in a row were not finite, the last is step 6") == 1
    assert "Traceback" not in ended.output
    folder = run.run_dir / "bad_steps" / "step_000006"
    record = json.loads((folder / "step.json").read_text())
    assert {culprit["rank"] for culprit in record["culprits"]} == {1}
    for rank in range(2):
        batch = load_file(folder / f"rank_{rank}.safetensors")
        assert sorted(batch) == ["images_0", "images_1", "targets_0", "targets_1"]
        assert batch["images_0"].shape == (2, 3, 16, 16)
        assert torch.allclose(batch["targets_0"].sum(dim=1), torch.ones(2))
    assert_all_finite(run)
    assert run.checkpoints()[-1] == "step_000006"
    again = run.finish()
    assert "continues after step 6" in again.outputs[0]
    other = without("zero1", 2, 4, 5, 6)
    assert_same_tensors(run.checkpoint(STEPS), other.checkpoint(STEPS))
    assert learned(run.run_dir) == learned(other.run_dir)
    assert json.loads((run.run_dir / "results.json").read_text())["bad_steps"] == 4


def test_bad_steps_in_a_row_are_counted_across_a_stop(tiny_run):
    run = dataclasses.replace(tiny_run, more=("--train.max_bad_steps", "3"))
    both = ((spoil, 0, "loss", 4, 5, 6), (sabotage.at, 1, "forward", 4, sabotage.send, 15))
    assert run.run(sabotage=(sabotage.everything, *both)).codes == [75, 75]
    ended = run.run(sabotage=(spoil, 0, "loss", 4, 5, 6))
    assert ended.codes == [5, 5], ended.output
    assert "the last is step 6" in ended.outputs[0]


@pytest.mark.parametrize(("layout", "rank"), [("zero1", 0), ("zero1", 1), ("plain", 0)])
def test_weights_that_are_not_finite_are_never_saved(layout, rank, tiny_run, calm):
    run = dataclasses.replace(tiny_run, layout=layout)
    ended = run.run(sabotage=(ruin_weights, rank, 6))
    assert ended.codes == [5] * run.ranks, ended.output
    assert ended.output.count("error:") == 1
    assert "no longer finite" in ended.outputs[0]
    assert "Traceback" not in ended.output
    assert run.checkpoints() == ["step_000004"]
    assert_all_finite(run)
    assert "continues after step 4" in run.finish().outputs[0]
    assert_same_end(run, calm(layout))


def ruin_weights(world, rank, step):
    """One number of a moment, which no loss shows at once."""
    if world.rank != rank:
        return
    inner = train.train_step

    def train_step(engine, teachers, batches, prepared, done, lr):
        result = inner(engine, teachers, batches, prepared, done, lr)
        if done + 1 == step:
            piece = engine._state._placement.pieces[0]
            engine._state._optimizer.state[piece]["exp_avg"].view(-1)[0] = math.nan
        return result

    train.train_step = train_step
