import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from ranks import run_on_ranks
from torch import Tensor

from cit_scale.batch import LossTerms, MixedBatch
from cit_scale.distributed.world import World
from cit_scale.engines.base import StepResult
from cit_scale.errors import DivergedError
from cit_scale.run.bad_steps import BadStep, BadSteps, find_culprits
from cit_scale.run.metrics import RunLog
from cit_scale.run.progress import TrainingProgress

ALONE = World()
SKIPPED = StepResult(0.1, torch.tensor(math.inf))


def loss(label: float = 1.0, conv: float = 2.0) -> LossTerms:
    return LossTerms(torch.tensor(label + conv), torch.tensor(label), {"conv": torch.tensor(conv)})


def samples(*indices: int) -> Tensor:
    return torch.tensor(indices)


def test_the_term_the_rank_and_the_samples_are_named():
    for found in run_on_ranks(2, find_nan_on_rank_1):
        (culprit,) = found.culprits
        assert (culprit.rank, culprit.micro_step) == (1, 1)
        assert culprit.terms == ["loss_conv", "loss"]
        assert culprit.samples == [15, 16]
        assert str(found) == "loss_conv, loss not finite on rank 1; micro-step 1 of rank 1 has samples 15, 16"
        assert not found.is_scaling


def find_nan_on_rank_1(world: World) -> BadStep:
    terms = [loss(), loss(conv=math.nan if world.rank == 1 else 2.0)]
    indices = [samples(10 * world.rank + 3, 10 * world.rank + 4), samples(10 * world.rank + 5, 10 * world.rank + 6)]
    return find_culprits(12, SKIPPED, terms, indices, world)


def test_a_gradient_that_is_not_finite_under_a_finite_loss_comes_with_everybodys_samples():
    for found in run_on_ranks(2, find_bad_gradient):
        assert [(culprit.rank, culprit.terms, culprit.samples) for culprit in found.culprits] == [
            (0, [], [1]),
            (1, [], [2]),
        ]
        assert str(found) == (
            "the gradient, though not the loss, is not finite on ranks 0, 1; micro-step 0 of rank 0 has samples 1"
        )
        assert not found.is_scaling


def find_bad_gradient(world: World) -> BadStep:
    return find_culprits(3, SKIPPED, [loss()], [samples(1 + world.rank)], world)


def test_fp16_looking_for_its_scale_is_not_a_bad_step(tmp_path, capsys):
    result = StepResult(0.1, torch.tensor(math.inf), torch.tensor(65536.0))
    bad_steps, log = BadSteps(TrainingProgress(), tmp_path, 1, ALONE), open_log(tmp_path)
    bad_steps.count(find_culprits(3, result, [loss()], [samples(1)], ALONE), log)
    assert not bad_steps.too_many
    assert "loss scale of 65536, which is halved" in capsys.readouterr().out
    # With a loss that is not finite it is one, whatever the scale.
    bad_steps.count(find_culprits(4, result, [loss(math.nan)], [samples(1)], ALONE), log)
    assert bad_steps.too_many


def open_log(folder: Path) -> RunLog:
    return RunLog(folder, ALONE, title="t", step=0, total_steps=10)


def test_bad_steps_are_counted_in_a_row_and_in_all_and_a_good_one_between_is_enough(tmp_path):
    progress, log = TrainingProgress(), open_log(tmp_path)
    bad_steps = BadSteps(progress, tmp_path, 2, ALONE)
    bad = find_culprits(1, SKIPPED, [loss(math.nan)], [samples(7, 8)], ALONE)
    bad_steps.count(bad, log)
    bad_steps.count_good()
    bad_steps.count(bad, log)
    assert (progress.bad_in_a_row, progress.bad_steps, bad_steps.too_many) == (1, 2, False)
    bad_steps.count(bad, log)
    assert (progress.bad_in_a_row, progress.bad_steps, bad_steps.too_many) == (2, 3, True)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["culprits"] for line in lines] == [
        [{"rank": 0, "micro_step": 0, "terms": ["loss_label", "loss"], "samples": [7, 8]}]
    ] * 3


def test_a_run_that_gave_up_has_its_full_patience_when_it_is_started_again(tmp_path):
    assert not BadSteps(TrainingProgress(bad_in_a_row=5), tmp_path, 5, ALONE).too_many
    interrupted = TrainingProgress(bad_in_a_row=4)
    bad_steps = BadSteps(interrupted, tmp_path, 5, ALONE)
    bad_steps.count(find_culprits(9, SKIPPED, [loss(math.nan)], [samples(1)], ALONE), open_log(tmp_path))
    assert bad_steps.too_many


def test_giving_up_leaves_what_the_last_bad_step_saw(tmp_path):
    bad_steps = BadSteps(TrainingProgress(), tmp_path, 1, ALONE)
    bad_steps.count(find_culprits(7, SKIPPED, [loss(math.nan)], [samples(5)], ALONE), open_log(tmp_path))
    batches = [MixedBatch(torch.full((1, 3, 2, 2), float(i)), torch.eye(3)[:1]) for i in range(2)]
    with pytest.raises(DivergedError, match=r"one step was not finite, .* step 7: loss_label.*samples 5; .*optim\.lr"):
        bad_steps.give_up(batches)
    folder = tmp_path / "bad_steps" / "step_000007"
    saved = safetensors.torch.load_file(folder / "rank_0.safetensors")
    assert torch.equal(saved["images_1"], batches[1].images)
    assert torch.equal(saved["targets_0"], batches[0].targets)
    assert json.loads((folder / "step.json").read_text())["culprits"][0]["samples"] == [5]
