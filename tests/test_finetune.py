"""Training from pretrained weights: frozen parts, rates by layer, heads for teachers beside any model's own."""

import copy

import pytest
import sabotage
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny_run import CLASSES, LAYOUTS, RECIPE, TINY_CIT, TinyRun, assert_same_end
from torch import nn

from cit_scale.config import OptimConfig
from cit_scale.engines.loss_scale import LossScale
from cit_scale.engines.state import TrainingState, WholeParameters
from cit_scale.errors import ConfigError
from cit_scale.models.freeze import freeze
from cit_scale.models.network import build_network, head_names
from cit_scale.models.weights import load_weights, start_from
from cit_scale.optim import adamw, parameter_groups, set_learning_rate

SMALL = {"channels": [8, 8, 16, 16], "stem_width": 8}
TEACHERS = ("conv", "inv")


def small(name="resnet10t", kwargs=None, teachers=(), size=32):
    torch.manual_seed(0)
    return build_network(name, SMALL if kwargs is None else kwargs, num_classes=5, image_size=size, teachers=teachers)


def small_cit(**kwargs):
    return small("cit_tiny_patch16_224", {**TINY_CIT, **kwargs}, TEACHERS)


# ---------------------------------------------------------------------------------------------------------------------
# Freezing


def test_what_is_frozen_stays_in_the_state_dict_and_out_of_the_parameters():
    network, before = small_cit(), small_cit()
    freeze(network, ["trunk"], ())
    assert {name for name, _ in network.model.named_parameters()} == {
        f"{head}.{part}" for head in ("head", "teacher_heads.conv", "teacher_heads.inv") for part in ("weight", "bias")
    }
    assert network.state_dict().keys() == before.state_dict().keys()
    network.train()
    network(torch.rand(4, 3, 32, 32)).cls.sum().backward()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name]), name  # statistics of BatchNorm too
    assert network.model.head.weight.grad is not None
    assert not network.model.patch_embed.stems["conv"].bn1.training


def test_patterns_name_modules_and_parameters():
    network = small_cit()
    freeze(network, ["blocks.0", "*.bias", "cls_token"], ())
    trained = {name for name, _ in network.model.named_parameters()}
    assert not any(name.startswith("blocks.0.") or name.endswith(".bias") for name in trained)
    assert {"blocks.1.attn.qkv.weight", "pos_embed", "head.weight"} <= trained
    network.train()
    assert network.model.patch_embed.stems["conv"].bn1.training  # its weight is trained, and so are its statistics


def test_what_nothing_has_trained_is_not_frozen():
    network = small_cit()
    new = [key for key in network.model.state_dict() if key.startswith(("patch_embed", "head", "teacher_heads"))]
    with pytest.raises(ConfigError, match=r"what nothing has trained, such as patch_embed\.proj.*start from"):
        freeze(network, ["trunk"], new)
    freeze(network, ["blocks", "batch_norm"], new)  # whose new BatchNorms are trained
    assert network.frozen_norms == []
    freeze(small_cit(), [], new)


def test_an_advised_models_parts_are_named_as_the_model_names_them():
    network = small(teachers=TEACHERS)
    freeze(network, ["layer1", "bn1"], ())
    assert not any(
        "layer1" in name or (".bn1." in f".{name}" and "layer" not in name)
        for name, _ in network.model.named_parameters()
    )
    assert "trunk.layer2.0.conv1.weight" in dict(network.model.named_parameters())


@pytest.mark.parametrize("name", ["average", "cls", "label", "keys", "a b"])
def test_the_names_of_teachers_are_those_that_a_cit_may_have(name):
    with pytest.raises(ConfigError, match=f"teacher.*{name}"):
        small(teachers=(name,))


def test_batch_norms_alone_can_be_frozen_and_there_may_be_none():
    network = small()
    freeze(network, ["batch_norm"], ())
    norms = [layer for layer in network.model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(network.frozen_norms) == len(norms) > 0
    assert not any(layer.training for layer in norms)
    assert not any(list(layer.parameters()) for layer in norms)
    assert "conv1.0.weight" in dict(network.model.named_parameters())
    vit = small("vit_tiny_patch16_224", TINY_CIT)
    freeze(vit, ["batch_norm"], ())
    assert vit.frozen == frozenset()


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (["block"], "train.freeze='block' names no parameter; the network's parts are trunk, batch_norm, cls_token, "),
        (["*"], r"train.freeze=\* freezes every parameter"),
        (["trunk", "head", "teacher_heads"], "leaves nothing to train"),
    ],
)
def test_a_pattern_that_names_nothing_or_everything_is_refused(patterns, said):
    with pytest.raises(ConfigError, match=said):
        freeze(small_cit(), patterns, ())


