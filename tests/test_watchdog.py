"""Each case is a process of its own: the watchdog ends it."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from cit_scale.distributed import watchdog
from cit_scale.distributed.watchdog import Patience, Watchdog, step_limit
from cit_scale.errors import HUNG

HANGS = {
    "in Python": "import time; time.sleep(60)",
    "in C, with the interpreter's lock held": "import ctypes; ctypes.PyDLL(None).sleep(60)",
    "in a lock": "import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()",
}


def run(body: str, tmp_path, *, timeout_s=1.0, message="it hangs") -> tuple[int, str, str, float]:
    """Exit code, stderr, stacks and seconds of a process with a watchdog, of one second if nothing else is said."""
    program = f"""
import sys
from pathlib import Path
from cit_scale.distributed.watchdog import Watchdog
watchdog = Watchdog({timeout_s}, Path(sys.argv[1]), {message!r})
{body}
"""
    stacks = tmp_path / "folder" / "stacks.txt"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program, str(stacks)], capture_output=True, text=True, timeout=30)
    return done.returncode, done.stderr, stacks.read_text() if stacks.exists() else "", time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize("hang", HANGS)
def test_a_process_that_hangs_leaves_its_stacks_and_the_exit_code_of_hanging(hang, tmp_path):
    code, errors, stacks, seconds = run(f"def stuck():\n    {HANGS[hang]}\nstuck()", tmp_path)
    assert code == HUNG, errors
    assert "in stuck" in stacks
    assert seconds < 1 + 10
    assert errors == "error: it hangs\n"


@pytest.mark.slow
def test_progress_puts_the_end_off_and_close_calls_it_off(tmp_path):
    body = "import time\nfor _ in range(6):\n    time.sleep(0.5)\n    watchdog.progress()\n"
    body += "watchdog.close()\ntime.sleep(5)\nprint('through', file=sys.stderr)"
    code, errors, stacks, seconds = run(body, tmp_path)
    assert (code, errors, stacks) == (0, "through\n", "")
    assert seconds > 8


@pytest.mark.slow
@pytest.mark.parametrize(("after_s", "expected"), [(2.5, HUNG), (0.2, 1)])
def test_an_error_of_a_rank_that_is_being_ended_is_the_hang(after_s, expected, tmp_path):
    """Of several ranks that hang one ends first, and breaks the connection in which the others wait."""
    body = f"import time\nwith watchdog:\n    time.sleep({after_s})\n    raise RuntimeError('connection closed')"
    code, errors, stacks, _ = run(body, tmp_path)
    assert code == expected, errors
    assert (errors == "error: it hangs\n") == (code == HUNG) == bool(stacks)
    assert ("RuntimeError: connection closed" in errors) == (code != HUNG)


def test_stacks_that_were_written_outlive_a_close(tmp_path):
    """The rank beside may break the connection before this one leaves by itself."""
    body = "import time\ntry:\n    time.sleep(2)\nfinally:\n    watchdog.close()"
    code, _, stacks, _ = run(body, tmp_path)
    assert code == 0
    assert "most recent call first" in stacks


PAUSED = """
import os, signal, subprocess, time
others = "import os, signal, sys, time; time.sleep(4); os.kill(int(sys.argv[1]), signal.SIGCONT)"
subprocess.Popen([sys.executable, "-c", others, str({target})], start_new_session=True)
os.kill({target}, signal.SIGSTOP)
time.sleep(0.2)  # the one who sends it a signal in vain does not get here
"""
TARGETS = {"the process": "os.getpid()", "its whole group": "-os.getpgrp()"}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_pause_is_no_hang(target, tmp_path):
    """Four seconds, of a watchdog of one; as a Ctrl-Z reaches the whole group."""
    body = (
        PAUSED.format(target=TARGETS[target])
        + "watchdog.progress()\nwatchdog.close()\nprint('through', file=sys.stderr)"
    )
    code, errors, stacks, seconds = run(body, tmp_path)
    assert (code, errors, stacks) == (0, "through\n", "")
    assert seconds > 4


@pytest.mark.slow
def test_a_hang_after_a_pause_still_ends_whatever_holds_the_interpreters_lock(tmp_path):
    body = PAUSED.format(target="os.getpid()") + HANGS["in C, with the interpreter's lock held"]
    code, errors, stacks, seconds = run(body, tmp_path)
    assert (code, errors) == (HUNG, "error: it hangs\n")
    assert "File" in stacks
    assert 5 < seconds < 5 + 10


@pytest.mark.slow
@pytest.mark.parametrize("stderr", ["a full disk", "a pipe that nobody reads", "a full pipe"])
def test_a_hang_ends_also_where_nobody_can_be_told(stderr, tmp_path):
    program = "import sys\nfrom pathlib import Path\nfrom cit_scale.distributed.watchdog import Watchdog\n"
    program += "Watchdog(1.0, Path(sys.argv[1]), 'it hangs')\nimport time\ntime.sleep(60)"
    reading, writing = os.pipe()
    if stderr == "a pipe that nobody reads":
        os.close(reading)
    if stderr == "a full pipe":
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, b"x" * 4096)
        os.set_blocking(writing, True)
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", program, str(tmp_path / "stacks.txt")]
        done = subprocess.run(command, stderr=full if stderr == "a full disk" else writing, timeout=30)
    assert done.returncode == HUNG
    assert "File" in (tmp_path / "stacks.txt").read_text()


@pytest.mark.slow
def test_progress_in_the_last_moment_calls_the_end_off(tmp_path):
    body = (
        "import time\ntime.sleep(2)\nfor _ in range(8):\n    watchdog.progress()\n    time.sleep(0.5)\nwatchdog.close()"
    )
    code, _, stacks, _ = run(body, tmp_path)
    assert code == 0
    assert "most recent call first" in stacks


@pytest.mark.slow
def test_an_overseer_that_was_killed_is_replaced(tmp_path):
    body = f"""
