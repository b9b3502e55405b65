"""The check at the start of a job: every node says that it is there and fit, and one that is not is named.

The ranks meet at rank 0's store before they join the process group, where a missing rank would be a time-out that names
nobody, and one without a device a crash there and a hang everywhere else.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from cit_scale.distributed.slurm_job import job_id
from cit_scale.distributed.stop import StopRequest
from cit_scale.distributed.watchdog import Patience
from cit_scale.distributed.world import World
from cit_scale.errors import ConfigError, Stopped, UnfitNodeError, one_line
from cit_scale.run_folder import UNFIT_NODES

MAX_SKEW_S = 60.0
SHARED_S = 10.0  # how long a file that another node has written may take to be seen
TRIAL_S = 120.0  # for connections between all nodes and a sum over them
FAREWELL_S = 10.0
ANNOUNCE_S = 30.0
POLL_S = 0.05

Verdict = dict[str, str]
"""By node: why it cannot take part."""


@dataclass(frozen=True)
class Report:
    """What a rank says of its node. time: by its own clock, in seconds since 1970. device: cuda or cpu."""

    host: str
    time: float
    device: str
    problem: str | None


def meet(world: World, env: Mapping[str, str], run_dir: Path, stop: StopRequest, timeout_s: float) -> dist.Store:
    """Collective. Check every rank's node, and return the store through which the ranks are to join.

    timeout_s: how long the slowest rank may take to arrive. Raises UnfitNodeError on all ranks, which names the nodes
    and is noted in the run folder for the next try; ConfigError where the port is taken; Stopped when asked to stop.
    """
    store, opened = _open_store(world, env, timeout_s), time.time()
    shared = _shared_file(world, store, run_dir, timeout_s)
    try:
        problem = find_problem(world, env, shared)
        _post(store, f"report/{world.rank}", asdict(Report(node_name(env), time.time(), world.device.type, problem)))
        verdict = _agree(
            world, store, "report", stop, timeout_s, lambda posts: judge(posts, world, env, timeout_s, opened)
        )
    finally:
        if world.is_main and shared is not None:
            shared.unlink(missing_ok=True)
    _refuse(verdict, world, env, run_dir)
    return store


def try_to_reduce(world: World, env: Mapping[str, str], run_dir: Path, stop: StopRequest, store: dist.Store) -> None:
    """Collective. Connect all ranks, sum over them, and let go again, with less patience than the training's.

    Raises UnfitNodeError on all ranks. The nodes where it failed are noted for the next try if they are fewer than
    half; otherwise it is the network between them, or one of them whose fault all the others see.
    """
    if world.world_size == 1:
        return
    if world.num_nodes > 1 and "GLOO_SOCKET_IFNAME" not in os.environ:
        interface = find_interface([*env.get("CIT_HOSTS", "").split(), env["MASTER_ADDR"]])
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    # Without this NCCL ends the process when its patience does, before anything could be said.
    before, os.environ["TORCH_NCCL_BLOCKING_WAIT"] = os.environ.get("TORCH_NCCL_BLOCKING_WAIT"), "1"
    devices = dict.fromkeys([torch.device("cpu"), world.device])  # over gloo, then over NCCL where there is a GPU
    problem = None
    try:
        trial, patience = dist.PrefixStore("trial", store), timedelta(seconds=TRIAL_S)
        dist.init_process_group(
            world.backend, store=trial, rank=world.rank, world_size=world.world_size, timeout=patience
        )
        for device in devices:
            ones = torch.ones(1, device=device)
            dist.all_reduce(ones)
            if ones.item() != world.world_size:
                problem = f"a sum of ones over {world.world_size} ranks on {device} came out as {ones.item():g}"
    except RuntimeError as error:
        problem = f"a sum over the ranks failed: {' '.join(str(error).split())[:200]}"
    finally:
        del os.environ["TORCH_NCCL_BLOCKING_WAIT"]
        if before is not None:
            os.environ["TORCH_NCCL_BLOCKING_WAIT"] = before
        if dist.is_initialized():
            dist.destroy_process_group()
    _post(store, f"trial/{world.rank}", asdict(Report(node_name(env), time.time(), world.device.type, problem)))
    verdict = _agree(world, store, "trial", stop, 2 * TRIAL_S, lambda posts: judge(posts, world, env, 2 * TRIAL_S, 0.0))
    _refuse(verdict, world, env, run_dir if 2 * len(verdict) < world.num_nodes else None)


def node_name(env: Mapping[str, str]) -> str:
    """As Slurm calls it, which is what it has to be excluded by; the host's name elsewhere."""
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def find_problem(world: World, env: Mapping[str, str], shared: Path | None) -> str | None:
    """What keeps this node from taking part, as far as it can tell alone.

    shared: a file that rank 0 has written; None where it could not, which is no node's fault here.
    """
    if env.get("SLURM_GPUS_ON_NODE", "0") != "0":
        visible = env.get("CUDA_VISIBLE_DEVICES")  # what Slurm has left of them for this rank
        promised = len(visible.split(",")) if visible else int(env["SLURM_GPUS_ON_NODE"])
        if torch.cuda.device_count() < promised:
            return f"Slurm promises {promised} GPUs, PyTorch sees {torch.cuda.device_count()}"
    try:
        torch.ones(1, device=world.device).add_(1).item()
    except RuntimeError as error:  # a device that is there and does not work, or fewer than there are ranks
        return f"rank {world.rank} cannot use {world.device}: {' '.join(str(error).split())[:200]}"
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


