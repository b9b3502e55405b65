"""Stopped on one number of ranks, one stage, one engine; the same run goes on with others, with no step in between."""

import dataclasses
from signal import SIGTERM

import pytest
import sabotage
from tiny_run import STEPS, STEPS_PER_EPOCH, learned, tensors

from cit_scale.checkpoint import store as checkpoint
from cit_scale.distributed.world import World

pytestmark = pytest.mark.fault

CHAINS = [("zero1", "plain", "fsdp2", "zero3"), ("plain", "zero3", "zero1", "fsdp2")]


@pytest.mark.parametrize("chain", CHAINS, ids="-".join)
def test_a_run_goes_on_at_another_number_of_ranks_stage_and_engine(chain, tiny_run, calm):
    stops = [3, 6, 9, None]  # the last reaches the end
    reached = 0
    for layout, stop in zip(chain, stops, strict=True):
        run = dataclasses.replace(tiny_run, layout=layout)
        signal_after_step = (sabotage.at, run.ranks - 1, "backward", stop, sabotage.send, SIGTERM) if stop else None
        ended = run.run(sabotage=signal_after_step)
        assert ended.codes == [75 if stop else 0] * run.ranks, ended.output
        beginning = f"continues after step {reached};" if reached else "starts in"
        assert beginning in ended.outputs[0], ended.output
        if stop:
            # Several ranks read what they voted a step later, or in an evaluation before.
            votes_later = run.ranks > 1 and stop % STEPS_PER_EPOCH
            reached = stop + 1 if votes_later else stop
            assert checkpoint.load_newest(run.run_dir, World()).step == reached
    # Drop path and BatchNorm follow the cut into ranks, so losses are not to the bit those of a run at one layout; the
    # place in the data and the schedule are.
    ours, theirs = learned(tiny_run.run_dir), learned(calm().run_dir)
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    assert [line["lr"] for line in ours] == [line["lr"] for line in theirs]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=0.2)
    assert tensors(tiny_run.checkpoint(STEPS)).keys() == tensors(calm().checkpoint(STEPS)).keys()
