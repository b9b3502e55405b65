"""CiT: sizes, golden logits and training steps, tokens, heads, and what timm asks of a model."""

import copy

import pytest
import timm
import torch
from golden_fill import golden, golden_images, released_state_dict, stream, unit_variance
from safetensors.torch import save_file
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

import cit_scale.models  # noqa: F401
from cit_scale.batch import teacher_logits_type
from cit_scale.config import OptimConfig
from cit_scale.losses import co_advise_loss
from cit_scale.models.cit import CiT
from cit_scale.models.convert_checkpoint import convert
from cit_scale.optim import adamw, clip_gradients, set_learning_rate

PARAMETERS = {
    "cit_tiny_patch16_224": 7_632_906,
    "cit_small_patch16_224": 25_776_138,
    "cit_base_patch16_224": 93_913_098,
}


def small_cit(**kwargs) -> CiT:
    """A CiT for 16-pixel images: 4 x 4 patches of 4 pixels, three classes."""
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "num_classes": 3, "depth": 2, "embed_dim": 32, "num_heads": 2}
    return timm.create_model("cit_tiny_patch16_224", **{**sizes, **kwargs})


def small_images(size: int = 16) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def released_student() -> dict[str, Tensor]:
    return convert(released_state_dict("cit_small", gain=1.0))


