import torch

from cit_scale.engines.loss_scale import GROWTH_STEPS, INITIAL_SCALE, LossScale

CPU = torch.device("cpu")
APPLIED, SKIPPED = torch.tensor(0.0), torch.tensor(1.0)


def test_the_loss_scale_is_halved_at_a_skip_and_doubled_after_many_good_steps():
    scale = LossScale(is_dynamic=True, device=CPU)
    assert scale.value == INITIAL_SCALE == 65536
    scale.update(SKIPPED)
    for _ in range(GROWTH_STEPS - 1):
        scale.update(APPLIED)
    assert scale.value == 32768
    scale.update(APPLIED)
    assert (scale.value.item(), scale.to_tensor().tolist()) == (65536, [65536, 0])
    for _ in range(GROWTH_STEPS - 1):
        scale.update(APPLIED)
    scale.update(SKIPPED)  # in a row, or it does not count
    scale.update(APPLIED)
    assert scale.to_tensor().tolist() == [32768, 1]
    for _ in range(20):
        scale.update(SKIPPED)
    assert scale.value == 1


def test_a_loss_scale_goes_on_where_it_was_saved_and_starts_where_there_was_none():
    scale = LossScale(is_dynamic=True, device=CPU)
    scale.load(torch.tensor([512.0, 7.0]))
    assert scale.to_tensor().tolist() == [512, 7]
    scale.load(LossScale(is_dynamic=False, device=CPU).to_tensor())
    assert scale.to_tensor().tolist() == [INITIAL_SCALE, 0]
    fixed = LossScale(is_dynamic=False, device=CPU)
    fixed.load(torch.tensor([512.0, 7.0]))
    fixed.update(SKIPPED)
    assert (fixed.value.item(), fixed.to_tensor().tolist()) == (1, [0, 0])


def test_scaling_and_unscaling_is_exact():
    scale = LossScale(is_dynamic=True, device=CPU)
    gradients = [torch.randn(5), torch.randn(2, 3)]
    before = [gradient.clone() for gradient in gradients]
    scaled = [scale.scaled(gradient) for gradient in gradients]
    assert torch.equal(scaled[0], before[0] * 65536)
    scale.unscale(scaled)
    assert all(map(torch.equal, scaled, before))
