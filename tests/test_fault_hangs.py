"""A rank that hangs, whatever in: every rank leaves in time, and says where it stood."""

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
        (1, "evaluation", 1, "sleep"),
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
        assert "in train_steps" in text or "in evaluate" in text, text
    if not (rank == 0 and how == "sleep_with_the_interpreters_lock"):  # which lets nothing be printed
        said = f"error: nothing was achieved for train.step_timeout_s={TIMEOUT_S} seconds"
        assert ended.outputs[0].count(said) == 1, ended.output
        assert f"{tiny_run.run_dir}/stacks_rank_*.txt" in ended.outputs[0]
    tiny_run.finish(*impatient)
    assert_same_end(tiny_run, calm())


START_S = 20
"""From the start of the processes to the place where one hangs, on a machine with other things to do."""
