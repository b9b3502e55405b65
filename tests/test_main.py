"""``cit-scale VERB``, and how soon every command answers who only asks."""

import importlib
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from cit_scale import __main__ as command
from cit_scale import cli

REPOSITORY = Path(__file__).parents[1]
LINES, COLUMNS = 40, 100  # of one screen

HEAVY = {"torch", "numpy", "PIL", "timm", "triton", "nvidia", "deepspeed", "submitit", "pydantic", "rich"}


def alone():
    """The environment without what a launcher sets, or DeepSpeed in a test before this one."""
    launchers = re.compile(r"(LOCAL_|CROSS_)?(RANK|SIZE)|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|(SLURM|SUBMITIT)_.*")
    return {name: value for name, value in os.environ.items() if not launchers.fullmatch(name)}


def ask(*arguments):
    """Run Python; also returns the seconds of CPU that it took, the least of three."""
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, env=alone(), capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return done, min(taken)


@pytest.mark.parametrize("verb", ["", *command.VERBS])
def test_help_is_one_screen_begins_with_an_example_and_comes_at_once(verb):
    done, cpu_s = ask("-m", "cit_scale", *verb.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS
    assert f"cit-scale {verb}".strip() in " ".join(lines[:2])
    assert cpu_s < 0.25


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["cit_scale/train.py", "--help"], 0),
        (["cit_scale/train.py", "--help-all"], 0),
        (["cit_scale/train.py", "--print_config"], 0),
        (["cit_scale/train.py", "--trian.epochs", "1"], 2),
        (["cit_scale/train.py", "--train.epochs", "0"], 2),
        (["cit_scale/train.py", "--train.global_batch_size", "60"], 2),
        (["cit_scale/train.py", "--name", ""], 2),
        (["cit_scale/train.py", "--engine.ds_config", "nosuch"], 2),
        (["cit_scale/train.py", "--teachers.new.model", "resnet10t"], 2),
        (["cit_scale/train.py", "--config", "nope"], 3),
        (["-m", "cit_scale", "train", "--train.epochs", "0"], 2),
        (["launchers/submit.py", "--help"], 0),
        (["launchers/submit.py", "--nodes", "0"], 2),
        (["launchers/submit.py", "--sweep", "lrr=1"], 2),
        (["launchers/submit.py", "--train.epochs", "0"], 2),
        (["launchers/runs.py", "--help"], 0),
        (["launchers/runs.py", "show", "nope", "--runs-dir", "docs"], 3),
        (["launchers/requeue.py", "--help"], 0),
    ],
)
def test_help_and_mistakes_take_less_than_a_second_of_cpu(arguments, code):
    done, cpu_s = ask(*arguments)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == (code != 0)
    assert cpu_s < 1.0


def test_only_the_first_rank_answers():
    ranks = {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for rank, lines in (("0", 1), ("1", 0)):
        env = alone() | ranks | {"RANK": rank, "LOCAL_RANK": rank}
        mistaken = [sys.executable, "cit_scale/train.py", "--train.epochs", "0"]
        done = subprocess.run(mistaken, cwd=REPOSITORY, env=env, capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (2, lines)
        for flag in ("--help", "--help-all", "--print_config"):
            asking = [sys.executable, "cit_scale/train.py", flag, f"--local_rank={rank}"]
            done = subprocess.run(asking, cwd=REPOSITORY, env=env, capture_output=True, text=True)
            assert (done.returncode, bool(done.stdout), done.stderr) == (0, bool(lines), "")


def test_help_to_a_stream_that_was_closed_is_no_error():
    done = subprocess.run(["sh", "-c", '"$0" cit_scale/train.py --help >&-', sys.executable], cwd=REPOSITORY)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"RANK": "0"}, "RANK=0 is set but LOCAL_RANK, WORLD_SIZE is not"),
        ({"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, "RANK='x' in the environment is no whole number"),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "rank=2 of world_size=2"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT do not say where"),
    ],
)
def test_an_environment_that_makes_no_sense_is_one_line(env, expected):
    command = [sys.executable, "cit_scale/train.py"]
    done = subprocess.run(command, cwd=REPOSITORY, env=alone() | env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert expected in done.stderr


def test_help_is_given_also_in_half_an_environment_of_a_launcher():
    shell = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}
    for flag, env in (("--help", shell), ("--help-all", {"RANK": "0"}), ("--print_config", shell)):
        command = [sys.executable, "cit_scale/train.py", flag]
        done = subprocess.run(command, cwd=REPOSITORY, env=alone() | env, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert "train" in done.stdout


def test_help_imports_nothing_heavy():
    program = "import sys\nfrom cit_scale.__main__ import main\n"
    for verb in command.VERBS:
        program += f"try:\n    main([{verb!r}, '--help'])\nexcept SystemExit as left:\n    assert left.code == 0\n"
    program += f"heavy = {HEAVY} & sys.modules.keys()\nsys.exit(f'imported {{heavy}}' if heavy else 0)"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", command.VERBS.values())
def test_every_verb_leads_somewhere(verb):
    assert callable(getattr(importlib.import_module(verb.module), verb.function))


def test_what_the_deepspeed_command_adds_is_no_verb():
    assert command.main(["--local_rank=1", "--version"]) == 0


def test_a_verb_that_there_is_not_is_answered_with_those_there_are(capsys):
    assert command.main(["trian"]) == 2
    assert capsys.readouterr().err == "error: cit-scale has no verb 'trian'; did you mean train?\n"
    assert command.main(["xyz"]) == 2
    assert "there are train, pack, video, evaluate, predict" in capsys.readouterr().err


def test_without_a_verb_the_help_is_shown(capsys):
    assert command.main([]) == 0
    assert capsys.readouterr().out == command.usage()


def test_the_whole_help_lists_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.parse_arguments(["--help-all"])
    shown = capsys.readouterr().out
    for setting in ("--train.epochs", "--data.train", "--engine.precision", "--optim.lr", "--fresh", "default: 300"):
        assert setting in shown


def test_verbs_take_their_arguments_and_return_exit_codes(tmp_path, capsys):
    assert command.main(["runs", "list", "--runs-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"
    assert command.main(["runs", "show", "mine", "--runs-dir", str(tmp_path)]) == 3
    assert command.main(["pack", str(tmp_path / "none"), str(tmp_path / "out")]) == 2


def test_the_former_names_of_pack_and_video_still_lead_there(tmp_path):
    for name in ("pack", "video"):
        done = subprocess.run(
            [sys.executable, "-m", f"cit_scale.data.{name}", "--help"], cwd=REPOSITORY, capture_output=True, text=True
        )
        assert done.returncode == 0
        assert done.stdout.startswith(f"cit-scale {name} ")
