"""What becomes of a Slurm job when its ranks have ended. Slurm is a recorder here; the real one is in test_slurm.py."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from launchers import requeue
from launchers.requeue import Fate, decide, read_fate
from launchers.slurm import Answer, SlurmError, run_slurm


@pytest.mark.parametrize(
    ("exit_code", "fate", "again", "reason"),
    [
        (0, Fate.LEAVES, False, "done"),
        (0, Fate.REQUEUED, False, "done"),
        (75, Fate.LEAVES, True, "stopped on request"),
        (75, Fate.LIMIT, True, "stopped on request"),
        (75, Fate.REQUEUED, True, "requeued by Slurm"),
        (137, Fate.REQUEUED, True, "requeued by Slurm"),
        (75, Fate.CANCELLED, False, "cancelled"),
        (137, Fate.CANCELLED, False, "cancelled"),
        (140, Fate.LEAVES, True, "stopped on request"),  # SIGUSR2, before the ranks could listen
        (2, Fate.LEAVES, False, "another try would end the same way"),
        (6, Fate.LEAVES, False, "another try would end the same way"),
        (7, Fate.LEAVES, False, "another try would end the same way"),
        (1, Fate.LEAVES, True, "failure 1 in a row without progress, of at most 3: tries again"),
        (8, Fate.LEAVES, True, "failure 1"),
        (14, Fate.LEAVES, True, "failure 1"),
        (137, Fate.LEAVES, True, "failure 1"),
    ],
)
def test_the_exit_code_and_what_slurm_does_decide(exit_code, fate, again, reason):
    decided, why = decide(exit_code, fate, 10, [], 3)
    assert decided is again
    assert reason in why


# From Slurm 22.05 at the end of a batch script: what differs in a job that was cancelled, requeued or left alone.
JOB = {
    "JobId": "7",
    "JobState": "RUNNING",
    "Restarts": "2",
    "RunTime": "00:00:08",
    "TimeLimit": "00:30:00",
    "StartTime": "2026-11-29T07:16:44",
    "ExcNodeList": "(null)",
}


@pytest.mark.parametrize(
    ("changes", "fate"),
    [
        ({}, Fate.LEAVES),
        ({"JobState": "COMPLETING", "RunTime": "00:00:04"}, Fate.CANCELLED),
        ({"JobState": "COMPLETING", "TimeLimit": "UNLIMITED"}, Fate.CANCELLED),
        ({"JobState": "COMPLETING", "RunTime": "00:30:21"}, Fate.LIMIT),
        ({"JobState": "PREEMPTED", "PreemptTime": "2026-11-29T07:17:33"}, Fate.PREEMPTED),
        ({"JobState": "COMPLETING", "PreemptTime": "2026-11-29T07:17:33"}, Fate.PREEMPTED),
        ({"JobState": "COMPLETING", "PreemptTime": "2026-11-28T07:17:33"}, Fate.CANCELLED),  # at an earlier start
        ({"JobState": "COMPLETING", "PreemptTime": "None"}, Fate.CANCELLED),
        ({"JobState": "STOPPED"}, Fate.LEAVES),  # scancel --signal=STOP
        ({"JobState": "RUNNING", "PreemptTime": "2026-11-29T07:17:33"}, Fate.LEAVES),  # within its time of grace
        ({"JobState": "COMPLETING", "RunTime": "1-00:00:00", "TimeLimit": "1-00:00:00"}, Fate.LIMIT),
        ({"JobState": "COMPLETING", "RunTime": "23:59:59", "TimeLimit": "1-00:00:00"}, Fate.CANCELLED),
        ({"JobState": "COMPLETING", "RunTime": "00:00:00", "Restarts": "3"}, Fate.REQUEUED),
        ({"JobState": "PENDING", "RunTime": "00:00:00", "Restarts": "3"}, Fate.REQUEUED),
    ],
)
def test_what_slurm_does_is_read_from_the_job(changes, fate):
    assert read_fate({**JOB, **changes}, restart=2) is fate


def test_a_number_of_restarts_that_is_another_jobs_is_not_believed(slurm):
    """As env.sh leaves it where Slurm did not answer at the start, in a job that was queued from within another one."""
    slurm.env = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "9"}
    assert requeue.main(["--exit-code", "1", *slurm.train], slurm.env) == 0
    assert attempts(slurm.run_dir)[0]["restart"] == 2
    slurm.job = {**JOB, "Restarts": "11"}
    assert requeue.main(["--exit-code", "1", *slurm.train], slurm.env) == 0
    assert [attempt["fate"] for attempt in attempts(slurm.run_dir)] == ["LEAVES", "LEAVES"]
    assert slurm.calls == [("requeue", "7")] * 2


def test_failures_at_the_same_step_are_counted_and_bounded():
    earlier = [(1, 10), (137, 10)]
    assert decide(1, Fate.LEAVES, 10, earlier, 3)[0]
    assert not decide(1, Fate.LEAVES, 10, [*earlier, (14, 10)], 3)[0]
    assert not decide(1, Fate.LEAVES, 10, [], 0)[0]


def test_a_checkpoint_in_between_starts_the_count_anew():
    earlier = [(1, 0), (1, 0), (1, 0)]
    assert not decide(1, Fate.LEAVES, 0, earlier, 3)[0]
    assert "failure 1 " in decide(1, Fate.LEAVES, 5, earlier, 3)[1]


def test_a_stop_on_request_is_no_failure_and_does_not_hide_one():
    earlier = [(1, 10), (75, 10), (75, 10)]
    assert "failure 2 " in decide(1, Fate.LEAVES, 10, earlier, 3)[1]


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """Answers for Slurm: ``slurm.job`` is what it knows of the job, ``slurm.calls`` what it was told."""

    recorder = SimpleNamespace(job=JOB, hosts="", calls=[])

    def answer(*command, retry):
        assert retry
        if command[1:3] == ("show", "hostnames"):
            return Answer(command, recorder.hosts)
        if command[1] == "show":
            return Answer(command, " ".join(f"{name}={value}" for name, value in recorder.job.items()))
        recorder.calls.append(command[1:])
        return Answer(command)

    monkeypatch.setattr("launchers.slurm.run_slurm", answer)
    recorder.answer = answer
    recorder.log = tmp_path / "job.log"
    recorder.log.write_text("".join(f"line {i}\n" for i in range(300)))
    recorder.env = {"SLURM_JOB_ID": "7", "CIT_RESTARTS": "2", "CIT_HOSTS": "a b", "CIT_LOG": str(recorder.log)}
    recorder.run_dir = tmp_path / "run"
    recorder.train = ["--", "--runs_dir", str(tmp_path), "--name", "run"]
    return recorder


def attempts(run_dir):
    return [json.loads(line) for line in (run_dir / "attempts.jsonl").read_text().splitlines()]


def test_outside_of_a_job_the_command_says_who_runs_it(slurm, capsys):
    with pytest.raises(SystemExit):
        requeue.main(["--exit-code", "1", *slurm.train], {})
    assert "SLURM_JOB_ID is not set; slurm/env.sh runs this command" in capsys.readouterr().err
    assert not slurm.run_dir.exists()


def test_a_failure_is_recorded_with_its_last_lines_and_requeued(slurm):
    for step in (10, 20):
        (slurm.run_dir / "ckpt" / f"step_{step:06d}").mkdir(parents=True)
    (slurm.run_dir / "teachers" / "conv" / "ckpt" / "step_000005").mkdir(parents=True)
    assert requeue.main(["--exit-code", "137", *slurm.train], slurm.env) == 0
    (attempt,) = attempts(slurm.run_dir)
    assert attempt.pop("time") > 0
    assert attempt.pop("last_lines") == [f"line {i}" for i in range(200, 300)]
    assert attempt == {
        "job_id": "7",
        "restart": 2,
        "exit_code": 137,
        "steps": 25,
        "fate": "LEAVES",
        "nodes": ["a", "b"],
        "unfit": {},
        "decision": "exit code 137, failure 1 in a row without progress, of at most 3: tries again",
    }
    assert slurm.calls == [("requeue", "7")]


def test_unfit_nodes_of_this_job_are_left_out_with_those_that_already_were(slurm):
    slurm.run_dir.mkdir()
    lines = [
        {"time": 1.0, "job_id": "6", "node": "c", "reason": "another job's"},
        {"time": 2.0, "job_id": "7", "node": "a", "reason": "no GPU"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (slurm.run_dir / "unfit_nodes.jsonl").write_text(text + '{"job_id": "7", "no')
    (slurm.run_dir / "attempts.jsonl").write_text('[]\n{"odd": 1}\nnot json\n')
    slurm.job = {**JOB, "ExcNodeList": "x[1-2]"}
    slurm.hosts = "x1\nx2\n"
    assert requeue.main(["--exit-code", "8", *slurm.train], slurm.env) == 0
    assert slurm.calls == [("requeue", "7"), ("update", "JobId=7", "ExcNodeList=x1,x2,a")]
    last = (slurm.run_dir / "attempts.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["unfit"] == {"a": "no GPU"}


def test_a_node_that_is_left_out_is_named_once(slurm, capsys):
    slurm.run_dir.mkdir()
    line = {"time": 2.0, "job_id": "7", "node": "a", "reason": "no GPU"}
    (slurm.run_dir / "unfit_nodes.jsonl").write_text(json.dumps(line) + "\n")
    slurm.job, slurm.hosts = {**JOB, "ExcNodeList": "a"}, "a\n"
    assert requeue.main(["--exit-code", "1", *slurm.train], slurm.env) == 0
    assert slurm.calls == [("requeue", "7")]
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "is_final"),
    [
        ("srun: error: Unable to create step for job 7: Requested node configuration is not available", True),
        ("srun: error: Unable to create step for job 7: Invalid generic resource (gres) specification", True),
        ("srun: fatal: --mem, --mem-per-cpu, and --mem-per-gpu are mutually exclusive.", True),
        ("srun: unrecognized option '--frobnicate'", True),
        ("srun: error: Invalid MPI type 'pmix', --mpi=list for acceptable types", True),
        ("srun: error: No directives to start application on any available hetjob components", True),
        ("srun: error: Invalid job credential", False),
        (
            "srun: error: Unable to create step for job 7: Required node not available (down, drained or reserved)",
            False,
        ),
        ("srun: error: Unable to create step for job 7: Job/step already completing or completed", False),
        ("srun: error: Unable to create step for job 7: Socket timed out on send/recv operation", False),
        ("srun: error: node1: task 0: Exited with exit code 1", False),
        ("rank 3 says srun: fatal: nothing of the kind", False),
    ],
)
def test_a_step_that_srun_refuses_is_not_tried_again(line, is_final, slurm):
    begin = slurm.log.stat().st_size
    slurm.log.write_text(slurm.log.read_text() + f"{line}\n")
    slurm.env["CIT_LOG_BEGIN"] = str(begin)
    assert requeue.main(["--exit-code", "1", *slurm.train], slurm.env) == 0
    assert slurm.calls == ([] if is_final else [("requeue", "7")])
    (attempt,) = attempts(slurm.run_dir)
    assert (line in attempt["decision"]) is is_final


def test_what_srun_refused_at_an_earlier_start_is_over(slurm):
    slurm.log.write_text("srun: fatal: then\n")
    slurm.env["CIT_LOG_BEGIN"] = str(slurm.log.stat().st_size)
    assert requeue.main(["--exit-code", "1", *slurm.train], slurm.env) == 0
    assert slurm.calls == [("requeue", "7")]


def test_a_job_that_slurm_has_requeued_itself_is_not_requeued_twice(slurm):
    slurm.job = {**JOB, "JobState": "PENDING", "Restarts": "3"}
    assert requeue.main(["--exit-code", "75", *slurm.train], slurm.env) == 0
    assert slurm.calls == []
    assert attempts(slurm.run_dir)[0]["last_lines"] == []


@pytest.mark.parametrize("exit_code", ["0", "2"])
def test_what_is_over_is_recorded_and_left_alone(slurm, exit_code):
    assert requeue.main(["--exit-code", exit_code, *slurm.train], slurm.env) == 0
    assert slurm.calls == []
    assert len(attempts(slurm.run_dir)) == 1


def test_arguments_that_train_py_refused_make_no_run_folder(slurm, tmp_path):
    assert requeue.main(["--exit-code", "2", *slurm.train, "--train.epoks", "3"], slurm.env) == 0
    assert slurm.calls == []
    assert not slurm.run_dir.exists()


def test_the_lines_of_submitits_other_ranks_are_kept_too(slurm, tmp_path):
    for rank in (0, 1, 12):
        (tmp_path / f"7_{rank}_log.out").write_text(f"rank {rank} was here\n")
    (tmp_path / "8_1_log.out").write_text("another job\n")
    env = {**slurm.env, "CIT_LOG": str(tmp_path / "7_0_log.out")}
    requeue.main(["--exit-code", "1", *slurm.train], env)
    assert attempts(slurm.run_dir)[0]["last_lines"] == ["rank 0 was here", "rank 1 was here", "rank 12 was here"]


def test_slurms_refusal_is_said(slurm, monkeypatch, capsys):
    def refuse(*command, retry):
        return Answer(command, complaint="Job is not requeueable")

    monkeypatch.setattr("launchers.slurm.run_slurm", refuse)
    assert requeue.main(["--exit-code", "75", *slurm.train], slurm.env) == 1
    assert "it ends here, and the same command continues: scontrol requeue 7: Job is" in capsys.readouterr().out
    assert attempts(slurm.run_dir)[0]["fate"] == "UNKNOWN"  # the end is on record all the same


def test_failures_that_cannot_be_noted_are_counted_all_the_same(slurm, capsys):
    (slurm.run_dir / "attempts.jsonl").mkdir(parents=True)
    for restart, calls in (("2", 1), ("3", 1)):
        slurm.job = {**JOB, "Restarts": restart}
        assert requeue.main(["--exit-code", "1", *slurm.train], {**slurm.env, "CIT_RESTARTS": restart}) == 0
        assert slurm.calls == [("requeue", "7")] * calls
    said = capsys.readouterr().out
    assert "failure 3 in a row" in said
    assert "failure 4 in a row without progress, of at most 3: given up" in said


def test_a_damaged_line_of_an_earlier_end_is_passed_over(slurm):
    slurm.run_dir.mkdir()
    lines = ['{"job_id": "7", "exit_code": [1]}', '{"job_id": "7", "exit_code": 1, "steps": 0}', "{"]
    (slurm.run_dir / "attempts.jsonl").write_text("\n".join(lines) + "\n")
    assert requeue.main(["--exit-code", "1", *slurm.train], slurm.env) == 0
    assert "failure 2 in a row" in (slurm.run_dir / "attempts.jsonl").read_text()


def test_what_can_be_no_node_does_not_keep_the_others_in(slurm):
    slurm.run_dir.mkdir()
    notes = ({"job_id": "7", "node": node} for node in ("a JobId=1", "b", ["c"]))
    (slurm.run_dir / "unfit_nodes.jsonl").write_text("".join(f"{json.dumps(note)}\n" for note in notes))
    assert requeue.main(["--exit-code", "8", *slurm.train], slurm.env) == 0
    assert slurm.calls[-1] == ("update", "JobId=7", "ExcNodeList=b")


def test_a_job_is_requeued_although_a_node_cannot_be_left_out(slurm, monkeypatch, capsys):
    slurm.run_dir.mkdir()
    (slurm.run_dir / "unfit_nodes.jsonl").write_text('{"job_id": "7", "node": "a.b"}\n{"job_id": "7"}\n')

    def refuse_update(*command, retry):
        if command[1] == "update":
            return Answer(command, complaint="Invalid node name specified")
        return slurm.answer(*command, retry=retry)

    monkeypatch.setattr("launchers.slurm.run_slurm", refuse_update)
    assert requeue.main(["--exit-code", "8", *slurm.train], slurm.env) == 1
    assert slurm.calls == [("requeue", "7")]
    expected = "unfit nodes are not left out: scontrol update JobId=7 ExcNodeList=a.b: Invalid node name"
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("complaint", "calls"), [("Socket timed out on send/recv operation", 3), ("Invalid job id specified", 1)]
)
def test_a_busy_controller_is_asked_again_and_a_clear_no_is_not(complaint, calls, tmp_path, monkeypatch):
    script = tmp_path / "scontrol"
    script.write_text(f"#!/bin/sh\necho x >> {tmp_path}/calls\necho '{complaint}' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr("launchers.slurm.PAUSES_S", (0, 0))
    with pytest.raises(SlurmError, match=complaint):
        run_slurm(str(script), "show", retry=True).checked()
    assert (tmp_path / "calls").read_text().count("x") == calls
    run_slurm(str(script), "show")
    assert (tmp_path / "calls").read_text().count("x") == calls + 1


@pytest.fixture
def requeue_by(tmp_path, monkeypatch):
    """``requeue_by(command)``: the exit code of requeue.py where the shell's ``command`` is ``scontrol requeue``."""

    def run(command: str) -> int:
        record = " ".join(f"{name}={value}" for name, value in JOB.items())
        script = tmp_path / "scontrol"
        script.write_text(
            f"#!/bin/sh\ncase $1 in show) echo '{record}';; *) echo x >> {tmp_path}/calls; {command};; esac\n"
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setattr("launchers.slurm.PAUSES_S", (0, 0))
        monkeypatch.setattr("launchers.slurm.TIMEOUT_S", 0.5)
        train = ["--", "--runs_dir", str(tmp_path), "--name", "run"]
        env = {"SLURM_JOB_ID": "7", "CIT_RESTARTS": JOB["Restarts"]}
        return requeue.main(["--exit-code", "75", *train], env)

    return run


def test_a_requeue_whose_answer_was_lost_has_succeeded(requeue_by, tmp_path, capsys):
    refuses = "echo 'Job is pending execution for job 7' >&2; exit 1"  # recorded from Slurm 22.05
    assert requeue_by(f"[ $(wc -l < {tmp_path}/calls) = 1 ] && exec sleep 60; {refuses}") == 0
    assert (tmp_path / "calls").read_text().count("x") == 2
    assert "it ends here" not in capsys.readouterr().out


def test_a_requeue_that_hangs_is_ended_and_tried_again_and_said_in_a_line(requeue_by, tmp_path, capsys):
    assert requeue_by("exec sleep 60") == 1
    assert (tmp_path / "calls").read_text().count("x") == 3
    assert capsys.readouterr().out.splitlines()[1:] == [
        "job 7: it ends here, and the same command continues: scontrol requeue 7: timed out: no answer within 0.5 s"
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"JobState": "COMPLETING", "RunTime": "INVALID"}, "scontrol show job 7 cannot be read: 'INVALID' is no time"),
        ({"JobState": None}, "scontrol show job --oneliner --details 7: the answer lacks JobState"),
    ],
)
def test_a_record_that_cannot_be_read_does_not_keep_the_job_from_going_back(slurm, capsys, changes, said):
    slurm.job = {name: value for name, value in {**JOB, **changes}.items() if value is not None}
    assert requeue.main(["--exit-code", "75", *slurm.train], slurm.env) == 0
    assert said in capsys.readouterr().out
    assert slurm.calls == [("requeue", "7")]
    assert attempts(slurm.run_dir)[0]["fate"] == "UNKNOWN"


