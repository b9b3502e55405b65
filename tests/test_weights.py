"""Every form in which people have weights: what is loaded of it, and what is said."""

import argparse
import collections
import json
import shlex
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from golden_fill import GOLDEN
from safetensors.torch import save_file
from tiny_run import TINY_CIT

from cit_scale.errors import ConfigError, MissingInputError, RefusedError
from cit_scale.models.network import build_network
from cit_scale.models.weights import PLACES, load_weights, read_weights

SMALL = {"channels": [8, 8, 16, 16], "stem_width": 8}


def network(name="resnet10t", kwargs=None, *, seed=0, **more):
    torch.manual_seed(seed)
    kwargs = SMALL if kwargs is None else kwargs
    return build_network(name, kwargs, **{"num_classes": 5, "image_size": 32, **more}).eval()


@pytest.fixture
def state():
    return network().model.state_dict()


def other(state):
    """Another state dict, which must not be taken."""
    return {key: torch.zeros_like(tensor) for key, tensor in state.items()}


def prefixed(state, prefix):
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


def as_type(state, dtype):
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in state.items()}


AVERAGE = "the moving average is taken: "

# By name: what the file holds, made of a state dict, and what is said.
FORMS = {
    "bare": (lambda state: state, []),
    "an ordered dict": (collections.OrderedDict, []),
    "model": (lambda state: {"model": state, "epoch": 3}, []),
    "state_dict": (lambda state: {"state_dict": state, "epoch": 3}, []),
    "model_state_dict": (lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {}}}, []),
    "DeepSpeed's model states": (lambda state: {"module": state, "global_steps": 5, "ds_version": "0.19"}, []),
    "timm's average": (
        lambda state: {"state_dict": other(state), "state_dict_ema": state, "arch": "resnet10t"},
        [f"{AVERAGE}state_dict_ema, not state_dict"],
    ),
    "DeiT's average": (
        lambda state: {"model": other(state), "model_ema": state},
        [f"{AVERAGE}model_ema, not model"],
    ),
    "an average alone": (lambda state: {"model_ema": state}, [f"{AVERAGE}model_ema"]),
    "an average under a name of its own": (
        lambda state: {"state_dict": other(state), "ema_state_dict": state},
        [f"{AVERAGE}ema_state_dict, not state_dict"],
    ),
    "the object of an average": (
        lambda state: {"state_dict": other(state), "state_dict_ema": {"module": state, "decay": 0.99}},
        [f"{AVERAGE}state_dict_ema, not state_dict"],
    ),
    "an average in a callback": (
        lambda state: {"state_dict": state, "callbacks": {"EMA": {"ema_weights": other(state)}}},
        ["state_dict is taken, not callbacks.EMA.ema_weights"],
    ),
    "states that are no network's": (
        lambda state: {
            "model": state,
            "rng": {"cpu": torch.get_rng_state()},
            "optimizer": {"state": {"fc.weight": {"exp_avg": torch.ones(2, 2)}}},
        },
        [],
    ),
    "an average that was not kept": (lambda state: {"state_dict": state, "state_dict_ema": None}, []),
    "DistributedDataParallel": (lambda state: prefixed(state, "module."), []),
    "torch.compile": (lambda state: prefixed(state, "_orig_mod."), []),
    "compiled, then parallel": (lambda state: {"model": prefixed(state, "module._orig_mod.")}, []),
    "parallel, then compiled": (lambda state: {"model": prefixed(state, "_orig_mod.module.")}, []),
    "checkpointed and sharded blocks": (
        lambda state: {
            key.replace(".0.", ".0._checkpoint_wrapped_module.", 1).replace(".1.", "._fsdp_wrapped_module.1.", 1): each
            for key, each in state.items()
        },
        [],
    ),
    "torch's AveragedModel": (lambda state: {"n_averaged": torch.tensor(7), **prefixed(state, "module.")}, []),
    "timm's checkpoint": (
        lambda state: {
            "epoch": 3,
            "arch": "resnet10t",
            "state_dict": prefixed(state, "module."),
            "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]},
            "version": 2,
            "args": argparse.Namespace(model="resnet10t", lr=0.1, aug_splits=0, layers=[1, 2], mean=None),
            "amp_scaler": {"scale": 65536.0},
            "metric": 71.5,
        },
        [],
    ),
    "fp16": (lambda state: as_type(state, torch.float16), []),
    "bf16": (lambda state: {"model": as_type(state, torch.bfloat16)}, []),
    "Lightning": (
        lambda state: {
            "epoch": 3,
            "global_step": 100,
            "pytorch-lightning_version": "2.6.0",
            "state_dict": {**prefixed(state, "net."), "criterion.weight": torch.ones(5)},
            "loops": {"fit_loop": {"state_dict": {}}},
            "hyper_parameters": {"lr": 0.1},
        },
        ["the tensors under 'net' are taken; 1 others belong to something else and are left out"],
    ),
    "Lightning's model alone": (
        lambda state: {"state_dict": prefixed(state, "model.")},
        ["the tensors under 'model' are taken"],
    ),
    "Hugging Face's wrapper": (
        lambda state: prefixed(state, "timm_model."),
        ["the tensors under 'timm_model' are taken"],
    ),
    "two attributes deep": (lambda state: prefixed(state, "a.b."), ["the tensors under 'a.b' are taken"]),
}


