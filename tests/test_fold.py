"""BatchNorm folded into convolutions: the same function, exactly, with fewer modules."""

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import prune

import cit_scale.models  # noqa: F401
from cit_scale.models.fold import fold_batch_norm
from cit_scale.models.rednet import Bottleneck


def settle(network: nn.Module, size: int = 4) -> nn.Module:
    """Float64, evaluation mode, and BatchNorms that have seen a batch of images of this size."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    network.double().train()(torch.rand(4, 3, size, size, dtype=torch.float64))
    return network.eval()


def batch_norms(network: nn.Module) -> set[str]:
    return {name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}


FOLDED = {"rednet26": 31, "regnety_002": 44, "efficientnet_b0": 49, "densenet121": 59}


@pytest.mark.parametrize("name", FOLDED)
def test_a_folded_network_is_the_same_function(name):
    network = settle(timm.create_model(name, num_classes=5), size=224)
    images = torch.rand(2, 3, 224, 224, dtype=torch.float64)
    before = batch_norms(network)
    with torch.no_grad():
        expected = network(images)
        folded = fold_batch_norm(network, images[:1])
        assert (folded(images) - expected).abs().max() <= 1e-11 * expected.abs().max()
        assert torch.equal(network(images), expected)  # itself it is left as it was
    assert batch_norms(network) == before
    assert batch_norms(folded) < before
    assert len(batch_norms(folded)) == len(before) - FOLDED[name]


def test_every_batch_norm_of_a_regnet_is_folded_and_all_of_a_rednet_but_those_behind_an_involution():
    example = torch.rand(1, 3, 64, 64)
    regnet, rednet = (fold_batch_norm(timm.create_model(name).eval(), example) for name in ("regnety_040", "rednet101"))
    assert not batch_norms(regnet)
    behind_involutions = {f"{name}.bn2" for name, module in rednet.named_modules() if isinstance(module, Bottleneck)}
    assert batch_norms(rednet) == behind_involutions | {"stem.bn2"}


def test_weights_stay_frozen_and_keep_dtype_and_layout():
    network = timm.create_model("regnety_002").eval().requires_grad_(False).to(memory_format=torch.channels_last)
    folded = fold_batch_norm(network, torch.rand(1, 3, 32, 32))
    assert not batch_norms(folded)
    convolutions = [module for module in folded.modules() if isinstance(module, nn.Conv2d)]
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convolutions)
    assert {parameter.dtype for parameter in folded.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in folded.parameters())


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(x))


class ReadTwice(Pair):
    def forward(self, x):
        x = self.conv(x)
        return x + self.norm(x)


class CalledTwice(Pair):
    def forward(self, x):
        return self.norm(self.conv(self.conv(x)))


class NormCalledTwice(Pair):
    def forward(self, x):
        return self.norm(self.conv(x)) + self.norm(x)


class ActivationBetween(Pair):
    def forward(self, x):
        return self.norm(self.conv(x).relu_())


class TwoNames(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(self.conv, self.norm)

    def forward(self, x):
        return self.body(x)


class Hooked(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.norm.register_forward_hook(lambda module, inputs, output: 2 * output)


class Pruned(Pair):
    def __init__(self) -> None:
        super().__init__()
        prune.random_unstructured(self.conv, "weight", 0.3)


class OptionalInput(Pair):
    def forward(self, x, skip=None):
        x = self.conv(x)
        return self.norm(x) + (x if skip is None else skip)


@pytest.mark.parametrize(
    "kind", [ReadTwice, CalledTwice, NormCalledTwice, ActivationBetween, TwoNames, Hooked, OptionalInput]
)
def test_where_it_would_change_the_function_nothing_is_folded(kind, recwarn):
    network = settle(kind())
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    folded = fold_batch_norm(network, x[:1])
    assert torch.equal(folded(x), network(x))
    assert batch_norms(folded) == batch_norms(network)
    assert not recwarn.list  # it was seen, and not found out by comparing answers


class Untraceable(Pair):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


class WeightReadElsewhere(Pair):
    def forward(self, x):
        return super().forward(x) + nn.functional.conv2d(x, self.conv.weight)


class CachesWhatItSees(Pair):
    ones = None

    def forward(self, x):
        if self.ones is None:
            self.ones = torch.ones_like(x)
        return super().forward(x) + self.ones


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Untraceable, ", as torch.fx cannot trace it: symbolically traced"),
        (Pruned, ", as torch.fx cannot trace it: Only Tensors created explicitly"),
        (WeightReadElsewhere, r": folding them changes its output by \d"),
    ],
)
def test_what_cannot_be_folded_safely_is_kept_with_a_warning(kind, said):
    network = settle(kind())
    with pytest.warns(UserWarning, match=f"{kind.__name__} keeps its BatchNorms{said}"):
        assert fold_batch_norm(network, torch.rand(1, 3, 4, 4, dtype=torch.float64)) is network


def test_a_network_that_keeps_tensors_keeps_no_proxies():
    network = CachesWhatItSees().eval()
    x = torch.rand(1, 3, 4, 4)
    folded = fold_batch_norm(network, x)
    assert not batch_norms(folded)
    assert isinstance(network.ones, torch.Tensor)
    torch.testing.assert_close(folded(x), network(x))


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_a_batch_norm_without_weights_is_folded_and_one_without_statistics_is_not(options):
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, **options))
    settle(network)
    x = torch.rand(2, 3, 5, 5, dtype=torch.float64)
    folded = fold_batch_norm(network, x)
    torch.testing.assert_close(folded(x), network(x))
    assert len(batch_norms(folded)) == (0 if "affine" in options else 1)


def test_a_network_without_batch_norms_is_returned_as_it_is():
    network = nn.Conv2d(3, 3, 1).eval()
    assert fold_batch_norm(network, torch.rand(1, 3, 4, 4)) is network


def test_in_training_mode_it_is_refused():
    network = Pair().eval()
    network.norm.train()
    with pytest.raises(ValueError, match=r"eval\(\)"):
        fold_batch_norm(network, torch.rand(1, 3, 4, 4))
