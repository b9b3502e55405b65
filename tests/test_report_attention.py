"""What tokens look at: rows that sum to 1, the weights that the network itself computes with, an object in a corner."""

import pytest
import timm
import torch
from tiny_run import TINY_CIT

import cit_scale.models  # noqa: F401  registers CiT with timm
from cit_scale.models.network import Network, build_network
from cit_scale.report.attention import attention_rows, token_attention, transformer_of

HEADS = ("cls", "conv", "inv")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    kwargs = {**TINY_CIT, "depth": 3}
    built = build_network("cit_tiny_patch16_224", kwargs, num_classes=4, image_size=32, teachers=("conv", "inv"))
    for parameter in built.parameters():
        if parameter.ndim == 2:  # far from the flat attention of a new network
            torch.nn.init.normal_(parameter, std=0.3)
    return built.eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_rows_sum_to_one_and_belong_to_the_tokens_of_the_heads(network, images):
    found = token_attention(network, images)
    assert found.tokens == HEADS
    assert found.grid == (4, 4)
    for rows in (found.last, found.rollout):
        assert rows.shape == (3, 3, 3 + 16)
        assert (rows >= 0).all()
        assert torch.allclose(rows.sum(dim=2), torch.ones(3, 3), atol=1e-5)
    assert not torch.allclose(found.last, found.rollout, atol=1e-2)


def test_the_weights_are_those_that_the_layer_itself_mixes_with(network, images):
    layer = network.model.blocks[-1].attn
    tokens = torch.randn(2, 19, network.model.embed_dim, generator=torch.Generator().manual_seed(2))
    values = layer.qkv(tokens).reshape(2, 19, 3, layer.num_heads, layer.head_dim).permute(2, 0, 3, 1, 4)[2]
    mixed = (attention_rows(layer, tokens) @ values).transpose(1, 2).reshape(2, 19, -1)
    assert torch.allclose(layer.proj(mixed), layer(tokens), atol=1e-5)


def test_rollout_is_the_product_over_the_layers(network, images):
    model, tokens = network.model, []
    hooks = [block.attn.register_forward_pre_hook(lambda _, given: tokens.append(given[0])) for block in model.blocks]
    network(images)
    for hook in hooks:
        hook.remove()
    whole = torch.eye(19)
    for block, given in zip(model.blocks, tokens, strict=True):
        whole = (attention_rows(block.attn, given).mean(dim=1) / 2 + torch.eye(19) / 2) @ whole
    assert torch.allclose(token_attention(network, images).rollout, whole[:, :3], atol=1e-5)


@pytest.mark.parametrize("name", ["resnet10t", "eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224"])
def test_models_whose_attention_cannot_be_read_are_left_alone(name):
    with torch.device("meta"):
        network = Network(timm.create_model(name))
    assert transformer_of(network) is None
    with pytest.raises(ValueError, match="has no attention that can be read"):
        token_attention(network, torch.rand(1, 3, 224, 224))


def test_a_plain_transformer_with_registers_has_its_tokens_named():
    model = timm.create_model("vit_wee_patch16_reg1_gap_256", num_classes=3, class_token=True, global_pool="token")
    found = token_attention(Network(model).eval(), torch.rand(1, 3, 256, 256))
    assert found.tokens == ("cls", "register 1")


def objects_in_corners(count, generator):
    """Noise with a patch of 8 x 8 pixels in a corner, whose colour is the class. Returns images, labels, corners."""
    images = 0.5 + 0.1 * torch.randn(count, 3, 32, 32, generator=generator)
    labels, corners = (torch.randint(0, most, (count,), generator=generator) for most in (3, 4))
    for image, label, corner in zip(images, labels.tolist(), corners.tolist(), strict=True):
        top, left = 24 * (corner // 2), 24 * (corner % 2)
        image[:, top : top + 8, left : left + 8] = torch.eye(3)[label][:, None, None]
    return images.clamp(0, 1), labels, corners


@pytest.fixture(params=[True, False], ids=["aligned", "learned tokens"])
def looked(request):
    """Of a student that was trained on such images: whether its tokens are aligned, what it looks at, where the objects
    are.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3)
    kwargs = {"patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3, "aligned": request.param}
    student = build_network("cit_tiny_patch16_224", kwargs, num_classes=3, image_size=32, teachers=("conv", "inv"))
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    for _ in range(150):
        images, labels, _ = objects_in_corners(32, generator)
        loss = sum(torch.nn.functional.cross_entropy(logits, labels) for logits in student(images))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, labels, corners = objects_in_corners(64, generator)
    student.eval()
    assert (torch.stack([*student(images)]).mean(dim=0).argmax(dim=1) == labels).float().mean() > 0.95
    patches = torch.tensor([0, 3, 12, 15])[corners]  # of a grid of 4 x 4
    return request.param, token_attention(student, images), patches


def test_a_trained_student_looks_at_the_object_in_the_corner(looked):
    is_aligned, found, patches = looked
    on_patches = found.rollout[:, :, 3:]
    shares = on_patches / on_patches.sum(dim=2, keepdim=True)  # 1 / 16 each, if the token looked everywhere alike
    on_object = shares[torch.arange(64), :, patches].mean(dim=0)  # (3,)
    most_on_object = (shares.argmax(dim=2) == patches[:, None]).float().mean(dim=0)
    if is_aligned:
        # A teacher's token is the mean of its own features over the image, and has the colour from there: of the three
        # the class token alone has to look.
        assert on_object[0] > 2.5 / 16
        assert on_object[0] > on_object[1:].max()
    else:
        assert (on_object > 5 / 16).all()
        assert (most_on_object > 0.95).all()