def loaded(path, **more):
    target = network(seed=1, **more)
    said = load_weights(target, path)
    return target.model.state_dict(), list(said)


@pytest.mark.parametrize("form", FORMS)
def test_the_weights_are_found_and_what_was_decided_is_said(form, state, tmp_path):
    make, said = FORMS[form]
    torch.save(make(state), tmp_path / "w.pth")
    found, notes = loaded(tmp_path / "w.pth")
    assert notes == said
    precision = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(form)
    expected = state if precision is None else as_type(as_type(state, precision), torch.float32)
    assert all(torch.equal(found[key], expected[key]) for key in state)
    with torch.device("meta"):
        tried = network()
    assert list(load_weights(tried, tmp_path / "w.pth")) == said


@pytest.mark.parametrize("file", ["w.safetensors", "a name as in a cache of downloads"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_safetensors_are_known_by_their_content(file, prefix, dtype, state, tmp_path):
    save_file(prefixed(as_type(state, dtype), prefix), tmp_path / file)
    found, said = loaded(tmp_path / file)
    assert said == []
    expected = as_type(as_type(state, dtype), torch.float32)
    assert all(torch.equal(found[key], expected[key]) for key in state)


def test_a_file_of_before_pytorch_1_6_is_read(state, tmp_path):
    torch.save({"model": state}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert loaded(tmp_path / "w.pth")[1] == []


def released(name):
    shapes = json.loads((GOLDEN / f"{name}.keys.json").read_text())
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) if shape else torch.tensor(3) for key, shape in shapes.items()}


@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("source", ["co-advise, the student", "co-advise, a teacher", "mmcls"])
def test_released_checkpoints_are_read_in_any_wrapping(source, wrapper, prefix, tmp_path):
    student = source == "co-advise, the student"
    content = released("cit_small" if student else "rednet26")
    if source == "mmcls":
        content = {
            key.replace("model.", "backbone.", 1).replace("classifier.", "head.fc.", 1): tensor
            for key, tensor in content.items()
        }
    content = prefixed(content, prefix)
    args = argparse.Namespace(model="cit", teacher_path="x")
    torch.save({wrapper: content, "meta": {"epoch": 1}, "args": args} if wrapper else content, tmp_path / "w.pth")
    name, teachers = ("cit_small_patch16_224", ("conv", "inv")) if student else ("rednet26", ())
    with torch.device("meta"):
        target = build_network(name, {}, num_classes=1000, image_size=224, teachers=teachers)
    assert load_weights(target, tmp_path / "w.pth") == ()


def test_deit_with_its_distillation_token_is_read(tmp_path):
    kwargs = {"embed_dim": 48, "depth": 1, "num_heads": 3}
    name = "deit_tiny_distilled_patch16_224"
    deit = network(name, kwargs)
    args = argparse.Namespace(model=name, distillation_type="hard")
    torch.save({"model": deit.model.state_dict(), "args": args, "epoch": 299}, tmp_path / "w.pth")
    target = network(name, kwargs, seed=1)
    assert load_weights(target, tmp_path / "w.pth") == ()
    assert torch.equal(target.model.dist_token, deit.model.dist_token)


def test_our_student_inside_another_module_is_read(tmp_path):
    student = network("cit_tiny_patch16_224", TINY_CIT, teachers=("conv",))
    content = {**prefixed(student.model.state_dict(), "student."), "teacher.fc.weight": torch.ones(3, 3)}
    torch.save({"state_dict": content}, tmp_path / "w.pth")
    target = network("cit_tiny_patch16_224", TINY_CIT, teachers=("conv",), seed=1)
    said = load_weights(target, tmp_path / "w.pth")
    assert said == ("the tensors under 'student' are taken; 1 others belong to something else and are left out",)
    assert torch.equal(target.model.pos_embed, student.model.pos_embed)


def test_of_two_plain_places_the_one_taken_is_said(state, tmp_path):
    torch.save({"state_dict": state, "model": other(state)}, tmp_path / "w.pth")
    assert loaded(tmp_path / "w.pth")[1] == ["state_dict is taken, not model"]


# --- Refused ---


def test_of_two_networks_that_fit_none_is_guessed(state, tmp_path):
    torch.save({**prefixed(state, "student."), **prefixed(other(state), "teacher.")}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="several networks that fit, under 'student', 'teacher'"):
        load_weights(network(), tmp_path / "w.pth")
    torch.save({**state, **prefixed(other(state), "module.")}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"names with and without module\."):
        load_weights(network(), tmp_path / "w.pth")


def test_tensors_that_belong_nowhere_are_no_part_to_be_left_out(state, tmp_path):
    torch.save({**state, "extra.weight": torch.ones(3)}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"do not fit ResNet; name the network .*extra\.weight"):
        load_weights(network(), tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "hold no state dict, but a list"),
        ({}, "hold no state dict, bare or under [a-z_, ]*$"),
        (
            {"model": {"a": torch.ones(2, 2)}, "model_ema": {"a": torch.ones(2, 2), "num_updates": 3}},
            r"under 'model_ema' is no state dict because of entries that are no tensors: 'num_updates' \(int\)",
        ),
        ({"model": {"a": torch.ones(2, 2)}, "ema": {"decay": 0.9}}, "what stands under 'ema' is no state dict"),
        ({"epoch": 3}, "hold no state dict, bare or under state_dict_ema, "),
        ({"model": {"a": 1}}, "hold no state dict, bare or under [a-z_, ]*$"),
        ({"model": {}}, "hold no state dict, bare or under [a-z_, ]*$"),
        (
            {"teacher": {"a": torch.ones(2, 2)}, "student": {"a": torch.ones(2, 2)}},
            "there are some under teacher, student",
        ),
    ],
)
def test_a_file_without_a_state_dict_is_one_line(content, said, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=said) as error:
        read_weights(tmp_path / "w.pth")
    assert "\n" not in str(error.value)