def judge(
    posts: Mapping[int, tuple[Report, float]], world: World, env: Mapping[str, str], timeout_s: float, opened: float
) -> Verdict:
    """On rank 0. posts: by rank, its report and when it was seen. Ranks may be missing.

    opened: when the first of them can have been written. Both times are by rank 0's clock, in seconds since 1970.
    """
    verdict: Verdict = {}
    mine = posts[0][0]
    for rank in range(world.world_size):
        if rank not in posts:
            verdict.setdefault(_host(rank, world, env), f"rank {rank} did not arrive within {timeout_s:g} s")
            continue
        report, seen = posts[rank]
        skew_s = report.time - min(max(report.time, opened), seen)  # how far it is outside of what can be
        if report.problem is not None:
            verdict.setdefault(report.host, report.problem)
        elif report.device != mine.device:
            verdict.setdefault(report.host, f"rank {rank} has a {report.device} and rank 0 a {mine.device}")
        elif abs(skew_s) > MAX_SKEW_S:
            verdict.setdefault(report.host, f"its clock is {skew_s:+.0f} s off that of {mine.host}")
    if world.num_nodes > 2 and len(posts) <= world.local_world_size:
        return {mine.host: f"none of the other {world.num_nodes - 1} nodes reached it within {timeout_s:g} s"}
    return verdict


def find_interface(hosts: Sequence[str]) -> str | None:
    """The network interface from which other nodes can be reached, where gloo would not find it; None otherwise.

    gloo tells the others the address that the host's own name stands for, and on Debian that is one of the loopback
    interface, 127.0.1.1.
    """
    try:
        if not socket.gethostbyname(socket.gethostname()).startswith("127."):
            return None
    except OSError:
        pass
    names = {each.address: name for name, addresses in psutil.net_if_addrs().items() for each in addresses}
    for host in hosts:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.connect((host, 9))  # sends nothing; the kernel chooses the route
            address = probe.getsockname()[0]
            if not address.startswith("127."):
                return names.get(address)
    return None


def _host(rank: int, world: World, env: Mapping[str, str]) -> str:
    """The node of a rank that did not say it, from the list that slurm/env.sh leaves."""
    hosts = env.get("CIT_HOSTS", "").split()
    place = rank // world.local_world_size
    return hosts[place] if place < len(hosts) else f"the node of rank {rank}"


