"""Model FLOPs, against sums worked by hand, and the utilisation that follows from them."""

import pytest
import torch
from torch import nn

from cit_scale import cli
from cit_scale.batch import student_logits_type
from cit_scale.config import EngineConfig, RunConfig, StudentConfig, TeacherConfig
from cit_scale.data.reader import Reader
from cit_scale.distributed.world import World
from cit_scale.engines.build import prepare_engine
from cit_scale.models.network import Network, build_network
from cit_scale.run.auto import with_precision
from cit_scale.run.flops import ModelFlops, forward_flops, model_flops, peak_flops
from cit_scale.run.setup import PreparedRun


class TwoLayers(nn.Module):
    pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.head = nn.Linear(5, 7)

    def forward_heads(self, images):
        return student_logits_type(())(self.head(self.conv(images).mean(dim=(2, 3))))


def test_a_multiplication_and_an_addition_are_two_operations():
    by_hand = 2 * (8 * 8) * 5 * (3 * 3 * 3) + 2 * 5 * 7
    assert forward_flops(Network(TwoLayers()), 8) == by_hand


def test_attention_and_all_of_a_vit_are_counted():
    """ViT-B/16 at 224 pixels is known for 17.6 G multiply-adds (Touvron et al., DeiT, 2021)."""
    with torch.device("meta"):
        network = build_network("vit_base_patch16_224", {}, num_classes=1000, image_size=224)
    tokens, width, depth = 197, 768, 12
    block = 2 * tokens * width * (3 + 1 + 4 + 4) * width + 2 * 2 * tokens * tokens * width
    by_hand = depth * block + 2 * 196 * (16 * 16 * 3) * width + 2 * width * 1000
    assert forward_flops(network, 224) == by_hand
    assert by_hand / 2 == pytest.approx(17.6e9, rel=0.01)


def silent(message):
    pytest.fail(message)


def prepared(images, world_size, config=None, **teachers):
    config = config or RunConfig(
        student=StudentConfig(name="cit_tiny_patch16_224"), teachers=teachers, engine=EngineConfig(precision="bf16")
    )
    reader = Reader(images)
    return PreparedRun(config, prepare_engine(config, World(world_size=world_size)), reader, reader, {})


def test_an_image_takes_three_forward_passes_of_the_student_and_one_of_each_teacher(tiny_digits):
    flops = model_flops(prepared(tiny_digits, 4, inv=TeacherConfig(model="rednet26")), "NVIDIA H100 80GB HBM3", silent)
    networks = {"cit_tiny_patch16_224": ("inv",), "rednet26": ()}
    student, teacher = (
        forward_flops(build_network(name, {}, num_classes=10, image_size=224, teachers=tokens), 224)
        for name, tokens in networks.items()
    )
    assert flops == ModelFlops(3 * student + teacher, 4 * 989e12)
    assert flops.utilisation(1000.0) == 1000 * (3 * student + teacher) / (4 * 989e12)


@pytest.mark.parametrize("recipe", ["digits", "cit_base"])
def test_the_networks_of_a_recipe_are_counted_at_its_image_size(recipe, tiny_digits):
    """Those of digits end in a single pixel, whose BatchNorm refuses a single image in training."""
    config = with_precision(cli.parse_arguments(["--config", recipe]).config, bf16=True)
    flops = model_flops(prepared(tiny_digits, 1, config), "NVIDIA H100 80GB HBM3", silent)
    assert flops.per_image > 1e6


def test_networks_that_cannot_be_counted_cost_the_figure_and_not_the_run(tiny_digits, monkeypatch):
    def forward(self, images):
        raise RuntimeError("needs\nvalues")

    said = []
    monkeypatch.setattr(Network, "forward", forward)
    assert model_flops(prepared(tiny_digits, 1), "NVIDIA H100 80GB HBM3", said.append) is None
    assert said == ["mfu is not logged, because the FLOPs of the networks cannot be counted: needs values"]


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H100 NVL", "fp16", 835e12),
        ("NVIDIA H200", "float32", 67e12),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5e12),
        ("Tesla V100-SXM2-16GB", "fp16", 125e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("Tesla T4", "fp16", 65e12),
        ("NVIDIA L40", "bf16", None),
        ("NVIDIA A10", "bf16", None),
        ("x86_64", "float32", None),
    ],
)
def test_the_peak_is_that_of_the_device_and_the_precision(name, precision, peak):
    assert peak_flops(name, precision) == peak


def test_without_a_known_peak_no_network_is_built(tiny_digits, monkeypatch):
    monkeypatch.setattr(PreparedRun, "build_on_meta", lambda run: pytest.fail("a network was built"))
    assert model_flops(prepared(tiny_digits, 1), "x86_64", silent) is None
