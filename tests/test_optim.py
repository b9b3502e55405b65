import math

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from cit_scale.config import OptimConfig
from cit_scale.errors import ConfigError
from cit_scale.optim import adamw, learning_rate, parameter_groups


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.head = nn.Linear(4, 2)
        self.relative = nn.ParameterDict({"bias": nn.Parameter(torch.zeros(2, 2))})

    def no_weight_decay(self) -> set[str]:
        return {"cls_token"}


def names_by_decay(module: nn.Module, weight_decay: float) -> dict[float, set[str]]:
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {
        group["weight_decay"]: {names[parameter] for parameter in group["params"]}
        for group in parameter_groups(module, weight_decay)
    }


def test_matrices_and_convolutions_decay_and_nothing_else():
    assert names_by_decay(Network(), 0.05) == {
        0.05: {"conv.weight", "head.weight"},
        0.0: {"conv.bias", "norm.weight", "norm.bias", "cls_token", "head.bias", "relative.bias"},
    }


def test_a_module_that_names_no_exemption_still_has_two_groups():
    assert names_by_decay(nn.Linear(3, 2), 0.1) == {0.1: {"weight"}, 0.0: {"bias"}}


def test_a_frozen_parameter_is_refused_by_name():
    module = Network()
    module.head.weight.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"head\.weight is frozen"):
        parameter_groups(module, 0.05)


def test_adamw_takes_the_numbers_of_the_recipe():
    optimizer = adamw(Network(), OptimConfig(betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2))
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    assert optimizer.defaults["eps"] == 1e-6
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]


@pytest.mark.parametrize(
    ("epochs", "steps_per_epoch", "warmup_epochs"), [(30, 7, 5), (4, 3, 0), (2, 5, 2), (3, 10, 0.5), (300, 2, 20)]
)
def test_the_learning_rate_is_timms_cosine_schedule_at_every_step(epochs, steps_per_epoch, warmup_epochs):
    optim = OptimConfig(warmup_lr=1e-6, min_lr=1e-5, warmup_epochs=warmup_epochs)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=3e-3)
    timms = CosineLRScheduler(
        optimizer,
        t_initial=epochs * steps_per_epoch,
        lr_min=1e-5,
        warmup_t=warmup_epochs * steps_per_epoch,
        warmup_lr_init=1e-6,
        warmup_prefix=False,
        t_in_epochs=False,
    )
    for step in range(epochs * steps_per_epoch + 3):
        timms.step_update(step)
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate(step, optim, 3e-3, steps_per_epoch, epochs) == pytest.approx(expected, rel=1e-12)


def test_the_learning_rate_meets_values_worked_by_hand():
    optim = OptimConfig(warmup_lr=0.1, min_lr=0.2, warmup_epochs=2)
    at = [learning_rate(step, optim, peak_lr=1.0, steps_per_epoch=10, epochs=10) for step in (0, 10, 20, 50, 100)]
    cosine_after_warmup = 0.2 + 0.8 * (1 + math.cos(0.2 * math.pi)) / 2
    assert at == pytest.approx([0.1, 0.55, cosine_after_warmup, 0.6, 0.2])
