"""Which package a batch script starts. What Slurm makes of it is tested on a cluster (test_slurm.py)."""

import os
import signal
import subprocess
import time
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
        (tmp_path / place / "slurm" / "env.sh").write_text("export CIT_SCALE\n")
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


@pytest.mark.parametrize("name", ["USR2", "TERM"])
def test_a_signal_to_all_while_python_is_looked_at_is_a_stop(name, tmp_path):
    """The Python dies of it, which is no sign that there is none."""
    python = tmp_path / "python"
    cases = [f"*find_spec*) touch {tmp_path}/begun; exec sleep 60 ;;", '*requeue.py*) echo "$*" ;;']
    python.write_text("\n".join(["#!/bin/bash", 'case "$*" in', *cases, "esac\n"]))
    python.chmod(0o755)
    env = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "node1", "CIT_PYTHON": str(python)}
    script = f". {SLURM}/env.sh; echo not reached"
    job = subprocess.Popen(
        ["bash", "-c", script, "job", "--seed", "1"],
        env={**env, "CIT_SCALE": str(SLURM.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    os.killpg(job.pid, getattr(signal, f"SIG{name}"))
    out, error = job.communicate(timeout=60)
    assert job.returncode == 140, error
    assert out == f"{SLURM.parent}/launchers/requeue.py --exit-code 140 --max-restarts 3 -- --seed 1\n"


@pytest.mark.parametrize("script", ["cit_tiny", "cit_small", "cit_base"])
def test_a_package_that_is_named_and_not_there_is_no_reason_to_take_another(script, start, tmp_path):
    code, out, error = start(script, SLURM_SUBMIT_DIR=str(tmp_path / "submitted"), CIT_SCALE="/no/such")
    assert (code, out) == (2, "")
    assert "error: run sbatch in the checkout, set CIT_SCALE to it, or install the package" in error