def test_a_frozen_network_can_be_copied():
    network = small()
    freeze(network, ["layer1", "bn1"], ())
    twin = copy.deepcopy(network).train()
    assert [layer.training for layer in twin.frozen_norms] == [False] * len(network.frozen_norms)
    assert not twin.model.bn1.training
    assert twin.model.layer2[0].bn1.training


# ---------------------------------------------------------------------------------------------------------------------
# Rates


def rates(network, **optim):
    """What multiplies each parameter's learning rate, by name."""
    optimizer = adamw(network, OptimConfig(**optim))
    set_learning_rate(optimizer, 2.0)
    names = {parameter: name.removeprefix("model.") for name, parameter in network.named_parameters()}
    return {names[parameter]: group["lr"] / 2 for group in optimizer.param_groups for parameter in group["params"]}


def test_without_layer_decay_there_are_two_groups_of_one_rate():
    assert [group["lr_scale"] for group in parameter_groups(small_cit(), 0.05)] == [1.0, 1.0]
    assert set(rates(small_cit()).values()) == {1.0}


@pytest.mark.parametrize("model", [small_cit, lambda: small("vit_tiny_patch16_224", TINY_CIT, TEACHERS)])
def test_each_layer_learns_slower_than_the_one_above_it(model):
    by_name = {name.removeprefix("trunk."): rate for name, rate in rates(model(), layer_decay=0.5).items()}
    assert by_name["head.weight"] == by_name["teacher_heads.conv.bias"] == 1.0
    assert by_name["blocks.1.attn.qkv.weight"] == by_name["norm.weight"] == 0.5  # timm's last norm is of the last block
    assert by_name["blocks.0.mlp.fc1.bias"] == 0.25
    assert by_name["pos_embed"] == by_name["cls_token"] == 0.125


def test_heads_learn_at_a_rate_of_their_own():
    by_name = rates(small_cit(), head_lr_scale=10.0)
    assert by_name["head.weight"] == by_name["teacher_heads.inv.weight"] == 10.0
    assert by_name["blocks.1.attn.qkv.weight"] == by_name["norm.weight"] == 1.0


def test_a_network_without_layers_is_refused():
    with pytest.raises(ConfigError, match="does not say what its layers are"):
        rates(small("pit_ti_224", {}, TEACHERS, size=224), layer_decay=0.5)


def test_the_average_follows_faster_at_first():
    module = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.AdamW(module.parameters())
    loss_scale = LossScale(is_dynamic=False, device=torch.device("cpu"))
    state = TrainingState(module, optimizer, WholeParameters(module), 0.9, loss_scale, ema_warmup=True)
    expected = module.weight.item()
    for update in range(120):
        with torch.no_grad():
            module.weight.fill_(update + 1.0)
        optimizer.state[module.weight]["step"] += 1  # as an update does
        state.follow(lambda device: torch.zeros((), device=device))
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * (update + 1.0)
        saved = state.copies({"ema/weight", "optimizer_step", "loss_scale", "weight/weight"} | state.shapes().keys())
        assert saved["ema/weight"].item() == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Any model as a student


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet10t", SMALL),
        ("vit_tiny_patch16_224", TINY_CIT),
        ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}),
        ("mobilenetv3_small_050", {}),
        ("tf_efficientnet_lite0", {}),
        ("regnety_002", {}),
        ("swin_tiny_patch4_window7_224", {"depths": [1, 1], "embed_dim": 16, "num_heads": [2, 2], "window_size": 4}),
        ("rednet26", {"layers": [1, 1, 1, 1], "base_width": 16, "stem_width": 16}),
    ],
)
def test_a_model_has_its_own_logits_and_those_of_a_head_per_teacher(name, kwargs, tmp_path):
    network = small(name, kwargs, TEACHERS).eval()
    assert network.heads == ("cls", *TEACHERS)
    assert head_names(network.model)[1:] == ("teacher_heads.conv.", "teacher_heads.inv.")
    images = torch.rand(2, 3, 32, 32)
    logits = network(images)
    normalized = (images - network.mean) / network.std
    torch.testing.assert_close(logits.cls, network.model.trunk(normalized), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network.model(normalized), sum(logits) / 3, rtol=1e-4, atol=1e-4)
    assert not torch.equal(logits.conv, logits.cls)
    # Its weights, and those of the model alone, are loaded into another one.
    save_file(network.model.state_dict(), tmp_path / "advised.safetensors")
    other = small(name, kwargs, TEACHERS)
    load_weights(other, tmp_path / "advised.safetensors")
    assert all(torch.equal(each, network.state_dict()[key]) for key, each in other.state_dict().items())
    torch.manual_seed(1)
    alone = timm.create_model(
        name, num_classes=7, **({"img_size": 32} if "swin" in name or "vit" in name else {}), **kwargs
    )
    save_file(alone.state_dict(), tmp_path / "alone.safetensors")
    said = start_from(other, str(tmp_path / "alone.safetensors")).notes
    assert "7 -> 5 classes" in said[1]
    theirs = alone.state_dict()
    heads = head_names(other.model)
    ours = {key: each for key, each in other.model.state_dict().items() if not key.startswith(heads)}
    assert all(torch.equal(each, theirs[key.removeprefix("trunk.")]) for key, each in ours.items())


