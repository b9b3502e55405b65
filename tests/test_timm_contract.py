"""What timm's own tests ask of every model, asked of each of ours: its users, trainers and exporters rely on it."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from timm.models import is_model_in_modules

import cit_scale.models  # noqa: F401  registers ours
from cit_scale.batch import student_logits_type
from cit_scale.models.rednet import RedNet

# Of torch.jit: that it is deprecated, and that sizes are checked when it traces.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning", "ignore::torch.jit.TracerWarning")

CITS = timm.list_models(module="cit")
REDNETS = timm.list_models(module="rednet")
SIZE = 64  # pixels; a RedNet has 2 x 2 positions at its end, a CiT 16 patches
CLASSES = 7


def is_cit(name):
    return is_model_in_modules(name, ["cit"])


def create(name, **kwargs):
    torch.manual_seed(0)
    size = {"img_size": SIZE} if is_cit(name) else {}
    return timm.create_model(name, **{"num_classes": CLASSES, **size, **kwargs})


def images(channels=3, size=SIZE, count=2):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


# The smallest of each kind answer quickly; the others are of the same code.
QUICK = ("cit_tiny_patch16_224", "rednet26")


@pytest.fixture(
    scope="module",
    params=[pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in (*CITS, *REDNETS)],
)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    """Not to be changed: one for all tests of a model."""
    return create(name).eval()


def test_all_models_are_tested():
    assert len(CITS) == 3
    assert len(REDNETS) == 5


def test_forward(model):
    logits = model(images())
    assert logits.shape == (2, CLASSES)
    assert torch.isfinite(logits).all()


def test_backward_reaches_every_parameter(name, model):
    trained = copy.deepcopy(model).train()
    # A RedNet's residual branches start at zero, which lets no gradient into them.
    for module in trained.modules():
        if isinstance(getattr(module, "bn3", None), torch.nn.BatchNorm2d):
            torch.nn.init.constant_(module.bn3.weight, 0.5)
    trained(images()).sum().backward()
    assert [key for key, parameter in trained.named_parameters() if parameter.grad is None] == []
    assert all(torch.isfinite(parameter.grad).all() for parameter in trained.parameters())


def test_the_configuration_describes_the_model(name, model):
    cfg = model.pretrained_cfg
    keys = set(model.state_dict())
    for key in (cfg["classifier"], cfg["first_conv"]):
        assert {f"{part}.weight" for part in ((key,) if isinstance(key, str) else key)} <= keys
    assert cfg["input_size"] == (3, 224, 224)
    assert model.default_cfg is cfg
    assert model.num_classes == CLASSES


def test_features_and_head_are_the_forward_pass(model):
    features = model.forward_features(images())
    assert features.shape[-1 if features.ndim == 3 else 1] == model.num_features
    assert torch.equal(model.forward_head(features), model(images()))
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)


def test_the_classifier_can_be_reset_and_removed(name, model):
    other = copy.deepcopy(model)
    other.reset_classifier(3)
    assert other(images()).shape == (2, 3)
    assert other.num_classes == 3
    other.reset_classifier(0)
    pooled = other(images())
    assert pooled.shape == (2, model.num_features)
    assert torch.allclose(pooled, model.forward_head(model.forward_features(images()), pre_logits=True), atol=1e-5)
    without = create(name, num_classes=0).eval()
    assert without(images()).shape == (2, model.num_features)
    assert without.get_classifier() is not None


def test_intermediates_are_those_of_the_layers(model):
    last, intermediates = model.forward_intermediates(images())
    assert torch.equal(last, model.forward_features(images()))
    only = model.forward_intermediates(images(), indices=[0, 2], intermediates_only=True)
    assert [torch.equal(a, b) for a, b in zip(only, (intermediates[0], intermediates[2]), strict=True)] == [True] * 2
    early = model.forward_intermediates(images(), indices=[1], stop_early=True, intermediates_only=True)
    assert torch.equal(early[0], intermediates[1])
    if isinstance(model, RedNet):
        shapes = [(info["num_chs"], SIZE // info["reduction"]) for info in model.feature_info]
        assert [tuple(each.shape[1:3]) for each in intermediates] == shapes
        with pytest.raises(ValueError, match="output_fmt='NLC'"):
            model.forward_intermediates(images(), output_fmt="NLC")


def test_layers_behind_the_last_wanted_one_can_be_pruned(model):
    expected = model.forward_intermediates(images(), indices=[0, 1], intermediates_only=True)
    pruned = copy.deepcopy(model)
    assert list(pruned.prune_intermediate_layers([0, 1])) == [0, 1]
    found = pruned.forward_intermediates(images(), indices=[0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())


def test_features_only(name, model):
    ways = ("getter",) if is_cit(name) else ("getter", "list", "fx", "hook")
    outputs = {}
    for way in ways:
        body = create(name, features_only=True, feature_cls=way).eval()
        outputs[way] = body(images())
        channels, reductions = body.feature_info.channels(), body.feature_info.reduction()
        assert [each.shape[1] for each in outputs[way]] == channels
        assert [SIZE // each.shape[2] for each in outputs[way]] == reductions
    first = outputs["getter"]
    assert all(torch.equal(a, b) for way in ways for a, b in zip(outputs[way], first, strict=True))
    default = create(name, features_only=True)(images())
    assert len(default) == len(first)


def test_fx(model):
    assert torch.equal(torch.fx.symbolic_trace(model)(images()), model(images()))


def test_script(name, model):
    scripted = torch.jit.script(model)
    assert torch.allclose(scripted(images()), model(images()), atol=1e-5)
    saved = io.BytesIO()
    torch.jit.save(scripted, saved)
    saved.seek(0)
    assert torch.allclose(torch.jit.load(saved)(images()), model(images()), atol=1e-5)


def test_trace(model):
    traced = torch.jit.trace(model, images())
    assert torch.allclose(traced(images()), model(images()), atol=1e-5)


def test_export(model):
    exported = torch.export.export(model, (images(),)).module()
    assert torch.allclose(exported(images()), model(images()), atol=1e-5)


def test_pickle_and_save(model):
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(images()), model(images()))
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved, weights_only=False)(images()), model(images()))


def test_deepcopy(model):
    assert torch.equal(copy.deepcopy(model)(images()), model(images()))


def test_gradient_checkpointing(model):
    plain, saving = copy.deepcopy(model), copy.deepcopy(model)
    saving.set_grad_checkpointing(True)
    for each in (plain, saving):
        each(images()).sum().backward()
    pairs = zip(plain.parameters(), saving.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


def test_the_configuration_can_be_overlaid(name):
    cfg = create(name, pretrained_cfg_overlay={"mean": (0.5, 0.5, 0.5), "crop_pct": 1.0}).pretrained_cfg
    assert (cfg["mean"], cfg["crop_pct"], cfg["input_size"]) == ((0.5, 0.5, 0.5), 1.0, (3, 224, 224))


@pytest.mark.parametrize("channels", [1, 4])
def test_in_chans(name, channels):
    assert create(name, in_chans=channels).eval()(images(channels)).shape == (2, CLASSES)


def test_another_input_size(name, model):
    other = copy.deepcopy(model)
    if is_cit(name):
        other.set_input_size((SIZE, 2 * SIZE))
    larger = torch.cat([images(), images()], dim=3)
    assert other(larger).shape == (2, CLASSES)


def test_no_weight_decay_and_layers_of_the_learning_rate(model):
    assert getattr(model, "no_weight_decay", set)() <= dict(model.named_parameters()).keys()
    matcher = timm.models.group_parameters(model, model.group_matcher(coarse=False))
    assert sorted(key for group in matcher.values() for key in group) == sorted(dict(model.named_parameters()))


def test_a_scriptable_model_can_be_asked_for(name):
    assert torch.jit.script(create(name, scriptable=True).eval())(images()).shape == (2, CLASSES)


# --- One by one ---


def tiny(**kwargs):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return create("cit_tiny_patch16_224", **{**sizes, **kwargs})


@pytest.mark.parametrize(
    "kwargs", [{}, {"aligned": False}, {"teachers": ("a",), "stems": {"a": "patch"}}, {"teachers": ()}]
)
def test_training_gives_one_tensor_until_distilled_training_is_asked_for(kwargs):
    """timm's train.py, its distillation from a network's logits and Hugging Face's wrapper take a model so."""
    model = tiny(**kwargs).train()
    model.pos_drop = torch.nn.Identity()
    alone = model(images(size=32))
    assert alone.shape == (2, CLASSES)
    model.set_distilled_training(True)
    logits = model(images(size=32))
    assert logits._fields == ("cls", *model.teachers)
    model.set_distilled_training(False)
    assert torch.is_tensor(model(images(size=32)))
    model.set_distilled_training()
    assert torch.is_tensor(model.eval()(images(size=32)))


