import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_run import TINY_CIT

from cit_scale.errors import ConfigError, RefusedError
from cit_scale.models.network import build_network, try_forward
from cit_scale.models.weights import load_weights, read_weights


def small_cit(**changes):
    arguments = {"num_classes": 5, "image_size": 32, "teachers": ("conv", "inv")} | changes
    return build_network("cit_tiny_patch16_224", TINY_CIT, **arguments).eval()


def test_a_network_normalises_with_its_own_models_statistics():
    network = build_network("resnet18", {}, num_classes=5, image_size=32).eval()
    images = torch.rand(2, 3, 32, 32)
    mean = torch.tensor(network.model.pretrained_cfg["mean"]).view(3, 1, 1)
    std = torch.tensor(network.model.pretrained_cfg["std"]).view(3, 1, 1)
    torch.testing.assert_close(network(images).cls, network.model((images - mean) / std))


def test_a_plain_model_answers_with_one_head_and_a_cit_with_one_per_teacher():
    images = torch.rand(2, 3, 32, 32)
    plain = build_network("resnet18", {}, num_classes=5, image_size=32).eval()
    assert plain(images)._fields == plain.heads == ("cls",)
    cit = small_cit()
    assert cit(images)._fields == cit.heads == ("cls", "conv", "inv")
    assert all(logits.shape == (2, 5) for logits in cit(images))


def test_statistics_are_no_part_of_the_weights():
    assert all(name.startswith("model.") for name in small_cit().state_dict())


def test_tokens_and_position_embedding_are_exempt_from_weight_decay():
    assert {"model.cls_token", "model.pos_embed"} <= small_cit().no_weight_decay()


def test_weights_survive_a_file(tmp_path):
    network, other = small_cit(), small_cit()
    save_file(network.model.state_dict(), tmp_path / "w.safetensors")
    load_weights(other, tmp_path / "w.safetensors")
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(network(images), other(images), rtol=0, atol=0)


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_pytorch_files_are_read_bare_or_wrapped(tmp_path, wrapper):
    state = small_cit().model.state_dict()
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").tensors.keys() == state.keys()


def test_weights_of_another_image_size_are_resampled(tmp_path):
    save_file(small_cit().model.state_dict(), tmp_path / "w.safetensors")
    larger = small_cit(image_size=64)
    load_weights(larger, tmp_path / "w.safetensors")
    assert larger.model.pos_embed.shape == (1, 3 + 64, TINY_CIT["embed_dim"])


def test_a_planted_object_does_not_run(tmp_path):
    class Planted:
        def __reduce__(self):
            return (open, (str(tmp_path / "mark"), "w"))

    torch.save({"model": Planted()}, tmp_path / "w.pth")
    with pytest.raises(RefusedError, match=r"hold objects of _?io\.open beside"):
        read_weights(tmp_path / "w.pth")
    assert not (tmp_path / "mark").exists()


