"""The check at the start, with one thread for each rank: the store does not mind."""

import ctypes
import functools
import json
import mmap
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import start_process

from cit_scale.distributed import preflight
from cit_scale.distributed.preflight import MAX_SKEW_S, Report, find_problem, judge, meet
from cit_scale.distributed.stop import StopRequest
from cit_scale.distributed.world import World, start
from cit_scale.errors import HUNG, ConfigError, RunError, Stopped, UnfitNodeError, error_line


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
    monkeypatch.setattr(preflight, "cuda_versions", lambda: "versions")
    monkeypatch.setattr(preflight.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(preflight.torch.cuda, "is_available", lambda: False)  # which asks it
    failures = meet_all(tmp_path / "mine", SLURM_GPUS_ON_NODE="2")
    reason = f"{socket.gethostname()} cannot take part: Slurm promises 2 GPUs, PyTorch sees 1 (versions)"
    assert [str(failure) for failure in failures] == [reason] * 4


def test_a_rank_that_is_shown_its_own_gpu_only_is_content_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "cuda_versions", lambda: "versions")
    env = {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "3"}
    monkeypatch.setattr(preflight.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(preflight.torch.cuda, "is_available", lambda: False)  # which asks it
    assert find_problem(World(), env, tmp_path) is None
    monkeypatch.setattr(preflight.torch.cuda, "device_count", lambda: 0)
    assert find_problem(World(), env, tmp_path) == "Slurm promises 1 GPUs, PyTorch sees 0 (versions)"


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


def report(host, *, clock=1000.0, device="cpu", problem=None, gpu=None):
    return Report(host, clock, device, problem, gpu)


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


def test_two_ranks_on_one_gpu_are_named_with_the_way_out_and_no_node_is_blamed():
    gpus = [report("a", device="cuda", gpu=gpu) for gpu in ("5e1f", "77aa")]
    same = report("b", device="cuda", gpu="5e1f")  # another node's, whatever it is called there
    two = World(0, 0, 4, 2)
    assert judge(posts(*gpus, same, report("b", device="cuda", gpu="77aa")), two, {}, 60, 990.0) == {}
    (key, reason), *others = judge(posts(*gpus, same, same), two, {}, 60, 990.0).items()
    assert (key, others) == (preflight.COMMAND, [])
    assert "ranks 2 and 3 are on the same GPU of b (5e1f)" in reason
    assert "no more ranks on a node than it has GPUs" in reason
    assert judge(posts(*[report("a")] * 4), two, {}, 60, 990.0) == {}  # a CPU is shared


def test_two_ranks_on_one_gpu_end_all_ranks_with_bad_usage_and_exclude_no_node(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "gpu_identity", lambda device, env: "5e1f")
    for failure in meet_all(tmp_path / "mine"):
        assert type(failure) is ConfigError
        assert "ranks 0 and 1 are on the same GPU" in str(failure)
    assert not (tmp_path / "mine").exists()


def test_parts_of_a_divided_gpu_are_told_apart_even_where_they_bear_its_uuid(monkeypatch):
    def identity(name, visible):
        properties = SimpleNamespace(name=name, uuid="5e1f")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return preflight.gpu_identity(torch.device("cuda", 0), {"CUDA_VISIBLE_DEVICES": visible})

    part = "NVIDIA H100 80GB HBM3 MIG 1g.10gb"
    assert identity(part, "MIG-1") != identity(part, "MIG-2")
    assert identity(part, "MIG-1") == identity(part, "MIG-1")
    assert identity("NVIDIA H100", "0") == identity("NVIDIA H100", "0,1") == "5e1f"
    assert preflight.gpu_identity(torch.device("cpu"), {}) is None


def test_where_nobody_else_arrives_rank_0s_own_node_is_suspected():
    found = judge(posts(report("a"), report("a"), None, None, None, None), SIX, {}, 60, 990.0)
    assert found == {"a": "none of the other 2 nodes reached it within 60 s"}


def test_a_missing_node_without_slurm_goes_by_its_rank():
    assert judge(posts(report("a"), None), World(0, 0, 2, 1), {}, 60, 990.0) == {
        "the node of rank 1": "rank 1 did not arrive within 60 s"
    }


@pytest.mark.parametrize(
    ("faulty", "earlier", "nodes", "named"),
    [
        (["a", "b"], [], 2, "a, b"),
        (["a", "b"], [], 4, "a, b"),
        (["a"], [], 2, None),  # it may be the node
        (["a", "b"], [], 6, None),
        (["b"], ["a"], 1, "a, b"),  # one after the other
        (["a"], ["a"], 1, None),
        (["b"], ["a"], 4, None),
    ],
)
def test_the_same_fault_of_half_of_the_nodes_is_not_theirs(faulty, earlier, nodes, named):
    def reasons(names):
        return {name: f"rank {place} cannot use cuda:{place}: too old" for place, name in enumerate(names)}

    other = {"z": "no temporary file can be written"} if nodes == 6 else {}
    found = preflight.find_shared_fault({**reasons(faulty), **other}, reasons(earlier), nodes)
    if named is None:
        assert found is None
    else:
        assert found.startswith(f"{named} cannot take part: rank ")


def test_what_a_node_lacked_at_another_start_without_a_job_does_not_count(tmp_path, monkeypatch):
    line = {"time": 1.0, "job_id": None, "node": "a", "reason": "Slurm promises 2 GPUs, PyTorch sees 0"}
    (tmp_path / "unfit_nodes.jsonl").write_text(
        json.dumps(line) + "\n" + json.dumps({**line, "job_id": "7"}) + "\n[]\n{"
    )
    lacked = {"a": "Slurm promises 2 GPUs, PyTorch sees 0"}
    assert preflight.earlier_faults(tmp_path, {}) == {}
    assert preflight.earlier_faults(tmp_path, {"SLURM_JOB_ID": "7"}) == lacked
    assert preflight.earlier_faults(tmp_path, {"SLURM_JOB_ID": "8"}) == {}
    (tmp_path / "teachers" / "conv" / "ckpt" / "step_000005").mkdir(parents=True)  # it has got on since
    assert preflight.earlier_faults(tmp_path, {"SLURM_JOB_ID": "7"}) == {}


def test_ranks_whose_nodes_all_lack_their_gpus_end_with_bad_usage_and_exclude_none(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "promised_gpus", lambda env: 2)
    hosts = iter("aabb")
    monkeypatch.setattr(preflight, "node_name", lambda env: next(hosts))
    for failure in meet_all(tmp_path / "mine"):
        assert type(failure) is ConfigError
        assert "a, b cannot take part: Slurm promises 2 GPUs, PyTorch sees 0 (PyTorch " in str(failure)
        assert f"built for CUDA {torch.version.cuda}" in str(failure) or "built without CUDA" in str(failure)
        assert "driver" in str(failure)
    assert not (tmp_path / "mine").exists()


def test_gloos_own_choice_of_interface_is_left_alone_where_it_works(monkeypatch):
    monkeypatch.setattr(preflight.socket, "gethostbyname", lambda name: "10.1.2.3")
    assert preflight.find_interface(["10.1.2.4"]) is None


def reduce_on(world, port, path, result, wrong=None, before=None):
    """wrong: the rank that gets another sum than the others. before: called first, with the rank."""
    if before is not None:
        before(world.rank)
    stop, env = StopRequest(), env_of(port, SLURMD_NODENAME=f"n{world.rank}")
    store = meet(world, env, path, stop, 30.0)
    if world.rank == wrong:
        all_reduce = dist.all_reduce
        dist.all_reduce = lambda tensor: (all_reduce(tensor), tensor.mul_(2))
    try:
        preflight.try_to_reduce(world, env, path, stop, store)
        start(world, store=store)
        outcome = "joined"
    except RunError as error:
        outcome = error_line(error)
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


TRIAL_S = 2.0


def hang_in_a_sum(rank, *, hanging=1, library=ctypes.CDLL):
    """Let the rank block in C for good where it joins the trial's process group, and give every rank little time."""
    preflight.TRIAL_S, preflight.EXIT_S = TRIAL_S, 10
    if rank == hanging:
        dist.init_process_group = lambda *_, **__: library(None).sleep(600)


@pytest.mark.parametrize("hanging", [0, 1])
def test_a_rank_that_hangs_in_the_trial_ends_all_ranks_in_time_with_the_nodes_named(hanging, tmp_path):
    began = time.monotonic()
    found = outcomes(tmp_path, [World(rank, 0, 2, 1) for rank in (0, 1)], before=functools.partial(hang, hanging))
    assert found[0] == found[1]
    assert f"n{hanging} cannot take part: a sum over the ranks did not end within 2.5 s" in found[0]
    assert f"n{1 - hanging} cannot take part: a sum over the ranks failed: " in found[0]
    assert time.monotonic() - began < 20
    assert not (tmp_path / "runs" / "mine").exists()  # half of the nodes: maybe the network


def hang(hanging, rank):
    hang_in_a_sum(rank, hanging=hanging)


def hang_with_the_interpreters_lock(rank):
    hang_in_a_sum(rank, library=ctypes.PyDLL)


@pytest.mark.slow
def test_a_rank_that_hangs_with_the_interpreters_lock_is_ended_and_named_by_the_others(tmp_path):
    """No thread of it can report. Its watchdog ends it, and does not wait for the lock either."""
    result, port = tmp_path / "result", free_port()
    result.mkdir()
    processes = [
        start_process(
            functools.partial(reduce_on, before=hang_with_the_interpreters_lock),
            World(rank, 0, 2, 1),
            port,
            tmp_path / "runs" / "mine",
            result,
        )
        for rank in (0, 1)
    ]
    for process in processes:
        process.join(60)
    assert "the node of rank 1 cannot take part: rank 1 did not arrive within 4 s" in (result / "0").read_text()
    assert processes[1].exitcode == HUNG


def fail_after_all(rank):
    """A rank that refuses at once, while the others wait for it."""
    preflight.TRIAL_S, preflight.EXIT_S = TRIAL_S, 10
    if rank == 2:
        dist.init_process_group = fail


def fail(*_, **__):
    raise dist.DistBackendError("ncclUnhandledCudaError: no such link")


def test_the_node_that_failed_is_named_before_those_that_waited_for_it(tmp_path):
    found = outcomes(tmp_path, [World(rank, 0, 3, 1) for rank in (0, 1, 2)], before=fail_after_all)
    assert found[0].startswith(
        "n2 cannot take part: a sum over the ranks failed: ncclUnhandledCudaError: no such link; n0"
    )
    assert found == [found[0]] * 3


def end_blocked():
    from cit_scale.distributed.watchdog import end_within

    end_within(1)
    ctypes.PyDLL(None).sleep(60)


def test_a_process_whose_end_hangs_is_ended():
    process = start_process(end_blocked)
    process.join(20)
    assert process.exitcode == HUNG


def test_variables_are_set_for_a_while_and_then_as_they_were(monkeypatch):
    monkeypatch.setenv("CIT_TEST_SET", "before")
    monkeypatch.delenv("CIT_TEST_UNSET", raising=False)
    with preflight.environment({"CIT_TEST_SET": "1", "CIT_TEST_UNSET": "2"}):
        assert (os.environ["CIT_TEST_SET"], os.environ["CIT_TEST_UNSET"]) == ("1", "2")
    assert os.environ["CIT_TEST_SET"] == "before"
    assert "CIT_TEST_UNSET" not in os.environ


def test_a_problem_comes_back_from_the_thread_whatever_it_is():
    assert preflight.within(60, "it", lambda: None) is None
    assert preflight.within(60, "it", lambda: "wrong") == "wrong"
    assert preflight.within(60, "it", lambda: {}["no key"]) == "it failed: 'no key'"
    assert "it did not end within 0.1 s" in preflight.within(0.1, "it", lambda: time.sleep(3))


def test_on_gpus_the_trial_connects_its_own_device_at_once_without_blocking(monkeypatch):
    calls = []

    def join(backend, **given):
        calls.append((backend, given["device_id"], {name: os.environ.get(name) for name in settings}))
        raise dist.DistBackendError("no GPU here")

    settings = (preflight.BLOCKING_WAIT, preflight.NONBLOCKING, preflight.NONBLOCKING_TIMEOUT)
    for name in settings:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(device))
    monkeypatch.setattr(dist, "init_process_group", join)
    gpu = torch.device("cuda", 1)
    with preflight.environment(preflight.nccl_settings()), pytest.raises(dist.DistBackendError):
        preflight.sum_ones(World(3, 1, 4, 2), dist.HashStore())
    assert calls == [gpu, ("cpu:gloo,cuda:nccl", gpu, dict(zip(settings, ("1", "1", "120"), strict=True)))]
    assert not set(settings) & set(os.environ)


def test_a_users_own_choice_of_communicators_stays(monkeypatch):
    monkeypatch.setenv(preflight.NONBLOCKING, "0")
    assert preflight.nccl_settings() == {preflight.BLOCKING_WAIT: "1"}


def test_the_installed_pytorch_reads_the_variables_of_the_trial():
    """One that was renamed would be ignored without a word."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    if not library.exists():
        pytest.skip("PyTorch without CUDA")
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for name in (preflight.BLOCKING_WAIT, preflight.NONBLOCKING, preflight.NONBLOCKING_TIMEOUT):
            assert content.find(name.encode() + b"\0") >= 0, name
