"""The batch scripts and the launchers on Slurms of several versions, with a stand-in for the trainer (stand_in.sh)."""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import slurm_cluster
import slurm_releases
from slurm_cluster import Cluster

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(300),
    pytest.mark.skipif(slurm_cluster.why_not() is not None, reason=str(slurm_cluster.why_not())),
]

REPOSITORY = Path(__file__).parents[1]
END_S = 120
HOSTS = ("node1", "node2", "node3", "node4", "small1", "gpu1", "gpu2")
LINES = """
NodeName=node[1-3] NodeAddr=SUBNET.[1-3] CPUs=64 RealMemory=8000 Weight=10
NodeName=node4 NodeAddr=SUBNET.4 CPUs=64 CoreSpecCount=2 RealMemory=8000 Weight=20
NodeName=small1 NodeAddr=SUBNET.5 CPUs=32 RealMemory=8000
NodeName=gpu[1-2] NodeAddr=SUBNET.[6-7] CPUs=64 RealMemory=8000 Gres=gpu:a100:2
PartitionName=main Nodes=node[1-4] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=node[1-2] PriorityTier=10 PreemptMode=OFF
PartitionName=cheap Nodes=node[1-2] PriorityTier=1 PreemptMode=CANCEL GraceTime=0
PartitionName=unlike Nodes=node3,small1 PriorityTier=1 PreemptMode=OFF
PartitionName=gpus Nodes=gpu[1-2] PriorityTier=1 PreemptMode=OFF
PartitionName=capped Nodes=node[3-4] MaxCPUsPerNode=16 PreemptMode=OFF
PartitionName=closed Nodes=node4 State=DOWN
"""


def train(cluster: Cluster, name: str) -> list[str]:
    """Arguments of train.py that find the run folder ``name``."""
    return ["--config", "digits", "--data.train", "digits", "--runs_dir", str(cluster.shared), "--name", name]


@pytest.fixture(scope="module", params=slurm_releases.RELEASES, ids=str)
def cluster(request, tmp_path_factory):
    reason = slurm_releases.why_not(request.param) or slurm_releases.make_root(request.param)
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    with Cluster(folder, HOSTS, LINES, select="CR_Core_Memory", release=request.param) as cluster:
        yield cluster


@pytest.fixture(scope="module", autouse=True)
def limited(cluster, stand_in):
    """A job whose batch script alone is told of its time limit of a minute; Slurm looks every half a minute."""
    options = ["--signal=B:USR2@55", "--time=1", "--nodes=1", "--nodelist=node4"]
    return Job.queued(cluster, stand_in, "limited", *options, does="stops")


@dataclass(frozen=True)
class Job:
    """A job on the cluster, the run folder it works in, and its log."""

    cluster: Cluster
    job_id: str
    run_dir: Path
    log: Path

    @classmethod
    def queued(
        cls, cluster: Cluster, stand_in: Path, name: str, *options: str, does: str = "ends", on_gpus: bool = False
    ) -> Job:
        """One of the scripts as it stands, queued."""
        log = cluster.shared / f"{name}.log"
        kind = [] if on_gpus else ["--gpus-per-node=0"]
        said = cluster.run(
            *("sbatch", "--parsable", f"--output={log}", "--cpus-per-task=4", *kind, *options, "slurm/cit_tiny.sh"),
            *train(cluster, name),
            env=environment(cluster, stand_in, does),
            cwd=REPOSITORY,
        )
        return cls(cluster, said.strip(), cluster.shared / name, log)

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def told(self, start: int = 0) -> dict[int, dict[str, str]]:
        """What each rank of a start was told."""
        said = re.compile(
            rf"rank (\d+) of (?P<ranks>\d+) on (?P<host>\w+): start {start} of (?P<job>\w+), (?P<cores>\d+) cores, "
            r"(?P<threads>\d+) threads, (?P<gpus>\d+) GPUs, meets at (?P<meets>\w+)"
        )
        return {int(match[1]): match.groupdict() for match in said.finditer(self.text())}

    def hosts(self, start: int = 0) -> list[str]:
        """The host of each rank, in order of rank; each rank was told how many there are, and where the first is."""
        told = self.told(start)
        assert sorted(told) == list(range(len(told))), self.text()
        for each in told.values():
            assert int(each["ranks"]) == len(told), self.text()
            assert each["meets"] == told[0]["host"], self.text()
        return [told[rank]["host"] for rank in sorted(told)]

    def waits_for(self, text: str) -> None:
        self.cluster.wait_for(f"{text!r} in {self.log.name}", lambda: text in self.text(), END_S)

    def starts(self, ranks: int) -> None:
        """Wait for the ranks of the first start."""
        self.cluster.wait_for(f"{ranks} ranks in {self.log.name}", lambda: len(self.told()) == ranks, END_S)

    def ends(self, state: str = "COMPLETED") -> None:
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED")
        self.cluster.wait_for("the job's end", lambda: self.cluster.state(self.job_id) in over, END_S)
        assert self.cluster.state(self.job_id) == state, self.text()

    def attempts(self) -> list[dict]:
        path = self.run_dir / "attempts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def codes(self) -> list[int]:
        return [attempt["exit_code"] for attempt in self.attempts()]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Path:
    """A folder to stand first on PATH, whose ``python`` runs the stand-in where it is asked for the trainer."""
    folder = tmp_path_factory.mktemp("bin")
    script = folder / "python"
    trainer = f"exec {Path(__file__).with_name('stand_in.sh')}"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in\n*cit_scale.train*) {trainer} "$@";;\nesac\nexec {sys.executable} "$@"\n'
    )
    script.chmod(0o755)
    return folder


