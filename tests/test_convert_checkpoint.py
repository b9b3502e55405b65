"""Released names become ours, one for one."""

import json

import pytest
import timm
import torch
from golden_fill import GOLDEN

import cit_scale.models  # noqa: F401
from cit_scale.models.convert_checkpoint import convert

MODELS = {"cit_small": "cit_small_patch16_224", "rednet26": "rednet26"}


def released_shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(shape) for key, shape in json.loads((GOLDEN / f"{name}.keys.json").read_text()).items()}


def our_shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in timm.create_model(MODELS[name]).state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
def test_every_released_tensor_finds_its_place(name):
    assert convert(released_shapes(name)) == our_shapes(name)


def test_a_backbone_of_the_involution_release_finds_its_place():
    released = {
        key.replace("model.", "backbone.", 1).replace("classifier.", "head.fc.", 1): shape
        for key, shape in released_shapes("rednet26").items()
    }
    assert "backbone.stem.0.conv.weight" in released
    assert convert(released) == our_shapes("rednet26")


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"teachers": ("conv", "swin"), "stems": {"swin": "patch"}},
        {"teachers": ("a", "b"), "aligned": False},
        {"teachers": ()},
    ],
)
def test_our_own_checkpoints_pass_unchanged(kwargs):
    small = {"depth": 1, "embed_dim": 16, "num_heads": 1, "num_classes": 3}
    for network in (timm.create_model("cit_tiny_patch16_224", **small, **kwargs), timm.create_model("rednet26")):
        state_dict = network.state_dict()
        converted = convert(state_dict)
        assert list(converted) == list(state_dict)
        assert all(converted[key] is state_dict[key] for key in state_dict)


def test_unknown_keys_are_named():
    weights = {"fc.weight": torch.zeros(3, 4), "s1.b1.conv1.conv.weight": torch.zeros(1), "layer1.0.conv9.weight": None}
    with pytest.raises(ValueError, match=r"2 of 3 keys unknown: s1\.b1\.conv1\.conv\.weight, layer1\.0\.conv9\.weight"):
        convert(weights)
    with pytest.raises(ValueError, match=r"30 of 30 keys unknown: key0, .*, key9 and 20 more"):
        convert({f"key{i}": None for i in range(30)})
