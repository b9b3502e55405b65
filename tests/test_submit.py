"""What is queued, and what is refused before anything is."""

import functools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_partitions import SCONTROL, SCONTROL_NODE

from cit_scale import cli
from cit_scale import recipe as recipes
from cit_scale.config import REPOSITORY
from cit_scale.distributed.lock import exclusive
from cit_scale.distributed.stop import StopRequest
from cit_scale.distributed.world import World
from cit_scale.doctor.examine import Examined
from cit_scale.doctor.findings import Finding
from cit_scale.doctor.show import as_record
from cit_scale.errors import ConfigError
from cit_scale.settings import to_yaml
from launchers import examine as nodes
from launchers import executors, options, resources, submit
from launchers.resources import Resources
from launchers.slurm import NoSlurmError

GOLDEN = Path(__file__).parent / "golden"

# Stands in for each Slurm program; sbatch keeps what it was given.
PROGRAMS = {
    "squeue": "cat {folder}/queue.txt",
    "sbatch": 'cp "$1" {folder}/queued.sh && echo "Submitted batch job 12"',
    "scontrol": 'case "$*" in *partition*) f=partitions;; *node*) f=nodes;; *) f=config;; esac; cat {folder}/$f.txt',
    "srun": "false",
}


@pytest.fixture(autouse=True)
def no_cluster_file(monkeypatch, tmp_path):
    """Where cluster.yaml would stand."""
    monkeypatch.setattr(options, "CLUSTER_FILE", tmp_path / "cluster.yaml")
    return tmp_path / "cluster.yaml"