def test_stops_without_one_more_step_are_bounded():
    assert decide(75, Fate.LEAVES, 0, [(75, 0)] * 8, 3)[0]
    again, reason = decide(75, Fate.LEAVES, 0, [(75, 0)] * 9, 3)
    assert not again
    assert "stopped 10 times without one more step" in reason
    assert decide(75, Fate.LEAVES, 1, [(75, 0)] * 9, 3)[0]


def test_ranks_that_slurm_killed_for_their_nodes_have_not_failed(slurm):
    slurm.run_dir.mkdir()
    lines = [{"job_id": "7", "exit_code": 137, "steps": 0, "fate": "REQUEUED"}] * 5
    (slurm.run_dir / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    requeue.main(["--exit-code", "1", *slurm.train], slurm.env)
    assert "failure 1 in a row" in attempts(slurm.run_dir)[-1]["decision"]


def test_a_recipe_that_cannot_be_read_just_now_is_asked_for_again(slurm, monkeypatch):
    monkeypatch.setattr(requeue, "PAUSES_S", (0, 0))
    answers = [OSError(116, "Stale file handle"), OSError(116, "Stale file handle")]
    parse = requeue.cli.parse_arguments
    monkeypatch.setattr(requeue.cli, "parse_arguments", lambda argv: raise_first(answers) or parse(argv))
    assert requeue.main(["--exit-code", "75", *slurm.train], slurm.env) == 0
    assert slurm.calls == [("requeue", "7")]
    assert attempts(slurm.run_dir)[0]["exit_code"] == 75


def test_a_teachers_recipe_that_is_gone_does_not_keep_the_job_from_going_back(slurm):
    teacher = ["--teachers.conv.model", "resnet10t", "--teachers.conv.recipe", "gone.yaml"]
    assert requeue.main(["--exit-code", "75", *slurm.train, *teacher], slurm.env) == 0
    assert slurm.calls == [("requeue", "7")]
    assert attempts(slurm.run_dir)[0]["exit_code"] == 75


def raise_first(errors):
    if errors:
        raise errors.pop()


@pytest.mark.parametrize(("exit_code", "restart", "again"), [(1, 0, True), (1, 3, False), (75, 5, True), (2, 0, False)])
def test_where_the_recipe_stays_unreadable_slurms_count_of_starts_bounds_the_tries(
    exit_code, restart, again, slurm, monkeypatch, capsys
):
    monkeypatch.setattr(requeue, "PAUSES_S", ())
    monkeypatch.setattr(requeue.cli, "parse_arguments", lambda argv: raise_first([OSError(116, "Stale file handle")]))
    monkeypatch.setattr(requeue, "read_fate", lambda job, restart: Fate.LEAVES)
    env = {**slurm.env, "CIT_RESTARTS": str(restart)}
    assert requeue.main(["--exit-code", str(exit_code), *slurm.train], env) == 0
    assert bool(slurm.calls) == again
    assert "the recipe cannot be read" in capsys.readouterr().out


def test_a_log_that_takes_no_more_does_not_keep_the_job_from_going_back(slurm):
    command = [sys.executable, requeue.__file__, "--exit-code", "2", *slurm.train]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env={**os.environ, **slurm.env})
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_folder_and_a_log_that_cannot_be_read_do_not_keep_the_job_from_going_back(slurm, monkeypatch, capsys):
    def stale(*args):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(requeue, "steps_saved", stale)
    env = {**slurm.env, "CIT_LOG": str(slurm.run_dir.parent)}  # a folder
    assert requeue.main(["--exit-code", "1", *slurm.train], env) == 0
    assert slurm.calls == [("requeue", "7")]
    assert "cannot be read: [Errno 116]" in capsys.readouterr().out
    assert attempts(slurm.run_dir)[0]["last_lines"] == []
    del env["CIT_LOG"]
    assert requeue.main(["--exit-code", "1", *slurm.train], env) == 0