def relative_error(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_those_of_the_paper(name):
    assert sum(parameter.numel() for parameter in timm.create_model(name).parameters()) == PARAMETERS[name]


def test_the_released_student_gives_the_logits_of_the_authors_implementation(released_student):
    network = timm.create_model("cit_small_patch16_224").double().eval()
    network.load_state_dict(released_student)
    expected = golden("cit_small")
    images = golden_images()
    with torch.no_grad():
        heads = network.forward_heads(images)
        average = network(images)
    assert heads._fields == ("cls", "conv", "inv")
    for name, logits in heads._asdict().items():
        assert relative_error(logits, expected[name].double()) <= 1e-6, name
    assert relative_error(average, expected["eval"].double()) <= 1e-6


def test_four_training_steps_are_those_of_the_authors_implementation(released_student):
    network = timm.create_model("cit_small_patch16_224").double().train()
    network.load_state_dict(released_student)
    network.set_distilled_training()
    optimizer = adamw(network, OptimConfig(weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8))
    set_learning_rate(optimizer, 1e-3)

    expected = golden("cit_small_trajectory")
    for step in range(4):
        images = unit_variance(stream(f"image{step}", 4 * 3 * 224 * 224)).reshape(4, 3, 224, 224)
        targets = torch.softmax(torch.from_numpy(8 * stream(f"target{step}", 4000)).view(4, 1000), dim=1)
        student = network(torch.from_numpy(images))
        teacher_logits = [torch.from_numpy(6 * stream(f"{name}{step}", 4000)).view(4, 1000) for name in ("conv", "inv")]
        loss = co_advise_loss(
            student,
            teacher_logits_type(("conv", "inv"))(*teacher_logits),
            targets,
            temperature=1.0,
            weights={"conv": 1.0, "inv": 1.0},
        )
        optimizer.zero_grad()
        loss.total.backward()
        grad_norm = clip_gradients(network.parameters(), 1.0)
        optimizer.step()
        terms = torch.stack([loss.label, loss.distillation["conv"], loss.distillation["inv"]])
        assert relative_error(loss.total, expected["loss"][step]) <= 1e-6, step
        assert relative_error(terms, expected["terms"][step]) <= 1e-6, step
        assert grad_norm.item() == pytest.approx(expected["grad_norm"][step].item(), rel=1e-6), step
    with torch.no_grad():
        assert relative_error(network.eval()(torch.from_numpy(images)), expected["final_eval"]) <= 1e-6


def test_training_answers_by_head_and_evaluation_with_the_average():
    network = small_cit(teachers=["conv", "inv", "swin"], stems={"swin": "patch"})
    network.set_distilled_training()
    by_head = network.train()(small_images())
    assert by_head._fields == ("cls", "conv", "inv", "swin")
    assert all(logits.shape == (2, 3) for logits in by_head)

    average = network.eval()(small_images())
    heads = network.forward_heads(small_images())
    torch.testing.assert_close(average, (heads.cls + heads.conv + heads.inv + heads.swin) / 4)

    network.train().set_distilled_training(False)
    assert network(small_images()).shape == (2, 3)


@pytest.mark.parametrize("teachers", [("conv", "inv"), ("inv", "conv")])
@pytest.mark.parametrize("aligned", [True, False])
def test_each_head_reads_the_token_of_its_teacher(teachers, aligned):
    network = small_cit(teachers=teachers, aligned=aligned, num_classes=32).eval()
    for head in network.get_classifier():
        nn.init.eye_(head.weight)
        nn.init.zeros_(head.bias)
    features = network.forward_features(small_images())
    heads = network.forward_heads(small_images())
    assert heads._fields == ("cls", *teachers)
    for position, logits in enumerate(heads):
        torch.testing.assert_close(logits, features[:, position])


def test_aligned_tokens_are_the_means_of_the_stems_whose_sum_embeds_the_patches():
    embed = small_cit(teachers=("inv", "conv")).eval().patch_embed
    images = small_images()
    maps = {name: embed.projections[name](embed.stems[name](images)) for name in ("conv", "inv")}  # each (B, C, 4, 4)
    tokens = embed(images)
    assert tokens.shape == (2, 2 + 16, 32)
    torch.testing.assert_close(tokens[:, 0], maps["inv"].mean((2, 3)))
    torch.testing.assert_close(tokens[:, 1], maps["conv"].mean((2, 3)))
    torch.testing.assert_close(tokens[:, 2 + 5], (maps["conv"] + maps["inv"])[:, :, 1, 1])


def test_unaligned_tokens_are_learned_and_stand_between_class_token_and_patches():
    network = small_cit(aligned=False).eval()
    nn.init.zeros_(network.pos_embed)
    patches = network.patch_embed(small_images())
    tokens = network._pos_embed(patches)
    expected = torch.cat([network.cls_token, network.teacher_tokens], dim=1).expand(2, -1, -1)
    assert torch.equal(tokens, torch.cat([expected, patches], dim=1))
    assert network.teacher_tokens.abs().sum() > 0


def test_without_teachers_it_is_a_plain_vit():
    network = small_cit(teachers=()).eval()
    plain = timm.models.VisionTransformer(
        img_size=16, patch_size=4, num_classes=3, depth=2, embed_dim=32, num_heads=2
    ).eval()
    plain.load_state_dict(network.state_dict())
    torch.testing.assert_close(network(small_images()), plain(small_images()))
    assert network.forward_heads(small_images())._fields == ("cls",)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"teachers": "conv"}, "a sequence of names"),
        ({"teachers": ("con-v",)}, "identifier"),
        ({"teachers": ("class",)}, "identifier"),
        ({"teachers": ("_conv",)}, "identifier"),
        ({"teachers": ("cls",)}, "'cls' needs another name"),
        ({"teachers": ("items",)}, "'items' needs another name"),
        ({"teachers": ("conv", "conv")}, "each name may occur only once"),
        ({"teachers": ("conv", "swin")}, "'swin'.*known: conv, inv, patch"),
        ({"teachers": ("conv", "swin"), "stems": {"swin": "window"}}, "'window'; known: conv, inv, patch"),
        ({"teachers": ("conv",), "stems": {"swin": "conv"}}, r"\['swin'\].*\['conv'\]"),
        ({"img_size": 18}, r"img_size=\(18, 18\) is not a multiple of patch_size=\(4, 4\); \(16, 16\) is"),
        ({"img_size": 15, "patch_size": 5}, r"patch_size=\(5, 5\) is not a multiple of 2.*'conv'"),
        ({"embed_dim": 33}, "embed_dim=33 is not a multiple of num_heads=2; 34 is"),
        ({"reg_tokens": 1}, "reg_tokens=1"),
        ({"global_pool": "avg"}, "global_pool='avg'"),
        ({"dynamic_img_size": True}, "dynamic_img_size=True"),
        ({"dynamic_img_pad": True}, "dynamic_img_pad=True"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_way_out(kwargs, said):
    with pytest.raises(ValueError, match=said):
        small_cit(**kwargs)


def test_images_of_another_size_than_built_for_are_refused():
    with pytest.raises(AssertionError, match="images of height 32, but the model takes 16"):
        small_cit()(small_images(32))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"img_size": (16, 24), "patch_size": (4, 8)},
        {"img_size": 30, "patch_size": 10},
        {"img_size": 15, "patch_size": 5, "aligned": False},
        {"img_size": 15, "patch_size": 5, "teachers": ("swin",), "stems": {"swin": "patch"}},
        {"in_chans": 1},
    ],
)
def test_image_and_patch_size_are_free(kwargs):
    network = small_cit(**kwargs).eval()
    height, width = network.patch_embed.img_size
    images = torch.randn(2, network.in_chans, height, width)
    assert network(images).shape == (2, 3)
    grid = network.patch_embed.grid_size
    assert network.pos_embed.shape[1] == grid[0] * grid[1] + 1 + len(network.teachers)