@pytest.fixture
def no_slurm(monkeypatch):
    def ask():
        raise NoSlurmError("there is no Slurm here")

    monkeypatch.setattr(resources, "ask_partitions", ask)


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """A folder of programs that answer as Slurm does: partitions main, short and gpus."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "partitions.txt").write_text(SCONTROL)
    (folder / "nodes.txt").write_text(SCONTROL_NODE)
    (folder / "config.txt").write_text("MaxArraySize            = 3\nMaxDBDMsgs              = 20024\n")
    (folder / "queue.txt").touch()
    for name, script in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/sh\n{script.format(folder=folder)}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.fixture
def tiny(tiny_inputs, tmp_path):
    """Arguments of train.py for a run that is quickly checked."""
    recipe, runs_dir = str(tiny_inputs / "tiny.yaml"), str(tmp_path / "runs")
    return ["--config", recipe, "--runs_dir", runs_dir, "--data.cache_dir", str(tiny_inputs / "cache")]


@pytest.fixture
def call(capsys):
    """``call(*arguments)``: the exit code, what was printed, and the one line of complaint."""

    def run(*argv):
        code = submit.main(list(map(str, argv)))
        printed = capsys.readouterr()
        assert code == 0 or re.fullmatch(r"error: .*\n", printed.err), printed.err
        return code, printed.out, printed.err

    return run


def compare(name, text, places):
    """With a recorded text, in which places are called by name. UPDATE_GOLDEN=1 records it anew."""
    for place, path in places.items():
        text = text.replace(str(path), place)
    if os.environ.get("UPDATE_GOLDEN"):
        (GOLDEN / name).write_text(text)
    assert text == (GOLDEN / name).read_text()


# ---------------------------------------------------------------------------------------------------------------------
# The batch script


RESOURCES = [
    "--nodes=4", "--min-nodes=1", "--ntasks-per-node=1", "--cpus-per-task=6", "--mem=64G", "--time=1-12:00:00",
    "--partition=gpu,old", "--account=vision", "--qos=high", "--constraint=h100|h200", "--exclude=node[3-4]",
    "--dependency=afterok:7", "--max-restarts=5", "--signal-delay=600", "--setup=module load cuda",
    "--setup=ulimit -n 65536",
]  # fmt: skip


def test_a_dry_run_prints_the_plan_and_the_whole_batch_script(call, tiny, tiny_inputs, tmp_path, no_slurm):
    code, printed, _ = call(*RESOURCES, "--dry-run", *tiny, "--train.epochs=3")
    assert code == 0
    places = {"INPUTS": tiny_inputs, "TMP": tmp_path, "PYTHON": sys.executable, "CHECKOUT": REPOSITORY}
    compare("submit_one.txt", printed, places)
    assert not (tmp_path / "runs").exists()


def test_a_sweep_is_one_array(call, tiny, tiny_inputs, tmp_path, no_slurm):
    sweep = ["--sweep", "lr=0.001,0.002", "--sweep", "betas=[0.9,0.99]", "--array", 1]
    code, printed, _ = call(*sweep, "--dry-run", *tiny)
    assert code == 0
    places = {"INPUTS": tiny_inputs, "TMP": tmp_path, "PYTHON": sys.executable, "CHECKOUT": REPOSITORY}
    compare("submit_sweep.txt", printed, places)


def test_the_batch_script_is_valid_shell_and_passes_the_arguments_on(call, tiny, tmp_path, slurm):
    name = 'it\'s $HOME; a "b"'
    code, _, _ = call("--sweep", "seed=0,1", "--min-nodes", 1, "--nodes", 2, *tiny, "--name", name)
    assert code == 0
    script = (slurm / "queued.sh").read_text()
    # In place of what is not there: env.sh, which here prints what it would find, and the ranks.
    script = re.sub(r"^source .*", 'printf "%s\\\\n" "$CIT_NODE_COUNTS" "$@"; exit', script, flags=re.MULTILINE)
    ran = subprocess.run(["bash", "-u"], input=script, capture_output=True, text=True, env={"SLURM_ARRAY_TASK_ID": "1"})
    assert ran.returncode == 0, ran.stderr
    counts, *argv = ran.stdout.splitlines()
    assert counts == "2 1"
    assert cli.parse_arguments(argv).config.seed == 1
    assert argv[: len(tiny)] == tiny
    assert argv[len(tiny) : len(tiny) + 2] == ["--name", name]


def test_a_container_gets_whatever_a_rank_reads_or_writes(call, tiny, tiny_inputs, tmp_path, no_slurm, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sharding = tmp_path.parent / f"{tmp_path.name}-sharding" / "mine.json"
    sharding.parent.mkdir()
    sharding.write_text('{"zero_optimization": {"stage": 2}}')
    image = "nvcr.io/nvidia/pytorch:25.01-py3"
    _, printed, _ = call("--container", image, "--dry-run", *tiny, f"--deepspeed_config={sharding}")
    (command,) = (line for line in printed.splitlines() if line.startswith("srun "))
    assert f"--container-image={image}" in command
    assert f"--container-workdir={tmp_path}" in command
    mounts = re.search(r"--container-mounts=(\S+)", command)[1].split(",")
    # Cache and weights lie in the folder of the data, the run folder in the one that the command stands in.
    assert set(mounts) >= {f"{path}:{path}" for path in (REPOSITORY, tmp_path, tiny_inputs, sharding.parent)}
    assert f"{tmp_path}/runs:{tmp_path}/runs" not in mounts
    assert " python3 -u -m submitit" in command


# ---------------------------------------------------------------------------------------------------------------------
# Options and cluster.yaml


def test_the_file_gives_defaults_and_the_command_line_wins(call, tiny, no_cluster_file, no_slurm):
    no_cluster_file.write_text(
        "partition: gpu\nntasks_per_node: 2\ntime: 24:00:00\nmem: 10G\nsetup: [module load a, module load b]\n"
    )
    _, printed, _ = call("--dry-run", *tiny)
    for line in ("partition=gpu", "ntasks-per-node=2", "time=1440", "mem=10G"):
        assert f"\n#SBATCH --{line}\n" in printed
    assert "\nmodule load a\nmodule load b\ntrap - ERR\nCIT_SCALE=" in printed
    _, printed, _ = call("--dry-run", "--mem", "0", "--setup", "true", "--ntasks-per-node", 1, *tiny)
    for line in ("partition=gpu", "ntasks-per-node=1", "mem=0"):
        assert f"\n#SBATCH --{line}\n" in printed
    assert "\ntrue\ntrap - ERR\nCIT_SCALE=" in printed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpus_per_nodes: 8", r"cluster.yaml: unknown option 'gpus_per_nodes'; did you mean gpus-per-node\?"),
        ("sweep: [lr=1]", r"cluster.yaml: unknown option 'sweep'"),
        ("nodes: many", r"cluster.yaml: argument --nodes: 'many' is not a whole number above 0"),
        ("account: [a, b]", r"cluster.yaml: account takes one value"),
        ("just words", r"cluster.yaml holds no options; write one to a line"),
        ("nodes: [", r"cluster.yaml cannot be read"),
    ],
)
def test_a_mistake_in_the_file_is_refused(call, no_cluster_file, text, expected):
    no_cluster_file.write_text(text)
    code, _, error = call("--dry-run")
    assert code == 2
    assert re.search(expected, error)


def test_the_example_in_the_help_is_a_valid_file(tmp_path):
    example = options.EPILOG.split("the file's list:\n\n")[1].split("\n\n")[0]
    path = tmp_path / "example.yaml"
    path.write_text("\n".join(line.removeprefix("    ") for line in example.splitlines()))
    given = options.read_cluster_file(path)
    assert given == {
        "partition": "gpu",
        "account": "vision",
        "gpus_per_node": 8,
        "cpus_per_task": 12,
        "time": "24:00:00",
        "setup": ["module load cuda"],
    }
    assert yaml.safe_load(path.read_text())["time"] != "24:00:00"  # the trap: YAML would count it in seconds


def test_gpus_of_a_kind_are_asked_for(call, tiny, slurm):
    asked = ["--partition", "gpus", "--dry-run", "--cpus-per-task", 2]
    _, printed, _ = call("--gpus-per-node", "h100:2", *asked, *tiny)
    assert "#SBATCH --gpus-per-node=h100:2\n" in printed
    assert "2 ranks with 2 cores each, 2 GPUs;" in printed
    code, _, complaint = call("--gpus-per-node", "h100:2", "--nodes", 3, *asked, *tiny)
    assert code == 2
    assert "--nodes=3 --gpus-per-node=h100:2, but of the nodes of partition gpus 2 have so many GPUs" in complaint
    code, _, complaint = call("--gpus-per-node", "h100", *asked, *tiny)
    assert code == 2
    assert "'h100' is no number of GPUs; write 4, or a100:4" in complaint


def test_without_gpus_per_node_a_job_takes_as_many_as_all_nodes_with_gpus_have(call, tiny, slurm):
    _, printed, _ = call("--dry-run", "--partition", "gpus", *tiny, "--train.global_batch_size", 16)
    assert "#SBATCH --gpus-per-node=4\n" in printed
    assert "#SBATCH --ntasks-per-node=4\n" in printed
    assert "time limit 01:00:00; partition gpus" in printed
    assert "#SBATCH --time" not in printed
    with (slurm / "gpus.txt").open("a") as file:
        file.write("gpus|16|(null)\n")
    assert "#SBATCH --gpus-per-node=4\n" in call("--dry-run", "--partition=gpus", *tiny, "--mixing.group_size=1")[1]
    _, printed, _ = call("--dry-run", "--partition", "gpus", "--ntasks-per-node", 2, *tiny)
    assert "gpus-per-node" not in printed


def test_the_script_runs_by_its_path(tmp_path):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(REPOSITORY / "launchers" / "submit.py"), "--nodes", "0"]
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "error: argument --nodes: '0' is not a whole number above 0\n"


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--node", 2], r"unknown option --node; did you mean --nodes\?"),
        (["--partition"], r"argument --partition: expected one argument"),
        (["--time", "2h"], r"--time: '2h' is no time; write minutes, HH:MM:SS or D-HH:MM:SS"),
        (["--time", "0"], r"--time=0 is no time to train in"),
        (["--partition", "nope"], r"no partition is called 'nope'; those there are: main \(the default\), short, gpus"),
        (["--nodes", 16], r"--nodes=16, but partition main has 8"),
        (["--partition", "gpus", "--gpus-per-node", 16], r"the most that one has: 8"),
        (["--partition", "gpus,main", "--nodes", 16], r"gpus has 4; --nodes=16, but partition main has 8"),
        (["--partition", "short", "--time", "1:00:00"], r"--time=01:00:00, but partition short allows 00:30:00"),
        (["--time", 5], r"--signal-delay=300 seconds before the time limit, but that is 00:05:00"),
        (["--partition", "short", "--signal-delay", 1800], r"but that is 00:30:00"),
        (["--nodes", 2, "--min-nodes", 3], r"--min-nodes=3 is more than --nodes=2"),
        (["--nodes", 4, "--min-nodes", 3], r"--min-nodes=3, but below --nodes=4, .* evenly are 2, 1$"),
        (["--nodes", 3], r"global_batch_size=8 does not give each of 3 ranks .*; the nearest that do: 6, 12"),
        (["--gpus-per-node", 2, "--ntasks-per-node", 4, "--partition", "gpus"], r"a rank computes on one GPU"),
        (["--sweep", "lrr=1"], r"--sweep lrr: there is no such setting; near it: optim.lr"),
        (["--sweep", "epochs=3,0"], r"train.epochs=0 must be above 0"),
        (["--engine.name", "plain", "--nodes", 2], r"engine.name=plain is for one process and there are 2"),
        (["--train.epohcs", 2], r"did you mean train.epochs"),
        (["--cluster", "local", "--nodes", 2], r"--nodes=2, but --cluster local is this machine alone"),
        (["--cluster", "local", "--nodes", 2, "--doctor"], r"--nodes=2, but --cluster local is this machine alone"),
        (["--cluster", "local", "--gpus-per-node", 64], r"--gpus-per-node=64, but this machine shows \d"),
        (["--cluster", "local", "--sweep", "seed=0,1"], r"a sweep is an array of Slurm's; with --cluster local"),
        (["--cluster", "lsf"], r"invalid choice: 'lsf' \(choose from"),
    ],
)
def test_a_mistake_is_one_line_before_anything_queues(call, tiny, slurm, tmp_path, argv, expected):
    code, _, error = call(*argv, *tiny)
    assert code == 2
    assert re.search(expected, error), error
    assert not (slurm / "queued.sh").exists()
    assert not (tmp_path / "runs").exists()


def test_where_there_is_no_slurm_the_run_is_refused_with_the_other_ways(call, tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, error = call(*tiny)
    assert code == 2
    assert re.search(r"no Slurm here .*--cluster local.*deepspeed cit_scale/train.py", error)
    assert "doctor" not in error
    code, _, error = call(*tiny, "--doctor", "quick")
    assert code == 2
    assert re.search(r"no Slurm here .*to examine this machine: cit-scale doctor --quick$", error)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--config", "nope"], r"no recipe is called 'nope'"),
        (["--data.train", "/nowhere"], r"/nowhere"),
        (["--teachers.conv.weights", "/nowhere.pth"], r"weights /nowhere.pth do not exist"),
    ],
)
def test_a_missing_input_has_the_exit_code_of_one(call, tiny, slurm, argv, expected):
    code, _, error = call(*tiny, *argv)
    assert code == 3
    assert re.search(expected, error)
    assert not (slurm / "queued.sh").exists()


def test_a_run_folder_with_other_settings_is_refused_and_fresh_sets_it_aside(call, tiny, slurm, tmp_path):
    run_dir = tmp_path / "runs" / "tiny"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(to_yaml(cli.parse_arguments([*tiny, "--seed", "7"]).config))
    code, _, error = call(*tiny)
    assert code == 7
    assert "seed: 7 -> 0" in error
    assert call("--dry-run", "--fresh", *tiny)[0] == 0
    assert (run_dir / "config.yaml").exists()
    assert call("--fresh", *tiny)[0] == 0
    assert (tmp_path / "runs" / "tiny.1" / "config.yaml").exists()
    assert not (run_dir / "config.yaml").exists()
    # The job that queues itself again would set aside what it has learned.
    assert "--fresh" not in (slurm / "queued.sh").read_text()


def test_what_fresh_set_aside_is_back_where_sbatch_refuses(call, tiny, slurm, tmp_path):
    run_dir = tmp_path / "runs" / "tiny"
    (run_dir / "slurm").mkdir(parents=True)
    (run_dir / "slurm" / "1_0_log.out").write_text("trained")
    (slurm / "sbatch").write_text("#!/bin/sh\necho 'Invalid qos' >&2\nexit 1\n")
    code, printed, _ = call("--fresh", *tiny)
    assert code == 2
    assert f"{run_dir} is back, as nothing was queued\n" in printed
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()] == ["tiny"]
    assert [path.name for path in (run_dir / "slurm").iterdir()] == ["1_0_log.out"]


def test_a_run_that_waits_or_trains_is_not_queued_twice_but_behind_itself(call, tiny, slurm):
    assert call(*tiny)[0] == 0
    (slurm / "queue.txt").write_text("12|12|PENDING||Resources\n")
    code, _, error = call(*tiny)
    assert code == 7
    assert "is pending (Resources) already; cancel that first" in error
    assert call("--dependency", "afterany:12", *tiny)[0] == 0


@pytest.mark.parametrize("argv", [["--name", "q%j"], ["--name", "a\\s"], ["--runs_dir", "/tmp/%u"]])
def test_a_path_of_the_log_that_slurm_would_read_otherwise_is_refused(call, tiny, slurm, argv):
    code, _, error = call("--dry-run", *tiny, *argv)
    assert code == 2
    assert re.search(r"the log would go to \S+, and Slurm reads [%\\] there as something else; ", error)


def test_fresh_does_not_take_the_folder_from_under_a_job_that_works_there(call, tiny, slurm, tmp_path):
    run_dir = tmp_path / "runs" / "tiny"
    run_dir.mkdir(parents=True)
    with StopRequest() as stop, exclusive(run_dir, World(), stop):
        code, _, error = call("--fresh", *tiny)
    assert code == 7
    assert f"{run_dir} is running (process {os.getpid()} on " in error
    assert run_dir.exists()
    assert not (slurm / "queued.sh").exists()


def test_an_sbatch_that_hangs_in_a_dry_run_is_a_line_and_the_script_is_shown(call, tiny, slurm, monkeypatch):
    monkeypatch.setattr("launchers.slurm.TIMEOUT_S", 0.5)
    (slurm / "sbatch").write_text("#!/bin/sh\nexec sleep 60\n")
    code, printed, error = call("--dry-run", *tiny)
    assert (code, error) == (0, "")
    assert re.search(r"^sbatch says +timed out: no answer within 0.5 s$", printed, re.MULTILINE)
    assert "\n#SBATCH --job-name=tiny\n" in printed


def test_what_sbatch_refuses_is_told(call, tiny, slurm):
    complaint = "sbatch: error: Batch job submission failed:\nInvalid qos specification"
    (slurm / "sbatch").write_text(f"#!/bin/sh\necho '{complaint}' >&2\nexit 1\n")
    code, _, error = call("--qos", "gold", *tiny)
    assert code == 2
    assert error == f"error: sbatch refuses: {' '.join(complaint.split())}\n"


# ---------------------------------------------------------------------------------------------------------------------
# What is queued


def test_a_submission_is_noted_in_the_run_folder_with_the_command_that_repeats_it(call, tiny, slurm, tmp_path):
    run_dir = tmp_path / "runs" / "tiny"
    _, printed, _ = call("--nodes", 2, "--setup", "true", "--dependency", "afterok:3", *tiny)
    assert f"submitted as job 12: {run_dir}\n" in printed
    before = time.time()
    call("--partition", "short", *tiny)
    first, second = json.loads((run_dir / "job.json").read_text())
    log = run_dir / "slurm" / "12_0_log.out"
    assert f"follow with: tail --retry -F {log}\n" in printed
    assert first == {
        "job_id": "12",
        "cluster": "slurm",
        "submitted": first["submitted"],
        "log": str(log),
        "command": ["--nodes=2", "--setup=true", *tiny],
        "cwd": os.getcwd(),
    }
    assert first["submitted"] <= before <= second["submitted"]
    assert second["command"] == ["--partition=short", *tiny]
    given, train_argv = options.parse(first["command"])
    assert (given, train_argv) == ({"nodes": 2, "setup": ["true"]}, tiny)
    assert (run_dir / "slurm" / "12_submitted.pkl").exists()


@pytest.mark.slow
def test_a_job_gets_the_environment_of_the_shell_and_nothing_that_was_found_on_the_login_node(tiny, slurm):
    (slurm / "sbatch").write_text(f"#!/bin/sh\nenv > {slurm}/env.txt && echo Submitted batch job 12\n")
    env = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "MINE": "1", "SLURM_CONF": "/etc/slurm.conf"}
    env |= {"SBATCH_RESERVATION": "ours", "MASTER_PORT": "20012", "CIT_CHOSEN": "MASTER_PORT=20012"}  # the job will see
    # Of the job in whose shell this is called, and of sbatch where it would contradict the batch script.
    theirs = dict.fromkeys(("SLURM_JOB_ID", "SLURM_NTASKS_PER_NODE", "SLURM_ARRAY_TASK_ID", "RANK", "CIT_JOB_ID"), "1")
    theirs |= {"SBATCH_SIGNAL": "KILL@9", "SBATCH_TIMELIMIT": "40", "SBATCH_NO_REQUEUE": "1"}
    command = [sys.executable, str(REPOSITORY / "launchers" / "submit.py"), *tiny]
    subprocess.run(command, env=env | theirs, check=True)
    found = {line.split("=")[0] for line in (slurm / "env.txt").read_text().splitlines()}
    of_the_shell = {"PWD", "OLDPWD", "SHLVL", "_", "LC_CTYPE"}
    assert found - of_the_shell == set(env)


def test_what_sbatch_would_read_as_options_and_is_none_here_is_named(call, tiny, slurm, monkeypatch):
    for name in ("SBATCH_GRES", "SBATCH_SIGNAL", "SBATCH_PARTITION", "SBATCH_RESERVATION"):
        monkeypatch.setenv(name, "gpu")
    printed = call("--dry-run", "--partition=main", *tiny)[1]
    assert re.search(
        r"^not counted +SBATCH_GRES, SBATCH_SIGNAL, of which options of this command", printed, re.MULTILINE
    )
    assert "SBATCH_PARTITION" not in printed


def test_what_sbatch_would_read_as_options_counts_as_typed(no_cluster_file):
    no_cluster_file.write_text("partition: theirs\naccount: vision\n")
    env = {
        "SBATCH_TIMELIMIT": "1",
        "SBATCH_PARTITION": "short",
        "SBATCH_GPUS_PER_NODE": "2",
        "SBATCH_MEM_PER_NODE": "1G",
    }
    given, _ = options.parse(["--time", "30", "--nodes", "2"], env)
    expected = {"partition": "short", "account": "vision", "time": "30", "gpus_per_node": 2, "mem": "1G", "nodes": 2}
    assert given == expected
    local = options.parse(["--cluster", "local"], env)[0]
    assert local == {"partition": "theirs", "account": "vision", "cluster": "local"}
    with pytest.raises(ConfigError, match="SBATCH_GPUS_PER_NODE in the environment: argument --gpus-per-node: 'many'"):
        options.parse([], {"SBATCH_GPUS_PER_NODE": "many"})


@pytest.mark.slow
@pytest.mark.parametrize(("argv", "code"), [(["--dry-run"], 6), ([], 0)])
def test_a_full_disk_fails_a_dry_run_and_no_submission(argv, code, tiny, slurm):
    command = [sys.executable, str(REPOSITORY / "launchers" / "submit.py"), *argv, *tiny]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == code
    assert done.stderr == ("error: [Errno 28] No space left on device\n" if code else "")
    assert (slurm / "queued.sh").exists() != bool(code)


def test_more_runs_than_an_array_may_have_are_refused(call, tiny, slurm):
    code, _, complaint = call("--sweep", "seed=0,1,2,3", *tiny)
    assert code == 2
    assert "--sweep makes 4 runs, but an array of this Slurm's has at most 3 tasks" in complaint


@pytest.mark.parametrize(
    ("setup", "code", "said"),
    [
        (["true", "f() { return 3; }", "f"], 2, "error: --setup fails at: return 3\n"),
        (["true", "false"], 2, "error: --setup fails at: false\n"),
        (["false || true", "[[ -z x ]] && false", "export A=b"], 0, ""),
        (["source ./sourced"], 0, ""),  # for that file it was no reason to fail
        (["source ./failing"], 2, "error: --setup fails at: source ./failing\n"),
        (["source ./missing 2> /dev/null"], 2, "error: --setup fails at: source ./missing 2> /dev/null\n"),
    ],
)
def test_a_line_of_setup_that_fails_ends_the_job(setup, code, said, tmp_path):
    lines = executors.setup_lines(options.Options(setup=setup), Resources(1, 0, 1, None, (1,)), [])
    until_the_ranks = lines[: lines.index("trap - ERR") + 1]
    script = "\n".join([*until_the_ranks, "false", "exit 0"])
    (tmp_path / "script").write_text(script)
    (tmp_path / "sourced").write_text("false\ntrue\n")
    (tmp_path / "failing").write_text("true\nfalse\n")
    done = subprocess.run(["bash", "script"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, said)


def test_each_run_of_a_sweep_is_noted_in_its_own_folder(call, tiny, slurm, tmp_path):
    call("--sweep", "seed=0,1", "--array", 1, "--mem", "1G", *tiny)
    assert "#SBATCH --array=0-1%1\n" in (slurm / "queued.sh").read_text()
    for index in (0, 1):
        (note,) = json.loads((tmp_path / "runs" / f"tiny-seed={index}" / "job.json").read_text())
        assert note["job_id"] == f"12_{index}"
        assert note["log"] == str(tmp_path / "runs" / "tiny-sweep" / "slurm" / f"12_{index}_0_log.out")
        assert note["command"] == ["--mem=1G", *tiny, f"--seed={index}", f"--name=tiny-seed={index}"]


def test_a_local_job_runs_in_the_background_and_its_ranks_can_meet(call, tiny, tmp_path, monkeypatch):
    # In place of the training: print the environment.
    monkeypatch.setattr(executors, "TrainJob", lambda argv: functools.partial(os.system, "env"))
    code, printed, _ = call("--cluster", "local", "--ntasks-per-node", 2, *tiny)
    assert code == 0
    (note,) = json.loads((tmp_path / "runs" / "tiny" / "job.json").read_text())
    assert note["cluster"] == "local"
    assert note["command"] == ["--cluster=local", "--ntasks-per-node=2", *tiny]
    assert note["log"] in printed
    worlds, meeting_places = set(), set()
    for rank in (0, 1):
        log = Path(note["log"].replace("_0_log", f"_{rank}_log"))
        deadline = time.monotonic() + 60
        while not (log.exists() and "successful completion" in log.read_text()):
            assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
            time.sleep(0.2)
        env = dict(line.split("=", 1) for line in log.read_text().splitlines() if "=" in line)
        worlds.add(World.from_env({key: env[key] for key in env if key.startswith("SUBMITIT")}))
        meeting_places.add((env["MASTER_ADDR"], env["MASTER_PORT"]))
        assert env["PYTHONPATH"].startswith(str(REPOSITORY))
    assert worlds == {World(rank, rank, 2, 2) for rank in (0, 1)}
    assert len(meeting_places) == 1
    assert "MASTER_PORT" not in os.environ


def test_a_debug_job_runs_here_on_one_rank_whatever_it_would_get(call, tiny, monkeypatch):
    calls = []
    monkeypatch.setattr("cit_scale.train.main", lambda argv: calls.append(argv) or 75)
    assert submit.main(["--cluster", "debug", "--nodes", "3", "--gpus-per-node", "8", *tiny]) == 75
    assert calls == [tuple(tiny)]


def test_gpus_that_are_hidden_here_stay_hidden_from_a_local_job():
    assert executors.visible_gpus({"CUDA_VISIBLE_DEVICES": "2,3"}) == (2, 3)
    assert executors.visible_gpus({}) == ()
    assert executors.visible_gpus({"CUDA_VISIBLE_DEVICES": "GPU-5f"}) == ()


def test_a_recipe_is_parsed_once_for_all_nodes_and_runs(call, tiny, tmp_path, monkeypatch):
    """20 runs on 64 to 1 nodes."""
    recipe = {"teachers": {"conv": {"model": "resnet10t", "recipe": str(tmp_path / "teacher.yaml")}}}
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump({"train": {"global_batch_size": 512, "epochs": 30}}))
    (tmp_path / "advised.yaml").write_text(yaml.safe_dump(recipe))
    parsed = []
    load = recipes._load
    monkeypatch.setattr(recipes, "_load", lambda text, source: parsed.append(source) or load(text, source))
    seeds = ",".join(map(str, range(20)))
    arguments = cli.parse_arguments(["--config", str(tmp_path / "advised.yaml")])
    runs = submit.plan_runs(arguments, ["--config", str(tmp_path / "advised.yaml")], [f"seed={seeds}"])
    monkeypatch.setattr(resources, "can_host", lambda run, world_size: True)
    counts = resources.node_counts(options.Options(nodes=64, min_nodes=1), 1, runs)
    assert counts == (64, 32, 16, 8, 4, 2, 1)
    assert [source for source in parsed if not source.startswith("--")] == [
        str(tmp_path / name) for name in ("advised.yaml", "teacher.yaml")
    ]


def test_a_sweep_gives_what_the_teachers_of_its_recipe_lack(tmp_path):
    (tmp_path / "advised.yaml").write_text(yaml.safe_dump({"teachers": {"conv": {"model": "resnet10t"}}}))
    argv = ["--config", str(tmp_path / "advised.yaml")]
    runs = submit.plan_runs(cli.parse_arguments(argv), argv, ["teachers.conv.weights=a.pth,b.pth"])
    assert [run.config.teachers["conv"].weights for run in runs] == ["a.pth", "b.pth"]
    with pytest.raises(ConfigError, match=r"conv .* has neither weights nor a recipe"):
        submit.plan_runs(cli.parse_arguments(argv), argv, ["seed=0,1"])


def test_help_and_mistakes_import_nothing_that_takes_long(tmp_path):
    program = """
