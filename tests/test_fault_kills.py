"""kill -9: the same command goes on, and ends bit for bit as if nothing had been."""

import dataclasses
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import sabotage
import torch
import torch.distributed as dist
from ranks import start_process
from tiny_run import SAVE_EVERY, assert_same_end

from cit_scale.checkpoint import store as checkpoint
from cit_scale.checkpoint.layout import share_out
from cit_scale.checkpoint.store import Retention, load_newest
from cit_scale.distributed.world import World

pytestmark = pytest.mark.fault

KILLED = -signal.SIGKILL


@pytest.mark.parametrize(
    ("layout", "rank", "place", "step"),
    [
        ("zero1", 0, "start", 0),
        ("zero1", 0, "forward", 7),
        ("zero1", 1, "forward", 3),
        ("zero1", 0, "backward", 3),
        ("zero1", 1, "backward", 7),
        ("zero1", 1, "applied", 6),
        ("zero1", 1, "evaluation", 1),
        ("zero1", 1, "evaluation", 3),
        ("zero1", 0, "evaluation", 5),
        ("zero3", 1, "forward", 7),
        ("fsdp2", 0, "backward", 7),
        ("plain", 0, "backward", 7),
    ],
)
def test_a_rank_killed_at_any_time_costs_only_the_steps_since_the_last_checkpoint(
    layout, rank, place, step, tiny_run, calm
):
    run = dataclasses.replace(tiny_run, layout=layout)
    ended = run.run(sabotage=(sabotage.at, rank, place, step, sabotage.die))
    assert ended.codes[rank] == KILLED, ended.output
    assert not (run.run_dir / "results.json").exists()
    saved = [int(name.removeprefix("step_")) for name in run.checkpoints() if name.removeprefix("step_").isdigit()]
    again = run.finish()
    assert (f"continues after step {max(saved)}" if saved else "starts in") in again.outputs[0]
    assert_same_end(run, calm(layout))


# --- At every point of a checkpoint's writing ---

SHAPES = {
    "weight/model.head": torch.Size([5, 3]),
    "buffer/model.seen": torch.Size([4]),
    "ema/model.head": torch.Size([5, 3]),
    "exp_avg/model.head": torch.Size([5, 3]),
    "exp_avg_sq/model.head": torch.Size([5, 3]),
    "optimizer_step": torch.Size([]),
}


def state_of(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}


def save_steps(world: World, run_dir: Path, *steps: int) -> None:
    shares = share_out(SHAPES, world.world_size)
    for step in steps:
        state = {key: tensor for key, tensor in state_of(step).items() if key in shares[world.rank]}
        meta = {"step": step, "top1": None}
        checkpoint.save(run_dir, step, state, shares, meta, world, Retention(last=1))


def save_step_3_and_die(world: World, folder: Path, run_dir: Path, rank: int, point: int, when: str) -> None:
    """A process; ends with 0 if there is no such point."""
    store = dist.FileStore(str(folder / "store"), world.world_size)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.world_size)
    sabotage.on_disk_calls(world, rank, 3, sabotage.die_at, point, when, trace=f"{run_dir}.calls")
    save_steps(world, run_dir, 3)
    sabotage.os._exit(0)


def exit_codes_of_a_save(run_dir: Path, rank: int, point: int, when: str) -> int | None:
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            start_process(save_step_3_and_die, World(i, i, 2, 2), Path(folder), run_dir, rank, point, when)
            for i in range(2)
        ]
        processes[rank].join(60)
        processes[1 - rank].join(0.2 if processes[rank].exitcode else 60)  # it waits for one that is no more
        for process in processes:
            process.kill()
            process.join()
        return processes[rank].exitcode


# What the disk is asked for by rank 0 and by rank 1 in one save, in order.
CALLS = {
    0: [
        *("mkdir", "rmtree", "mkdir"),  # a leftover goes, the folder is made
        *("save_file", "chmod", "fsync") * 2,  # student, moments
        *("write_text", "fsync") * 2,  # index, meta
        *("write_text", "fsync", "fsync", "rename"),  # manifest, folder, commit
        *("fsync", "fsync"),  # the folders above
        *("rename", "rmtree", "rmtree"),  # retention, and what an earlier one left
    ],
    1: ["save_file", "chmod", "fsync"] * 2,
}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_save_killed_at_any_point_on_any_rank_loses_at_most_itself(rank, tmp_path):
    before = tmp_path / "before"
    save_steps(World(), before, 1, 2)
    for leftover in ("step_000001.deleted", "step_000003.partial"):
        shutil.copytree(before / "ckpt" / "step_000002", before / "ckpt" / leftover)
    survivors: list[int] = []
    for point in range(len(CALLS[rank]) + 1):
        for when in ("before", "within", "after"):
            run_dir = tmp_path / f"rank {rank} {point} {when}"
            shutil.copytree(before, run_dir)
            code = exit_codes_of_a_save(run_dir, rank, point, when)
            is_past_the_last = point == len(CALLS[rank])
            assert code == (0 if is_past_the_last else KILLED), f"{run_dir.name}: {code}"
            found = load_newest(run_dir, World())
            assert found is not None
            assert found.meta["step"] == found.step
            expected = state_of(found.step)
            assert found.state.keys() == expected.keys()
            assert all(torch.equal(found.state[key], tensor) for key, tensor in expected.items()), run_dir.name
            survivors.append(found.step)
            save_steps(World(), run_dir, found.step + 1)
            assert sorted(path.name for path in (run_dir / "ckpt").iterdir()) == [f"step_{found.step + 1:06d}"]
            shutil.rmtree(run_dir)
            if is_past_the_last:
                break
    assert Path(f"{tmp_path}/rank {rank} {len(CALLS[rank])} before.calls").read_text().split() == CALLS[rank]
    assert survivors == sorted(survivors), "once committed, always committed"
    assert set(survivors) == {2, 3}


@pytest.mark.parametrize(
    ("rank", "call", "when", "survives"),
    [
        (0, "mkdir", "after", False),
        (1, "save_file", "within", False),
        (0, "rename", "before", False),
        (0, "rename", "after", True),
        (0, "rmtree", "within", True),
    ],
)
def test_a_run_killed_while_it_saves_goes_on_from_what_is_whole(rank, call, when, survives, tiny_run, calm):
    step = 2 * SAVE_EVERY
    dying = (sabotage.on_disk_calls, rank, step, die_at_first, call, when)
    ended = tiny_run.run("--train.keep_last", "1", sabotage=dying)
    assert ended.codes[rank] == KILLED, ended.output
    again = tiny_run.finish()
    assert f"continues after step {step if survives else step - SAVE_EVERY}" in again.outputs[0]
    assert_same_end(tiny_run, calm())


def die_at_first(number: int, name: str, moment: str, half: Any, call: str, when: str) -> None:
    if name == call:
        sabotage.die_at(0, name, moment, half, 0, when)