OBJECTS = {
    "a model": lambda state: module(state),
    "a model under model": lambda state: {"model": module(state), "epoch": 3},
    "a model under a key of its own": lambda state: {"net": module(state)},
    "numpy's number": lambda state: {"state_dict": state, "metric": np.float64(71.5)},
    "numpy's number in a bare dict": lambda state: {**state, "metric": np.float64(71.5)},
    "a path": lambda state: {"model": state, "args": argparse.Namespace(output=__import__("pathlib").Path("x"))},
    "numpy's arrays": lambda state: {key: tensor.numpy() for key, tensor in state.items()},
    "an average's object": lambda state: {"model_ema": state, "callback": collections.UserDict()},
}


def module(state):
    model = timm.create_model("resnet10t", num_classes=5, **SMALL)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("kind", OBJECTS)
def test_other_objects_are_named_and_the_line_says_how_to_keep_the_tensors(kind, state, tmp_path):
    path = tmp_path / "it's 100 %.pth"
    torch.save(OBJECTS[kind](state), path)
    with pytest.raises(RefusedError, match="hold objects of ") as error:
        read_weights(path)
    assert "\n" not in str(error.value)
    assert "Namespace" not in str(error.value).split("beside")[0]
    command = str(error.value).split("tensors alone: python ")[1]
    subprocess.run(["bash", "-c", f"{shlex.quote(sys.executable)} {command}"], cwd=tmp_path, check=True)
    if "of its own" in kind:
        with pytest.raises(ConfigError, match="there are some under net: save one"):
            read_weights(tmp_path / "stripped.pth")
        return
    found, _ = loaded(tmp_path / "stripped.pth")
    assert all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize("entry", [None, 3, [1.0], "text"])