@pytest.mark.parametrize("aligned", [True, False])
def test_a_state_dict_of_another_image_size_loads_with_its_positions_resampled(aligned):
    source, target = small_cit(aligned=aligned), small_cit(aligned=aligned, img_size=(24, 16))
    with torch.no_grad():  # a ramp from top to bottom, which resampling keeps
        source.pos_embed[:, 3:] = torch.arange(4.0).repeat_interleave(4)[None, :, None]
    weights = source.state_dict()
    target.load_state_dict(weights)
    assert torch.equal(target.pos_embed[:, :3], source.pos_embed[:, :3])
    grid = target.pos_embed[0, 3:, 0].detach().view(6, 4)
    assert (grid.diff(dim=0) > 0).all()
    torch.testing.assert_close(grid, grid[:, :1].expand(6, 4))
    torch.testing.assert_close(grid.mean(), torch.tensor(1.5))
    assert weights["pos_embed"].shape[1] == 19  # the caller's dictionary stays as it was


def test_a_state_dict_of_another_number_of_teachers_is_refused():
    with pytest.raises(RuntimeError, match="pos_embed"):
        small_cit(aligned=False).load_state_dict(
            small_cit(aligned=False, teachers=("conv",)).state_dict(), strict=False
        )


def test_the_input_size_can_be_changed_in_place():
    network = small_cit().eval()
    network.set_input_size((24, 32))
    assert network(torch.randn(2, 3, 24, 32)).shape == (2, 3)
    with pytest.raises(ValueError, match="patches of"):
        network.set_input_size(patch_size=8)


def test_weight_decay_spares_tokens_and_positions():
    for network in (small_cit(), small_cit(aligned=False)):
        tokens = {name for name, _ in network.named_parameters() if "token" in name or "pos" in name}
        assert tokens <= network.no_weight_decay()


def test_layer_decay_grows_from_the_embedding_to_the_heads():
    network = small_cit()
    scale = {}
    for group in param_groups_layer_decay(network, layer_decay=0.5):
        for name, parameter in network.named_parameters():
            if any(parameter is member for member in group["params"]):
                scale[name] = group["lr_scale"]
    stem = scale["patch_embed.stems.inv.conv1.weight"]
    assert scale["cls_token"] == stem < scale["blocks.0.attn.qkv.weight"] < scale["blocks.1.attn.qkv.weight"]
    assert scale["head.weight"] == scale["teacher_heads.conv.weight"] == 1


