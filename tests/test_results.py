import subprocess

import pytest

from cit_scale.distributed.world import World
from cit_scale.run.results import environment_record, print_table


def test_the_environment_names_versions_and_commit():
    environment = environment_record(World())
    assert {"torch", "timm", "deepspeed"} <= environment["packages"].keys()
    assert environment["world_size"] == 1


@pytest.mark.parametrize("error", [FileNotFoundError("git"), subprocess.CalledProcessError(128, "git")])
def test_a_machine_without_git_or_repository_has_no_commit(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    assert environment_record(World())["commit"] is None


def test_the_table_shows_every_network_and_where_the_run_is(tmp_path, capsys):
    results = {
        "model": "cit",
        "steps": 3,
        "images_per_s": None,
        "eval_images": 10,
        "accuracy": {"student": {"top1": {"cls": 90.0, "average": 95.5}, "top5": {"cls": 99.0, "average": 100.0}}},
        "teachers": {"conv": {"model": "regnet", "top1": 80.25, "top5": 98.0}},
    }
    print_table(tmp_path, results)
    shown = capsys.readouterr().out
    for part in ("teacher conv (regnet)", "80.25", "student, average", "95.50", "not measured", str(tmp_path)):
        assert part in shown


def test_results_of_a_version_that_measured_less_are_shown(capsys, tmp_path):
    teachers = {"conv": {"model": "resnet10t", "top1": 50.0}}
    print_table(tmp_path, {"steps": 12, "accuracy": {"student": {"top1": {"cls": 99.5}}}, "teachers": teachers})
    print_table(tmp_path, {"steps": 12})
    shown = capsys.readouterr().out
    assert "student, cls" in shown
    assert "99.50" in shown
    assert "50.00" in shown