@pytest.mark.parametrize("place", [None, "model"])
def test_what_stands_between_the_tensors_is_named(entry, place, state, tmp_path):
    content = {**state, "head._extra_state": entry}
    torch.save({place: content} if place else content, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=rf"no tensors: 'head\._extra_state' \({type(entry).__name__}\)") as error:
        read_weights(tmp_path / "w.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_numbers_that_are_no_weights_are_refused(dtype, state, tmp_path):
    torch.save({**state, "fc.weight": state["fc.weight"].to(dtype)}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=rf"hold fc\.weight in {str(dtype)[6:]}, from which"):
        load_weights(network(), tmp_path / "w.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, state, tmp_path):
    torch.save({**state, "fc.bias": torch.full_like(state["fc.bias"], value)}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"are not finite, in fc\.bias; take an earlier checkpoint"):
        load_weights(network(), tmp_path / "w.pth")


@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html>\n<html>", b"version https://git-lfs.github.com/spec/v1\n", b"\x93NUMPY\x01", b"GGUF"]
)
def test_a_file_that_is_none_of_weights_is_said_to_be_none(content, tmp_path):
    (tmp_path / "w.pth").write_bytes(content * 9)
    with pytest.raises(MissingInputError, match=r"w\.pth (are|cannot be read: .*) neither a safetensors file nor one"):
        read_weights(tmp_path / "w.pth")


def test_a_file_that_is_cut_short_is_one_line(state, tmp_path):
    torch.save(state, tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    for part in (0.5, 0.01, 0):
        (tmp_path / "w.pth").write_bytes(content[: int(len(content) * part)])
        with pytest.raises(MissingInputError) as error:
            read_weights(tmp_path / "w.pth")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("protocol", [4, 5])
def test_another_protocol_of_pickles_can_be_stripped_too(protocol, state, tmp_path):
    torch.save(state, tmp_path / "w.pth", pickle_protocol=protocol)
    with pytest.raises(RefusedError, match="of a protocol of pickle's") as error:
        read_weights(tmp_path / "w.pth")
    command = str(error.value).split("tensors alone: python ")[1]
    subprocess.run(["bash", "-c", f"{shlex.quote(sys.executable)} {command}"], cwd=tmp_path, check=True)
    assert loaded(tmp_path / "stripped.pth")[1] == []


def test_every_place_is_looked_into(state, tmp_path):
    for place in PLACES:
        torch.save({place: state}, tmp_path / "w.pth")
        assert read_weights(tmp_path / "w.pth").tensors.keys() == state.keys()