REFUSED = {
    "cpubone", "crossvit", "dla", "dpn", "efficientformer", "efficientformer_v2", "efficientvim", "iformer", "levit",
    "repvit", "resnetv2", "sequencer", "swiftformer", "vision_transformer_sam",
}  # fmt: skip


# A small model of each family that has pooled features before a linear classifier.
ADVISED = [
    "beit_base_patch16_224", "eca_botnext26ts_256", "mobileone_s1", "cait_xxs24_224", "coat_tiny", "convit_tiny",
    "convmixer_768_32", "convnext_atto_rms", "csatv2", "cs3darknet_focus_s", "cspnext_tiny", "davit_tiny",
    "deepseek_vit_412m", "deit_tiny_patch16_224", "densenet121", "edgenext_xx_small", "tinynet_e", "efficientvit_b0",
    "efficientvit_m0", "vit_tiny_patch16_dinov3_qkvb", "fasternet_t0", "fastvit_s12", "focalnet_tiny_srf",
    "gcvit_xxtiny", "gemma4_vit_167m", "ghostnet_050", "hardcorenas_b", "hgnetv2_b0", "hiera_tiny_224",
    "sam2_hiera_tiny", "hrnet_w18_small", "inception_next_atto", "inception_resnet_v2", "inception_v3",
    "inception_v4", "lcnetv2_small", "lowformer_b0", "mambaout_femto", "maxvit_pico_rw_256", "poolformer_s12",
    "gmixer_12_224", "lcnet_035", "mobilenetv5_300m", "mobilevit_xxs", "mvitv2_tiny", "naflexvit_base_patch16_gap",
    "nasnetalarge", "nest_tiny", "nextvit_small", "nf_regnet_b0", "pit_xs_224", "pnasnet5large", "pvt_v2_b0",
    "qwen3_vit_88m", "rdnet_tiny", "regnetx_002", "repghostnet_050", "res2net50_14w_8s", "resnest14d", "resnet18",
    "rexnet_100", "selecsls42", "legacy_seresnet18", "shvit_s1", "skresnet18", "starnet_s050",
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224", "tiny_vit_5m_224",
    "tnt_s_legacy_patch16_224", "tresnet_m", "twins_svt_small", "vgg11", "visformer_tiny", "vit_tiny_patch16_224",
    "vit_tiny_r_s16_p8_224", "test_vit_relpos", "vitamin_small_224", "volo_d1_224", "ese_vovnet19b_slim_dw",
    "legacy_xception", "xception41p", "xcit_nano_12_p8_224",
]  # fmt: skip


# What cannot be 32 pixels high, and what is too large for a test as it is.
SIZES = {"csatv2": 64, "deepseek_vit_412m": 56, "inception_resnet_v2": 96, "inception_v3": 96, "inception_v4": 96}
DEEP = {"beit_base_patch16_224", "deepseek_vit_412m", "gemma4_vit_167m", "qwen3_vit_88m"}


def test_every_family_of_timms_is_advised_or_refused_by_name():
    """A family that a new version of timm brings has to be entered above."""
    families = {module for module in timm.list_modules() if timm.list_models(module=module)}
    families -= {"advised", "cit", "rednet"}  # ours
    advised = {module for module in families for name in ADVISED if timm.models.is_model_in_modules(name, [module])}
    assert len(ADVISED) == len(advised)
    assert families - advised == REFUSED


@pytest.mark.slow
@pytest.mark.parametrize("module", sorted(REFUSED))
def test_a_family_without_pooled_features_is_refused_by_name(module):
    for name in timm.list_models(module=module)[:2]:
        with torch.device("meta"), pytest.raises(ConfigError, match=r"no linear classifier .* or drop the teachers"):
            build_network(name, {}, num_classes=7, image_size=224, teachers=TEACHERS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ADVISED)