import runpy, sys
for argv in ["--help"], ["--nodes", "0"], ["--train.epochs", "0"], ["--sweep", "lrr=1"], ["--name", ""]:
    sys.argv = ["submit.py", *argv]
    try:
        runpy.run_path(PATH, run_name="__main__")
    except SystemExit as end:
        print(end.code, file=sys.stderr)
heavy = {"torch", "timm", "triton", "nvidia.dali", "deepspeed", "submitit", "numpy"} & sys.modules.keys()
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    program = program.replace("PATH", repr(str(Path(submit.__file__))))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^\d$", done.stderr, re.MULTILINE) == ["0", "2", "2", "2", "2"]


# ---------------------------------------------------------------------------------------------------------------------
# Examining nodes

HOSTS = """case "$*" in *hostnames*) printf 'node1\\nnode2\\nnode3\\n'; exit;; esac
"""


def node_record(*, status="ok", version="1"):
    finding = Finding(status, "it says", "do that" if status != "ok" else "", {"version": version})
    return {**as_record([Examined("disk", finding, 1.0, "")], quick=False), "whole": True}


@pytest.fixture
def examined(slurm, monkeypatch):
    """``examined(records)``: what the job that examines node1 to node3 writes before it ends."""
    monkeypatch.setattr(nodes, "POLL_S", 0.01)
    monkeypatch.setattr(nodes, "LATE_S", 0.1)
    scontrol = (slurm / "scontrol").read_text()
    (slurm / "scontrol").write_text(scontrol.replace("\n", f"\n{HOSTS}", 1))

    def write(records, state="COMPLETED"):
        for node, record in records.items():
            (slurm / f"{node}.json").write_text(json.dumps(record))
        (slurm / "sbatch").write_text(
            f'#!/bin/sh\ncp "$1" {slurm}/queued.sh\n'
            f'cp {slurm}/node*.json "$(dirname "$1")"\necho Submitted batch job 12\n'
        )
        (slurm / "queue.txt").write_text(f"12|12|{state}|node[1-3]|None\n")

    return write


