"""What Slurm says of a job, and what its ranks are told. The records are those of Slurm 22.05, cut where it makes no
difference; on a real Slurm in test_slurm.py."""

import shlex
import subprocess

import pytest

from cit_scale.distributed import slurm_job
from cit_scale.distributed.ranks import Ranks
from cit_scale.errors import ConfigError
from launchers import this_job
from launchers.environment import STALE
from launchers.slurm import Answer, ThisJob, parse_job_record, parse_this_job
from launchers.this_job import rank_hosts, variables

TAIL = " MinCPUsNode=1 Command=/home/a/cit_base.sh x JobId=7 Restarts=9 TresPerNode=gpu:0 WorkDir=/home/a"


def record_text(
    *,
    number="JobId=12",
    name="mine",
    nodes=("Nodes=node[1-2] CPU_IDs=0-3 Mem=0 GRES=",),
    tasks=2,
    per_node="0",
    tres="gres:gpu:0",
):
    return (
        f"{number} JobName={name} UserId=a(1000) GroupId=a(1000) JobState=RUNNING Requeue=1 Restarts=2 "
        f"RunTime=00:00:08 TimeLimit=00:30:00 NodeList=node[1-2] NumNodes=2 NumCPUs=8 NumTasks={tasks} CPUs/Task=4 "
        f"NtasksPerN:B:S:C={per_node}:0:*:* JOB_GRES=(null)   {'   '.join(nodes)}{TAIL} TresPerNode={tres} \n"
    )


def parsed(job_id="12", **changes):
    return parse_this_job(*parse_job_record(record_text(**changes), job_id), ["node1", "node2"])


def told(env=None, *, node_counts=(), ranks_per_node=None, **changes):
    return variables(parsed(**changes), node_counts, ranks_per_node, env or {})


def test_a_job_is_read_whatever_its_name_and_its_command_hold():
    expected = ThisJob(12, "12", False, 2, ("node1", "node2"), 2, None, 4, 0, False)
    assert parsed() == expected
    assert parsed(name="a JobId=3 NumTasks=9 Restarts=7 b") == expected
    assert parsed(name="a UserId=b JobId=3") == expected


def test_a_task_of_an_array_is_read_from_among_its_siblings():
    """By the number of the first, which is the array's, Slurm shows all of them."""
    siblings = ["JobId=12 ArrayJobId=12 ArrayTaskId=1", "JobId=13 ArrayJobId=12 ArrayTaskId=0"]
    text = "".join(record_text(number=each, tasks=2 + place) for place, each in enumerate(siblings))
    for asked, number, job_id, ranks in (("12", 12, "12_1", 2), ("13", 13, "12_0", 3), ("12_0", 13, "12_0", 3)):
        job = parse_this_job(*parse_job_record(text, asked), ["node1"])
        assert (job.number, job.job_id, job.ranks) == (number, job_id, ranks)
    assert parse_job_record(text, "1") == ({}, [])


def test_cores_and_gpus_are_the_fewest_that_a_node_gives():
    two_kinds = "Nodes=node1 CPU_IDs=0-3,8 Mem=0 GRES=gpu:a100:2(IDX:0,3),gpu:b:1(IDX:4)"
    nodes = [two_kinds, "Nodes=node2 CPU_IDs=7 Mem=0 GRES=gpu:4(IDX:0-3)"]
    job = parsed(nodes=nodes, tres="gres:gpu:8,gres:gpu:3")
    assert (job.cores, job.gpus, job.is_uneven) == (1, 3, True)
    assert parsed(nodes=nodes, tres="gres:gpu:0").gpus == 0
    assert parsed(nodes=nodes, tres="gres/gpu:0").gpus == 0


@pytest.mark.parametrize(
    ("changes", "ranks", "cores"),
    [
        ({}, 1, 4),
        ({"tasks": 4}, 2, 2),
        ({"tasks": 1}, 1, 4),  # of --nodes=1-2
        ({"per_node": "4"}, 4, 1),
        ({"per_node": "8"}, 8, 1),
        ({"nodes": ["Nodes=node[1-2] CPU_IDs=0-7 Mem=0 GRES=gpu:2(IDX:0-1)"], "tres": "gres:gpu:2"}, 2, 4),
        ({"per_node": "4", "ranks_per_node": 2}, 2, 2),
    ],
)
def test_ranks_are_those_that_were_asked_for(changes, ranks, cores):
    found = told(**changes)
    assert found["SLURM_NTASKS_PER_NODE"] == str(ranks)
    assert found["SLURM_NTASKS"] == str(2 * ranks)
    assert found["SLURM_CPUS_PER_TASK"] == found["SRUN_CPUS_PER_TASK"] == found["OMP_NUM_THREADS"] == str(cores)
    assert rank_hosts(found) == ["node1"] * ranks + ["node2"] * ranks


def test_ranks_that_cannot_be_shared_out_are_refused():
    with pytest.raises(ConfigError, match=r"--ntasks=5 cannot be shared out evenly over 2 nodes; give --ntasks-per-no"):
        told(tasks=5)


def test_fewer_nodes_are_used_where_all_cannot_share_the_batch():
    found = told(node_counts=(4, 1), tasks=4)
    assert (found["SLURM_JOB_NUM_NODES"], found["CIT_HOSTS"], found["SLURM_NTASKS"]) == ("1", "node1", "2")
    assert told(node_counts=(4, 2))["SLURM_JOB_NUM_NODES"] == "2"
    assert told(node_counts=(8, 4))["SLURM_JOB_NUM_NODES"] == "2"  # the trainer says which numbers would do


