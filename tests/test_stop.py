import os
import pickle
import signal
import subprocess
import sys
import time

import pytest

from cit_scale.distributed.stop import StopRequest
from cit_scale.errors import Stopped


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_is_remembered_and_nothing_is_interrupted(signum):
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signum)
        assert stop.requested
        assert stop.signum == signum


def test_the_launchers_sigterm_after_a_ctrl_c_is_the_same_request():
    with StopRequest() as stop:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), signum)
        assert stop.signum == signal.SIGINT


def test_a_second_ctrl_c_interrupts_at_once():
    with StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_is_shielded_is_not_interrupted_by_any_number_of_signals():
    with StopRequest() as stop:
        with stop.shielded():
            for signum in [signal.SIGINT] * 3 + [signal.SIGTERM, signal.SIGUSR1]:
                os.kill(os.getpid(), signum)
        assert stop.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_outcome_travels_to_other_ranks():
    copied = pickle.loads(pickle.dumps(Stopped(7, signal.SIGTERM)))
    assert (copied.step, copied.signum, str(copied)) == (7, signal.SIGTERM, "stopped after step 7")


def test_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


ENDING = """
import os, signal, sys
from cit_scale.distributed.stop import StopRequest
with StopRequest(ends_process=True):
    pass  # asked or not: another rank may have been
os.kill(os.getpid(), getattr(signal, sys.argv[1]))
raise SystemExit(75)
"""


@pytest.mark.parametrize("later", ["SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT"])
def test_a_process_that_ends_does_so_with_its_own_code(later):
    """Whatever is sent while the libraries' ends take their seconds: the code says that the run goes on later."""
    assert subprocess.run([sys.executable, "-c", ENDING, later]).returncode == 75


COMMAND = """
import subprocess, sys, time
# Two generations below: what deepspeed's launcher starts, and a rank that looks at it only when it is told to.
node = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', *sys.argv[2:0:-1]]); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", node, sys.argv[1], sys.argv[2], "deepspeed.launcher.launch"])
time.sleep(60)
"""
RANK = """
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
(folder / "rank").write_text(str(os.getppid()))
while not (folder / "look").exists():
    time.sleep(0.01)
from cit_scale.distributed.stop import Launcher
launcher = Launcher.above()
(folder / "seen.partial").write_text(str(launcher.is_gone()))
(folder / "seen.partial").rename(folder / "seen")
"""


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_launcher_that_was_killed_before_a_rank_was_ready_to_look_is_missed(is_killed, tmp_path):
    command = subprocess.Popen([sys.executable, "-c", COMMAND, str(tmp_path), RANK], start_new_session=True)
    try:
        wait_for(tmp_path / "rank")
        if is_killed:
            command.kill()
            command.wait()
        (tmp_path / "look").touch()
        wait_for(tmp_path / "seen")
        assert (tmp_path / "seen").read_text() == str(is_killed)
    finally:
        os.killpg(command.pid, signal.SIGKILL)
        command.wait()


def wait_for(path):
    deadline = time.monotonic() + 30
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
