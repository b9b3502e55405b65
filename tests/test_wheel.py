"""Installed from a wheel, without a checkout, the package does what it does in one."""

import ast
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import wheel

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return wheel.install(tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def python(site, tmp_path):
    """``python(*arguments)``: a command of the installed package's, in an empty folder. Returns what it prints, and
    errors for another exit code than 0."""

    def run(*arguments, code=0):
        (tmp_path / "empty").mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path / "empty",
            env=wheel.environment(site),
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stderr if code else done.stdout

    return run


def test_every_file_of_the_checkout_that_is_used_is_in_the_wheel(site):
    (built,) = site.parent.glob("*.whl")
    held = set(zipfile.ZipFile(built).namelist())
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    wanted = set()
    for name in tracked.split():
        if re.match(r"(launchers|slurm|ds_configs)/", name):
            wanted.add(f"cit_scale/checkout/{name}")
        elif name.startswith("cit_scale/"):
            wanted.add(name)
    assert wanted - held == set()
    assert {name for name in held if ".dist-info/" not in name} == wanted


def test_the_list_of_packages_is_complete():
    listed = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in (REPOSITORY / "cit_scale").rglob("*.py")}
    found = {".".join(folder.relative_to(REPOSITORY).parts) for folder in folders}
    beside = {f"cit_scale.checkout.{name}" for name in ("ds_configs", "launchers", "slurm")}
    assert set(listed) == found | beside


def test_it_says_where_launchers_and_scripts_are(python, site):
    where = Path(python("-m", "cit_scale", "where").strip())
    assert where == (site / "cit_scale" / "checkout").resolve()
    for name in ("launchers/submit.py", "slurm/cit_base.sh", "ds_configs/zero1.json"):
        assert (where / name).is_file()
    assert not list(where.rglob("__init__.py"))


def test_the_default_engine_trains(python, site, tiny_inputs, tmp_path):
    arguments = ["--config", tiny_inputs / "tiny.yaml", "--data.cache_dir", tiny_inputs / "cache"]
    said = python("-m", "cit_scale.train", *arguments, "--runs_dir", tmp_path / "runs")
    assert "tiny  step 12/12" in said
    (start,) = json.loads((tmp_path / "runs" / "tiny" / "env.json").read_text())
    assert start["commit"] is None
    again = python("-m", "cit_scale", "train", *arguments, "--runs_dir", tmp_path / "runs")
    assert "after 12 steps" in again


def test_the_deepspeed_launcher_starts_it(site, tiny_inputs, tmp_path):
    command = [Path(sys.executable).with_name("deepspeed"), "--master_port", "29731", "--num_accelerators", "2"]
    arguments = ["--config", tiny_inputs / "tiny.yaml", "--data.cache_dir", tiny_inputs / "cache"]
    done = subprocess.run(
        list(map(str, [*command, "--module", "cit_scale.train", *arguments, "--runs_dir", tmp_path])),
        cwd=tmp_path,
        env=wheel.environment(site),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks x" in done.stdout


def test_the_launchers_work(python, site, tiny_inputs, tmp_path):
    where = python("-m", "cit_scale", "where").strip()
    arguments = ["--config", tiny_inputs / "tiny.yaml", "--data.cache_dir", tiny_inputs / "cache"]
    shown = python(
        f"{where}/launchers/submit.py", "--cluster", "local", "--dry-run", *arguments, "--runs_dir", tmp_path / "runs"
    )
    assert f"tiny in {tmp_path}/runs/tiny" in shown
    nothing = tmp_path / "empty"
    assert python(f"{where}/launchers/runs.py", "list", "--runs-dir", nothing) == f"no runs in {nothing}\n"
    assert "usage: submit.py" in python(f"{where}/launchers/submit.py", "--help")


def test_the_clusters_options_stand_outside_the_package(python, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    submit = Path(python("-m", "cit_scale", "where").strip()) / "launchers" / "submit.py"
    file = tmp_path / "cit_scale" / "cluster.yaml"
    assert f"\n{file}\n" in python(submit, "--help")
    file.parent.mkdir()
    file.write_text("nodes: many")
    assert f"error: {file}: argument --nodes" in python(submit, "--dry-run", code=2)


def test_the_command_cit_scale_is_installed(site, tmp_path):
    """The only file of the package's that stands outside its folder."""
    command = site / "bin" / "cit-scale"
    done = subprocess.run(
        [command, "where"], cwd=tmp_path, env=wheel.environment(site), capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{(site / 'cit_scale' / 'checkout').resolve()}\n"


def test_nothing_looks_for_the_checkout_by_its_place():
    """Whatever stands beside the package is found by ``config.REPOSITORY``, which knows both places."""
    places = []
    for path in sorted((REPOSITORY / "cit_scale").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            shown = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            climbs = "__file__" in shown and (shown.endswith(".parents") or shown.endswith(".parent.parent"))
            if climbs and path.name not in ("config.py", "train.py"):
                places.append(f"{path.name}:{node.lineno}")
    assert places == []