def _open_store(world: World, env: Mapping[str, str], timeout_s: float) -> dist.Store:
    if world.world_size == 1:
        return dist.HashStore()  # a process alone needs no port
    host, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    # torchrun's agent has opened the port itself, for all its restarts.
    is_agents = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    patience = timedelta(seconds=timeout_s)
    try:
        store = dist.TCPStore(
            host, port, world.world_size, world.is_main and not is_agents, patience, wait_for_workers=False
        )
    except dist.DistNetworkError as error:
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
            f"{node_name(env)} cannot reach rank 0 at {host}:{port} ({' '.join(str(error).split())[:200]})"
        ) from error
    return dist.PrefixStore(f"start {env.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _shared_file(world: World, store: dist.Store, run_dir: Path, timeout_s: float) -> Path | None:
    """Collective. A file beside the run folder, written by rank 0 and under a name that no node can have cached.

    None where rank 0 cannot write there.
    """
    folder = run_dir.parent
    if world.is_main:
        name = f".preflight_{secrets.token_hex(8)}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        except OSError:  # the run says so when it wants to write
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
    """Collective. What rank 0 makes of everybody's post, on every rank. Raises Stopped on all if rank 0 is asked to."""
    if world.is_main:
        posts = _collect(world, store, what, stop, timeout_s)
        verdict = None if posts is None else judge(posts)
        _post(store, f"{what}/verdict", verdict)
        if verdict != {}:  # the store ends with this process: the others have to have read it
            _collect_farewells(world, store, what)
    else:
        # Rank 0 gives the others timeout_s, and may itself have arrived that much later.
        verdict = json.loads(_get(store, f"{what}/verdict", 2 * timeout_s + FAREWELL_S))
        store.set(f"{what}/farewell/{world.rank}", "")
    if verdict is None:
        raise Stopped(0, stop.signum)
    return verdict


def _collect(
    world: World, store: dist.Store, what: str, stop: StopRequest, timeout_s: float
) -> dict[int, tuple[Report, float]] | None:
    """On rank 0. The reports of those that arrive in time, by rank; None when asked to stop."""
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
            missing = ", ".join(str(rank) for rank in range(world.world_size) if rank not in posts)
            print(f"waiting for ranks {missing}, at most {timeout_s:g} s from their start", flush=True)
            is_announced = True
        time.sleep(POLL_S if len(posts) < world.world_size else 0)
    return posts


def _collect_farewells(world: World, store: dist.Store, what: str) -> None:
    patience = Patience(FAREWELL_S)
    waiting = set(range(1, world.world_size))
    while waiting and not patience.is_over():
        waiting = {rank for rank in waiting if not store.check([f"{what}/farewell/{rank}"])}
        time.sleep(POLL_S)


def _post(store: dist.Store, key: str, value: object) -> None:
    store.set(key, json.dumps(value))


def _get(store: dist.Store, key: str, timeout_s: float) -> str:
    """Wait for it in slices: the store's own patience would run out while this process is paused."""
    patience = Patience(timeout_s)
    while True:
        try:
            store.wait([key], timedelta(seconds=min(timeout_s, Patience.LONGEST_LOOK_S)))
            return store.get(key).decode()
        except dist.DistError as error:
            if not isinstance(error, dist.DistStoreError) or patience.is_over():
                said = one_line(error, 200)
                raise UnfitNodeError(f"{socket.gethostname()} lost rank 0: {said}") from error


def _refuse(verdict: Verdict, world: World, env: Mapping[str, str], run_dir: Path | None) -> None:
    """Collective. Raise UnfitNodeError if there is anybody to name, which rank 0 notes in the run folder, if given."""
    if not verdict:
        return
    if world.is_main and run_dir is not None:
        about = {"time": time.time(), "job_id": job_id(env)}
        lines = [json.dumps({**about, "node": node, "reason": reason}) + "\n" for node, reason in verdict.items()]
        with suppress(OSError):  # said below in any case
            run_dir.mkdir(parents=True, exist_ok=True)
            with (run_dir / UNFIT_NODES).open("a") as file:
                file.write("".join(lines))
    raise UnfitNodeError("; ".join(f"{node} cannot take part: {reason}" for node, reason in verdict.items()))
