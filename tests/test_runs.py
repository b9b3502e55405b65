import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import submitit
import yaml

from cit_scale.errors import ConfigError, MissingInputError, RefusedError
from cit_scale.run.folders import Job, Phase, RunFolder, find_run
from cit_scale.run.show import State
from launchers import runs
from launchers.local_jobs import find_controller
from launchers.slurm import SlurmJob, ask_jobs, parse_jobs

SCRIPT = Path(runs.__file__)

# Slurm 22.05, of two arrays and of jobs that waited, ran, were cancelled, and failed.
SQUEUE = """\
4_0|4|PENDING||BeginTime
4_1|4|PENDING||BeginTime
3_0|5|RUNNING|node1|None
3_1|3|RUNNING|node1|None
11|11|COMPLETING|node1|None
14|14|CANCELLED|node1|None
13|13|FAILED|node1|JobLaunchFailure
16|16|COMPLETED|node[1-2]|None
"""
FORGOTTEN = "slurm_load_jobs error: Invalid job id specified"
NO_CONTROLLER = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
NO_ACCOUNTING = "Slurm accounting storage is disabled"
SACCT = """\
7|7|COMPLETED|node[1-2]
8_1|10|CANCELLED by 1000|node1
9|9|CANCELLED by 1000|None assigned
"""

NOW = 1_800_000_000.0
CONFIG = {
    "name": "mine",
    "student": {"name": "cit_tiny_patch16_224"},
    "teachers": {"conv": {"model": "regnety_002"}, "inv": {"model": "rednet26"}},
    "train": {"global_batch_size": 64, "epochs": 15},
}
RESULTS = {
    "model": "cit_tiny_patch16_224",
    "steps": 330,
    "bad_steps": 2,
    "images_per_s": 324.0,
    "goodput": 0.9,
    "accuracy": {"student": {"top1": {"cls": 99.4, "average": 99.2}, "top5": {"cls": 100.0, "average": 100.0}}},
    "teachers": {"conv": {"model": "regnety_002", "sha256": "ab", "top1": 94.1, "top5": 100.0}},
}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def start(step=0, *, at=NOW, total=330, job=None, log=None):
    slurm = job and {"job_id": job, "restart": 0, "nodes": ["node1", "node2"], "log": log}
    return {"step": step, "total_steps": total, "time": at, "host": "here", "world_size": 2, "slurm": slurm}


def submission(job_id, *, at=NOW, cluster="slurm", log="out.log", command=("--nodes=2", "--name", "my run"), cwd=None):
    about = {"job_id": job_id, "cluster": cluster, "submitted": at, "log": str(log), "command": list(command)}
    return {**about, "cwd": cwd} if cwd else about


def make_run(folder, *, starts=(), metrics=(), checkpoints=(), results=None, jobs=(), attempts=()):
    """A run folder as the trainer and the launchers leave it."""
    if starts:
        write(folder / "config.yaml", yaml.safe_dump({**CONFIG, "name": folder.name}))
        write(folder / "env.json", list(starts))
    if metrics:
        write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in metrics))
    for step in checkpoints:
        write(folder / f"ckpt/step_{step:06d}/meta.json", {"step": step, "bad_steps": 1})
    if results:
        write(folder / "results.json", results)
    if jobs:
        write(folder / "job.json", list(jobs))
    if attempts:
        write(folder / "attempts.jsonl", "".join(json.dumps(line) + "\n" for line in attempts))
    return folder


def attempt(exit_code, decision, *, at=NOW + 100, job="12"):
    about = {"time": at, "job_id": job, "restart": 0, "exit_code": exit_code, "nodes": ["node1"]}
    return {**about, "unfit": {}, "decision": decision, "last_lines": ["Traceback", "RuntimeError: boom"]}


class FakeSlurm:
    """Slurm's commands, which answer what they are told to and note how they were called."""

    def __init__(self, folder):
        self.folder = folder
        self.calls_path = folder / "calls"
        self.answers()

    def answers(self, squeue="", *, error=None, sacct=None):
        self._command("squeue", squeue, error)
        self._command("sacct", sacct or "", None if sacct else NO_ACCOUNTING)
        self._command("scancel", "", None)

    def _command(self, name, output, error):
        path = self.folder / name
        fails = f"echo '{error}' >&2; exit 1" if error else ""
        path.write_text(f"#!/bin/sh\necho {name} \"$@\" >> {self.calls_path}\nprintf '%s' '{output}'\n{fails}\n")
        path.chmod(0o755)

    @property
    def calls(self):
        return self.calls_path.read_text().splitlines() if self.calls_path.exists() else []


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return FakeSlurm(folder)


