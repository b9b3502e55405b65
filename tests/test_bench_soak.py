"""The soak's own parts: what it plans, that its damage is damage, that it sees one bit, and what it takes for wrong."""

import itertools
import json
import os
import random
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from cit_scale.bench.soak import (
    DAMAGES,
    HARMLESS,
    KILLS,
    KINDS,
    SAVE_EVERY_STEPS,
    Start,
    committed,
    complaint,
    differences,
    excess,
    learned,
    plan,
)
from cit_scale.checkpoint import store as checkpoint
from cit_scale.checkpoint.layout import share_out
from cit_scale.checkpoint.store import Retention
from cit_scale.distributed.world import World
from cit_scale.run.metrics import COSTS

STATE = {
    "weight/model.a": torch.linspace(-1, 1, 64).view(8, 8),
    "ema/model.a": torch.linspace(-1, 1, 64).view(8, 8),
    "exp_avg/model.a": torch.zeros(8, 8),
}
LOSSES = [{"step": 5, "loss": 2.5, "goodput": 0.1}, {"step": 10, "loss": 2.25, "goodput": 0.2}]


@pytest.fixture
def run_dir(tmp_path):
    """A finished run with checkpoints of steps 5 and 10."""
    folder = tmp_path / "run"
    shares = share_out({key: tensor.shape for key, tensor in STATE.items()}, 1)
    for step in (5, 10):
        meta = {"step": step, "top1": None, "useful_s": float(step)}
        checkpoint.save(folder, step, STATE, shares, meta, World(), Retention())
    save_file({"a": STATE["weight/model.a"]}, folder / "student.safetensors")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOSSES))
    return folder


def some_start(**seen):
    usual = {
        "began": 10,
        "struck_at": 22,
        "reached": 23,
        "newest": 23,
        "exit_code": 75,
        "seconds": 9.0,
        "startup_s": 5.0,
    }
    return Start(**{**usual, "kind": "SIGTERM, a rank", "second": None, "in_startup": False, **seen})


def test_a_seed_gives_the_same_faults_again_and_another_seed_others():
    first, again, other = (list(itertools.islice(plan(seed), 50)) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_every_fault_and_every_damage_comes_before_any_comes_again():
    faults = list(itertools.islice(plan(3), 2 * len(KINDS) * len(DAMAGES)))
    assert Counter(fault.kind for fault in faults[: len(KINDS)]) == dict.fromkeys(KINDS, 1)
    assert Counter(fault.damage for fault in faults[: 2 * len(DAMAGES)] if fault.damage) == dict.fromkeys(DAMAGES, 1)
    assert not [fault for fault in faults if fault.second and fault.kind in KILLS]
    assert 0.1 < sum(fault.startup_part is not None for fault in faults) / len(faults) < 0.3


def contents(folder):
    return {path: (path.stat().st_mtime, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_costs_the_newest_checkpoint_and_a_harmless_leftover_nothing(run_dir, damage, seed):
    before = contents(run_dir)
    DAMAGES[damage](committed(run_dir)[10], random.Random(seed))
    assert committed(run_dir).keys() == {5, 10}
    assert contents(run_dir) != before
    assert checkpoint.load_newest(run_dir, World()).step == (10 if damage in HARMLESS else 5)


def test_two_runs_that_learned_the_same_are_told_from_one_bit_less(run_dir):
    other = shutil.copytree(run_dir, run_dir.with_name("other"))
    assert differences(learned(run_dir), learned(other)) == []
    for file in ("ckpt/step_000010/optimizer_000.safetensors", "student.safetensors"):
        path = other / file
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 0x80]))
        key = next(iter(load_file(path)))
        assert differences(learned(run_dir), learned(other)) == [f"different: {file}, {key}"]
        path.write_bytes(whole)


def test_another_sign_of_zero_and_another_type_are_differences(run_dir):
    other = shutil.copytree(run_dir, run_dir.with_name("other"))
    path = other / "ckpt" / "step_000010" / "optimizer_000.safetensors"
    for moment in (-torch.zeros(8, 8), torch.zeros(8, 8, dtype=torch.int32)):
        save_file({"exp_avg/model.a": moment}, path)
        assert len(differences(learned(run_dir), learned(other))) == 1


@pytest.mark.parametrize(
    ("lines", "different"),
    [
        (LOSSES, []),
        ([LOSSES[0] | dict.fromkeys(COSTS, 0.9), {"step": 5, "save_write_s": 1.0}, LOSSES[1]], []),
        ([LOSSES[0], LOSSES[1] | {"loss": 2.2500000000000004}], ["different: metrics.jsonl, loss"]),
        (LOSSES[:1], ["different: metrics.jsonl, loss"]),
        ([*LOSSES, LOSSES[1]], ["different: metrics.jsonl, loss"]),
        ([*LOSSES, {"step": 10, "top1_cls": 50.0}], ["different: metrics.jsonl, top1_cls"]),
    ],
)
def test_metrics_are_compared_but_for_times(run_dir, lines, different):
    other = shutil.copytree(run_dir, run_dir.with_name("other"))
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert differences(learned(run_dir), learned(other)) == different


def test_a_missing_weights_file_and_another_last_step_are_differences(run_dir):
    other = shutil.copytree(run_dir, run_dir.with_name("other"))
    os.remove(other / "student.safetensors")
    shutil.rmtree(other / "ckpt" / "step_000010")
    found = differences(learned(run_dir), learned(other))
    assert {"different: steps", "different: student.safetensors, a", "different: meta.json, step"} <= set(found)


def test_a_request_may_lose_nothing_and_a_kill_two_intervals():
    most = 2 * SAVE_EVERY_STEPS
    request = some_start()
    kill = some_start(kind="SIGKILL, all", exit_code=-9, newest=23 - most)
    never_began = some_start(began=None, newest=10)
    assert excess([request, kill, never_began]) == []
    assert len(excess([replace(request, newest=22), replace(kill, newest=22 - most)])) == 2


@pytest.mark.parametrize(
    ("seen", "is_done", "log", "is_wrong"),
    [
        ({}, False, "stopped after step 23; the same command continues there", False),
        ({}, False, "", True),
        ({"exit_code": 1}, False, "stopped after step 23; the same command continues there", True),
        ({"kind": "SIGTERM, launcher", "exit_code": 1}, False, "; the same command continues there", False),
        ({"kind": "SIGUSR1, launcher", "exit_code": -10}, False, "; the same command continues there", False),
        ({"kind": "SIGUSR1, launcher", "exit_code": -10, "in_startup": True}, False, "", False),
        ({"kind": "SIGKILL, launcher", "exit_code": -9, "struck_at": 0, "reached": 110}, True, "", True),
        ({"kind": "SIGKILL, launcher", "exit_code": -9}, True, "", False),
        ({"kind": "SIGKILL, a rank", "exit_code": 1}, False, 'File "/x/cit_scale/train.py", line 3', False),
        ({}, False, 'File "/x/cit_scale/train.py", line 3\n; the same command continues there', True),
        ({"kind": None, "exit_code": 0}, True, "", False),
        ({"kind": None, "exit_code": 14}, False, "", True),
    ],
)
def test_what_is_wrong_with_how_a_start_ended(seen, is_done, log, is_wrong):
    assert bool(complaint(some_start(**seen), is_done, log)) == is_wrong