import psutil, time
(overseer,) = psutil.Process().children()
overseer.kill()
for _ in range(10):
    watchdog.progress()
    time.sleep(0.1)
assert psutil.Process().children() not in ([], [overseer])
{HANGS["in C, with the interpreter's lock held"]}
"""
    code, errors, _, _ = run(body, tmp_path)
    assert (code, errors) == (HUNG, "error: it hangs\n")


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "os._exit(0)", "pass"])
def test_nothing_is_left_of_a_process_that_ended(end, tmp_path):
    body = f"import os, psutil\nprint(psutil.Process().children()[0].pid, file=sys.stderr, flush=True)\n{end}"
    _, errors, _, _ = run(body, tmp_path)
    deadline = time.monotonic() + 5
    while psutil.pid_exists(int(errors)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(int(errors))


def test_patience_counts_only_the_time_in_which_somebody_waits(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    patience = Patience(8)
    for passed, is_over in ((2, False), (3600, False), (2, True)):  # a pause counts for LONGEST_LOOK_S
        now[0] += passed
        assert patience.is_over() == is_over


def test_without_a_timeout_nothing_is_armed(tmp_path):
    before = psutil.Process().children()
    watchdog = Watchdog(0, tmp_path / "stacks.txt", "it hangs")
    watchdog.begin_step()
    watchdog.progress()
    assert psutil.Process().children() == before
    watchdog.close()
    assert list(tmp_path.iterdir()) == []


def test_handlers_of_others_are_given_back(tmp_path):
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    try:
        Watchdog(30, tmp_path / "stacks.txt", None).close()
        signal.raise_signal(signal.SIGALRM)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert seen == [1]


def test_progress_is_cheap(tmp_path):
    watchdog = Watchdog(30, tmp_path / "stacks.txt", "it hangs")
    started = time.perf_counter()
    for _ in range(200):
        watchdog.begin_step()
        watchdog.progress()
    spent = (time.perf_counter() - started) / 200
    watchdog.close()
    assert spent < 2e-3, f"{spent * 1e6:.0f} microseconds"


def test_a_steps_limit_is_at_most_the_setting_and_far_from_what_steps_take():
    assert step_limit(1800, None) == 1800  # the first steps, which compile
    assert step_limit(1800, 0.04) == 900  # a GPU's step: fifteen minutes, of a disk that is away
    assert step_limit(1800, 60) == 1200  # twenty times the slowest
    assert step_limit(1800, 300) == 1800  # a stall of five minutes that passed
    assert step_limit(14400, 0.04) == 7200  # who sets more waits longer
    assert step_limit(600, 0.04) == 600
    assert step_limit(4, 100) == 4


def test_the_limit_is_that_of_a_step_in_steps_only_and_follows_the_slowest(tmp_path, monkeypatch):
    now, told = [0.0], []
    dog = Watchdog(1800, tmp_path / "stacks.txt", None)
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(dog, "_report", told.append)

    def turn(step_s, between_s=0.0):
        told.clear()
        dog.begin_step()
        now[0] += step_s
        dog.progress()
        now[0] += between_s
        dog.progress()
        return told[:]

    for _ in range(watchdog.WARMUP_STEPS):
        assert turn(200.0) == [1800, 1800, 1800]  # compiling is not what a step takes
    assert turn(0.05) == [1800, 1800, 1800]
    assert turn(60, between_s=3600) == [900, 1800, 1800]  # neither is an evaluation or a checkpoint
    assert turn(0.05) == [1200, 1800, 1800]
    assert turn(0.05) == [1200, 1800, 1800]
    dog.close()


STEPS = """
import time
from cit_scale.distributed import watchdog as limits
limits.WARMUP_STEPS, limits.SHORTEST_LIMIT_S, limits.SHORTEST_SHARE = 2, 1.5, 0.0
for _ in range(3):
    watchdog.begin_step()
    watchdog.progress()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hang", "what", "expected"),
    [
        ("watchdog.begin_step()", "a step", HUNG),
        ("watchdog.begin_step(); time.sleep(0.7); watchdog.progress()", "between two steps", 0),
    ],
)
def test_a_step_that_hangs_ends_by_what_steps_take_and_what_is_between_them_does_not(hang, what, expected, tmp_path):
    body = f"{STEPS}{hang}\ntime.sleep(8)\nwatchdog.close()"
    code, errors, _, _ = run(body, tmp_path, timeout_s=60.0, message="nothing for {seconds} seconds")
    assert code == expected, (what, errors)
    assert errors == ("error: nothing for 1.5 seconds\n" if expected else "")


@pytest.mark.slow
def test_the_end_of_a_slow_step_while_its_stacks_are_written_gives_the_next_part_the_whole_time(tmp_path):
    body = f"{STEPS}watchdog.begin_step()\ntime.sleep(2.2)\nwatchdog.progress()\ntime.sleep(8)\nwatchdog.close()"
    code, _, stacks, _ = run(body, tmp_path, timeout_s=60.0)
    assert code == 0
    assert "most recent call first" in stacks