def environment(cluster: Cluster, stand_in: Path, does: str) -> dict[str, str]:
    path = f"{stand_in}:{Path(sys.executable).parent}:{cluster.env['PATH']}"
    return {"PATH": path, "PYTHONPATH": str(REPOSITORY), "CIT_STAND_IN": does}


@pytest.fixture
def login(cluster, stand_in):
    """``login(*command, does=...)``: a command on the login node, in the checkout. does: what the stand-in is to do."""

    def run(*command: str, does: str = "ends") -> str:
        return cluster.run(*command, env=environment(cluster, stand_in, does), cwd=REPOSITORY)

    return run


@pytest.fixture
def sbatch(cluster, stand_in, request):
    """``Job.queued``, called what the test is called."""
    name = re.sub(r"\W+", "_", request.node.name)
    return partial(Job.queued, cluster, stand_in, name)


def test_the_slurm_is_that_of_its_column_in_the_docs(cluster):
    version = tuple(map(int, re.search(r"(\d+)\.(\d+)", cluster.run("sinfo", "--version")).groups()))
    match cluster.release.slurm:
        case "24.11":
            assert version == (24, 11)
        case "newest":
            assert version >= (26, 5)
        case "own":
            assert version >= (22, 5)


# ---------------------------------------------------------------------------------------------------------------------
# Before a job


def test_what_the_plan_has_to_know_is_read(login):
    asked = "from launchers.slurm import *; import json; print(json.dumps([vars(each) for each in ask_partitions()]))"
    found = {each["name"]: each for each in json.loads(login("python", "-c", asked))}
    assert list(found) == re.findall(r"PartitionName=(\w+)", LINES)
    assert found["main"]["cores"] == [64, 64, 64, 62]
    assert found["capped"]["cores"] == [16, 16]
    assert [name for name, each in found.items() if each["is_default"]] == ["main"]
    assert [name for name, each in found.items() if each["state"] != "UP"] == ["closed"]
    assert {(each["accounts"], each["qos"], *each["not_accounts"]) for each in found.values()} == {(None, None)}
    assert found["gpus"]["gpus"] == [2, 2]
    assert login("python", "-c", "from launchers.slurm import *; print(ask_max_array_size())") == "1001\n"


def test_a_setup_that_fails_ends_the_job(cluster, login):
    resources = ["--nodes=1", "--gpus-per-node=0", "--cpus-per-task=4", "--setup", "echo begun; false; echo missed"]
    said = login("python", "launchers/submit.py", *resources, *train(cluster, "failing"))
    (log,) = (Path(path) for path in re.findall(r"tail --retry -F (\S+)", said))
    job = Job(cluster, re.search(r"submitted as job (\d+)", said)[1], cluster.shared / "failing", log)
    job.ends("FAILED")
    assert job.text() == "begun\nerror: --setup fails at: false\n"
    assert cluster.job(job.job_id)["ExitCode"] == "2:0"


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


@pytest.mark.parametrize(
    ("options", "hosts", "cores"),
    [
        (["--nodes=2"], ["node1", "node2"], 4),
        (["--nodes=2", "--ntasks-per-node=2"], ["node1", "node1", "node2", "node2"], 4),
        (["--nodes=2", "--ntasks=4", "--cpus-per-task=1"], ["node1", "node1", "node2", "node2"], 1),
        (["--nodes=2", "--ntasks-per-node=2", "--distribution=cyclic"], ["node1", "node1", "node2", "node2"], 4),
        (["--nodes=3", "--export=ALL,CIT_NODE_COUNTS=4 2 1"], ["node1", "node2"], 4),
        (["--nodes=2", "--partition=unlike", "--exclusive"], ["node3", "small1"], 32),
    ],
    ids=["nodes", "ntasks_per_node", "ntasks", "cyclic", "fewer_nodes", "unlike_nodes"],
)
def test_ranks_are_placed(options, hosts, cores, sbatch):
    job = sbatch(*options)
    job.ends()
    assert job.hosts() == hosts
    assert {int(each["cores"]) for each in job.told().values()} == {cores}


