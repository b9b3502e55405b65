"""The launchers on a Slurm that keeps accounts, which most sites' do: what only they know, and whom they let in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import slurm_accounting
import slurm_cluster
from slurm_cluster import Cluster

WHY_NOT = slurm_cluster.why_not() or slurm_accounting.why_not()
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(300),
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]

REPOSITORY = Path(__file__).parents[1]
END_S = 120
HOSTS = ("node1", "node2", "gpu1")
LINES = """
NodeName=node[1-2] NodeAddr=SUBNET.[1-2] CPUs=64 RealMemory=8000
NodeName=gpu1 NodeAddr=SUBNET.3 CPUs=64 RealMemory=8000 Gres=gpu:2
PartitionName=main Nodes=node[1-2] Default=YES
PartitionName=labs Nodes=gpu1 AllowAccounts=lab
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """root's own account is root; lab if it asks for that. QoS one is for one job at a time."""
    with Cluster(tmp_path_factory.mktemp("slurm"), HOSTS, LINES, has_accounts=True) as cluster:
        for line in (
            "add qos one MaxJobsPerUser=1",
            "add account lab Description=lab Organization=lab",
            "add account lab3 Description=lab3 Organization=lab parent=lab",
            "add user root Account=lab",
            "modify user root set QOS+=one",
        ):
            cluster.run("sacctmgr", "-i", *line.split())
        yield cluster


@pytest.fixture
def launch(cluster):
    """``launch(script, *arguments)``: one of the launchers on the login node."""

    def attempt(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(REPOSITORY / "launchers" / script), *arguments]
        return cluster.attempt(*command, cwd=REPOSITORY)

    return attempt


@pytest.fixture
def submit(cluster, launch, tiny_inputs):
    """``submit(name, *options)``: a run of two ranks on one node."""

    def attempt(name: str, *options: str) -> subprocess.CompletedProcess[str]:
        places = ["--runs_dir", str(cluster.shared), "--data.cache_dir", str(cluster.shared / "cache")]
        train = ["--config", str(tiny_inputs / "tiny.yaml"), *places, "--name", name, "--engine.name", "fsdp2"]
        return launch("submit.py", "--ntasks-per-node=2", "--cpus-per-task=1", *options, *train)

    return attempt


@pytest.fixture
def state(cluster, launch):
    """``state(name)``: what runs.py says of a run: its state, and why."""

    def read(name: str) -> str:
        done = launch("runs.py", "list", "--json", "--runs-dir", str(cluster.shared))
        assert done.returncode == 0, done.stderr
        (run,) = (run for run in json.loads(done.stdout) if run["name"] == name)
        return f"{run['state']}: {run['detail']}"

    return read


def job_id(cluster: Cluster, name: str) -> str:
    return json.loads((cluster.shared / name / "job.json").read_text())[-1]["job_id"]


def forgotten(cluster: Cluster, job: str) -> bool:
    """Whether squeue does not know the job any more, so that the accounting alone does."""
    return not cluster.attempt("squeue", "--noheader", "--states=all", f"--jobs={job}").stdout.strip()


def test_a_run_goes_through_and_the_accounts_have_it(cluster, submit, state):
    assert submit("through").returncode == 0
    cluster.wait_for("the run's end", lambda: state("through") == "finished: ", END_S)
    told = cluster.run("sacct", "-X", "-n", "-P", "-o", "State,Account", "-j", job_id(cluster, "through"))
    assert told.split() == ["COMPLETED|root"]


def test_how_a_job_ended_is_known_after_squeue_has_forgotten_it(cluster, submit, launch, state):
    with cluster.drained("node1"), cluster.drained("node2"):
        assert submit("waiting").returncode == 0
        assert submit("taken", "--array=2", "--sweep=seed=0,1").returncode == 0
        assert state("waiting").startswith("pending: ")
        runs = ["waiting", *(path.name for path in cluster.shared.glob("taken-*") if path.name != "taken-sweep")]
        assert len(runs) == 3
        for name in runs:
            done = launch("runs.py", "cancel", name, "--runs-dir", str(cluster.shared))
            assert done.stdout.endswith("is out of the queue, and does not come back\n"), done.stderr
    assert submit("failing", "--setup", "false").returncode == 0
    for name in ("failing", *runs):
        cluster.wait_for(f"{name} forgotten", lambda name=name: forgotten(cluster, job_id(cluster, name)), END_S)
    assert state("failing") == "failed: "
    (log,) = (cluster.shared / "failing" / "slurm").glob("*.out")
    assert log.read_text() == "error: --setup fails at: false\n"
    assert {name: state(name) for name in runs} == dict.fromkeys(runs, "not started: cancelled")
    # None of them is taken for one that waits: it can be queued again.
    done = launch("runs.py", "resume", "waiting", "--runs-dir", str(cluster.shared))
    assert "submitted as job" in done.stdout, done.stderr
    cluster.wait_for("the end", lambda: state("waiting") == "finished: ", END_S)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--account=other"], "Invalid account or account/partition combination specified"),
        (["--qos=high"], "Invalid qos specification"),
    ],
)
def test_whom_the_accounts_do_not_let_in_is_told_in_one_line(cluster, submit, options, expected):
    done = submit("kept-out", *options)
    assert done.returncode == 2, done.stdout
    assert done.stderr == f"error: sbatch refuses: sbatch: error: Batch job submission failed: {expected}\n"
    assert not (cluster.shared / "kept-out" / "job.json").exists()


def test_whom_a_partition_is_for_is_known_before_anything_is_queued(cluster, submit):
    on_labs = ["--partition=labs", "--gpus-per-node=0", "--dry-run"]
    done = submit("planned", *on_labs)
    assert done.returncode == 2, done.stdout
    assert done.stderr == "error: the job's account is root, but partition labs is for lab\n"
    for account in ("LAB", "lab3"):  # newer Slurms take the second as well, older ones say so themselves
        assert submit("planned", *on_labs, f"--account={account}").returncode == 0
    assert not (cluster.shared / "planned").exists()


def test_a_job_that_waits_for_a_limit_says_which(cluster, submit, state):
    for name in ("first", "second"):
        assert submit(name, "--qos=one", "--setup", "sleep 200").returncode == 0
    cluster.wait_for("the limit", lambda: state("second") == "pending: QOSMaxJobsPerUserLimit", END_S)
    cluster.run("scancel", job_id(cluster, "second"), job_id(cluster, "first"))