def test_what_a_user_has_set_is_kept_and_what_another_job_chose_is_not():
    first = told({})
    assert (first["MASTER_PORT"], first["OMP_NUM_THREADS"]) == ("20026", "4")
    eight = ["Nodes=node[1-2] CPU_IDs=0-7 Mem=0 GRES="]
    within = variables(parsed("13", number="JobId=13", nodes=eight), (), None, first)
    assert (within["MASTER_PORT"], within["OMP_NUM_THREADS"]) == ("20027", "8")
    users = {"MASTER_PORT": "4000", "OMP_NUM_THREADS": "2"}
    assert not told(users).keys() & users.keys()
    assert not variables(parsed("13", number="JobId=13"), (), None, {**first, **users}).keys() & users.keys()


def test_of_another_jobs_variables_nothing_is_left():
    """As they were found in a job that was queued from a task of an array's job."""
    left = (
        "SLURM_ARRAY_JOB_ID=5 SLURM_ARRAY_TASK_ID=5 SLURM_RESTART_COUNT=1 SLURM_STEP_ID=0 SLURM_STEPID=0 "
        "SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 SLURM_NPROCS=1 SLURM_NTASKS_PER_NODE=2 SLURM_MEM_PER_NODE=100 "
        "SLURM_DISTRIBUTION=cyclic SLURM_TASKS_PER_NODE=1(x2) SLURM_GPUS_PER_NODE=1 SLURM_GPUS_ON_NODE=1 RANK=0 "
        "SLURM_HET_SIZE=2 SLURM_JOB_NODELIST_HET_GROUP_0=n1 SLURM_CONSTRAINT=no "
        "SLURM_GPU_BIND=map_gpu:0 SLURM_THREADS_PER_CORE=1 SLURM_HINT=nomultithread SLURM_TIMELIMIT=1 "
        "SLURM_TRES_PER_TASK=cpu=4 SUBMITIT_LOCAL_GLOBALID=3 CIT_JOB_ID=5_5 CIT_RESTARTS=1"
    )
    env = dict(word.split("=", 1) for word in left.split()) | {"SLURM_JOB_ID": "12", "SLURM_CONF": "/etc/slurm.conf"}
    found = told(env)
    kept = {name: value for name, value in env.items() if not STALE.fullmatch(name)} | found
    assert kept.keys() & env.keys() - found.keys() == {"SLURM_JOB_ID", "SLURM_CONF"}
    assert Ranks.from_env(kept) == Ranks()
    assert (slurm_job.job_id(kept), slurm_job.restart_count(kept), slurm_job.promised_gpus(kept)) == ("12", 2, 0)


@pytest.fixture
def ask(monkeypatch, tmp_path, capsys):
    """``ask(answer, **env)``: exit code, output and complaint of the command where Slurm gives this answer."""

    def run(answer, *argv, **env):
        def run_slurm(*command, retry):
            assert retry
            return Answer(command, "node1\nnode2\n") if "hostnames" in command else answer

        monkeypatch.setattr("launchers.slurm.run_slurm", run_slurm)
        code = this_job.main(["--host-file", str(tmp_path / "hosts"), *argv], {"SLURM_JOB_ID": "12", **env})
        return code, *capsys.readouterr()

    return run


def test_the_lines_are_those_of_a_shell(ask, tmp_path):
    uneven = ["Nodes=node1 CPU_IDs=0-4 Mem=0 GRES=", "Nodes=node2 CPU_IDs=0 Mem=0 GRES="]
    answer = Answer((), record_text(nodes=uneven, tasks=6))
    code, lines, complaint = ask(answer, "--node-counts", "", "--ranks-per-node", "", SLURM_NTASKS="1", RANK="0")
    assert (code, complaint) == (0, "")
    show = f'RANK=0; SLURM_NTASKS=1; eval {shlex.quote(lines)}; echo "$CIT_HOSTS, ${{RANK-}}, $SLURM_NTASKS"; env'
    shown = subprocess.run(["bash", "-c", show], capture_output=True, text=True, check=True, env={}).stdout
    assert shown.startswith("node1 node2, , 6\n")
    assert f"SLURM_HOSTFILE={tmp_path}/hosts\n" in shown
    assert (tmp_path / "hosts").read_text() == "node1\n" * 3 + "node2\n" * 3


def test_a_task_of_an_array_keeps_its_place(ask):
    """submitit finds what it is to run by it."""
    place = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}
    _, lines, _ = ask(Answer((), record_text(number="JobId=12 ArrayJobId=12 ArrayTaskId=1")), **place)
    assert "SLURM_ARRAY" not in lines
    assert "export CIT_JOB_ID=12_1\n" in lines
    _, lines, _ = ask(Answer((), record_text()), **place)
    assert "unset SLURM_ARRAY_JOB_ID\nunset SLURM_ARRAY_TASK_COUNT\nunset SLURM_ARRAY_TASK_ID\n" in lines


def test_a_job_that_cannot_be_and_a_slurm_that_does_not_answer_are_told_apart(ask, tmp_path):
    refusal = "error: --ntasks=5 cannot be shared out evenly over 2 nodes; give --ntasks-per-node instead\n"
    assert ask(Answer((), record_text(tasks=5))) == (2, "", refusal)
    silent = Answer(("scontrol", "show"), complaint="Unable to contact slurm controller")
    assert ask(silent) == (1, "", "error: scontrol show: Unable to contact slurm controller\n")
    code, _, complaint = ask(Answer(("scontrol", "show"), record_text(number="JobId=1")))
    assert (code, complaint) == (1, "error: scontrol show: the answer lacks NodeList, NumTasks, Restarts, CPU_IDs\n")
    assert not (tmp_path / "hosts").exists()
