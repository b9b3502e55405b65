import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks

from cit_scale.cli import read_ranks
from cit_scale.distributed.world import (
    Votes,
    World,
    broadcast,
    first_on_each_node,
    start,
    sum_over_ranks,
    warn_once_per_job,
)
from cit_scale.errors import ConfigError


def test_a_process_without_a_launcher_is_alone():
    assert World.from_env({}) == World(rank=0, local_rank=0, world_size=1, local_world_size=1)


@pytest.mark.parametrize(
    "env",
    [
        {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"},
        {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4"},
        {
            "SLURM_PROCID": "5",
            "SLURM_LOCALID": "1",
            "SLURM_NTASKS": "8",
            "SLURM_NTASKS_PER_NODE": "4",
            "SLURM_STEP_ID": "0",
        },
    ],
    ids=["torchrun", "deepspeed", "srun"],
)
def test_each_launcher_spelling_is_read(env):
    assert World.from_env(env) == World(rank=5, local_rank=1, world_size=8, local_world_size=4)


def test_submitit_tasks_on_one_machine_are_read():
    env = {"SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_LOCALID": "1", "SUBMITIT_LOCAL_NTASKS": "2"}
    assert World.from_env(env) == World(rank=1, local_rank=1, world_size=2, local_world_size=2)


@pytest.mark.parametrize(("visible", "index"), [(8, 3), (1, 0)])
def test_a_rank_computes_on_its_own_gpu_whether_it_is_shown_all_or_one(visible, index, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert World(3, 3, 8, 8).device == torch.device("cuda", index)


@pytest.mark.parametrize(("world", "bound"), [(World(5, 1, 8, 4), torch.device("cuda", 1)), (World(), None)])
def test_training_binds_nccl_to_the_device_that_it_computes_on(world, bound, monkeypatch):
    """PyTorch's guess, the rank modulo the GPUs, is cuda:5 here."""
    given = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: given.update(current=device))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)  # a run that another test made here may have left one
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: given.update(more))
    start(world)
    assert (given["device_id"], given["current"]) == (bound, world.device)


def test_torchrun_inside_a_slurm_step_wins_over_slurm():
    slurm = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}
    torchrun = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    assert World.from_env(slurm | torchrun).rank == 3


def test_a_batch_script_outside_srun_is_one_process():
    assert World.from_env({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}).world_size == 1


def test_half_an_environment_is_refused_with_what_is_missing():
    with pytest.raises(ValueError, match=r"RANK=1 is set but LOCAL_RANK, WORLD_SIZE is not"):
        World.from_env({"RANK": "1"})


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"])
def test_a_variable_that_is_no_number_is_named(name):
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", name: "x"}
    with pytest.raises(ValueError, match=f"{name}='x' in the environment is no whole number"):
        World.from_env(env)


def test_a_port_that_is_none_is_named():
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here"}
    for port in ("x", "0", "65536", "-1"):
        with pytest.raises(ConfigError, match=f"MASTER_PORT='{port}' in the environment is not a port"):
            read_ranks(env | {"MASTER_PORT": port})
    assert read_ranks(env | {"MASTER_PORT": "29500"}).world_size == 2
    for empty in ({"MASTER_PORT": ""}, {"MASTER_PORT": "29500", "MASTER_ADDR": " "}):
        with pytest.raises(ConfigError, match="do not say where they meet"):
            read_ranks(env | empty)


def test_a_rank_beyond_the_world_is_refused():
    with pytest.raises(ValueError, match=r"rank=4 of world_size=4"):
        World(rank=4, local_rank=0, world_size=4, local_world_size=4)


def collectives(world):
    summed = sum_over_ranks(world, torch.tensor([1.0, 10.0 * world.rank])).tolist()
    return broadcast(world, f"from {world.rank}"), voted(world), summed


def voted(world):
    """What is read at three turns, of which rank 1 has a flag at the second."""
    turn = 0
    votes = Votes(world, lambda: (world.rank == 1 and turn == 1, False))
    read = []
    for turn in range(3):  # noqa: B007  the lambda reads it
        read.append(votes.read())
        votes.cast()
    return [*read, votes.read()]


def test_collectives_answer_alike_on_every_rank():
    no, yes = (False, False), (True, False)
    assert run_on_ranks(2, collectives) == [("from 0", [no, no, yes, no], [2.0, 10.0])] * 2
    assert collectives(World()) == ("from 0", [no] * 4, [1.0, 0.0])


def test_a_process_alone_reads_what_holds_now():
    flags = [True]
    votes = Votes(World(), lambda: flags)
    assert votes.read() == (True,)
    votes.cast()
    flags[0] = False
    assert votes.read() == (False,)


def fill_then_read(world, path):
    def function():
        found = path.exists()
        path.touch()
        return found

    return first_on_each_node(world, function)


def test_one_rank_fills_the_cache_before_the_others_look(tmp_path):
    assert run_on_ranks(2, fill_then_read, tmp_path / "cache") == [False, True]


def fail_on_rank(world, failing):
    def function():
        if world.rank == failing:
            raise ValueError(f"no data on rank {failing}")

    try:
        first_on_each_node(world, function)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_of_one_rank_is_raised_on_all(failing):
    assert run_on_ranks(2, fail_on_rank, failing) == [f"no data on rank {failing}"] * 2


@pytest.mark.parametrize(("rank", "warnings"), [(None, 1), (0, 1), (1, 0)])
def test_a_warning_for_the_job_comes_from_rank_0(rank, warnings, monkeypatch, recwarn):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: rank is not None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    warn_once_per_job("slow")
    assert [str(warning.message) for warning in recwarn.list] == ["slow"] * warnings
