"""Which package a batch script starts. What Slurm makes of it is tested on a cluster (test_slurm.py)."""

import os
import subprocess
from pathlib import Path

import pytest

SLURM = Path(__file__).parents[1] / "slurm"


@pytest.fixture
def start(tmp_path):
    """``start(script, **env)``: run a script with an srun and a Python that print what they are called with."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "srun").write_text('#!/bin/sh\necho "srun in $CIT_SCALE: $*"\n')
    (bin_ / "fake_python").write_text(f"#!/bin/sh\necho {tmp_path}/installed\n")
    for file in bin_.iterdir():
        file.chmod(0o755)
    for place in ("submitted", "own", "installed"):
        (tmp_path / place / "slurm").mkdir(parents=True)
        (tmp_path / place / "slurm" / "env.sh").touch()
    (tmp_path / "elsewhere").mkdir()

    def run(script, **env):
        env = {"PATH": f"{bin_}:{os.environ['PATH']}", "CIT_PYTHON": "fake_python", **env}
        done = subprocess.run(["bash", SLURM / f"{script}.sh", "--seed", "1"], env=env, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.mark.parametrize("script", ["cit_tiny", "cit_small", "cit_base"])
def test_the_package_is_the_one_that_is_named_or_submitted_from_or_installed(script, start, tmp_path):
    command = f"fake_python -P -m cit_scale.train --config {script} --seed 1\n"
    submitted, elsewhere = str(tmp_path / "submitted"), str(tmp_path / "elsewhere")
    assert start(script, SLURM_SUBMIT_DIR=submitted) == (0, f"srun in {submitted}: {command}", "")
    own = str(tmp_path / "own")
    assert start(script, SLURM_SUBMIT_DIR=submitted, CIT_SCALE=own) == (0, f"srun in {own}: {command}", "")
    assert start(script, SLURM_SUBMIT_DIR=elsewhere) == (0, f"srun in {tmp_path}/installed: {command}", "")


@pytest.mark.parametrize("script", ["cit_tiny", "cit_small", "cit_base"])
def test_a_package_that_is_named_and_not_there_is_no_reason_to_take_another(script, start, tmp_path):
    code, out, error = start(script, SLURM_SUBMIT_DIR=str(tmp_path / "submitted"), CIT_SCALE="/no/such")
    assert (code, out) == (2, "")
    assert "error: run sbatch in the checkout, set CIT_SCALE to it, or install the package" in error