def test_missing_damaged_and_foreign_weights_are_refused_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match="do not exist"):
        read_weights(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_weights(tmp_path / "bad.safetensors")
    save_file(timm.create_model("resnet18", num_classes=5).state_dict(), tmp_path / "resnet.safetensors")
    with pytest.raises(ConfigError) as error:
        load_weights(small_cit(), tmp_path / "resnet.safetensors")
    assert "\n" not in str(error.value)


def test_weights_of_another_class_count_are_refused_with_both_counts(tmp_path):
    save_file(small_cit(num_classes=7).model.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=r"have 7 classes, the data set has 5"):
        load_weights(small_cit(), tmp_path / "w.safetensors")


def test_a_model_with_a_convolution_for_its_classifier_loads_its_weights(tmp_path):
    network = build_network("resnetv2_50", {}, num_classes=5, image_size=32)
    save_file(network.model.state_dict(), tmp_path / "w.safetensors")
    load_weights(network, tmp_path / "w.safetensors")
    other = build_network("resnetv2_50", {}, num_classes=7, image_size=32)
    with pytest.raises(ConfigError, match=r"have 5 classes, the data set has 7"):
        load_weights(other, tmp_path / "w.safetensors")


def test_a_file_that_holds_no_state_dict_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(ConfigError, match="hold no state dict"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("argument", ["num_classes", "img_size", "in_chans", "teachers"])
def test_what_the_run_decides_cannot_be_decided_again_in_the_kwargs(argument):
    with pytest.raises(ConfigError, match=rf"set {argument}=7"):
        build_network("cit_tiny_patch16_224", {argument: 7}, num_classes=5, image_size=32)


def test_an_unknown_model_is_answered_with_known_ones():
    with pytest.raises(ConfigError, match=r"no model is called 'cit_tinny'.*cit_tiny_patch16_224"):
        build_network("cit_tinny", {}, num_classes=5, image_size=32)


def test_an_unknown_tag_of_a_model_is_answered_with_known_ones():
    with pytest.raises(ConfigError, match=r"no model is called 'resnet18\.tinny'; the nearest are .*resnet18\."):
        build_network("resnet18.tinny", {}, num_classes=5, image_size=32)


def test_a_model_without_teacher_tokens_cannot_be_advised():
    with pytest.raises(ConfigError, match=r"DLA has no linear classifier .* teachers conv could be; choose another"):
        build_network("dla34", {}, num_classes=5, image_size=32, teachers=("conv",))


def tried(name, kwargs=None, *, mode=True, teachers=(), **sizes):
    sizes = {"batch_size": 2, "image_size": 32, "num_classes": 5, **sizes}
    with torch.device("meta"):
        network = build_network(
            name, kwargs or {}, num_classes=5, image_size=sizes["image_size"], teachers=teachers
        ).train(mode)
    try_forward(network, **sizes)


@pytest.mark.parametrize(
    ("name", "sizes", "said"),
    [
        ("inception_v3", {"mode": True}, r"images \(2, 3, 32, 32\): .*[Kk]ernel size"),
        ("inception_v3", {"mode": False}, r"images \(2, 3, 32, 32\): .*[Kk]ernel size"),
        ("resnet18", {"batch_size": 1}, r"images \(1, 3, 32, 32\): ValueError: Expected more than 1 value per channel"),
        ("vgg11", {"image_size": 16}, "it cannot take images"),
        ("mobilenetv5_300m_enc", {"image_size": 256}, r"and not into logits \(2, 5\)"),
    ],
)
def test_a_model_that_cannot_take_the_images_is_found_without_computing(name, sizes, said):
    with pytest.raises(ConfigError, match=said) as error:
        tried(name, **sizes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["resnet18", "regnety_002", "rednet26", "swin_tiny_patch4_window7_224", "convnext_atto"]
)
@pytest.mark.parametrize("mode", [True, False])
def test_a_model_that_can_is_let_pass(name, mode):
    tried(name, mode=mode, image_size=64)
    tried("cit_tiny_patch16_224", TINY_CIT, teachers=("conv", "inv"), mode=mode)


def test_a_wrong_argument_of_a_model_is_one_line():
    with pytest.raises(ConfigError, match=r"timm\.create_model\('resnet18'.*depht"):
        build_network("resnet18", {"depht": 3}, num_classes=5, image_size=32)


WRONG_ARGUMENTS = [
    ("cit_tiny_patch16_224", {"act_layer": "geluu"}, "KeyError: 'geluu'"),
    ("cit_tiny_patch16_224", {"patch_size": 0}, "ZeroDivisionError"),
    ("cit_tiny_patch16_224", {"embed_dim": 0}, "ZeroDivisionError"),
    ("cit_tiny_patch16_224", {"drop_path_rate": 2.0}, "drop_path_rate=2.0, which must be from 0 to below 1"),
    ("cit_tiny_patch16_224", {"pretrained": True}, "the settings pretrained and weights beside it"),
    ("rednet26", {"base_width": -16}, "RuntimeError"),
    ("resnet10t", {"channels": []}, "IndexError"),
    ("resnet10t", {"pretrained_cfg_overlay": {"mean": [0, 0]}}, "RuntimeError"),
]


@pytest.mark.parametrize(("name", "kwargs", "said"), WRONG_ARGUMENTS)
def test_arguments_that_a_model_cannot_have_are_one_line(name, kwargs, said):
    with pytest.raises(ConfigError, match=said) as error:
        build_network(name, kwargs, num_classes=5, image_size=32)
    assert "\n" not in str(error.value)


def test_a_model_that_cannot_take_the_images_leaves_no_stack_in_the_log(caplog, capfd):
    with torch.device("meta"):
        network = build_network("vgg11", {}, num_classes=5, image_size=16)
    with pytest.raises(ConfigError, match="it cannot take images"):
        try_forward(network, batch_size=2, image_size=16, num_classes=5)
    assert caplog.text == ""
    assert "Traceback" not in capfd.readouterr().err
