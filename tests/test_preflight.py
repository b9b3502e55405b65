"""The check at the start, with one thread for each rank: the store does not mind."""

import functools
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from ranks import start_process

from cit_scale.distributed import preflight
from cit_scale.distributed.preflight import MAX_SKEW_S, Report, find_problem, judge, meet
from cit_scale.distributed.stop import StopRequest
from cit_scale.distributed.world import World, start
from cit_scale.errors import ConfigError, Stopped, UnfitNodeError


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def env_of(port, **more):
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SLURM_JOB_ID": "7", **more}


def meet_all(run_dir, ranks=(0, 1, 2, 3), *, timeout_s=30.0, stop=None, **more):
    """What ``meet`` returns or raises on each rank of four, two on a node, of which only ``ranks`` arrive."""
    env, stop = env_of(free_port(), **more), stop or StopRequest()

    def answer(rank):
        try:
            return meet(World(rank, rank % 2, 4, 2), env, run_dir, stop, timeout_s)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(answer, ranks))


def test_ranks_that_are_all_there_and_fit_get_a_store(tmp_path):
    stores = meet_all(tmp_path / "runs" / "mine")
    stores[3].set("greeting", "hello")
    assert stores[0].get("greeting") == b"hello"
    assert list((tmp_path / "runs").iterdir()) == []  # nothing is left of what the nodes were to see


@pytest.mark.slow
def test_the_node_that_does_not_arrive_is_named_on_every_rank_and_noted(tmp_path):
    failures = meet_all(tmp_path / "mine", (0, 1, 2), timeout_s=1.0, CIT_HOSTS="first second")
    for failure in failures:
        assert isinstance(failure, UnfitNodeError)
        assert str(failure) == "second cannot take part: rank 3 did not arrive within 1 s"
    (line,) = (tmp_path / "mine" / "unfit_nodes.jsonl").read_text().splitlines()
    noted = json.loads(line)
    assert (noted["job_id"], noted["node"], noted["reason"]) == ("7", "second", "rank 3 did not arrive within 1 s")


def test_a_rank_that_cannot_reach_rank_0_says_where_it_looked(tmp_path):
    (failure,) = meet_all(tmp_path / "mine", (1,), timeout_s=1.0)
    assert isinstance(failure, UnfitNodeError)
    assert "cannot reach rank 0 at 127.0.0.1:" in str(failure)