@pytest.mark.parametrize(
    ("options", "ranks", "gpus"),
    [
        (["--gpus-per-node=2"], 2, 2),
        (["--gpus-per-node=a100:2"], 2, 2),
        (["--gpus-per-node=1", "--ntasks-per-node=1"], 1, 1),
        (["--gpus-per-node=2", "--ntasks-per-gpu=1", "--cpus-per-task=1"], 2, 2),
        (["--gpus-per-node=0", "--exclusive"], 1, 0),
    ],
    ids=["gpus", "typed", "one", "ntasks_per_gpu", "none"],
)
def test_ranks_have_their_gpus(options, ranks, gpus, sbatch):
    job = sbatch("--partition=gpus", "--nodes=2", *options, on_gpus=True)
    job.ends()
    assert job.hosts() == ["gpu1"] * ranks + ["gpu2"] * ranks
    assert {int(each["gpus"]) for each in job.told().values()} == {gpus}


def test_gres_counts_beside_the_gpus_of_the_script(cluster, sbatch):
    options = ["--partition=gpus", "--nodes=2", "--gres=gpu:1"]
    if cluster.release.slurm == "newest":
        with pytest.raises(AssertionError, match="--gpus-per-node and --gres=gpu are mutually"):
            sbatch(*options, on_gpus=True)
        return
    job = sbatch(*options, on_gpus=True)
    job.ends()
    assert job.hosts() == ["gpu1", "gpu2"]
    assert {each["gpus"] for each in job.told().values()} == {"1"}


def test_a_job_without_the_environment_runs_by_the_python_it_is_given(sbatch, stand_in):
    job = sbatch("--nodes=2", f"--export=CIT_PYTHON={stand_in}/python")
    job.ends()
    assert job.hosts() == ["node1", "node2"]


def test_memory_by_core_beside_the_script_s_is_refused_by_sbatch(sbatch):
    with pytest.raises(AssertionError, match="--mem, --mem-per-cpu, and --mem-per-gpu are mutually exclusive"):
        sbatch("--nodes=1", "--mem-per-cpu=100")


@pytest.mark.parametrize("python", ["exec /nowhere/python", f"exec {sys.executable} -I -S"], ids=["none", "bare"])
def test_a_job_without_a_python_of_its_own_says_how_to_give_it_one(python, sbatch, cluster, tmp_path):
    other = cluster.shared / tmp_path.name
    other.write_text(f'#!/bin/sh\n{python} "$@"\n')
    other.chmod(0o755)
    job = sbatch("--nodes=2", f"--export=CIT_PYTHON={other}")
    job.ends("FAILED")
    (line,) = job.text().splitlines()
    assert line.startswith(f"error: {other} on node1 is missing, older than 3.11 or without torch; queue the job with ")
    assert cluster.job(job.job_id)["ExitCode"] == "2:0"


# ---------------------------------------------------------------------------------------------------------------------
# Interrupted


@pytest.mark.parametrize(
    "how",
    [
        ["--signal=USR2"],
        ["--signal=TERM"],
        ["--full", "--signal=USR2"],
        ["--batch", "--signal=TERM"],
    ],
    ids=" ".join,
)
def test_a_signal_stops_and_requeues(how, sbatch, cluster):
    job = sbatch("--nodes=2", does="stops")
    job.starts(2)
    cluster.run("scancel", *how, job.job_id)
    job.ends()
    assert job.codes() == [75, 0], job.text()
    assert len(job.hosts(1)) == 2


def test_a_requeued_job_comes_back(sbatch, cluster):
    job = sbatch("--nodes=2", does="stops")
    job.starts(2)
    cluster.run("scontrol", "requeue", job.job_id)
    job.ends()
    assert job.codes() == [75, 0], job.text()


def test_a_cancelled_job_stays_cancelled(sbatch, cluster):
    job = sbatch("--nodes=2", does="stops")
    job.starts(2)
    cluster.run("scancel", job.job_id)
    cluster.wait_for("the attempt's record", lambda: bool(job.attempts()))
    job.ends("CANCELLED")
    (attempt,) = job.attempts()
    assert attempt["decision"].startswith("cancelled")


