import multiprocessing
import os
import signal

import pytest

from cit_scale.distributed.lock import exclusive
from cit_scale.distributed.stop import StopRequest
from cit_scale.distributed.world import World
from cit_scale.errors import ConfigError, Stopped


def hold(run_dir, ready, release):
    with exclusive(run_dir, World(), StopRequest()):
        ready.set()
        release.wait()


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the run folder, and the event that makes it let go."""
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "run", ready, release))
    process.start()
    assert ready.wait(60)
    yield process, release
    process.kill()
    process.join()


def test_a_held_run_folder_is_refused_with_its_holder(tmp_path, holder):
    process, _ = holder
    with (
        pytest.raises(ConfigError, match=rf"in use by process {process.pid} on .*another --name"),
        exclusive(tmp_path / "run", World(), StopRequest(), wait_s=0.3),
    ):
        raise AssertionError("two jobs in one folder")


def test_a_successor_waits_until_the_folder_is_free(tmp_path, holder, capsys):
    process, release = holder
    release.set()
    with exclusive(tmp_path / "run", World(), StopRequest(), wait_s=60):
        process.join(60)
        assert process.exitcode == 0


def test_a_killed_holder_holds_no_longer(tmp_path, holder):
    process, _ = holder
    process.kill()
    with exclusive(tmp_path / "run", World(), StopRequest(), wait_s=60):
        assert (tmp_path / ".run.lock").read_text().startswith(f"{os.getpid()} on ")


def test_waiting_can_be_stopped(tmp_path, holder):
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped), exclusive(tmp_path / "run", World(), stop, wait_s=60):
            raise AssertionError("two jobs in one folder")