@pytest.mark.parametrize(
    "kwargs", [{}, {"aligned": False}, {"teachers": ("a",), "stems": {"a": "patch"}}, {"teachers": ()}]
)
def test_every_form_of_a_student_scripts_traces_and_pickles(kwargs):
    model = tiny(**kwargs).eval()
    expected = model(images(size=32))
    for other in (torch.jit.script(model), torch.fx.symbolic_trace(model), pickle.loads(pickle.dumps(model))):
        assert torch.allclose(other(images(size=32)), expected, atol=1e-6)


def test_a_pickled_student_answers_by_head_in_another_process(tmp_path):
    model = tiny().eval()
    torch.save(model, tmp_path / "model.pt")
    torch.save(images(size=32), tmp_path / "images.pt")
    program = (
        "import sys, torch\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "logits = model.forward_heads(torch.load(sys.argv[2]))\n"
        "torch.save(dict(logits._asdict()), sys.argv[3])\n"
    )
    paths = [str(tmp_path / file) for file in ("model.pt", "images.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", program, *paths], check=True)
    expected = model.forward_heads(images(size=32))
    assert isinstance(expected, student_logits_type(model.teachers))
    found = torch.load(paths[2])
    assert list(found) == list(expected._fields)
    assert all(torch.equal(found[head], logits) for head, logits in expected._asdict().items())


@pytest.mark.parametrize(("output_stride", "last"), [(32, 2), (16, 4), (8, 8)])
def test_output_stride_keeps_the_size_of_the_last_stages(output_stride, last):
    layers = {"layers": (1, 1, 1, 1), "base_width": 16, "stem_width": 16}
    body = create("rednet26", output_stride=output_stride, features_only=True, **layers).eval()
    assert body.feature_info.reduction() == [2, 4, *(min(each, output_stride) for each in (8, 16, 32))]
    assert body(images())[-1].shape[2:] == (last, last)
    dense, plain = create("rednet26", output_stride=output_stride, **layers), create("rednet26", **layers)
    dense.load_state_dict(plain.state_dict())


def test_an_output_stride_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="output_stride=4"):
        create("rednet26", output_stride=4)


def test_drop_path_acts_in_training_and_rises_with_depth():
    model = create("rednet26", drop_path_rate=0.7, base_width=16, stem_width=16)
    blocks = [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.7 * place / 7 for place in range(8)])
    for block in blocks:
        torch.nn.init.ones_(block.bn3.weight)
    torch.manual_seed(0)
    assert not torch.equal(model.train()(images()), model(images()))
    assert torch.equal(model.eval()(images()), model(images()))