def test_the_classifier_is_all_heads_and_can_be_reset():
    network = small_cit()
    names = network.pretrained_cfg["classifier"]
    assert network.get_classifier() == tuple(network.get_submodule(name) for name in names)
    network.reset_classifier(7)
    assert [logits.shape for logits in network.forward_heads(small_images())] == [(2, 7)] * 3
    network.reset_classifier(0)
    features = network.eval().forward_features(small_images())
    torch.testing.assert_close(network(small_images()), network.forward_head(features, pre_logits=True))
    with pytest.raises(ValueError, match="global_pool='avg'"):
        network.reset_classifier(3, "avg")


def test_stem_convolutions_start_kaiming_normal():
    network = timm.create_model("cit_tiny_patch16_224", depth=1)
    for name, conv in network.patch_embed.named_modules():
        if isinstance(conv, nn.Conv2d):
            fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
            count = conv.weight.numel()
            tolerance = 4 / (2 * count) ** 0.5  # four standard deviations of a sample's standard deviation
            assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=tolerance), name
            assert conv.weight.abs().max() > 1.8 * conv.weight.std(), name  # no uniform distribution reaches so far
            assert conv.bias is None or not conv.bias.any(), name


def test_patch_dropout_keeps_the_tokens_of_all_teachers():
    network = small_cit(patch_drop_rate=0.5).train()
    tokens = torch.randn(2, 19, 32)
    kept = network.patch_drop(tokens)
    assert kept.shape == (2, 3 + 8, 32)
    assert torch.equal(kept[:, :3], tokens[:, :3])


def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for enable in (False, True):
        network = small_cit().train()
        network.set_grad_checkpointing(enable)
        sum(logits.square().sum() for logits in network.forward_heads(small_images())).backward()
        grads.append([parameter.grad for parameter in network.parameters()])
    assert all(grad is not None for grad in grads[0])
    torch.testing.assert_close(grads[1], grads[0])


def test_a_copy_is_independent_and_still_resamples():
    network = small_cit()
    duplicate = copy.deepcopy(network)
    duplicate.set_input_size((24, 24))
    duplicate.load_state_dict(network.state_dict())
    assert duplicate.pos_embed.shape[1] == 3 + 36
    network.load_state_dict(network.state_dict())
    assert network.pos_embed.shape[1] == 3 + 16


@pytest.mark.slow
@pytest.mark.parametrize("aligned", [True, False])
def test_training_and_evaluation_compile_to_one_graph(aligned):
    network = small_cit(aligned=aligned)
    network.set_distilled_training()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=False)
    by_head = compiled(small_images())
    assert type(by_head) is network.logits_type
    torch.testing.assert_close(tuple(by_head), tuple(network(small_images())))
    sum(logits.square().sum() for logits in by_head).backward()
    network.eval()
    torch.testing.assert_close(compiled(small_images()), network(small_images()))


def test_under_autocast_it_trains_with_float32_weights():
    network = small_cit()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        by_head = network.forward_heads(small_images())
    assert all(logits.dtype == torch.bfloat16 for logits in by_head)
    sum(logits.float().square().sum() for logits in by_head).backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in network.parameters())


@pytest.mark.parametrize(
    "kwargs",
    [
        {"teachers": ("conv", "swin"), "stems": {"swin": "patch"}},
        {"teachers": ("conv", "q"), "aligned": False},
        {"teachers": ()},
    ],
)
@pytest.mark.parametrize("change", [{"num_classes": 9}, {"in_chans": 1}])
def test_timm_adapts_the_weights_of_any_teachers(kwargs, change, tmp_path):
    kwargs = {**kwargs, "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    before = timm.create_model("cit_tiny_patch16_224", num_classes=5, **kwargs)
    save_file(before.state_dict(), tmp_path / "w.safetensors")
    overlay = {"file": str(tmp_path / "w.safetensors"), "num_classes": 5}
    kwargs = {"num_classes": 5, **kwargs, **change}
    model = timm.create_model("cit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    assert torch.equal(model.blocks[0].attn.qkv.weight, before.blocks[0].attn.qkv.weight)
    names = dict(model.named_modules())
    assert all(name in names for key in ("classifier", "first_conv") for name in model.pretrained_cfg[key])