def test_a_node_without_its_gpus_is_refused_on_every_rank(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(preflight.torch.cuda, "is_available", lambda: False)  # which asks it
    failures = meet_all(tmp_path / "mine", SLURM_GPUS_ON_NODE="2")
    reason = f"{socket.gethostname()} cannot take part: Slurm promises 2 GPUs, PyTorch sees 1"
    assert [str(failure) for failure in failures] == [reason] * 4


def test_a_rank_that_is_shown_its_own_gpu_only_is_content_with_it(tmp_path, monkeypatch):
    env = {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "3"}
    monkeypatch.setattr(preflight.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(preflight.torch.cuda, "is_available", lambda: False)  # which asks it
    assert find_problem(World(), env, tmp_path) is None
    monkeypatch.setattr(preflight.torch.cuda, "device_count", lambda: 0)
    assert find_problem(World(), env, tmp_path) == "Slurm promises 1 GPUs, PyTorch sees 0"


@pytest.mark.slow
def test_a_request_to_stop_ends_the_wait_on_all_ranks(tmp_path):
    stop = StopRequest()
    stop.signum = 15
    assert [type(failure) for failure in meet_all(tmp_path / "mine", (0, 1, 2), stop=stop)] == [Stopped] * 3


@pytest.mark.parametrize(
    ("more", "error", "reason"),
    [({}, ConfigError, "MASTER_PORT=N"), ({"SLURM_JOB_ID": "7"}, UnfitNodeError, "the next start takes another")],
)
def test_a_taken_port_is_named_with_the_way_out(more, error, reason, tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **more}
        with pytest.raises(error, match=rf"port {port} of 127\.0\.0\.1.* in use .*{reason}"):
            meet(World(0, 0, 2, 2), env, tmp_path / "mine", StopRequest(), 5.0)


def test_a_folder_that_rank_0_cannot_write_is_nobodys_fault_here(tmp_path):
    (tmp_path / "file").touch()
    started = time.monotonic()
    assert not any(isinstance(answer, Exception) for answer in meet_all(tmp_path / "file" / "runs" / "mine"))
    assert time.monotonic() - started < preflight.SHARED_S


def test_a_node_that_does_not_see_the_shared_file_is_unfit(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "SHARED_S", 0.0)
    problem = find_problem(World(), {}, tmp_path / "absent")
    assert problem == f"{tmp_path} is not the folder that rank 0 sees there; runs_dir has to be on a shared disk"


def test_a_node_without_a_place_for_temporary_files_is_unfit(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.tempfile, "tempdir", str(tmp_path / "gone"))
    assert "no temporary file can be written" in find_problem(World(), {}, tmp_path)


def posts(*reports, seen=1000.0):
    return {rank: (report, seen) for rank, report in enumerate(reports) if report is not None}


def report(host, *, clock=1000.0, device="cpu", problem=None):
    return Report(host, clock, device, problem)


SIX = World(0, 0, 6, 2)


def test_a_clock_that_is_off_is_named_with_how_much():
    off = report("b", clock=990.0 - MAX_SKEW_S - 5)
    found = judge(posts(*[report("a")] * 2, off, off, *[report("c")] * 2), SIX, {}, 60, 990.0)
    assert found == {"b": "its clock is -65 s off that of a"}


def test_a_report_that_waited_for_a_slow_rank_0_is_not_taken_for_a_slow_clock():
    waited = report("b", clock=995.0)
    assert judge(posts(*[report("a")] * 2, *[waited] * 4, seen=1000.0 + 2 * MAX_SKEW_S), SIX, {}, 60, 990.0) == {}


def test_a_node_goes_by_the_name_that_slurm_excludes_it_by():
    assert preflight.node_name({"SLURMD_NODENAME": "gpu-17"}) == "gpu-17"
    assert preflight.node_name({}) == socket.gethostname()


def test_a_disk_that_fails_is_the_nodes_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.Path, "exists", lambda self: (_ for _ in ()).throw(OSError(116, "Stale file handle")))
    assert "the folder of runs cannot be read: " in find_problem(World(), {}, tmp_path / "shared")


def test_a_node_of_another_kind_is_named():
    gpu, cpu = report("a", device="cuda"), report("c", device="cpu")
    found = judge(posts(*[gpu] * 4, cpu, cpu), SIX, {}, 60, 990.0)
    assert found == {"c": "rank 4 has a cpu and rank 0 a cuda"}


def test_where_nobody_else_arrives_rank_0s_own_node_is_suspected():
    found = judge(posts(report("a"), report("a"), None, None, None, None), SIX, {}, 60, 990.0)
    assert found == {"a": "none of the other 2 nodes reached it within 60 s"}


def test_a_missing_node_without_slurm_goes_by_its_rank():
    assert judge(posts(report("a"), None), World(0, 0, 2, 1), {}, 60, 990.0) == {
        "the node of rank 1": "rank 1 did not arrive within 60 s"
    }


def test_gloos_own_choice_of_interface_is_left_alone_where_it_works(monkeypatch):
    monkeypatch.setattr(preflight.socket, "gethostbyname", lambda name: "10.1.2.3")
    assert preflight.find_interface(["10.1.2.4"]) is None


def reduce_on(world, port, path, result, wrong=None):
    """wrong: the rank that gets another sum than the others."""
    stop, env = StopRequest(), env_of(port, SLURMD_NODENAME=f"n{world.rank}")
    store = meet(world, env, path, stop, 30.0)
    if world.rank == wrong:
        all_reduce = dist.all_reduce
        dist.all_reduce = lambda tensor: (all_reduce(tensor), tensor.mul_(2))
    try:
        preflight.try_to_reduce(world, env, path, stop, store)
        start(world, store=store)
        outcome = "joined"
    except UnfitNodeError as error:
        outcome = str(error)
    (result / str(world.rank)).write_text(outcome)
    deadline = time.monotonic() + 30
    while len(list(result.iterdir())) < world.world_size and time.monotonic() < deadline:
        time.sleep(0.01)


def outcomes(tmp_path, worlds, **more):
    """What ``reduce_on`` came to on each rank, each a process of its own. All stay until all have an outcome, as the
    ranks of a run do: the store is in rank 0's process."""
    port, result = free_port(), tmp_path / "result"
    result.mkdir()
    path = tmp_path / "runs" / "mine"
    processes = [start_process(functools.partial(reduce_on, **more), world, port, path, result) for world in worlds]
    for process in processes:
        process.join(60)
    return [(result / str(world.rank)).read_text() for world in worlds]


def test_ranks_that_can_sum_join_through_the_same_store(tmp_path):
    assert outcomes(tmp_path, [World(rank, rank, 2, 2) for rank in (0, 1)]) == ["joined", "joined"]


def test_the_one_node_of_three_whose_sum_is_wrong_is_named_and_noted(tmp_path):
    found = outcomes(tmp_path, [World(rank, 0, 3, 1) for rank in (0, 1, 2)], wrong=2)
    assert found == ["n2 cannot take part: a sum of ones over 3 ranks on cpu came out as 6"] * 3
    assert json.loads((tmp_path / "runs" / "mine" / "unfit_nodes.jsonl").read_text())["node"] == "n2"


def test_one_of_two_whose_sum_is_wrong_is_named_and_not_held_against_it(tmp_path):
    found = outcomes(tmp_path, [World(rank, 0, 2, 1) for rank in (0, 1)], wrong=1)
    assert found == ["n1 cannot take part: a sum of ones over 2 ranks on cpu came out as 4"] * 2
    assert not (tmp_path / "runs" / "mine").exists()
