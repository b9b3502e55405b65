"""Preflight check: every rank reports on its node before training starts, and a missing or unfit node is named.

The ranks meet at rank 0's store before they join the process group. In ``init_process_group`` a missing rank is a
time-out that names no rank, and a rank without a working device crashes while all other ranks hang.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from cit_scale.distributed.slurm_job import job_id, node_name, promised_gpus
from cit_scale.distributed.stop import StopRequest
from cit_scale.distributed.watchdog import Patience, Watchdog, end_within
from cit_scale.distributed.world import World
from cit_scale.errors import ConfigError, RunError, Stopped, UnfitNodeError, one_line
from cit_scale.run_folder import UNFIT_NODES, last_saved, unfit_nodes

MAX_SKEW_S = 60.0  # between a node's clock and rank 0's
SHARED_S = 10.0  # how long a new file of another node may take to appear on a network file system
TRIAL_S = 120.0  # time limit that PyTorch and NCCL get for connecting all ranks, and for the trial all-reduce
TRIAL_TIMES = 1.25  # after so many TRIAL_S the trial is given up, wherever it stands
EXIT_S = 60  # for the end of a process whose trial failed
FAREWELL_S = 10.0  # how long rank 0 keeps its store open for ranks that have not read the verdict
ANNOUNCE_S = 30.0  # rank 0 prints which ranks are missing after this time
POLL_S = 0.05

# What is tried, each in a thread of this name.
SUM, LEAVING = "a sum over the ranks", "leaving the trial's process group"

# The trial's NCCL, of both of PyTorch's backends for it. They read these variables when a group is made.
# - BLOCKING_WAIT: a time-out raises in the rank that waits. By default NCCL's watchdog ends the process, and the rank
#   could not report which node failed.
# - USE_COMM_NONBLOCKING: making the communicator (ncclCommInitRank) would block for as long as any rank is missing, and
#   neither of the other two would help. The default backend bounds it by the group's time-out.
# - NONBLOCKING_TIMEOUT, in whole seconds: bounds it in the older backend (TORCH_DIST_USE_NCCL2=0), which goes by the
#   value that it has read first for the rest of the process.
BLOCKING_WAIT = "TORCH_NCCL_BLOCKING_WAIT"
NONBLOCKING = "TORCH_NCCL_USE_COMM_NONBLOCKING"
NONBLOCKING_TIMEOUT = "TORCH_NCCL_NONBLOCKING_TIMEOUT"

Verdict = dict[str, str]
"""Node name to the reason why the node cannot take part. Empty: all nodes are fit."""

COMMAND = ""
"""In a verdict, in the place of a node's name: what is wrong with the way in which the run was started."""


@dataclass(frozen=True)
class Report:
    """A rank's report on its node.

    time: the node's clock, in seconds since 1970. device: "cuda" or "cpu". problem: why the node cannot take part; None
    for a fit node. gpu: ``gpu_identity`` of the device.
    """

    host: str
    time: float
    device: str
    problem: str | None
    gpu: str | None = None


def meet(world: World, env: Mapping[str, str], run_dir: Path, stop: StopRequest, timeout_s: float) -> dist.Store:
    """Collective. Check every rank's node. Returns the store for ``init_process_group``.

    timeout_s: how long rank 0 waits for the slowest rank.

    Raises UnfitNodeError on all ranks if a node is missing or unfit; the message names the nodes, and rank 0 appends
    them to unfit_nodes.jsonl in the run folder, from which the next start excludes them. Raises ConfigError if two
    ranks have the same GPU, if so many nodes have the same fault that it is not theirs, or if the port is in use
    (UnfitNodeError under Slurm, where the next start uses another port), and Stopped if a stop is requested.
    """

    def verdict_on(posts: Mapping[int, tuple[Report, float]]) -> Verdict:
        verdict = judge(posts, world, env, timeout_s, opened)
        faults = {report.host: report.problem for report, _ in posts.values() if report.problem is not None}
        if faults and (shared := find_shared_fault(faults, earlier_faults(run_dir, env), world.num_nodes)):
            return {COMMAND: shared}
        return verdict

    # ``opened`` is read after the store is open: no report can have been written before.
    store, opened = _open_store(world, env, timeout_s), time.time()
    shared = _shared_file(world, store, run_dir, timeout_s)
    try:
        problem = find_problem(world, env, shared)
        gpu = gpu_identity(world.device, env) if problem is None else None
        report = Report(node_name(env), time.time(), world.device.type, problem, gpu)
        _post(store, f"report/{world.rank}", asdict(report))
        verdict = _agree(world, store, "report", stop, timeout_s, verdict_on)
    finally:
        if world.is_main and shared is not None:
            shared.unlink(missing_ok=True)
    _refuse(verdict, world, env, run_dir)
    return store


