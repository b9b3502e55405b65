"""Asked to stop, by any signal, on any one rank, at any time: what was reached is saved, and no step is lost."""

import dataclasses
import re
from signal import SIGINT, SIGTERM, SIGUSR1, SIGUSR2

import pytest
import sabotage
from tiny_run import STEPS, STEPS_PER_EPOCH, assert_same_end

from cit_scale.checkpoint import store as checkpoint
from cit_scale.distributed.world import World

pytestmark = pytest.mark.fault

SIGNALS = (SIGTERM, SIGUSR1, SIGUSR2, SIGINT)

# One after the other in one run, which goes on each time from where it was stopped: place, number there, and the update
# after which it stops. The ranks vote after each update, and read what they voted after the next.
PHASES = [
    ("start", 0, 0),
    ("evaluation", 1, 0),  # of the teacher; from here on it is noted
    ("batch", 1, 2),
    ("forward", 3, 4),
    ("backward", STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH),  # whose evaluation is left to the next start
    ("evaluation", 1, STEPS_PER_EPOCH),
    ("evaluation", 2, STEPS_PER_EPOCH),
    ("save", 8, 9),  # written in the background: whichever vote comes first
    ("save", STEPS, STEPS),
    ("evaluation", 1, STEPS),  # the closing ones, of the student and of its average
    ("evaluation", 2, STEPS),
]


def assert_stopped(run, ended, step):
    """Returns the step after which it was stopped. step: that step, or None if it is not known."""
    assert ended.codes == [75] * run.ranks, ended.output
    stopped = re.search(r"stopped after step (\d+); the same command continues there", ended.outputs[0])
    assert stopped, ended.output
    reached = int(stopped[1])
    assert step in (None, reached), ended.output
    assert "Traceback" not in ended.output
    assert not (run.run_dir / "results.json").exists()
    if reached:
        assert run.checkpoint(reached).exists(), run.checkpoints()
        assert checkpoint._verify(run.checkpoint(reached), reached, World()) is None
    return reached


def assert_goes_on(ended, step):
    expected = f"continues after step {step};" if step else "starts in"
    assert expected in ended.outputs[0], ended.output


@pytest.mark.parametrize(("rank", "first"), [(0, 0), (1, 1), (1, 2), (0, 3)])
def test_any_signal_on_any_one_rank_in_any_phase_loses_no_step(rank, first, tiny_run, calm):
    reached = 0
    for turn, (place, number, step) in enumerate(PHASES):
        signum = SIGNALS[(first + turn) % len(SIGNALS)]
        ended = tiny_run.run(sabotage=(sabotage.at, rank, place, number, sabotage.send, signum))
        in_background = place == "save" and step < STEPS
        now = assert_stopped(tiny_run, ended, None if in_background else step)
        assert not in_background or now in range(number + 1, STEPS)
        assert_goes_on(ended, reached)
        reached = now
    assert_goes_on(tiny_run.finish(), reached)
    assert_same_end(tiny_run, calm())


@pytest.mark.parametrize(
    ("layout", "rank", "first", "second"),
    [
        ("zero1", 0, SIGTERM, SIGTERM),
        ("zero1", 1, SIGINT, SIGINT),
        ("zero1", 1, SIGUSR1, SIGTERM),
        ("plain", 0, SIGINT, SIGINT),
    ],
)
def test_a_second_signal_during_the_save_changes_nothing(layout, rank, first, second, tiny_run, calm):
    run = dataclasses.replace(tiny_run, layout=layout)
    stops = 7 if run.ranks == 1 else 8  # a process alone has nobody to vote with
    ended = run.run(
        sabotage=(
            sabotage.everything,
            (sabotage.at, rank, "forward", 7, sabotage.send, first),
            (sabotage.at, rank, "save", stops, sabotage.send, second, second),
        )
    )
    assert_stopped(run, ended, stops)
    assert_goes_on(run.finish(), stops)
    assert_same_end(run, calm(layout))


def test_a_signal_while_the_student_is_compiled_stops_after_the_first_steps(tiny_run):
    compiled = dataclasses.replace(tiny_run, more=("--engine.compile", "true"))
    ended = compiled.run(sabotage=(sabotage.at, 1, "compile", 1, sabotage.send, SIGTERM))
    assert_stopped(compiled, ended, 2)
    stop_soon = ((sabotage.at, None, "compile", 1, str), (sabotage.at, 0, "batch", 3, sabotage.send, SIGTERM))
    ended = compiled.run(sabotage=(sabotage.everything, *stop_soon))
    assert_stopped(compiled, ended, 4)
    assert_goes_on(ended, 2)


def test_every_rank_signalled_at_once_is_one_stop(tiny_run, calm):
    ended = tiny_run.run(sabotage=(sabotage.at, None, "forward", 7, sabotage.send, SIGUSR1, SIGTERM))
    assert_stopped(tiny_run, ended, 8)
    assert_goes_on(tiny_run.finish(), 8)
    assert_same_end(tiny_run, calm())


@pytest.mark.parametrize("layout", ["plain", "zero3", "fsdp2"])
def test_a_stop_in_the_evaluation_of_the_average_leaves_the_weights_as_they_were(layout, tiny_run, calm):
    run = dataclasses.replace(tiny_run, layout=layout)
    ended = run.run(sabotage=(sabotage.at, run.ranks - 1, "evaluation", 3, sabotage.send, SIGTERM))
    assert_stopped(run, ended, STEPS_PER_EPOCH)
    assert_goes_on(run.finish(), STEPS_PER_EPOCH)
    assert_same_end(run, calm(layout))


def test_a_signal_before_the_trainer_listens_ends_it_and_nothing_is_lost(tiny_run, calm):
    ended = tiny_run.run(sabotage=(early, SIGTERM))
    assert ended.code == -SIGTERM
    tiny_run.finish()
    assert_same_end(tiny_run, calm())


def early(world, signum):
    if world.rank == 1:
        sabotage.send(signum)
