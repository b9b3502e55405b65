import hashlib

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cit_scale.config import DistillConfig, TeacherConfig
from cit_scale.errors import ConfigError
from cit_scale.models.network import build_network
from cit_scale.models.weights import load_weights
from cit_scale.teachers import load_teacher, run_teachers

CPU = torch.device("cpu")
CLASSES = list("abcde")
SMALL = {"rednet26": {"layers": [1, 1, 1, 1], "base_width": 16, "stem_width": 16}, "regnety_002": {}}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights files with BatchNorm statistics that are not the initial ones."""
    files = {}
    for name, kwargs in SMALL.items():
        torch.manual_seed(0)
        network = build_network(name, kwargs, num_classes=5, image_size=32).train()
        with torch.no_grad():
            for _ in range(3):
                network(torch.rand(8, 3, 32, 32))
        files[name] = tmp_path_factory.mktemp(name) / "model.safetensors"
        save_file(network.model.state_dict(), files[name])
    return files


def teacher_config(name, weights):
    return TeacherConfig(model=name, kwargs=SMALL[name], weights=str(weights[name]))


def load(name, weights, **distill):
    config = DistillConfig(**{"compile": False} | distill)
    return load_teacher("conv", teacher_config(name, weights), config, classes=CLASSES, image_size=32, device=CPU)


def test_teachers_answer_by_name_without_autograd_and_in_evaluation_mode(weights):
    teacher = load("regnety_002", weights)
    images = torch.rand(4, 3, 32, 32)
    teacher_logits = run_teachers([teacher], images)
    assert teacher_logits._fields == ("conv",)
    assert not teacher_logits.conv.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    torch.testing.assert_close(run_teachers([teacher], images[:2]).conv, teacher_logits.conv[:2], rtol=1e-4, atol=1e-5)


def test_no_teachers_give_no_logits():
    assert run_teachers([], torch.rand(1, 3, 32, 32)) == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SMALL))
def test_a_compiled_teacher_says_what_the_eager_one_says(name, weights):
    images = torch.rand(4, 3, 32, 32)
    eager, compiled = load(name, weights), load(name, weights, compile=True)
    torch.testing.assert_close(compiled.forward(images), eager.forward(images), rtol=1e-4, atol=1e-4)


def test_low_precision_logits_are_float32_and_close(weights):
    images = torch.rand(4, 3, 32, 32)
    exact = load("regnety_002", weights).forward(images)
    low = load("regnety_002", weights, teacher_precision="bf16").forward(images)
    assert low.dtype == torch.float32
    assert not torch.equal(low, exact)
    assert (low - exact).norm() / exact.norm() < 0.05


def test_the_hash_is_that_of_the_weights_file(weights):
    assert load("regnety_002", weights).sha256 == hashlib.sha256(weights["regnety_002"].read_bytes()).hexdigest()


def test_a_teacher_of_another_class_count_is_refused(weights):
    with pytest.raises(ConfigError, match="have 5 classes, the data set has 10"):
        load_teacher(
            "conv",
            teacher_config("regnety_002", weights),
            DistillConfig(),
            classes=[*CLASSES, *"fghij"],
            image_size=32,
            device=CPU,
        )


def test_a_teacher_without_weights_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"teachers\.inv\.weights or \.recipe"):
        load_teacher("inv", TeacherConfig("rednet26"), DistillConfig(), classes=CLASSES, image_size=32, device=CPU)


@pytest.mark.parametrize("name", list(SMALL))
def test_a_teacher_is_folded_and_says_what_its_weights_say(name, weights):
    images = torch.rand(4, 3, 32, 32)
    plain = build_network(name, SMALL[name], num_classes=5, image_size=32).eval()
    load_weights(plain, weights[name])
    teacher = load(name, weights)
    torch.testing.assert_close(teacher.forward(images), plain(images).cls, rtol=1e-4, atol=1e-5)
    assert count_batch_norms(teacher.network) < count_batch_norms(plain)


def count_batch_norms(network):
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
