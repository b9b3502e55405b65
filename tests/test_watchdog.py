"""Each case is a process of its own: the watchdog ends it."""

import signal
import subprocess
import sys
import time

import pytest

from cit_scale.errors import HUNG

HANGS = {
    "in Python": "import time; time.sleep(60)",
    "in C, with the interpreter's lock held": "import ctypes; ctypes.PyDLL(None).sleep(60)",
    "in a lock": "import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()",
}


def run(body: str, tmp_path) -> tuple[int, str, str, float]:
    """Exit code, stderr, stacks and seconds of a process with a watchdog of one second."""
    program = f"""
import sys
from pathlib import Path
from cit_scale.distributed.watchdog import Watchdog
watchdog = Watchdog(1.0, Path(sys.argv[1]), "it hangs")
{body}
"""
    stacks = tmp_path / "folder" / "stacks.txt"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program, str(stacks)], capture_output=True, text=True, timeout=30)
    return done.returncode, done.stderr, stacks.read_text() if stacks.exists() else "", time.monotonic() - started


@pytest.mark.parametrize("hang", HANGS)
def test_a_process_that_hangs_leaves_its_stacks_and_the_exit_code_of_hanging(hang, tmp_path):
    code, errors, stacks, seconds = run(f"def stuck():\n    {HANGS[hang]}\nstuck()", tmp_path)
    assert code == HUNG, errors
    assert "in stuck" in stacks
    assert seconds < 1 + 10
    # With the interpreter's lock held nothing can print; the stacks and the exit code say it.
    assert ("error: it hangs" in errors) == ("held" not in hang)


def test_progress_puts_the_end_off_and_close_calls_it_off(tmp_path):
    body = "import time\nfor _ in range(6):\n    time.sleep(0.5)\n    watchdog.progress()\n"
    body += "watchdog.close()\ntime.sleep(5)\nprint('through', file=sys.stderr)"
    code, errors, stacks, seconds = run(body, tmp_path)
    assert (code, errors, stacks) == (0, "through\n", "")
    assert seconds > 8


def test_stacks_that_were_written_outlive_a_close(tmp_path):
    """The rank beside may break the connection before this one leaves by itself."""
    body = "import time\ntry:\n    time.sleep(2)\nfinally:\n    watchdog.close()"
    code, _, stacks, _ = run(body, tmp_path)
    assert code == 0
    assert "Timeout" in stacks


def test_without_a_timeout_nothing_is_armed(tmp_path):
    from cit_scale.distributed.watchdog import Watchdog

    watchdog = Watchdog(0, tmp_path / "stacks.txt", "it hangs")
    watchdog.progress()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    watchdog.close()
    assert list(tmp_path.iterdir()) == []


def test_handlers_of_others_are_given_back(tmp_path):
    from cit_scale.distributed.watchdog import Watchdog

    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    try:
        Watchdog(30, tmp_path / "stacks.txt", None).close()
        signal.raise_signal(signal.SIGALRM)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert seen == [1]


def test_progress_is_cheap(tmp_path):
    from cit_scale.distributed.watchdog import Watchdog

    watchdog = Watchdog(30, tmp_path / "stacks.txt", "it hangs")
    started = time.perf_counter()
    for _ in range(200):
        watchdog.progress()
    spent = (time.perf_counter() - started) / 200
    watchdog.close()
    assert spent < 2e-3, f"{spent * 1e6:.0f} microseconds"