def doctor(capsys, *argv):
    code = submit.main(["--doctor", *map(str, argv)])
    return code, capsys.readouterr().out


def test_nodes_are_examined_by_one_task_on_each(examined, slurm, capsys, tmp_path):
    examined({f"node{i}": node_record() for i in (1, 2, 3)})
    options.CLUSTER_FILE.write_text("time: 24:00:00\n")  # of runs
    code, printed = doctor(capsys, "--nodes=3", "--runs_dir", tmp_path / "runs")
    assert code == 0
    assert re.findall(r"^(node\d): fit, 1 checks", printed, re.MULTILINE) == ["node1", "node2", "node3"]
    script = (slurm / "queued.sh").read_text()
    for line in ("--nodes=3", "--ntasks-per-node=1", "--no-requeue", "--time=20", "--job-name=doctor"):
        assert f"#SBATCH {line}\n" in script
    assert "env.sh" not in script  # which queues a job again
    assert not [each for each in (tmp_path / "runs").iterdir() if not each.name.startswith(".")]


def test_a_node_that_is_unfit_differs_or_does_not_answer_is_named(examined, capsys, tmp_path):
    examined({"node1": node_record(status="failed"), "node2": node_record()})
    code, printed = doctor(capsys, "--nodes=3", "--runs_dir", tmp_path)
    assert code == 8
    assert "node1: not fit" in printed
    assert "node1: failed: disk: it says; what to do: do that\n" in printed
    assert "node3: no answer" in printed
    examined({"node1": node_record(), "node2": node_record(version="2"), "node3": node_record()})
    time.sleep(1)  # the folder of an examination is called by the second
    code, printed = doctor(capsys, "--nodes=3", "--runs_dir", tmp_path)
    assert code == 0  # all are fit
    assert "differs: disk, version: node2 2; the others 1\n" in printed