def try_to_reduce(world: World, env: Mapping[str, str], run_dir: Path, stop: StopRequest, store: dist.Store) -> None:
    """Collective. Join a process group, all-reduce a tensor of ones, and leave the group again.

    Takes TRIAL_TIMES * TRIAL_S at most on this rank, wherever it hangs. Raises UnfitNodeError on all ranks if the
    all-reduce failed on any. The failed nodes are written to unfit_nodes.jsonl, and so excluded from the next start,
    only if fewer than half of the nodes failed: otherwise the cause is the network, or a single node whose fault all
    others see. After an exception on a GPU, or one for a thread that is blocked, the process is to end; if it does not
    by itself, it is ended after EXIT_S.
    """
    if world.world_size == 1:
        return
    if world.num_nodes > 1 and "GLOO_SOCKET_IFNAME" not in os.environ:
        interface = find_interface([*env.get("CIT_HOSTS", "").split(), env["MASTER_ADDR"]])
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    limit_s = TRIAL_TIMES * TRIAL_S
    try:
        with environment(nccl_settings()), _watch_trial(node_name(env), 2 * limit_s):
            problem = within(limit_s, SUM, lambda: sum_ones(world, store))
        report = Report(node_name(env), time.time(), world.device.type, problem)
        _post(store, f"trial/{world.rank}", asdict(report))
        patience_s = 2 * TRIAL_S
        verdict = _agree(world, store, "trial", stop, patience_s, lambda posts: judge(posts, world, env, patience_s, 0))
        _refuse(verdict, world, env, run_dir if 2 * len(verdict) < world.num_nodes else None)
        # Only now: leaving, too, waits for the other ranks. After a failure NCCL's group is not left at all, because
        # that would wait for a communicator that never came up.
        problem = within(limit_s, LEAVING, dist.destroy_process_group)
        if problem is not None:
            raise UnfitNodeError(f"{node_name(env)} cannot take part: {problem}")
    except RunError:
        if world.device.type == "cuda" or {SUM, LEAVING} & {thread.name for thread in threading.enumerate()}:
            # A thread may be blocked in NCCL for good, and what runs at the end of a process may wait for it.
            end_within(EXIT_S)
        elif dist.is_initialized():  # gloo alone, which waits for nobody
            dist.destroy_process_group()
        raise


def nccl_settings() -> dict[str, str]:
    """The environment variables for the trial. A user's own choice of communicators stays."""
    settings = {BLOCKING_WAIT: "1"}
    if NONBLOCKING not in os.environ:
        settings |= {NONBLOCKING: "1", NONBLOCKING_TIMEOUT: os.environ.get(NONBLOCKING_TIMEOUT, f"{TRIAL_S:.0f}")}
    return settings


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables. Afterwards they are what they were: training's process group finds the user's."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def within(limit_s: float, what: str, function: Callable[[], str | None]) -> str | None:
    """Call ``function`` in a thread of its own, for ``limit_s`` seconds at most. Returns what it returns, a problem.

    An exception is a problem, too, and so is the end of the time: the thread is then left where it is, and never ends
    if it is blocked in C. what: the name of it in these two.
    """
    problems: list[str | None] = []

    def call() -> None:
        try:
            problems.append(function())
        except Exception as error:  # time-outs and broken connections are RuntimeErrors; the others wait for any
            problems.append(f"{what} failed: {one_line(error, 200)}")

    # A daemon: the process must be able to end while the thread is blocked.
    thread = threading.Thread(target=call, name=what, daemon=True)
    thread.start()
    patience = Patience(limit_s)
    while thread.is_alive() and not patience.is_over():
        thread.join(min(limit_s, Patience.LONGEST_LOOK_S / 2))
    if problems:
        return problems[0]
    return f"{what} did not end within {limit_s:g} s; see the network between the nodes, with NCCL_DEBUG=INFO for GPUs"