def test_a_model_of_each_family_takes_a_step_resumes_and_answers_as_it_does_alone(name, tmp_path):
    network = build(name)
    optimizer = adamw(network, OptimConfig(weight_decay=0.0))
    set_learning_rate(optimizer, 1e-3)
    before = {key: each.clone() for key, each in network.state_dict().items()}
    images = torch.rand(2, 3, SIZES.get(name, 32), SIZES.get(name, 32))
    seen = network.train()(images)
    assert seen._fields == ("cls", *TEACHERS)
    sum(logits.square().mean() for logits in seen).backward()
    optimizer.step()
    after = network.state_dict()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert {"model.teacher_heads.conv.weight", "model.teacher_heads.inv.weight"} <= changed
    assert any(key.startswith("model.trunk.") and key.split(".")[2] not in ("head", "fc") for key in changed)
    names = [name for name, _ in (*network.model.named_parameters(), *network.model.named_buffers())]  # as a checkpoint
    state = network.model.state_dict()
    save_file({key: state[key].contiguous() for key in names if key in state}, tmp_path / "it.safetensors")
    again = build(name)
    load_weights(again, tmp_path / "it.safetensors")
    again.eval(), network.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(images), network(images), rtol=1e-4, atol=1e-4)
        alone = network.model.trunk((images - network.mean) / network.std)
        torch.testing.assert_close(network(images).cls, alone, rtol=1e-3, atol=1e-3)


def build(name):
    torch.manual_seed(0)
    size, kwargs = SIZES.get(name, 32), {"depth": 2} if name in DEEP else {}
    return build_network(name, kwargs, num_classes=7, image_size=size, teachers=TEACHERS)


# ---------------------------------------------------------------------------------------------------------------------
# A run


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A plain ViT of other classes and another size."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    kwargs = {key: RECIPE["student"]["kwargs"][key] for key in ("patch_size", "depth", "embed_dim", "num_heads")}
    save_file(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7, **kwargs).state_dict(), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_from_pretrained_weights_resumes_exactly_and_its_frozen_parts_never_change(
    layout, vit, tiny_inputs, tmp_path
):
    more = (
        f"--student.weights={vit}", "--train.freeze=[blocks.0, cls_token]", "--optim.layer_decay=0.7",
        "--optim.head_lr_scale=2", "--optim.ema_warmup=true",
    )  # fmt: skip
    whole = TinyRun(tiny_inputs, tmp_path / "whole", layout, more)
    first = whole.finish().outputs[0]
    assert f"student.weights={vit}: new: head: 7 -> 3 classes, patch_embed" in first
    assert f"{vit}: left out: patch_embed (2)" in first
    stopped = TinyRun(tiny_inputs, tmp_path / "stopped", layout, more)
    ended = stopped.run(sabotage=(sabotage.at, 0, "forward", 6, sabotage.send, 15))
    assert ended.codes == [75] * stopped.ranks, ended.output
    stopped.finish()
    assert_same_end(stopped, whole)
    source = load_file(vit)
    for file in ("student.safetensors", "student_ema.safetensors"):
        state = load_file(whole.run_dir / file)
        assert torch.equal(state["cls_token"], source["cls_token"])
        for key in state:
            if key.startswith("blocks.0."):
                assert torch.equal(state[key], source[key]), key
        assert not torch.equal(state["blocks.1.attn.qkv.weight"], source["blocks.1.attn.qkv.weight"])
        assert state["head.weight"].shape[0] == CLASSES


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "zero3", "fsdp2"])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("mobilenetv3_small_050", {}), ("vit_tiny_patch16_224", TINY_CIT), ("convnext_atto", {"depths": [1, 1, 1, 1]})],
)
def test_any_student_trains_under_teachers_resumes_and_is_evaluated(name, kwargs, layout, tiny_inputs, tmp_path):
    import json

    arguments = ", ".join(f"{key}: {value}" for key, value in kwargs.items())
    more = (f"--student={{name: {name}, kwargs: {{{arguments}}}}}", "--data.image_size=32")
    run = TinyRun(tiny_inputs, tmp_path / "runs", layout, more)
    ended = run.run(sabotage=(sabotage.at, 0, "backward", 6, sabotage.send, 15))
    assert ended.codes == [75] * run.ranks, ended.output
    run.finish()
    results = json.loads((run.run_dir / "results.json").read_text())
    assert set(results["accuracy"]["student"]["top1"]) == {"cls", "conv", "average"}