def test_a_node_that_did_not_get_to_the_end_is_not_fit(examined, capsys, tmp_path):
    examined({f"node{i}": {**node_record(), "whole": i != 2} for i in (1, 2, 3)})
    code, printed = doctor(capsys, "--nodes=3", "--runs_dir", tmp_path)
    assert code == 8
    assert "node2: not fit: it did not get beyond disk" in printed


def test_a_slurm_that_does_not_answer_is_not_waited_for_for_ever(examined, slurm, capsys, tmp_path, monkeypatch):
    examined({}, state="RUNNING")
    (slurm / "squeue").write_text("#!/bin/sh\nexit 1\n")
    monkeypatch.setattr(nodes, "SILENT_S", 0.1)
    assert submit.main(["--doctor", "--runs_dir", str(tmp_path)]) == 1
    assert "Slurm has not answered for 0 s; what nodes have found is in" in capsys.readouterr().err


def test_ctrl_c_leaves_the_job_and_says_how_to_end_it(examined, capsys, tmp_path, monkeypatch):
    def interrupt(job_id, folder, count):
        raise KeyboardInterrupt

    examined({}, state="RUNNING")
    monkeypatch.setattr(nodes, "wait_for", interrupt)
    code, printed = doctor(capsys, "--nodes=3", "--runs_dir", tmp_path)
    assert code == 130
    assert "to end it: scancel 12" in printed


def test_a_job_that_reaches_no_node_is_named(examined, slurm, capsys, tmp_path):
    examined({}, state="CANCELLED")
    (slurm / "queue.txt").write_text("12|12|CANCELLED||None\n")
    code, printed = doctor(capsys, "--runs_dir", tmp_path)
    assert code == 8
    assert "0 of 1 nodes have answered; see " in printed


def test_a_dry_run_of_the_doctor_queues_nothing(no_slurm, capsys, tmp_path):
    code, printed = doctor(
        capsys, "quick", "--nodes=2", "--setup=module load cuda", "--dry-run", "--runs_dir", tmp_path
    )
    assert code == 0
    assert "#SBATCH --nodes=2\n" in printed
    assert "module load cuda\n" in printed
    assert not list(tmp_path.iterdir())


def test_the_doctor_examines_no_sweep(call, no_slurm):
    assert call("--doctor", "--sweep", "lr=1,2")[0] == 2