def sum_ones(world: World, store: dist.Store) -> str | None:
    """Collective. Join a process group, and all-reduce a tensor of ones on the CPU and on the GPU. Returns the problem.

    Stays in the group.
    """
    gpu = world.device if world.device.type == "cuda" else None
    if gpu is not None:
        torch.cuda.set_device(gpu)  # each thread has a current device of its own
    dist.init_process_group(
        world.backend,
        # Keys of their own: training's process group meets at the same store later. And a connection of its own: the
        # store serves one caller at a time, and this one may wait in it while the other thread has to report.
        store=dist.PrefixStore("trial", store.clone()),
        rank=world.rank,
        world_size=world.world_size,
        timeout=timedelta(seconds=TRIAL_S),
        device_id=gpu,  # connects at once
    )
    for device in dict.fromkeys([torch.device("cpu"), world.device]):  # gloo first; then NCCL if the rank has a GPU
        ones = torch.ones(1, device=device)
        dist.all_reduce(ones)
        if ones.item() != world.world_size:
            return f"a sum of ones over {world.world_size} ranks on {device} came out as {ones.item():g}"
    return None


def _watch_trial(node: str, limit_s: float) -> Watchdog:
    """A watchdog for a trial that holds the interpreter's lock, so that no other thread can give it up."""
    return Watchdog(limit_s, None, f"{node} cannot take part: a sum over the ranks hangs; where it stands is above")


def gpu_identity(device: torch.device, env: Mapping[str, str]) -> str | None:
    """What tells this GPU from the others of its node; None on a CPU.

    CUDA 12 may give the parts of a divided GPU (MIG) the GPU's own UUID, and a process sees only the first part that
    CUDA_VISIBLE_DEVICES names; so that variable tells them apart.
    """
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    part = f" {env.get('CUDA_VISIBLE_DEVICES', '')}" if " MIG " in properties.name else ""
    return f"{properties.uuid}{part}"


def find_problem(world: World, env: Mapping[str, str], shared: Path | None) -> str | None:
    """Check this node by itself: GPUs, device, temporary files, shared disk. Returns the first problem, or None.

    shared: a file that rank 0 has created in the folder of runs. None if rank 0 could not create one; the disk is then
    not checked, because the other nodes are not to blame.
    """
    if problem := missing_gpus(env):
        return problem
    try:
        torch.ones(1, device=world.device).add_(1).item()
    except RuntimeError as error:  # a device that does not compute, or fewer devices than ranks
        versions = f" ({cuda_versions()})" if world.device.type == "cuda" else ""
        return f"rank {world.rank} cannot use {world.device}: {one_line(error, 200)}{versions}"
    try:
        with tempfile.TemporaryFile() as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        return f"no temporary file can be written: {error}"
    patience = Patience(SHARED_S)
    try:
        while shared is not None and not shared.exists():
            if patience.is_over():
                return f"{shared.parent} is not the folder that rank 0 sees there; runs_dir has to be on a shared disk"
            time.sleep(POLL_S)
    except OSError as error:
        return f"the folder of runs cannot be read: {error}"
    return None


def missing_gpus(env: Mapping[str, str]) -> str | None:
    """Whether PyTorch sees fewer GPUs than Slurm gives this node's job, in words; None: it does not."""
    if not (promised := promised_gpus(env)):
        return None
    # Sites that bind GPUs to tasks show each rank only its own GPU: count against that list, not the node's number.
    visible = env.get("CUDA_VISIBLE_DEVICES")
    promised = len(visible.split(",")) if visible else promised
    if torch.cuda.device_count() >= promised:
        return None
    return f"Slurm promises {promised} GPUs, PyTorch sees {torch.cuda.device_count()} ({cuda_versions()})"


