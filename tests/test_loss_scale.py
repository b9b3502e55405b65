import torch

from cit_scale.engines.loss_scale import GROWTH_STEPS, INITIAL_SCALE, LossScale


def test_the_loss_scale_is_halved_at_a_skip_and_doubled_after_many_good_steps():
    scale = LossScale(is_dynamic=True)
    assert scale.value == INITIAL_SCALE == 65536
    scale.update(skipped=True)
    for _ in range(GROWTH_STEPS - 1):
        scale.update(skipped=False)
    assert scale.value == 32768
    scale.update(skipped=False)
    assert (scale.value, scale.to_tensor().tolist()) == (65536, [65536, 0])
    for _ in range(GROWTH_STEPS - 1):
        scale.update(skipped=False)
    scale.update(skipped=True)  # in a row, or it does not count
    scale.update(skipped=False)
    assert scale.to_tensor().tolist() == [32768, 1]
    for _ in range(20):
        scale.update(skipped=True)
    assert scale.value == 1


def test_a_loss_scale_goes_on_where_it_was_saved_and_starts_where_there_was_none():
    scale = LossScale(is_dynamic=True)
    scale.load(torch.tensor([512.0, 7.0]))
    assert scale.to_tensor().tolist() == [512, 7]
    scale.load(LossScale(is_dynamic=False).to_tensor())
    assert scale.to_tensor().tolist() == [INITIAL_SCALE, 0]
    fixed = LossScale(is_dynamic=False)
    fixed.load(torch.tensor([512.0, 7.0]))
    fixed.update(skipped=True)
    assert (fixed.value, fixed.to_tensor().tolist()) == (1, [0, 0])
