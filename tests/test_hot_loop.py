"""The host is never waited for: what a step asks of the device and of the other ranks, counted on a CPU.

docs/measurements/gpu.md has the counts.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from counting import counting, counting_collectives, device_waits
from engine_cases import LR, SHARDINGS, loss_of, make_engine, micro_batch, shardings_on, update, write_ds_configs
from ranks import run_on_ranks

from cit_scale import train
from cit_scale.distributed.watchdog import Watchdog
from cit_scale.distributed.world import World
from cit_scale.engines.late import LateNumber

OFFLOADED = ("zero2_offload", "zero3_offload")
"""DeepSpeed sends gradients and weights to the CPU and back, a parameter at a time, and reads norms of some."""

# Whether the gradient is finite, read by DeepSpeed before it updates: at stages 1 and 2 of each group of parameters and
# of all, of which the tests' network has two; at stage 3 of all.
READ_BY_DEEPSPEED = {1: 3, 2: 3, 3: 1}


@pytest.mark.parametrize(("world_size", "precision"), [(1, "float32"), (1, "fp16"), (2, "float32")])
def test_an_update_reads_nothing_from_the_device_but_what_deepspeed_reads_itself(world_size, precision, tmp_path):
    write_ds_configs(tmp_path)
    shardings = shardings_on(world_size)
    for found in run_on_ranks(world_size, counts_of_updates, shardings, str(tmp_path), precision):
        for sharding, (waits, reads) in found.items():
            assert waits == 0, sharding
            assert not [line for line in reads if not line.startswith("deepspeed/")], sharding
            if sharding in OFFLOADED:
                continue
            stage = int(sharding.removeprefix("zero")[0]) if sharding in SHARDINGS and sharding != "fsdp2" else 0
            assert sum(reads.values()) == READ_BY_DEEPSPEED.get(stage, 0), (sharding, reads)


def counts_of_updates(
    world: World, shardings: list[str], ds_configs: str, precision: str = "float32"
) -> dict[str, tuple[int, dict[str, int]]]:
    """By sharding: synchronisations of the device, and reads by line, of an update with two micro-steps."""
    found = {}
    for sharding in shardings:
        engine = make_engine(world, sharding, 2, ds_configs, settings={"precision": precision})
        for step in range(2):
            update(engine, world, step)
        batches = [micro_batch(2, part, 2 * world.world_size) for part in range(2)]
        with device_waits() as waits, counting() as operators:
            for images, labels in batches:
                engine.backward(loss_of(engine.forward(images), labels))
            engine.step(LR)
        found[sharding] = len(waits), dict(operators.reads)
    return found


def test_deepspeeds_throughput_timer_would_wait_for_the_device(tmp_path, monkeypatch):
    """The count above can fail: with the timer on, each forward pass and the update wait."""
    write_ds_configs(tmp_path)
    (found,) = run_on_ranks(1, counts_with_the_timer, str(tmp_path))
    assert found == 3


def counts_with_the_timer(world: World, ds_configs: str) -> int:
    from cit_scale.engines import ds_config

    read = ds_config.read_ds_config
    ds_config.read_ds_config = lambda *args: read(*args) | {"timers": {"throughput": {"enabled": True}}}
    try:
        return counts_of_updates(world, ["zero1"], ds_configs)["zero1"][0]
    finally:
        ds_config.read_ds_config = read


@pytest.mark.parametrize("layout", ["plain", "zero1", "zero3", "fsdp2"])
def test_a_turn_of_the_loop_waits_for_neither_the_device_nor_the_other_ranks(layout, tiny_run, tmp_path):
    """From the batch to the update and all that is between two, where nothing is logged, evaluated or saved."""
    from dataclasses import replace

    run = replace(tiny_run, layout=layout, more=("--train.log_every_steps", "100", "--train.save_every_steps", "100"))
    ended = run.run(sabotage=(count_turns, str(tmp_path)))
    assert ended.codes == [0] * run.ranks, ended.output
    for rank in range(run.ranks):
        found = json.loads((tmp_path / f"turns_{rank}.json").read_text())
        assert found["turns"] == 3
        assert found["blocking"] == {}
        reads = [line for line in found["reads"] if not line.startswith("deepspeed/")]
        assert reads == [], found["reads"]
        assert found["all_reduces"] == (3 if run.ranks > 1 else 0), "one message a turn, which is read a turn later"


def count_turns(world: World, folder: str) -> None:
    """Count turns 3 to 5: steps and what is between them."""
    inner_step, inner_between = train.train_step, train.between_steps
    found = {"turns": 0, "reads": {}, "blocking": {}, "all_reduces": 0}
    counted = range(3, 6)

    def add(reads, collectives):
        for key, counts in (("reads", reads), ("blocking", collectives)):
            for line, count in counts.items():
                found[key][line] = found[key].get(line, 0) + count

    def train_step(engine, teachers, batches, prepared, step, lr):
        if step + 1 not in counted:
            return inner_step(engine, teachers, batches, prepared, step, lr)
        with counting_collectives() as collectives, counting() as operators:
            result = inner_step(engine, teachers, batches, prepared, step, lr)
        add(operators.reads, collectives)
        return result

    def between_steps(session, trained):
        if session.progress.step not in counted:
            return inner_between(session, trained)
        began = all_reduces(session.votes)
        with counting_collectives() as collectives, counting() as operators:
            inner_between(session, trained)
        add(operators.reads, collectives)
        found["turns"] += 1
        found["all_reduces"] += all_reduces(session.votes) is not began
        Path(folder, f"turns_{world.rank}.json").write_text(json.dumps(found))

    train.train_step, train.between_steps = train_step, between_steps


def all_reduces(votes) -> object:
    """The message under way: another object for each."""
    return votes._work


def test_a_read_of_the_device_is_counted_with_its_line():
    with counting() as operators:
        torch.ones(3).sum().item()
        torch.ones(2).tolist()
    assert sorted(line.split()[-1] for line in operators.reads) == ["_local_scalar_dense", "tolist"]


def test_what_the_host_waits_for_on_the_device_is_within_a_steps_limit(tiny_run, monkeypatch):
    """A device that hangs is noticed where its results are read."""
    from dataclasses import replace

    order = []

    def noting(owner, name):
        inner = getattr(owner, name)

        def noted(self, *args):
            order.append(name)
            return inner(self, *args)

        monkeypatch.setattr(owner, name, noted)

    noting(Watchdog, "begin_step")
    noting(Watchdog, "progress")
    noting(LateNumber, "read")
    run = replace(tiny_run, layout="plain", more=("--train.eval_every_epochs", "2", "--optim.ema_decay", "null"))
    assert train.main(run.argv) == 0
    first, last = order.index("begin_step"), len(order) - order[::-1].index("read")
    steps = " ".join(order[first:last]).split("begin_step")[1:]
    assert len(steps) == 12
    for step in steps:
        assert "read" in step.split("progress")[0]
