"""A rank that hangs, whatever in: every rank leaves in time, and says where it stood."""

import signal
import time

import pytest
import sabotage
from tiny_run import assert_same_end

pytestmark = pytest.mark.fault

TIMEOUT_S = 4


@pytest.mark.parametrize(
    ("rank", "place", "step", "how"),
    [
        (0, "forward", 6, "sleep"),
        (1, "forward", 6, "sleep_with_the_interpreters_lock"),
        (0, "backward", 6, "sleep_with_the_interpreters_lock"),
        (1, "evaluation", 2, "sleep"),
        (1, "save", 12, "sleep"),
    ],
)
def test_a_hung_rank_ends_the_run_with_the_stacks_of_all_ranks(rank, place, step, how, tiny_run, calm):
    impatient = ("--train.step_timeout_s", str(TIMEOUT_S))
    ended = tiny_run.run(*impatient, sabotage=(sabotage.at, rank, place, step, getattr(sabotage, how)))
    assert ended.codes == [14, 14], ended.output
    assert ended.wall_s < TIMEOUT_S + 10 + START_S
    stacks = [(tiny_run.run_dir / f"stacks_rank_{i}.txt").read_text() for i in range(2)]
    assert f"in {how}" in stacks[rank], stacks[rank]
    assert f"in {how}" not in stacks[1 - rank]
    for text in stacks:
        assert "in training_loop" in text or "in evaluate" in text, text
    said = f"error: nothing was achieved for {TIMEOUT_S} seconds (train.step_timeout_s={TIMEOUT_S})"
    assert ended.outputs[0].count(said) == 1, ended.output
    assert f"{tiny_run.run_dir}/stacks_rank_*.txt" in ended.outputs[0]
    tiny_run.finish(*impatient)
    assert_same_end(tiny_run, calm())


START_S = 20
"""From the start of the processes to the place where one hangs, on a machine with other things to do."""


def test_a_run_that_is_paused_for_longer_goes_on_as_if_nothing_had_been(tiny_run, calm):
    """By SIGSTOP and SIGCONT, as docker pause and Slurm's suspend do it."""
    job = tiny_run.start("--train.step_timeout_s", str(TIMEOUT_S), sabotage=(sabotage.at, 0, "batch", 7, say_so))
    job.wait_for("here")
    for signum in (signal.SIGSTOP, signal.SIGCONT):
        for rank in range(2):
            job.kill(rank, signum)
        if signum == signal.SIGSTOP:
            time.sleep(2.5 * TIMEOUT_S)
    ended = job.wait()
    assert ended.codes == [0, 0], ended.output
    assert not list(tiny_run.run_dir.glob("stacks_*"))
    assert_same_end(tiny_run, calm())


def say_so():
    print("here", flush=True)
    time.sleep(1)


def test_a_rank_that_is_paused_alone_is_a_hang_for_the_others(tiny_run, calm):
    impatient = ("--train.step_timeout_s", str(TIMEOUT_S))
    ended = tiny_run.run(*impatient, sabotage=(sabotage.at, 1, "forward", 6, sabotage.send, signal.SIGSTOP))
    assert ended.code == 14, ended.output
    assert ended.codes[0] == 14
    assert ended.wall_s < TIMEOUT_S + 10 + START_S
    assert "in training_loop" in (tiny_run.run_dir / "stacks_rank_0.txt").read_text()
    tiny_run.finish(*impatient)
    assert_same_end(tiny_run, calm())
