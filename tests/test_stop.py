import os
import pickle
import signal

import pytest

from cit_scale.errors import Stopped
from cit_scale.stop import StopRequest


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
