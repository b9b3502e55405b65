"""The batch scripts and the launchers on a real Slurm, whose nodes are hosts of their own on a network of their own.

The Slurm is this machine's; CIT_SLURM=newest chooses the newest, where the trainer has another Debian's C library.
Where only Slurm itself has a say, test_slurm_versions tries several of them with a stand-in for the trainer.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import wheel
from slurm_cluster import Cluster, why_not
from slurm_releases import OWN, RELEASES, make_root
from slurm_releases import why_not as why_no_release
from tiny_run import STEPS, STEPS_PER_EPOCH, assert_same_tensors, learned

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

REPOSITORY = Path(__file__).parents[1]
END_S = 240
EPOCHS = 5
LONG_STEPS = EPOCHS * STEPS_PER_EPOCH
LONG = ["--train.epochs", str(EPOCHS)]
ON_CPUS = ["--gpus-per-node=0"]
ALONE = "--teachers.inv=null"
"""The batch scripts' recipes have two teachers, the tiny recipe over them has one."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    release = {each.slurm: each for each in RELEASES}[os.environ.get("CIT_SLURM", OWN.slurm)]
    if reason := why_no_release(release) or make_root(release):
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm"), release=release) as cluster:
        yield cluster


@dataclass(frozen=True)
class Run:
    """A job on the cluster and the run folder it works in."""

    cluster: Cluster
    job_id: str
    run_dir: Path
    log: Path

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def reaches(self, text: str, times: int = 1) -> None:
        self.cluster.wait_for(f"{text!r} in {self.log.name}", lambda: self.text().count(text) >= times, END_S)

    def ends(self) -> None:
        """Wait until the job has completed, whatever Slurm had to do for it."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        self.cluster.wait_for("the job's end", lambda: self.cluster.state(self.job_id) in over, END_S)
        assert self.cluster.state(self.job_id) == "COMPLETED", self.text()

    def starts(self) -> list[dict]:
        return json.loads((self.run_dir / "env.json").read_text())

    def attempts(self) -> list[dict]:
        return [json.loads(line) for line in (self.run_dir / "attempts.jsonl").read_text().splitlines()]

    def nodes(self) -> list[list[str]]:
        return [start["slurm"]["nodes"] for start in self.starts()]


@pytest.fixture(scope="module")
def python_folder(tmp_path_factory):
    """``python_folder(slow)``: to stand first on PATH. With its ``python`` each step of training takes so many seconds
    more, also in a job of submitit's. "absent": train.py is not there on remote1.
    """

    def make(slow: float | str) -> Path:
        folder = tmp_path_factory.mktemp("bin")
        script = folder / "python"
        steps = f"exec {sys.executable} {Path(__file__).parent}/slow_steps.py {slow}"
        train = {
            "absent": '[ "$SLURMD_NODENAME" = remote1 ] && exit 127; '
            f'shift 3; {steps.replace("absent", "0")} train "$@"',
        }.get(slow, f'shift 3; {steps} train "$@"')
        script.write_text(
            f'#!/bin/sh\ncase "$*" in\n*cit_scale.train*) {train};;\n'
            f'*submitit.core._submit*) shift 3; {steps} submitit "$@";;\nesac\nexec {sys.executable} "$@"\n'
        )
        script.chmod(0o755)
        return folder

    return make


@pytest.fixture(scope="module")
def login(cluster, python_folder):
    """``login(*command, slow=...)``: a command on the login node, in the checkout."""

    def run(*command: str, slow: float | str = 0) -> str:
        path = f"{python_folder(slow)}:{Path(sys.executable).parent}:{cluster.env['PATH']}"
        # The nodes claim 64 cores.
        env = {"PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        return cluster.run(*command, env=env, cwd=REPOSITORY)

    return run


@pytest.fixture(scope="module")
def tiny(cluster, tiny_inputs):
    """``tiny(name, *more)``: arguments of train.py for a run of the tiny recipe on the disk that the nodes share."""

    def arguments(name: str, *more: str) -> list[str]:
        places = ["--data.cache_dir", str(tiny_inputs / "cache"), "--runs_dir", str(cluster.shared), "--name", name]
        return ["--config", str(tiny_inputs / "tiny.yaml"), *places, "--engine.name", "fsdp2", *more]

    return arguments


@pytest.fixture(scope="module")
def sbatch(cluster, login, tiny):
    """Queue one of the scripts as it stands, with the tiny recipe, in a run folder of the test's own."""

    def queue(script: str, name: str, *options: str, train: list[str] = (), slow: float | str = 0) -> Run:
        log = cluster.shared / f"{name}.log"
        said = login("sbatch", f"--output={log}", *options, f"slurm/{script}.sh", *tiny(name, ALONE, *train), slow=slow)
        return Run(cluster, said.split()[-1], cluster.shared / name, log)

    return queue


