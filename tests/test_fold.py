"""BatchNorm folded into convolutions: the same function, exactly, with fewer modules."""

import pytest
import timm
import torch
from torch import nn

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


@pytest.mark.parametrize("name", ["rednet26", "regnety_002", "efficientnet_b0", "densenet121"])
def test_a_folded_network_is_the_same_function(name):
    network = settle(timm.create_model(name, num_classes=5), size=224)
    images = torch.rand(2, 3, 224, 224, dtype=torch.float64)
    before = batch_norms(network)
    with torch.no_grad():
        expected = network(images)
        folded = fold_batch_norm(network)
        logits = network(images)
    assert (logits - expected).abs().max() <= 1e-11 * expected.abs().max()
    assert batch_norms(network) == before - set(folded)


def test_every_batch_norm_of_a_regnet_is_folded_and_all_of_a_rednet_but_those_behind_an_involution():
    regnet, rednet = (timm.create_model(name).eval() for name in ("regnety_040", "rednet101"))
    fold_batch_norm(regnet)
    fold_batch_norm(rednet)
    assert not batch_norms(regnet)
    behind_involutions = {f"{name}.bn2" for name, module in rednet.named_modules() if isinstance(module, Bottleneck)}
    assert batch_norms(rednet) == behind_involutions | {"stem.bn2"}


def test_weights_stay_frozen_and_keep_dtype_and_layout():
    network = timm.create_model("regnety_002").eval().requires_grad_(False).to(memory_format=torch.channels_last)
    assert fold_batch_norm(network)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    for conv in convolutions:
        assert conv.weight.dtype == conv.bias.dtype == torch.float32
        assert not conv.weight.requires_grad
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)


class ReadTwice(nn.Module):
    """The convolution's output goes around the BatchNorm as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.conv(x)
        return x + self.norm(x)


class CalledTwice(ReadTwice):
    def forward(self, x):
        return self.norm(self.conv(self.conv(x)))


class ActivationBetween(ReadTwice):
    def forward(self, x):
        return self.norm(self.conv(x).relu_())


class Untraceable(ReadTwice):
    def forward(self, x):
        return self.norm(self.conv(x)) if x.sum() > 0 else x


@pytest.mark.filterwarnings("ignore:Untraceable keeps its BatchNorms")
@pytest.mark.parametrize("kind", [ReadTwice, CalledTwice, ActivationBetween, Untraceable])
def test_where_it_would_change_the_function_nothing_is_folded(kind):
    network = settle(kind())
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    expected = network(x)
    assert fold_batch_norm(network) == []
    assert torch.equal(network(x), expected)


def test_a_network_that_cannot_be_traced_says_so():
    with pytest.warns(UserWarning, match="Untraceable keeps its BatchNorms: torch.fx says symbolically traced"):
        fold_batch_norm(settle(Untraceable()))


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_a_batch_norm_without_weights_is_folded_and_one_without_statistics_is_not(options):
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, **options)).double().eval()
    settle(network)
    x = torch.rand(2, 3, 5, 5, dtype=torch.float64)
    expected = network(x)
    assert fold_batch_norm(network) == (["1"] if "affine" in options else [])
    torch.testing.assert_close(network(x), expected)


def test_in_training_mode_it_is_refused():
    with pytest.raises(ValueError, match=r"eval\(\)"):
        fold_batch_norm(ReadTwice())