@pytest.fixture
def no_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


@pytest.fixture
def rows(tmp_path, capsys):
    """``rows()``: what list --json says, by run."""

    def read(*options):
        assert runs.main(["list", "--json", "--runs-dir", str(tmp_path / "runs"), *options]) == 0
        return {row["name"]: row for row in json.loads(capsys.readouterr().out)}

    return read


def say_state(row):
    return str(State(row["state"], row["detail"]))


def wait_until(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# What Slurm says


def test_what_squeue_prints_is_read_by_both_ids_of_a_job():
    jobs = parse_jobs(SQUEUE)
    assert jobs["4_1"] == SlurmJob("PENDING", "", "BeginTime")
    assert jobs["3_0"] == jobs["5"] == SlurmJob("RUNNING", "node1", "")
    assert {job_id for job_id, job in jobs.items() if not job.is_active} == {"13", "14", "16"}


def test_what_sacct_prints_is_read_without_who_cancelled():
    jobs = parse_jobs(SACCT)
    assert jobs["7"] == SlurmJob("COMPLETED", "node[1-2]")
    assert jobs["8_1"] == jobs["10"] == SlurmJob("CANCELLED", "node1")
    assert jobs["9"] == SlurmJob("CANCELLED", "")


def test_sacct_is_asked_for_what_squeue_has_forgotten(slurm):
    slurm.answers(SQUEUE, sacct=SACCT)
    jobs = ask_jobs(["3_0", "7", "8_1"])
    assert (jobs["3_0"].state, jobs["7"].state, jobs["8_1"].state) == ("RUNNING", "COMPLETED", "CANCELLED")
    squeue, sacct = slurm.calls
    assert "--array" in squeue
    assert squeue.endswith("--jobs=3_0,7,8_1")
    assert sacct.endswith("-j 7,8,8_1")


@pytest.mark.parametrize(
    ("sacct", "expected"),
    [
        ("8_0|9|COMPLETED|node1\n8_[1-3%2]|8|CANCELLED by 0|None assigned\n", {"8_0": "COMPLETED", "8_2": "CANCELLED"}),
        ("8|8|CANCELLED by 0|None assigned\n", {"8_0": "CANCELLED", "8_2": "CANCELLED"}),
        ("8_0|9|COMPLETED|node1\n8_3|8|FAILED|node1\n", {"8_0": "COMPLETED", "8_2": None}),  # 8 is also 8_3's own
        ("7|7|RUNNING|node1\n8|8|PENDING|None assigned\n", {"7": None, "8": None}),  # squeue has lost them
    ],
)
def test_tasks_that_never_started_are_found_under_their_array(slurm, sacct, expected):
    slurm.answers(error=FORGOTTEN, sacct=sacct)
    jobs = ask_jobs(list(expected))
    assert {job_id: jobs[job_id].state if job_id in jobs else None for job_id in expected} == expected


def test_a_cluster_without_accounting_has_forgotten_its_old_jobs(slurm, capfd):
    slurm.answers(error=FORGOTTEN)
    assert ask_jobs(["7"]) == {}
    assert capfd.readouterr().err == ""


def test_a_controller_that_is_gone_is_no_answer_and_no_slurm_is_an_empty_one(slurm, monkeypatch):
    slurm.answers(error=NO_CONTROLLER)
    assert ask_jobs(["7"]) is None
    monkeypatch.setenv("PATH", "")
    assert ask_jobs(["7"]) == {}


def test_what_is_no_id_does_not_cost_the_others_their_answer(slurm):
    slurm.answers(SQUEUE)
    assert ask_jobs(["None", "5", "3;4"])["5"].state == "RUNNING"
    assert ask_jobs(["None"]) == {}
    assert [call.split()[-1] for call in slurm.calls] == ["--jobs=5"]


def test_a_command_that_hangs_is_no_answer(slurm, monkeypatch):
    (slurm.folder / "squeue").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr("launchers.slurm.TIMEOUT_S", 0.2)
    assert ask_jobs(["7"]) is None


# The list


def test_one_squeue_answers_for_all_runs(tmp_path, slurm, rows):
    slurm.answers(SQUEUE)
    for job_id in ("3_0", "4_1", "11", "16"):
        make_run(tmp_path / "runs" / f"job{job_id}", jobs=[submission(job_id)])
    make_run(tmp_path / "runs/by_hand", starts=[start()])
    found = rows()
    assert {name: say_state(row) for name, row in found.items()} == {
        "by_hand": "stopped (before its first checkpoint)",
        "job11": "completing (node1)",
        "job16": "not started (completed)",
        "job3_0": "running (node1)",
        "job4_1": "pending (BeginTime)",
    }
    assert len([call for call in slurm.calls if call.startswith("squeue")]) == 1


def test_a_run_at_work_shows_how_far_it_is_and_how_long_it_will_take(tmp_path, slurm, rows):
    slurm.answers(SQUEUE)
    metrics = [
        {"step": 100, "loss": 2.0, "images_per_s": None},
        {"step": 110, "top1_cls": 70.0, "top1_average": 71.5, "top1_ema_cls": 80.0, "top1_ema_average": 81.0},
        {"step": 130, "loss": 1.5, "images_per_s": 32.0, "goodput": 0.8},
        {"step": 130, "loss": "nan", "images_per_s": None},
        {"step": 120, "save_bytes": 7},
    ]
    make_run(tmp_path / "runs/mine", starts=[start(job="5")], metrics=metrics, checkpoints=[120])
    row = rows()["mine"]
    assert (row["step"], row["total_steps"], row["loss"], row["top1"]) == (130, 330, "nan", 71.5)
    assert row["left_s"] == 200 * 64 / 32
    assert row["job_id"] == "5"


def test_while_a_teacher_is_trained_it_is_what_is_shown(tmp_path, slurm, rows):
    slurm.answers(SQUEUE)
    folder = tmp_path / "runs/mine"
    make_run(folder / "teachers/conv", starts=[start(at=NOW - 50, job="5")], results=RESULTS)
    make_run(folder / "teachers/inv", starts=[start(job="5")], metrics=[{"step": 40, "images_per_s": 64.0}])
    (row,) = rows().values()
    assert (row["name"], row["phase"], row["step"], row["total_steps"]) == ("mine", "teachers/inv", 40, 330)
    assert say_state(row) == "running (node1)"
    assert row["left_s"] == 290
    assert row["top1"] is None  # the student's


def test_without_slurm_the_folders_tell_how_their_runs_are(tmp_path, no_slurm, rows):
    folder = tmp_path / "runs"
    make_run(folder / "a/finished", starts=[start(job="12")], results=RESULTS)
    make_run(folder / "a/stopped", starts=[start(job="12")], checkpoints=[50, 100], attempts=[attempt(75, "again")])
    make_run(folder / "a/failed", starts=[start(job="12")], checkpoints=[50], attempts=[attempt(5, "no retry")])
    make_run(folder / "cancelled", starts=[start()], checkpoints=[50], attempts=[attempt(137, "cancelled; the same")])
    restarted = [start(), start(50, at=NOW + 200)]
    make_run(folder / "restarted", starts=restarted, checkpoints=[50], attempts=[attempt(5, "no retry")])
    make_run(folder / "queued", jobs=[submission("12")])
    found = rows()
    assert {name: say_state(row) for name, row in found.items()} == {
        "a/failed": "failed (exit code 5)",
        "a/finished": "finished",
        "a/stopped": "stopped (at step 100)",
        "cancelled": "stopped (at step 50)",
        "queued": "not started",
        "restarted": "stopped (at step 50)",
    }
    assert (found["a/finished"]["step"], found["a/finished"]["top1"]) == (330, 99.2)
    assert all(row["left_s"] is None for row in found.values())


def test_a_process_that_holds_the_folder_is_a_run_at_work(tmp_path, no_slurm, rows):
    make_run(tmp_path / "runs/mine", starts=[start()], checkpoints=[50])
    with (tmp_path / "runs/.mine.lock").open("w") as lock:
        lock.write("123 on here")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert say_state(rows()["mine"]) == "running (process 123 on here)"
    assert say_state(rows()["mine"]) == "stopped (at step 50)"


def test_a_node_that_failed_is_told_where_nothing_else_is_known(tmp_path, slurm, rows):
    slurm.answers("12|12|NODE_FAIL|node1|None\n")
    make_run(tmp_path / "runs/mine", starts=[start(job="12")], checkpoints=[50])
    assert say_state(rows()["mine"]) == "failed (node_fail)"


def test_what_was_set_aside_is_listed_on_request_and_other_numbers_are_names(tmp_path, no_slurm, rows):
    for name in ("mine", "lr0", "lr0.1"):
        make_run(tmp_path / "runs" / name, starts=[start()])
    make_run(tmp_path / "runs/mine", starts=[start()])
    (tmp_path / "runs/mine").rename(tmp_path / "runs/mine.1")
    make_run(tmp_path / "runs/mine", starts=[start()])
    assert list(rows()) == ["lr0", "lr0.1", "mine"]
    assert list(rows("--all")) == ["lr0", "lr0.1", "mine", "mine.1"]


def test_a_table_is_for_people(tmp_path, slurm, capsys):
    slurm.answers(SQUEUE)
    metrics = [{"step": 40, "loss": 1.23456, "images_per_s": 2.0}]
    make_run(tmp_path / "runs/[b]mine[/b]/teachers/conv", starts=[start(job="5")], metrics=metrics)
    assert runs.main(["list", "--runs-dir", str(tmp_path / "runs")]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert re.split(r"\s{2,}", row.strip()) == [
        "[b]mine[/b]", "5", "running (node1)", "teachers/conv 40/330", "2", "1.2346", "2 h 35 min"
    ]  # fmt: skip


def test_a_slurm_that_does_not_answer_is_said_once_and_the_folders_are_shown(tmp_path, slurm, capsys):
    slurm.answers(error=NO_CONTROLLER)
    make_run(tmp_path / "runs/mine", starts=[start(job="12")], checkpoints=[50])
    assert runs.main(["list", "--runs-dir", str(tmp_path / "runs")]) == 0
    shown = capsys.readouterr()
    assert "stopped (at step 50)" in shown.out
    assert shown.err.count("Slurm does not answer") == 1


# Files


FILES = (
    "config.yaml env.json metrics.jsonl results.json job.json attempts.jsonl unfit_nodes.jsonl ckpt/scores.json "
    "ckpt/step_000050/meta.json bad_images.tsv"
)
DAMAGE = {
    "empty": b"",
    "binary": bytes(range(256)),
    "half": b'{"step": 5, "lo',
    "another kind": b'"text"',
    "wrong values": b'{"step": "x", "time": [], "name": 3, "train": 7, "teachers": {"conv": 1}, "50": {}}',
    "infinite": b'{"step": NaN, "steps": Infinity, "images_per_s": 1e999, "submitted": null, "exit_code": "x"}',
    "list of it": b'[{"step": "x", "time": "y", "slurm": 5, "job_id": {}, "submitted": "z", "command": "c"}, 3]',
    "folder": None,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES.split())
def test_a_damaged_file_hides_nothing_else(tmp_path, no_slurm, capsys, name, damage):
    folder = make_run(
        tmp_path / "runs/mine",
        starts=[start(job="12")],
        metrics=[{"step": 60, "loss": 1.0}],
        checkpoints=[50],
        results=RESULTS if name != "metrics.jsonl" else None,
        jobs=[submission("12")],
        attempts=[attempt(1, "again")],
    )
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir() if damage == "folder" else (folder / name).write_bytes(DAMAGE[damage])
    for command in (["list"], ["list", "--json"], ["show", "mine"], ["show", "mine", "--json"]):
        assert runs.main([*command, "--runs-dir", str(tmp_path / "runs")]) == 0
        assert "mine" in capsys.readouterr().out


def test_half_a_line_at_the_end_of_the_metrics_is_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.')
    assert Phase("", tmp_path).metrics == {"step": 1, "loss": 2.0}


def test_of_large_metrics_only_the_end_is_read(tmp_path):
    with (tmp_path / "metrics.jsonl").open("wb") as file:
        file.seek(10**12)  # takes no room on the disk, and could not be read as a whole
        file.write(b"".join(b'\n{"step": %d, "loss": 1.0}' % step for step in range(1000)))
    assert Phase("", tmp_path).step == 999


def test_an_evaluation_long_ago_is_found_in_the_scores(tmp_path):
    make_run(tmp_path, metrics=[{"step": step, "loss": 1.0} for step in range(2000)])
    write(tmp_path / "ckpt/scores.json", {"900": 40.0, "1000": 50.0})
    assert Phase("", tmp_path).top1 == 50.0


# One run


def test_show_tells_all_that_is_known(tmp_path, slurm, capsys):
    slurm.answers(SQUEUE)
    starts = [start(job="12"), start(50, at=NOW + 200, job="5", log="/logs/5.log")]
    ends = [attempt(14, "failure 1 of at most 3: again")]
    folder = make_run(tmp_path / "runs/mine", starts=starts, checkpoints=[50, 100], attempts=ends)
    make_run(folder / "teachers/conv", starts=[start(at=NOW - 50, job="12")], checkpoints=[330], results=RESULTS)
    write(folder / "bad_images.tsv", "a.jpg\tempty\nb.jpg\tcut short\n")
    write(folder / "unfit_nodes.jsonl", '{"node": "node7", "reason": "sees no GPU"}\n')
    write(folder / "ckpt/scores.json", {"100": 61.25})

    assert runs.main(["show", "mine", "--json", "--runs-dir", str(tmp_path / "runs")]) == 0
    about = json.loads(capsys.readouterr().out)
    assert [(each["phase"], each["step"]) for each in about["starts"]] == [("teachers/conv", 0), ("", 0), ("", 50)]
    assert about["attempts"] == ends
    assert about["unfit_nodes"] == {"node7": "sees no GPU"}
    assert about["checkpoints"] == [
        {"phase": "teachers/conv", "step": 330, "top1": None},
        {"phase": "", "step": 50, "top1": None},
        {"phase": "", "step": 100, "top1": 61.25},
    ]
    assert (about["bad_images"], about["bad_steps"], about["log"]) == (2, 1, "/logs/5.log")
    assert about["config"]["teachers"] == "conv: regnety_002, inv: rednet26"

    assert runs.main(["show", "mine", "--runs-dir", str(tmp_path / "runs")]) == 0
    shown = capsys.readouterr().out
    for text in (
        "running (node1)",
        "node1 node2",
        "failure 1 of at most 3",
        "RuntimeError: boom",
        "sees no GPU",
        "50, 100",
    ):
        assert text in shown


def test_show_ends_with_the_table_of_results(tmp_path, no_slurm, capsys):
    make_run(tmp_path / "runs/mine", starts=[start()], results=RESULTS)
    assert runs.main(["show", "mine", "--runs-dir", str(tmp_path / "runs")]) == 0
    table = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()[-3:]]
    assert table == [
        ["teacher conv (regnety_002)", "94.10", "100.00"],
        ["student, cls", "99.40", "100.00"],
        ["student, average", "99.20", "100.00"],
    ]


@pytest.mark.parametrize("command", ["show", "logs", "cancel", "resume"])
def test_an_unknown_run_is_answered_with_the_nearest_ones(tmp_path, no_slurm, capsys, command):
    for name in ("digits", "sweep/a"):
        make_run(tmp_path / "runs" / name, starts=[start()])
    hints = {"digitz": "did you mean digits?", "zzz": "runs there: digits, sweep/a", "/": "runs there: digits, sweep/a"}
    for name, hint in hints.items():
        assert runs.main([command, name, "--runs-dir", str(tmp_path / "runs")]) == MissingInputError.exit_code
        assert capsys.readouterr().err.strip().endswith(hint)


def test_a_run_may_be_named_by_the_path_of_its_folder(tmp_path):
    folder = make_run(tmp_path / "runs/a/b", starts=[start()])
    assert find_run(tmp_path / "runs", str(folder)).name == find_run(tmp_path / "runs", "a/b").name == "a/b"


# Logs


def test_the_newest_log_is_that_of_the_newest_start_or_submission(tmp_path):
    folder = make_run(
        tmp_path / "mine", starts=[start(job="12", log="/first.log")], jobs=[submission("12", at=NOW - 9)]
    )
    assert RunFolder("mine", folder).log == Path("/first.log")
    write(folder / "job.json", [submission("12", at=NOW - 9), submission("13", at=NOW + 9, log="/second.log")])
    assert RunFolder("mine", folder).log == Path("/second.log")


def test_logs_shows_the_last_lines(tmp_path, slurm, capfd):
    log = tmp_path / "12.log"
    log.write_text("".join(f"line {i}\n" for i in range(100)))
    make_run(tmp_path / "runs/mine", jobs=[submission("12", log=log)])
    assert runs.main(["logs", "mine", "-n", "2", "--runs-dir", str(tmp_path / "runs")]) == 0
    assert capfd.readouterr().out == "line 98\nline 99\n"


def test_a_run_whose_log_nobody_knows_is_said_to_have_none(tmp_path, no_slurm, capsys):
    make_run(tmp_path / "runs/mine", starts=[start()])
    make_run(tmp_path / "runs/queued", jobs=[submission("12", log=tmp_path / "12.log")])
    for name, hint in {"mine": "where it was started", "queued": "-f waits for it"}.items():
        assert runs.main(["logs", name, "--runs-dir", str(tmp_path / "runs")]) == MissingInputError.exit_code
        assert hint in capsys.readouterr().err


def test_following_sees_what_is_added_replaced_and_cut_until_the_job_has_ended(tmp_path, monkeypatch, capfd):
    log, shown = tmp_path / "log", []
    make_run(tmp_path / "runs/mine", jobs=[submission("12", log=log)])

    def append(text):
        with log.open("a") as file:
            file.write(text)

    def replace():
        log.rename(tmp_path / "log.old")
        append("in a new file\n")

    def read():
        shown.append(capfd.readouterr().out)
        return "".join(shown)

    def has_ended(run):
        text = ""
        for change, seen in (
            (lambda: append("first\n"), "first\n"),
            (lambda: append("sec"), "sec"),
            (lambda: append("ond\n"), "ond\n"),
            (replace, "in a new file\n"),  # what tail has not read by then may be lost
            (lambda: log.write_text("anew\n"), "anew\n"),
        ):
            change()
            text += seen
            wait_until(lambda text=text: read() == text)
        append("the last words\n")
        return True

    monkeypatch.setattr(runs, "has_ended", has_ended)
    assert runs.main(["logs", "mine", "-f", "--runs-dir", str(tmp_path / "runs")]) == 0
    assert read().endswith("anew\nthe last words\n")


def test_following_ends_with_the_job_and_asks_slurm_seldom(tmp_path, slurm, monkeypatch, capfd):
    monkeypatch.setattr(runs, "ASK_SLURM_EVERY_S", 1)
    slurm.answers("12|12|RUNNING|node1|None\n")
    log = tmp_path / "12.log"
    log.write_text("a line\n")
    make_run(tmp_path / "runs/mine", jobs=[submission("12", log=log)])
    answered = ask_jobs

    def ask(job_ids):
        jobs = answered(job_ids)
        slurm.answers("12|12|COMPLETED|node1|None\n")
        return jobs

    monkeypatch.setattr("launchers.state.ask_jobs", ask)
    assert runs.main(["logs", "mine", "-f", "--runs-dir", str(tmp_path / "runs")]) == 0
    assert capfd.readouterr().out == "a line\n"
    assert len(slurm.calls) == 2


def test_following_goes_on_while_slurm_does_not_answer(tmp_path, slurm):
    slurm.answers(error=NO_CONTROLLER)
    run = RunFolder("mine", make_run(tmp_path / "runs/mine", jobs=[submission("12")]))
    assert not runs.has_ended(run)
    slurm.answers(error=FORGOTTEN)
    assert runs.has_ended(run)


# Cancelling


@pytest.mark.parametrize(
    ("options", "expected"), [((), ["scancel 12"]), (("--now",), ["scancel --signal=HUP 12", "scancel 12"])]
)
def test_a_job_of_slurms_is_cancelled(tmp_path, slurm, options, expected):
    slurm.answers("12|12|PENDING||Resources\n")
    make_run(tmp_path / "runs/mine", jobs=[submission("12")])
    assert runs.main(["cancel", "mine", *options, "--runs-dir", str(tmp_path / "runs")]) == 0
    assert [call for call in slurm.calls if call.startswith("scancel")] == expected


@pytest.mark.parametrize(
    ("state", "options", "said"),
    [
        ("SUSPENDED", (), "is ended without saving, because it was suspended"),
        ("PENDING", (), "is out of the queue"),
        ("PENDING", ("--now",), "is out of the queue"),
        ("RUNNING", (), "is asked to save and leave"),
        ("RUNNING", ("--now",), "is ended"),
    ],
)
def test_what_becomes_of_a_cancelled_job_is_said(tmp_path, slurm, capsys, state, options, said):
    slurm.answers(f"12|12|{state}||\n")
    make_run(tmp_path / "runs/mine", jobs=[submission("12")])
    assert runs.main(["cancel", "mine", *options, "--runs-dir", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out == f"job 12 of mine {said}, and does not come back\n"


def test_what_does_not_run_is_not_cancelled(tmp_path, slurm, capsys):
    slurm.answers("12|12|COMPLETED|node1|None\n")
    make_run(tmp_path / "runs/mine", starts=[start(job="12")], checkpoints=[50])
    assert runs.main(["cancel", "mine", "--runs-dir", str(tmp_path / "runs")]) == 0
    assert "mine is stopped (at step 50): there is nothing to cancel" in capsys.readouterr().out
    assert not [call for call in slurm.calls if call.startswith("scancel")]


@pytest.mark.parametrize("command", ["cancel", "resume"])
def test_nothing_is_done_while_slurm_does_not_answer(tmp_path, slurm, capsys, command):
    slurm.answers(error=NO_CONTROLLER)
    make_run(tmp_path / "runs/mine", jobs=[submission("12")])
    assert runs.main([command, "mine", "--runs-dir", str(tmp_path / "runs")]) == ConfigError.exit_code
    assert "before Slurm answers" in capsys.readouterr().err


def test_a_run_that_was_started_by_hand_is_cancelled_by_hand(tmp_path, no_slurm, capsys):
    make_run(tmp_path / "runs/mine", starts=[start()])
    with (tmp_path / "runs/.mine.lock").open("w") as lock:
        lock.write("123 on here")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert runs.main(["cancel", "mine", "--runs-dir", str(tmp_path / "runs")]) == ConfigError.exit_code
    assert "process 123 on here" in capsys.readouterr().err


# What a local job does here: note a SIGTERM, and leave.
WAIT_FOR_SIGTERM = """
import os, signal, time
signal.signal(signal.SIGTERM, lambda *_: (noted.write_text("asked to stop"), os._exit(0)))
noted.write_text("ready")
time.sleep(60)
"""


@pytest.mark.parametrize(("options", "left"), [((), "asked to stop"), (("--now",), "ready")])
def test_a_local_job_is_ended_through_submitits_process(tmp_path, no_slurm, options, left):
    executor = submitit.LocalExecutor(tmp_path / "slurm")
    executor.update_parameters(timeout_min=5)
    noted = tmp_path / "noted"
    job = executor.submit(exec, f"import pathlib; noted = pathlib.Path({str(noted)!r}); {WAIT_FOR_SIGTERM}", {})
    rank = None
    try:
        make_run(tmp_path / "runs/mine", jobs=[submission(job.job_id, cluster="local", at=time.time())])
        wait_until(lambda: noted.exists() and noted.read_text() == "ready")
        (rank,) = psutil.Process(int(job.job_id)).children()
        assert runs.main(["cancel", "mine", *options, "--runs-dir", str(tmp_path / "runs")]) == 0
        rank.wait(30)
        assert (job._process.wait(30) == -signal.SIGKILL) == ("--now" in options)
        assert noted.read_text() == left
        assert runs.state_of(RunFolder("mine", tmp_path / "runs/mine"), {}) == State("not started")
    finally:
        job._process.kill()
        if rank and rank.is_running():
            rank.kill()


def test_a_process_that_has_the_number_of_an_old_job_is_left_alone():
    command = [sys.executable, "-c", "input()", "-m", "submitit.local._local"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        wait_until(lambda: "submitit.local._local" in psutil.Process(process.pid).cmdline())
        now = time.time()
        assert find_controller(Job(str(process.pid), "local", now, None)).pid == process.pid
        assert find_controller(Job(str(process.pid), "local", now - 3600, None)) is None
        assert find_controller(Job(str(os.getppid()), "local", now, None)) is None
        process.kill()
    assert find_controller(Job("no number", "local", now, None)) is None


# Resuming


@pytest.fixture
def submitted(tmp_path, monkeypatch):
    """In the place of submit.py, a script that notes where it was started with which arguments. Returns where."""
    script, noted = tmp_path / "submit.py", tmp_path / "submitted"
    about = "json.dumps([os.getcwd(), *sys.argv[1:]])"
    script.write_text(f"import json, os, sys; open({str(noted)!r}, 'w').write({about}); sys.exit(7)")
    monkeypatch.setattr(runs, "SUBMIT", script)
    return noted


def test_a_stopped_run_is_submitted_as_and_where_it_was_last(tmp_path, no_slurm, submitted, capsys):
    jobs = [submission("12", at=NOW - 9, command=["--nodes=1"]), submission("13", cwd=str(tmp_path))]
    make_run(tmp_path / "runs/mine", starts=[start(at=NOW + 5, job="13")], checkpoints=[50], jobs=jobs)
    resume = ["resume", "mine", "--runs-dir", str(tmp_path / "runs")]
    assert runs.main(resume) == 7  # what submit.py said
    assert json.loads(submitted.read_text()) == [str(tmp_path), "--nodes=2", "--name", "my run"]
    assert capsys.readouterr().out == f"cd {tmp_path} && python {runs.SUBMIT} --nodes=2 --name 'my run'\n"

    write(tmp_path / "runs/mine/job.json", [*jobs, submission("14", at=NOW + 9)])
    assert runs.main(resume) == 7
    assert json.loads(submitted.read_text())[0] == os.getcwd()  # as long as nothing else is known

    write(tmp_path / "runs/mine/job.json", [*jobs, submission("14", at=NOW + 9, cwd=str(tmp_path / "gone"))])
    assert runs.main(resume) == MissingInputError.exit_code
    assert "gone" in capsys.readouterr().err


def test_a_run_that_waits_or_trains_is_not_submitted_again(tmp_path, slurm, submitted, capsys):
    slurm.answers("12|12|PENDING||Resources\n")
    make_run(tmp_path / "runs/mine", jobs=[submission("12")])
    assert runs.main(["resume", "mine", "--runs-dir", str(tmp_path / "runs")]) == RefusedError.exit_code
    assert "mine is pending (Resources)" in capsys.readouterr().err
    assert not submitted.exists()


def test_a_finished_run_is_left_as_it_is(tmp_path, no_slurm, submitted, capsys):
    make_run(tmp_path / "runs/mine", starts=[start()], jobs=[submission("12")], results=RESULTS)
    assert runs.main(["resume", "mine", "--runs-dir", str(tmp_path / "runs")]) == 0
    assert "finished" in capsys.readouterr().out
    assert not submitted.exists()


@pytest.mark.parametrize(("job", "command"), [(None, "deepspeed cit_scale/train.py"), ("12", "sbatch")])
def test_a_run_that_was_not_submitted_here_is_told_what_continues_it(tmp_path, no_slurm, capsys, job, command):
    make_run(tmp_path / "runs/mine", starts=[start(job=job)], checkpoints=[50])
    assert runs.main(["resume", "mine", "--runs-dir", str(tmp_path / "runs")]) == ConfigError.exit_code
    assert re.search(rf"{command}.* that started it continues it", capsys.readouterr().err)


# The script


def test_run_by_path_it_answers_without_pytorch(tmp_path):
    make_run(tmp_path / "runs/mine", starts=[start()], results=RESULTS)
    probe = f"""
import runpy, sys
sys.argv = ["runs.py", "list", "--json"]
try:
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
except SystemExit as end:
    heavy = {{"torch", "submitit", "numpy", "pydantic"}} & set(sys.modules)
    sys.exit(f"code {{end.code}}, imported {{heavy}}" if end.code or heavy else 0)
"""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["state"] == "finished"


def test_a_reader_who_leaves_early_is_no_error(tmp_path):
    for i in range(3000):
        (tmp_path / f"runs/{i:04d}").mkdir(parents=True)
        (tmp_path / f"runs/{i:04d}/job.json").touch()
    listing = f"{sys.executable} {SCRIPT} list --json; echo $? >&2"
    done = subprocess.run(["sh", "-c", f"({listing}) | head -n 1"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[\n", "0\n")