@pytest.fixture(scope="module")
def submit(cluster, login, tiny):
    """Queue a run with launchers/submit.py."""

    def queue(name: str, *options: str, train: list[str] = (), slow: float = 0) -> Run:
        # What Python says it is called stands in the batch script.
        call = "import os, sys; sys.executable = os.popen('command -v python').read().strip(); "
        call += "from launchers import submit; sys.exit(submit.main())"
        login(
            sys.executable,
            "-c",
            call,
            "--gpus-per-node=0",
            "--cpus-per-task=2",
            *options,
            *tiny(name, *train),
            slow=slow,
        )
        return submitted(cluster, name)

    return queue


def submitted(cluster: Cluster, name: str) -> Run:
    """The newest job of a run that submit.py has queued."""
    note = json.loads((cluster.shared / name / "job.json").read_text())[-1]
    return Run(cluster, note["job_id"], cluster.shared / name, Path(note["log"]))


@pytest.fixture(scope="module")
def calm(sbatch):
    """The long run on two nodes that nobody disturbed."""
    run = sbatch("cit_base", "calm", *ON_CPUS, "--nodes=2", train=LONG)
    run.ends()
    assert [line["step"] for line in learned(run.run_dir)] == list(range(1, LONG_STEPS + 1))
    return run


@pytest.fixture(scope="module")
def limited(sbatch, calm):
    """A run whose steps alone take a minute, with a limit of a minute.

    It is queued early, on nodes that no other test depends on, and trains for minutes while others are tested.
    """
    options = ["--nodes=2", "--nodelist=node3,node4", "--time=1", "--signal=USR2@5"]
    return sbatch("cit_base", "limited", *ON_CPUS, *options, train=LONG, slow=2)


def assert_same_end(run: Run, calm: Run) -> None:
    """The weights, bit for bit, and every step's loss: so no sample was lost or seen twice in an epoch."""
    assert_same_tensors(run.run_dir, calm.run_dir)
    assert learned(run.run_dir) == learned(calm.run_dir)


# ---------------------------------------------------------------------------------------------------------------------
# The scripts


