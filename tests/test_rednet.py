"""RedNet: sizes, golden logits, and what timm asks of a model."""

import pytest
import timm
import torch
from golden_fill import golden, golden_images, released_state_dict
from timm.optim import param_groups_layer_decay
from torch import nn

import cit_scale.models  # noqa: F401
from cit_scale.models.convert_checkpoint import convert
from cit_scale.models.rednet import InvolutionStem, RedNet

PARAMETERS = {
    "rednet26": 9_233_166,
    "rednet38": 12_386_986,
    "rednet50": 15_540_806,
    "rednet101": 25_652_950,
    "rednet152": 33_984_582,
}


def small_rednet(**kwargs) -> RedNet:
    """A RedNet for small images, with residual branches that do not start at zero."""
    torch.manual_seed(0)
    sizes = {"layers": (1, 1, 1, 1), "base_width": 16, "stem_width": 16, "num_classes": 10}
    network = timm.create_model("rednet26", **{**sizes, **kwargs})
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
    return network


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_those_of_the_paper(name):
    assert sum(parameter.numel() for parameter in timm.create_model(name).parameters()) == PARAMETERS[name]


def test_rednet26_gives_the_logits_of_the_authors_implementation():
    network = timm.create_model("rednet26").double().eval()
    network.load_state_dict(convert(released_state_dict("rednet26", gain=0.4)))
    with torch.no_grad():
        logits = network(golden_images())
    expected = golden("rednet26")["eval"].double()
    assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 32)])
def test_any_image_size_gives_one_position_per_32_pixels(size):
    network = small_rednet()
    features = network.forward_features(torch.randn(2, 3, *size))
    assert features.shape == (2, network.num_features, -(-size[0] // 32), -(-size[1] // 32))
    assert network.forward_head(features).shape == (2, 10)


def test_widths_and_layers_are_free():
    network = small_rednet(layers=[2, 1, 1, 1], base_width=32, stem_width=48, in_chans=1)
    assert network.stem.num_features == 96
    assert [info["num_chs"] for info in network.feature_info] == [96, 128, 256, 512, 1024]
    assert len(network.layer1) == 2
    assert network(torch.randn(2, 1, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"base_width": 24}, "24 channels"),
        ({"stem_width": 8}, "8 channels"),
        ({"layers": (1, 1, 1)}, r"\(1, 1, 1\)"),
        ({"layers": (1, 0, 1, 1)}, r"\(1, 0, 1, 1\)"),
    ],
)
def test_impossible_sizes_are_refused(kwargs, said):
    with pytest.raises(ValueError, match=said):
        small_rednet(**kwargs)


def test_stem_halves_the_image_without_pooling():
    assert InvolutionStem()(torch.randn(2, 3, 15, 20)).shape == (2, 64, 8, 10)


def test_timm_users_find_what_they_expect():
    network = small_rednet(drop_rate=0.5)
    assert network.pretrained_cfg["architecture"] == "rednet26"
    assert network.get_classifier() is network.get_submodule(network.pretrained_cfg["classifier"])
    assert network.get_submodule(network.pretrained_cfg["first_conv"]).in_channels == 3
    features = network.eval().forward_features(torch.randn(2, 3, 32, 32))
    pooled = network.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))

    network.reset_classifier(3)
    assert network.forward_head(features).shape == (2, 3)
    network.reset_classifier(0)
    assert torch.equal(network.forward_head(features), pooled)
    network.reset_classifier(0, global_pool="")
    assert torch.equal(network.forward_head(features), features)


def test_dropout_acts_on_the_pooled_features_in_training_only():
    network = small_rednet(drop_rate=0.5)
    pooled = network.eval().forward_head(torch.ones(2, 512, 1, 1), pre_logits=True)
    assert (pooled == 1).all()
    dropped = network.train().forward_head(torch.ones(2, 512, 1, 1), pre_logits=True)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}


def test_layer_decay_grows_from_the_stem_to_the_classifier():
    network = small_rednet()
    scale = {}
    for group in param_groups_layer_decay(network, layer_decay=0.5):
        for name, parameter in network.named_parameters():
            if any(parameter is member for member in group["params"]):
                scale[name] = group["lr_scale"]
    assert scale["stem.conv1.weight"] < scale["layer1.0.conv1.weight"] < scale["layer4.0.conv1.weight"]
    assert scale["fc.weight"] == 1


def test_residual_branches_start_at_zero():
    network = timm.create_model("rednet26", layers=(1, 2, 1, 1), base_width=16, stem_width=16).train()
    x = torch.rand(2, 128, 4, 4)
    assert torch.equal(network.layer2[1](x), x)


def test_gradient_checkpointing_changes_no_gradient():
    images = torch.randn(2, 3, 32, 32)
    grads = []
    for enable in (False, True):
        network = small_rednet().eval()
        network.set_grad_checkpointing(enable)
        network(images).square().sum().backward()
        grads.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("feature_cls", ["list", "hook", "fx"])
def test_features_of_chosen_stages_come_out(feature_cls):
    networks = []
    for options in ({}, {"features_only": True, "feature_cls": feature_cls, "out_indices": (0, 2, 4)}):
        torch.manual_seed(0)
        networks.append(timm.create_model("rednet26", layers=(1, 1, 1, 1), base_width=16, stem_width=16, **options))
    whole, network = networks
    images = torch.randn(2, 3, 64, 64)
    features = network(images)
    expected = [whole.stem(images)]
    expected.append(whole.layer2(whole.layer1(whole.maxpool(expected[0]))))
    expected.append(whole.layer4(whole.layer3(expected[1])))
    torch.testing.assert_close(features, expected)
    assert network.feature_info.reduction() == [2, 8, 32]
    assert network.feature_info.channels() == [32, 128, 512]
    assert [tuple(feature.shape) for feature in features] == [(2, 32, 32, 32), (2, 128, 8, 8), (2, 512, 2, 2)]


@pytest.mark.slow
def test_rednet101_compiles_to_one_graph():
    # Inductor itself is met in test_involution.py; building a whole network with it takes minutes.
    network = timm.create_model("rednet101").eval()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=False)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), network(images), rtol=1e-4, atol=1e-4)