@pytest.mark.parametrize("partition", ["main", "cheap"])
def test_a_preempted_job_comes_back(partition, sbatch, cluster):
    """main gives a time of grace and requeues by itself; cheap does neither."""
    job = sbatch("--nodes=2", "--nodelist=node[1-2]", f"--partition={partition}", does="stops")
    job.starts(2)
    asked = ["--partition=urgent", "--nodes=2", "--cpus-per-task=64", "--output=/dev/null", "--wrap=sleep 2"]
    urgent = cluster.run("sbatch", "--parsable", *asked).strip()
    job.ends()
    assert cluster.state(urgent) == "COMPLETED"
    first, *others = job.codes()
    assert (first, {*others}) == (75, {0}), job.text()  # a job that has just come back may have to go again


def test_a_term_to_all_that_runs_is_srun_s_to_obey(sbatch, cluster):
    """It kills the ranks: a failure, which is tried again from the newest checkpoint."""
    job = sbatch("--nodes=2", does="stops")
    job.starts(2)
    cluster.run("scancel", "--full", "--signal=TERM", job.job_id)
    job.ends()
    first, last = job.codes()
    assert last == 0
    assert first not in (0, 75)
    assert "failure 1 in a row" in job.attempts()[0]["decision"]


def test_a_time_limit_that_the_batch_script_alone_is_told_of_stops_and_requeues(limited):
    limited.ends()
    assert limited.codes() == [75, 0], limited.text()


# ---------------------------------------------------------------------------------------------------------------------
# Failures


def test_a_failure_is_tried_again(sbatch):
    job = sbatch("--nodes=2", does="fails-1")
    job.ends()
    assert job.codes() == [1, 0]


def test_what_always_fails_is_given_up(sbatch):
    job = sbatch("--nodes=2", "--export=ALL,CIT_MAX_RESTARTS=1", does="fails")
    job.ends("FAILED")
    assert job.codes() == [1, 1]
    assert "given up" in job.attempts()[-1]["decision"]


def test_a_step_that_srun_refuses_is_given_up_with_its_own_line(cluster, login):
    log, script = cluster.shared / "refused.log", cluster.shared / "refused.sh"
    arguments = shlex.join(train(cluster, "refused"))
    script.write_text(
        f"#!/bin/bash\nexport CIT_SCALE={REPOSITORY}\nset -- {arguments}\n. $CIT_SCALE/slurm/env.sh\n"
        'srun --gpus-per-node=9 python -P -m cit_scale.train "$@"\n'
    )
    options = ["--requeue", f"--output={log}", "--nodes=2"]
    job_id = login("sbatch", "--parsable", *options, str(script)).strip()
    job = Job(cluster, job_id, cluster.shared / "refused", log)
    job.ends("FAILED")
    (attempt,) = job.attempts()
    assert "no rank was started" in attempt["decision"]
    assert f"srun: error: Unable to create step for job {job_id}: Invalid generic resource" in attempt["decision"]


def test_nodes_that_are_unfit_are_left_out_and_named_once(sbatch, cluster):
    job = sbatch("--nodes=1", does="unfit")
    job.ends()
    assert job.text().count("left out from now on: node1\n") == 1, job.text()
    assert job.text().count("left out from now on: node2\n") == 1, job.text()
    assert job.hosts(2) == ["node3"]
    assert cluster.job(job.job_id)["ExcNodeList"] in ("node[1-2]", "node1,node2")


def test_a_job_from_within_a_task_of_another_one_is_its_own(login, cluster):
    """In its environment it finds the other one's tasks, step and place in an array. It fails, and is requeued."""
    log, said = cluster.shared / "inner.log", cluster.shared / "outer.log"
    inner = [f"--output={log}", "--gpus-per-node=0", "--nodes=2", "--cpus-per-task=4", "--mem=50"]
    queue = shlex.join(["sbatch", "--parsable", *inner, "slurm/cit_tiny.sh", *train(cluster, "inner")])
    asked = ["--array=5", "--nodes=2", "--ntasks-per-node=2", "--mem=100", "--distribution=cyclic", f"--output={said}"]
    wrap = f"srun --ntasks=1 --nodes=1 --mem=50 {queue}; sleep 100"
    around = login("sbatch", "--parsable", *asked, f"--wrap={wrap}", does="fails-1").strip()
    try:
        cluster.wait_for("the inner job's number", lambda: said.exists() and said.read_text().strip().isdigit(), END_S)
        job = Job(cluster, said.read_text().strip(), cluster.shared / "inner", log)
        job.ends()
        assert [(end["job_id"], end["restart"], len(end["nodes"])) for end in job.attempts()] == [
            (job.job_id, 0, 2),
            (job.job_id, 1, 2),
        ]
        assert cluster.job(f"{around}_5")["Restarts"] == "0"
        assert cluster.state(f"{around}_5") == "RUNNING"
    finally:
        cluster.run("scancel", around)