@pytest.mark.parametrize(("script", "nodes"), [("cit_tiny", 2), ("cit_small", 2), ("cit_base", 2), ("cit_base", 8)])
def test_a_script_trains_on_all_its_nodes(script, nodes, sbatch):
    batch = ["--train.global_batch_size", "16"]
    run = sbatch(script, f"{script}_{nodes}", *ON_CPUS, f"--nodes={nodes}", train=[*batch, "--engine.name", "zero"])
    run.ends()
    assert run.nodes() == [[f"node{i}" for i in range(1, nodes + 1)]]
    assert run.starts()[0]["world_size"] == nodes
    assert (run.run_dir / "results.json").exists()
    assert [line["step"] for line in learned(run.run_dir)] == list(range(1, STEPS // 2 + 1))


def test_an_installed_package_trains_by_its_own_scripts(cluster, python_folder, tiny, tmp_path_factory):
    """From a wheel, submitted from a folder that is no checkout."""
    site = wheel.install(tmp_path_factory.mktemp("wheel"))
    path = f"{python_folder(0)}:{Path(sys.executable).parent}:{cluster.env['PATH']}"
    env = {"PATH": path, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    where = cluster.run("python", "-m", "cit_scale", "where", env=env, cwd=cluster.shared).strip()
    assert where == str((site / "cit_scale" / "checkout").resolve())

    shown = cluster.run(
        *("python", f"{where}/launchers/submit.py", "--nodes", "2", *ON_CPUS, "--dry-run", *tiny("installed")),
        env=env,
        cwd=cluster.shared,
    )
    assert f"source {where}/slurm/env.sh" in shown

    log = cluster.shared / "installed.log"
    script = f"{where}/slurm/cit_tiny.sh"
    said = cluster.run(
        *("sbatch", f"--output={log}", *ON_CPUS, "--nodes=2", script, *tiny("installed", ALONE)),
        env=env,
        cwd=cluster.shared,
    )
    run = Run(cluster, said.split()[-1], cluster.shared / "installed", log)
    run.ends()
    assert run.starts()[0]["world_size"] == 2
    assert run.starts()[0]["commit"] is None
    assert (run.run_dir / "results.json").exists()


def test_of_three_nodes_two_train_where_three_cannot_share_the_batch(sbatch):
    options = ["--nodes=3", "--ntasks-per-node=2", "--cpus-per-task=8", "--export=ALL,CIT_NODE_COUNTS=4 2 1"]
    run = sbatch("cit_tiny", "two_of_three", *ON_CPUS, *options)
    run.ends()
    assert run.nodes() == [["node1", "node2"]]
    assert run.starts()[0]["world_size"] == 4


# ---------------------------------------------------------------------------------------------------------------------
# Interrupted


@pytest.fixture
def disturbed(sbatch, cluster):
    """``disturbed(name)``: the long run on two nodes, some steps from its beginning, with time to act."""

    def run(name: str, *options: str, slow: float = 0.2, train: list[str] = ()) -> Run:
        run = sbatch("cit_base", name, *ON_CPUS, *(options or ("--nodes=2",)), train=[*LONG, *train], slow=slow)
        run.reaches("step 8/")
        return run

    return run


@pytest.mark.usefixtures("limited")
def test_a_requeued_run_ends_as_if_nothing_had_been(disturbed, calm, cluster):
    run = disturbed("requeued", train=["--fresh"])  # which is for the first start
    cluster.run("scontrol", "requeue", run.job_id)
    run.ends()
    assert len(run.starts()) == 2
    assert run.starts()[1]["step"] >= 8  # what was reached was saved; no step was done twice
    assert_same_end(run, calm)


def test_a_signal_to_the_batch_script_alone_saves_requeues_and_goes_on(disturbed, calm, cluster):
    run = disturbed("signalled")
    cluster.run("scancel", "--batch", "--signal=TERM", run.job_id)
    run.ends()
    assert [attempt["exit_code"] for attempt in run.attempts()] == [75, 0]
    assert run.starts()[1]["step"] == run.attempts()[0]["steps"] >= 8
    assert_same_end(run, calm)


def test_a_job_of_a_higher_partition_takes_the_nodes_and_the_run_comes_back(disturbed, calm, cluster):
    run = disturbed("preempted")
    urgent = cluster.run(
        "sbatch",
        "--parsable",
        "--partition=urgent",
        "--nodes=2",
        "--cpus-per-task=64",
        "--output=/dev/null",
        "--wrap=sleep 2",
    ).strip()
    run.ends()
    assert cluster.state(urgent) == "COMPLETED"
    assert len(run.starts()) == 2
    assert run.starts()[1]["step"] >= 8
    assert_same_end(run, calm)


def test_a_run_longer_than_its_time_limit_takes_several(limited, calm):
    # Slurm looks every half a minute whose time is nearly up.
    run = limited
    run.ends()
    assert len(run.starts()) >= 2
    codes = {attempt["exit_code"] for attempt in run.attempts()[:-1]}
    # On a busy machine Slurm may look while the ranks still start: the signal ends them, and nothing was reached.
    assert {75} <= codes <= {75, 128 + signal.SIGUSR2}
    assert_same_end(run, calm)


@pytest.mark.parametrize("harm", ["kill_node", "kill_slurmd"])
def test_a_lost_node_does_not_change_what_is_learned(harm, disturbed, calm, cluster):
    run = disturbed(harm)
    getattr(cluster, harm)("node2")
    try:
        run.ends()
    finally:
        cluster.start_node("node2")
        cluster.wait_for("node2", lambda: "idle" in cluster.run("sinfo", "--noheader", "--nodes=node2", "-o", "%t"))
    assert run.nodes()[0] == ["node1", "node2"]
    if harm == "kill_node":  # the ranks of a node without its slurmd finish before Slurm misses it
        assert "node2" not in run.nodes()[-1]
    assert_same_end(run, calm)


def test_a_node_drained_in_mid_run_is_left_at_the_next_start(disturbed, calm, cluster):
    run = disturbed("drained")
    with cluster.drained("node1"):
        cluster.run("scontrol", "requeue", run.job_id)
        run.ends()
    assert "node1" in run.nodes()[0]
    assert "node1" not in run.nodes()[1]
    assert_same_end(run, calm)


@pytest.mark.parametrize("by", ["script", "submit"])
def test_two_nodes_requeued_onto_one_continue(by, disturbed, submit, cluster):
    def states() -> set[str]:
        return set(cluster.run("sinfo", "--noheader", "--Node", "--partition=pair", "--format=%t").split())

    cluster.wait_for("two idle nodes", lambda: states() == {"idle"})  # or it would begin on one
    if by == "script":
        run = disturbed("fewer", "--partition=pair", "--nodes=1-2")
    else:
        run = submit("fewer_submitted", "--partition=pair", "--nodes=2", "--min-nodes=1", train=LONG, slow=0.2)
        run.reaches("step 8/")
    with cluster.drained("node8"):
        cluster.run("scontrol", "requeue", run.job_id)
        run.ends()
    assert run.nodes() == [["node7", "node8"], ["node7"]]
    assert [start["world_size"] for start in run.starts()] == [2, 1]
    assert [line["step"] for line in learned(run.run_dir)] == list(range(1, LONG_STEPS + 1))


def test_a_cancelled_run_is_saved_and_stays_cancelled(disturbed, cluster):
    run = disturbed("cancelled")
    cluster.run("scancel", run.job_id)
    cluster.wait_for("the attempt's record", (run.run_dir / "attempts.jsonl").exists)
    (attempt,) = run.attempts()
    assert attempt["steps"] >= 8
    assert attempt["decision"].startswith("cancelled")
    cluster.wait_for("its end", lambda: run.job_id not in cluster.run("squeue", "--noheader", "-o", "%i").split())
    assert cluster.state(run.job_id) == "CANCELLED"


# ---------------------------------------------------------------------------------------------------------------------
# Failures


def ranks_of(job_id: str, rank: int) -> list[int]:
    """Process ids of a rank's trainer."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            if any("slow_steps.py" in word for word in process.info["cmdline"] or []):
                env = process.environ()
                if (env.get("SLURM_JOB_ID"), env.get("SLURM_PROCID")) == (job_id, str(rank)):
                    found.append(process.pid)
    return found


def test_a_killed_rank_costs_a_restart_and_its_last_lines_are_kept(disturbed, calm):
    run = disturbed("killed")
    (pid,) = ranks_of(run.job_id, 1)
    os.kill(pid, signal.SIGKILL)
    run.ends()
    failed, done = run.attempts()
    assert failed["exit_code"] not in (0, 75)
    assert "failure 1 in a row without progress, of at most 3" in failed["decision"]
    assert any("step 8/" in line for line in failed["last_lines"])
    assert (done["exit_code"], done["last_lines"]) == (0, [])
    assert_same_end(run, calm)


def test_a_wrong_setting_is_not_tried_again(sbatch, cluster):
    run = sbatch("cit_tiny", "wrong", *ON_CPUS, train=["--train.epochs", "-1"])
    cluster.wait_for("the job's end", lambda: cluster.state(run.job_id) == "FAILED", END_S)
    (attempt,) = run.attempts()
    assert attempt["exit_code"] == 2
    assert any("train.epochs=-1 must be above 0" in line for line in attempt["last_lines"])


def test_a_node_whose_rank_does_not_start_is_named_and_left_out(sbatch, calm):
    options = [*ON_CPUS, "--partition=sea", "--nodes=2"]
    run = sbatch("cit_base", "absent", *options, train=[*LONG, "--train.start_timeout_s", "30"], slow="absent")
    run.ends()
    failed, done = run.attempts()
    assert failed["exit_code"] == 127  # the highest of 8 and that of a program that is not there
    assert failed["unfit"] == {"remote1": "rank 1 did not arrive within 30 s"}
    assert "remote1" not in done["nodes"]
    assert_same_end(run, calm)


def test_a_node_without_the_shared_disk_is_named_and_left_out(sbatch, calm):
    run = sbatch("cit_base", "at_sea", *ON_CPUS, "--partition=sea", "--nodes=2", train=LONG)
    run.ends()
    failed, done = run.attempts()
    assert failed["exit_code"] == 8
    assert "remote1" in failed["nodes"]
    assert list(failed["unfit"]) == ["remote1"]
    assert "runs_dir has to be on a shared disk" in failed["unfit"]["remote1"]
    assert "remote1" not in done["nodes"]
    assert_same_end(run, calm)


def test_a_node_without_its_gpus_is_left_out_until_another_one_lacks_them_too(sbatch, cluster):
    run = sbatch("cit_base", "broken", "--partition=gpus", "--nodes=1", "--gpus-per-node=2")
    cluster.wait_for("the job's end", lambda: cluster.state(run.job_id) == "FAILED", END_S)
    first, second = run.attempts()
    ((node, reason),) = first["unfit"].items()
    assert (first["exit_code"], first["nodes"]) == (8, [node])
    assert reason.startswith("Slurm promises 2 GPUs, PyTorch sees 0 (PyTorch ")
    assert (second["exit_code"], second["unfit"]) == (2, first["unfit"])
    assert second["nodes"] != first["nodes"]
    assert any("broken1, broken2 cannot take part: Slurm promises 2 GPUs" in line for line in second["last_lines"])


# ---------------------------------------------------------------------------------------------------------------------
# submit.py and runs.py


def test_submit_trains_on_eight_nodes(submit):
    run = submit("submitted", "--nodes=8", train=["--train.global_batch_size", "16"])
    run.ends()
    assert run.nodes() == [[f"node{i}" for i in range(1, 9)]]
    assert [line["step"] for line in learned(run.run_dir)] == list(range(1, STEPS // 2 + 1))


def test_the_doctor_examines_nodes_and_names_the_one_that_does_not_answer(cluster, login):
    """On remote1 the shared disk is missing, and with it the job."""
    command = (sys.executable, "launchers/submit.py", "--doctor", "quick", "--gpus-per-node=0", "--cpus-per-task=2")
    path = f"{Path(sys.executable).parent}:{cluster.env['PATH']}"
    environment = {"PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}

    def examine(*options):
        return cluster.attempt(*command, *options, "--runs_dir", str(cluster.shared), env=environment, cwd=REPOSITORY)

    done = examine("--nodes=2", "--partition=pair")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^(node\d): fit", done.stdout, re.MULTILINE) == ["node7", "node8"]
    done = examine("--nodes=2", "--partition=sea")
    assert done.returncode == 8, done.stdout + done.stderr
    assert "remote1: no answer" in done.stdout
    assert re.search(r"^node\d: fit", done.stdout, re.MULTILINE)


def test_submitits_signal_is_the_trainers(submit, calm, cluster):
    run = submit("submitted_disturbed", "--nodes=2", train=LONG, slow=0.2)
    run.reaches("step 8/")
    cluster.run("scancel", "--signal=USR2", run.job_id)
    run.ends()
    assert [attempt["exit_code"] for attempt in run.attempts()] == [75, 0]
    assert run.starts()[1]["step"] == run.attempts()[0]["steps"] >= 8
    assert_same_end(run, calm)


def test_a_task_of_a_sweep_is_requeued_alone(submit, cluster):
    names = [f"swept-seed={seed}" for seed in (0, 1)]
    with pytest.raises(FileNotFoundError):  # the sweep's own name has no run folder
        submit("swept", "--sweep=seed=0,1", train=["--engine.name", "plain", "--train.epochs", "3"], slow=0.2)
    runs = [submitted(cluster, name) for name in names]
    array = runs[0].job_id.split("_")[0]
    assert [run.job_id for run in runs] == [f"{array}_0", f"{array}_1"]
    runs[1].reaches("step 8/")
    cluster.run("scancel", "--signal=USR2", runs[1].job_id)
    for run in runs:
        run.ends()
    assert [attempt["exit_code"] for attempt in runs[0].attempts()] == [0]
    assert [attempt["exit_code"] for attempt in runs[1].attempts()] == [75, 0]
    for run in runs:
        assert [line["step"] for line in learned(run.run_dir)] == list(range(1, 3 * STEPS_PER_EPOCH + 1))
    assert learned(runs[0].run_dir) != learned(runs[1].run_dir)


def test_a_run_is_listed_cancelled_and_resumed(submit, calm, cluster, login):
    def runs(*command: str) -> str:
        return login(sys.executable, "launchers/runs.py", *command, "--runs-dir", str(cluster.shared))

    def listed() -> dict:
        return next(each for each in json.loads(runs("list", "--json")) if each["name"] == "listed")

    run = submit("listed", "--nodes=2", train=LONG, slow=0.2)
    run.reaches("step 8/")
    assert listed()["state"] == "running"
    assert 8 <= listed()["step"] <= listed()["total_steps"] == LONG_STEPS
    runs("cancel", "listed")
    runs("resume", "listed")  # which waits until it is saved
    assert cluster.state(run.job_id) == "CANCELLED"
    assert run.attempts()[0]["decision"].startswith("cancelled")
    again = submitted(cluster, "listed")
    assert again.job_id != run.job_id
    again.ends()
    assert listed()["state"] == "finished"
    assert_same_end(again, calm)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--partition=gpuu"], "no partition is called 'gpuu'; those there are: "),
        (["--nodes=3", "--partition=short"], "--nodes=3, but partition short has 2"),
        (["--partition=short", "--time=60"], "--time=01:00:00, but partition short allows 00:30:00"),
        (["--nodes=3"], "train.global_batch_size=8 does not give each of 3 ranks"),
    ],
)
def test_what_slurm_would_never_start_is_refused_in_one_line(options, reason, login, tiny, cluster):
    path = {"PATH": f"{Path(sys.executable).parent}:{cluster.env['PATH']}"}
    command = [sys.executable, "launchers/submit.py", "--gpus-per-node=0", *options, *tiny("refused")]
    done = cluster.attempt(*command, env=path, cwd=REPOSITORY)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert reason in line


# ---------------------------------------------------------------------------------------------------------------------
# Several hosts without Slurm


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_other_launchers_meet_across_hosts(launcher, cluster, tiny, tmp_path):
    name = f"by_{launcher}"
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    start = {
        "torchrun": "torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint node1:29400",
        "deepspeed": f"deepspeed --hostfile {tmp_path}/hosts --no_ssh --master_addr node1 --node_rank {{rank}}",
    }[launcher]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    processes = []
    for rank, node in enumerate(("node1", "node2")):
        command = f"cd {REPOSITORY} && exec {start.format(rank=rank)} cit_scale/train.py {shlex.join(tiny(name))}"
        with (tmp_path / f"{node}.log").open("w") as log:
            processes.append(
                subprocess.Popen(cluster.on_node(node, command), env=env, cwd=REPOSITORY, stdout=log, stderr=log)
            )
    codes = [process.wait(END_S) for process in processes]
    assert codes == [0, 0], "\n".join((tmp_path / f"node{i}.log").read_text() for i in (1, 2))
    (start,) = json.loads((cluster.shared / name / "env.json").read_text())
    assert start["world_size"] == 2
    assert [line["step"] for line in learned(cluster.shared / name)] == list(range(1, STEPS + 1))