def cuda_versions() -> str:
    """The CUDA that PyTorch was built for, and the newest that this node's driver can do."""
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return f"PyTorch {torch.__version__} is built {built}, {_driver_version()}"


def _driver_version() -> str:
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return "and there is no NVIDIA driver"
    if failed:
        return "and the NVIDIA driver does not say for which it is"
    major, minor = version.value // 1000, version.value % 1000 // 10
    return f"the NVIDIA driver for CUDA {major}.{minor} at most"


def earlier_faults(run_dir: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Reasons by node, of the nodes that failed at earlier starts of this job, since it last got on.

    Without a job they are other days'.
    """
    job = job_id(env)
    return unfit_nodes(run_dir, job, last_saved(run_dir)) if job else {}


def find_shared_fault(faults: Mapping[str, str], earlier: Mapping[str, str], nodes: int) -> str | None:
    """What to say where half of the nodes or more, and not one alone, have the same fault; None where none is shared.

    faults: by node, of this start, which has so many ``nodes``. earlier: of nodes that were excluded for them. Such
    nodes are not at fault, and excluding them would go on until the job has none left.
    """

    def kind(reason: str) -> str:
        return re.sub(r"\d+", "N", reason)  # whatever the rank, the device and the version

    for reason in faults.values():
        here = [node for node, other in faults.items() if kind(other) == kind(reason)]
        before = [node for node, other in earlier.items() if kind(other) == kind(reason) and node not in here]
        if 2 * len(here) >= nodes and len(here) + len(before) > 1:
            return (
                f"{', '.join(sorted([*before, *here]))} cannot take part: {reason}; the same on so many nodes is no "
                "fault of theirs, and no more are excluded for it: what they share has to change"
            )
    return None


def judge(
    posts: Mapping[int, tuple[Report, float]], world: World, env: Mapping[str, str], timeout_s: float, opened: float
) -> Verdict:
    """On rank 0. Decide from the reports which nodes cannot take part. Returns the reasons by node.

    posts: rank to (report, time at which rank 0 saw the report). A rank without an entry did not arrive.
    opened: when rank 0 opened the store, before which no report can have been written. Both times are by rank 0's
    clock, in seconds since 1970.
    """
    verdict: Verdict = {}
    mine = posts[0][0]
    first_on: dict[tuple[str, str], int] = {}  # by node and GPU
    for rank in range(world.world_size):
        if rank not in posts:
            verdict.setdefault(_host(rank, world, env), f"rank {rank} did not arrive within {timeout_s:g} s")
            continue
        report, seen = posts[rank]
        # The report was written between ``opened`` and ``seen``. A time inside that interval is no skew, however long
        # rank 0 took to look; otherwise the skew is the distance to the interval.
        skew_s = report.time - min(max(report.time, opened), seen)
        if report.problem is not None:
            verdict.setdefault(report.host, report.problem)
        elif report.device != mine.device:
            verdict.setdefault(report.host, f"rank {rank} has a {report.device} and rank 0 a {mine.device}")
        elif abs(skew_s) > MAX_SKEW_S:
            verdict.setdefault(report.host, f"its clock is {skew_s:+.0f} s off that of {mine.host}")
        if report.gpu is not None and (first := first_on.setdefault((report.host, report.gpu), rank)) != rank:
            # Not a fault of the node: the next start would meet the same on the nodes that are left.
            verdict.setdefault(
                COMMAND,
                f"ranks {first} and {rank} are on the same GPU of {report.host} ({report.gpu}), and NCCL needs one for "
                "each; start no more ranks on a node than it has GPUs, or show each its own by CUDA_VISIBLE_DEVICES",
            )
    # If only ranks of rank 0's own node arrived, that node is the likely cause, not all the others.
    if world.num_nodes > 2 and len(posts) <= world.local_world_size:
        return {mine.host: f"none of the other {world.num_nodes - 1} nodes reached it within {timeout_s:g} s"}
    return verdict


def find_interface(hosts: Sequence[str]) -> str | None:
    """Find the network interface for GLOO_SOCKET_IFNAME. Returns None if gloo finds a usable address by itself.

    gloo publishes the address to which the host's own name resolves. On Debian that is 127.0.1.1, an address of the
    loopback interface, which other nodes cannot reach. hosts: names of the nodes, tried in order.
    """
    try:
        if not socket.gethostbyname(socket.gethostname()).startswith("127."):
            return None
    except OSError:
        pass
    names = {each.address: name for name, addresses in psutil.net_if_addrs().items() for each in addresses}
    for host in hosts:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.connect((host, 9))  # UDP: connecting sends no packet, but makes the kernel choose a route
            address = probe.getsockname()[0]
            if not address.startswith("127."):
                return names.get(address)
    return None


def _host(rank: int, world: World, env: Mapping[str, str]) -> str:
    """The node of a rank that has not reported, from the list of hosts that slurm/env.sh exports."""
    hosts = env.get("CIT_HOSTS", "").split()  # in the order of the ranks
    place = rank // world.local_world_size
    return hosts[place] if place < len(hosts) else f"the node of rank {rank}"


def _open_store(world: World, env: Mapping[str, str], timeout_s: float) -> dist.Store:
    """Collective. Rank 0 opens a TCPStore at MASTER_ADDR:MASTER_PORT, and the others connect to it."""
    if world.world_size == 1:
        return dist.HashStore()  # a single process needs no port
    host, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    # torchrun's agent hosts the store itself and keeps it over its restarts, so rank 0 must not bind the port again.
    is_agents = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    patience = timedelta(seconds=timeout_s)
    try:
        store = dist.TCPStore(
            host, port, world.world_size, world.is_main and not is_agents, patience, wait_for_workers=False
        )
    except dist.DistNetworkError as error:
        # Under Slurm the port follows from job id and restart count (slurm/env.sh): a requeued job gets another one.
        if "EADDRINUSE" in str(error) and "SLURM_JOB_ID" in env:
            raise UnfitNodeError(
                f"port {port} of {host} is in use by another program; the next start takes another"
            ) from error
        if "EADDRINUSE" in str(error):
            raise ConfigError(
                f"port {port} of {host}, where the ranks are to meet, is in use by another program; choose another: "
                "deepspeed --master_port N, or MASTER_PORT=N"
            ) from error
        raise UnfitNodeError(
            f"{node_name(env)} cannot reach rank 0 at {host}:{port} ({one_line(error, 200)})"
        ) from error
    # The agent's store still holds the reports of earlier restarts; a prefix keeps them apart.
    return dist.PrefixStore(f"start {env.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _shared_file(world: World, store: dist.Store, run_dir: Path, timeout_s: float) -> Path | None:
    """Collective. Rank 0 creates a file beside the run folder. Returns its path, or None if rank 0 cannot write there.

    The name is random: a network file system may have cached on a node that a file of a fixed name does not exist.
    """
    folder = run_dir.parent
    if world.is_main:
        name = f".preflight_{secrets.token_hex(8)}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        except OSError:  # not reported here: the lock of the run folder is taken later and names the path
            name = ""
        store.set("shared", name)
    name = _get(store, "shared", timeout_s)
    return folder / name if name else None


def _agree(
    world: World,
    store: dist.Store,
    what: str,
    stop: StopRequest,
    timeout_s: float,
    judge: Callable[[dict[int, tuple[Report, float]]], Verdict],
) -> Verdict:
    """Collective. Rank 0 collects all reports and judges them. Returns its verdict on every rank.

    Raises Stopped on all ranks if rank 0 is asked to stop while it waits.
    """
    if world.is_main:
        posts = _collect(world, store, what, stop, timeout_s)
        verdict = None if posts is None else judge(posts)
        _post(store, f"{what}/verdict", verdict)
        # After a bad verdict rank 0 exits, and its store with it: wait until the other ranks have read the verdict.
        if verdict != {}:
            _collect_farewells(world, store, what)
    else:
        # Rank 0 waits timeout_s for the others, and may itself arrive up to timeout_s after this rank.
        verdict = json.loads(_get(store, f"{what}/verdict", 2 * timeout_s + FAREWELL_S))
        store.set(f"{what}/farewell/{world.rank}", "")
    if verdict is None:
        raise Stopped(0, stop.signum)
    return verdict


def _collect(
    world: World, store: dist.Store, what: str, stop: StopRequest, timeout_s: float
) -> dict[int, tuple[Report, float]] | None:
    """On rank 0. Wait for reports. Returns those that arrived in time, by rank, or None if a stop is requested."""
    posts: dict[int, tuple[Report, float]] = {}
    patience, before_announcing = Patience(timeout_s), Patience(ANNOUNCE_S)
    is_announced = False
    while len(posts) < world.world_size and not patience.is_over():
        if stop.requested:
            return None
        for rank in range(world.world_size):
            if rank not in posts and store.check([f"{what}/{rank}"]):
                posts[rank] = (Report(**json.loads(store.get(f"{what}/{rank}"))), time.time())
        if not is_announced and before_announcing.is_over() and len(posts) < world.world_size:
            # docs/slurm.md lists this message with what to do.
            missing = ", ".join(str(rank) for rank in range(world.world_size) if rank not in posts)
            print(f"waiting for ranks {missing}, at most {timeout_s:g} s from their start", flush=True)
            is_announced = True
        time.sleep(POLL_S if len(posts) < world.world_size else 0)
    return posts


def _collect_farewells(world: World, store: dist.Store, what: str) -> None:
    """On rank 0. Wait until every other rank has read the verdict, at most FAREWELL_S seconds."""
    patience = Patience(FAREWELL_S)
    waiting = set(range(1, world.world_size))
    while waiting and not patience.is_over():
        waiting = {rank for rank in waiting if not store.check([f"{what}/farewell/{rank}"])}
        time.sleep(POLL_S)


def _post(store: dist.Store, key: str, value: object) -> None:
    store.set(key, json.dumps(value))


def _get(store: dist.Store, key: str, timeout_s: float) -> str:
    """Wait for a key and return its value. Raises UnfitNodeError if rank 0 is gone or the time is over.

    Waits in slices: a single wait of timeout_s would expire during a pause of this process.
    """
    patience = Patience(timeout_s)
    while True:
        try:
            store.wait([key], timedelta(seconds=min(timeout_s, Patience.LONGEST_LOOK_S)))
            return store.get(key).decode()
        except dist.DistError as error:
            # DistStoreError is a slice that timed out; any other DistError means that the connection broke.
            if not isinstance(error, dist.DistStoreError) or patience.is_over():
                said = one_line(error, 200)
                raise UnfitNodeError(f"{socket.gethostname()} lost rank 0: {said}") from error


def _refuse(verdict: Verdict, world: World, env: Mapping[str, str], run_dir: Path | None) -> None:
    """Collective. Raise UnfitNodeError if the verdict names a node, ConfigError if the command is at fault.

    run_dir: where rank 0 appends the nodes to unfit_nodes.jsonl; None writes nothing.
    """
    if COMMAND in verdict:
        raise ConfigError(verdict[COMMAND])
    if not verdict:
        return
    if world.is_main and run_dir is not None:
        about = {"time": time.time(), "job_id": job_id(env)}
        lines = [json.dumps({**about, "node": node, "reason": reason}) + "\n" for node, reason in verdict.items()]
        with suppress(OSError):  # the exception below names the nodes even if the file cannot be written
            run_dir.mkdir(parents=True, exist_ok=True)
            with (run_dir / UNFIT_NODES).open("a") as file:
                file.write("".join(lines))
    nodes: dict[str, list[str]] = {}
    for node, reason in verdict.items():
        nodes.setdefault(reason, []).append(node)
    # The rarest reason first: where one node fails, all others wait for it, and fail for that.
    by_count = sorted(nodes.items(), key=lambda item: len(item[1]))
    raise UnfitNodeError("; ".join(f"{', '.join(names)} cannot take part: {reason}" for reason, names in by_count))
