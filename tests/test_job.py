"""What submitit runs on each rank."""

import os
import pickle
import signal
import subprocess
import sys

import pytest

import cit_scale.train
from cit_scale.distributed.stop import StopRequest
from cit_scale.job import LOCAL_REQUEUE, TrainJob, exit_code


def test_the_pickle_holds_the_arguments_and_is_made_without_a_gpu_stack():
    script = (
        "import pickle, sys; from cit_scale.job import TrainJob; "
        "job = pickle.loads(pickle.dumps(TrainJob(('--name', 'mine')))); "
        "print(job.argv, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "('--name', 'mine') False"
    assert len(pickle.dumps(TrainJob(("--name", "mine")))) < 200


def test_submitits_constant_for_another_try_is_still_the_same():
    from submitit.local import local

    assert local.LOCAL_REQUEUE_RETURN_CODE == LOCAL_REQUEUE


@pytest.mark.parametrize(
    ("code", "signum", "executor", "seen"),
    [
        (75, signal.SIGUSR2, "local", LOCAL_REQUEUE),
        (75, signal.SIGINT, "local", 75),  # a person asked: not again
        (75, None, "local", 75),  # on a rank that got no signal; one that did is enough
        (75, signal.SIGUSR2, "slurm", 75),
        (1, signal.SIGUSR2, "local", 1),
    ],
)
def test_only_a_time_limit_of_the_local_executor_asks_for_another_try(code, signum, executor, seen):
    assert exit_code(code, signum, {"SUBMITIT_EXECUTOR": executor}) == seen


@pytest.fixture
def _handlers_are_given_back():
    """A job's process ends with it; this one does not."""
    before = {signum: signal.getsignal(signum) for signum in StopRequest.SIGNALS}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.usefixtures("_handlers_are_given_back")
def test_a_signal_is_the_trainers_from_the_first_moment_to_the_last(monkeypatch):
    """submitit's handler would requeue at once; it must be called neither before train.py is imported nor after it."""
    called = []
    signal.signal(signal.SIGUSR2, lambda *_: called.append("submitit"))

    def main(argv, stop):
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.requested
        return 75

    monkeypatch.setattr(cit_scale.train, "main", main)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    with pytest.raises(SystemExit) as left:
        TrainJob(())()
    assert left.value.code == 75
    os.kill(os.getpid(), signal.SIGUSR2)  # neither ends the process, with a code of its own
    assert called == []


@pytest.mark.usefixtures("_handlers_are_given_back")
def test_a_job_that_ends_well_returns(monkeypatch):
    monkeypatch.setattr(cit_scale.train, "main", lambda argv, stop: 0)
    assert TrainJob(("--name", "mine"))() == 0
