"""Weights by name: from the hub, folders and run folders; what fits of them into another network, and what is said."""

import json
import os
import re
import socket
import subprocess
import sys
import time

import hub_server
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_run import TINY_CIT

from cit_scale.config import DistillConfig, RunConfig, TeacherConfig, check_config
from cit_scale.errors import ConfigError, MissingInputError
from cit_scale.models.classes import class_columns
from cit_scale.models.network import build_network
from cit_scale.models.pretrained import description_of, find_pretrained
from cit_scale.models.weights import load_weights, start_from
from cit_scale.teachers import load_teacher

SMALL = {"channels": [8, 8, 16, 16], "stem_width": 8}
MEAN = [0.5, 0.25, 0.125]
LABELS = ["tench", "goldfish, Carassius auratus", "great white shark", "tiger shark", "hammerhead"]


def write_folder(folder, *, num_classes=5, name="resnet10t", kwargs=None, weights="model.safetensors", seed=0):
    """A folder in the hub's layout."""
    torch.manual_seed(seed)
    kwargs = SMALL if kwargs is None else kwargs
    model = timm.create_model(name, num_classes=num_classes, **kwargs)
    folder.mkdir(parents=True, exist_ok=True)
    if weights.endswith(".safetensors"):
        save_file(model.state_dict(), folder / weights)
    else:
        torch.save(model.state_dict(), folder / weights)
    pretrained_cfg = {
        "mean": MEAN, "std": [0.5, 0.5, 1.0], "input_size": [3, 48, 48], "first_conv": "conv1.0", "classifier": "fc",
    }  # fmt: skip
    config = {
        "architecture": name,
        "num_classes": num_classes,
        "label_names": LABELS[:num_classes],
        "model_args": kwargs,
        "pretrained_cfg": pretrained_cfg,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "lake")
    return tmp_path / "lake"


# ---------------------------------------------------------------------------------------------------------------------
# Where they are found


@pytest.mark.parametrize("name", ["{}", "local-dir:{}", "{}/model.safetensors"])
def test_a_folder_is_found_by_any_of_its_names(name, folder):
    found = find_pretrained(name.format(folder))
    assert found.file == folder / "model.safetensors"
    if name != "{}/model.safetensors":
        assert found.description["mean"] == MEAN
        assert (found.architecture, found.arguments) == ("resnet10t", SMALL)
        assert found.description["label_names"] == LABELS


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "does not describe a model"),
        ("[1]", "it holds a list"),
        ('{"architecture": "resnet10t", "model_args": 3}', "does not describe a model"),
    ],
)
def test_a_folder_with_a_damaged_description_is_refused(config, said, folder):
    (folder / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=rf"config\.json .*{said}"):
        find_pretrained(f"local-dir:{folder}")


def test_a_description_of_the_transformers_library_says_nothing(folder):
    (folder / "config.json").write_text('{"architectures": ["ViTForImageClassification"], "model_type": "vit"}')
    assert find_pretrained(f"local-dir:{folder}").description == {}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet18.a1_in", r"no pretrained weights are called 'resnet18\.a1_in'; the nearest are .*resnet18\.a1_in1k"),
        ("rednet50", "timm has no pretrained weights for rednet50"),
        ("rednet50.in1k", "there are none of rednet50"),
        ("regnety_404.ra3_in1k", r"weights regnety_404\.ra3_in1k do not exist: .* nearest of its names are regnety_"),
        ("local-dir:", "names no folder"),
        ("local-dir:/no/such", "no weights are in the folder /no/such: .*; there is no such folder"),
    ],
)
def test_what_does_not_exist_is_one_line(name, said):
    with pytest.raises(MissingInputError, match=said) as error:
        find_pretrained(name)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# The hub

FIND = (
    "import sys; from cit_scale.models.pretrained import find_pretrained; from cit_scale.errors import RunError\n"
    "try: print(find_pretrained(sys.argv[1]).file)\n"
    "except RunError as error: print(error, file=sys.stderr); sys.exit(error.exit_code)"
)


@pytest.fixture
def find(tmp_path):
    """``find(name, endpoint)``: in a process of its own, which reads HF_ENDPOINT and HF_HOME as it starts."""

    def run(name, endpoint, **more):
        env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-c", FIND, name], env={**env, **more}, capture_output=True, text=True)
        return done.returncode, done.stdout.strip(), done.stderr.strip(), time.monotonic() - began

    return run


def test_a_repository_is_downloaded_once_and_found_without_a_network_from_then_on(find, tmp_path):
    write_folder(tmp_path / "hub" / "timm" / "resnet10t.c3_in1k")
    expected = (tmp_path / "hub" / "timm" / "resnet10t.c3_in1k" / "model.safetensors").read_bytes()
    with hub_server.serve(tmp_path / "hub") as endpoint:
        for name in ("hf-hub:timm/resnet10t.c3_in1k", "hf-hub:timm/resnet10t.c3_in1k@main", "resnet10t.c3_in1k"):
            code, path, error, _ = find(name, endpoint)
            assert code == 0, error
            with open(path, "rb") as file:
                assert file.read() == expected
    for offline in ({}, {"HF_HUB_OFFLINE": "1"}):
        code, path, error, seconds = find("resnet10t.c3_in1k", endpoint, **offline)
        assert (code, error) == (0, "")
        assert path.startswith(str(tmp_path / "home"))
        assert seconds < 20


def test_a_repository_with_a_pickle_only_is_found_too(find, tmp_path):
    write_folder(tmp_path / "hub" / "own" / "net", weights="pytorch_model.bin")
    with hub_server.serve(tmp_path / "hub") as endpoint:
        code, path, error, _ = find("hf-hub:own/net", endpoint)
        assert code == 0, error
        assert path.endswith("pytorch_model.bin")
    code, again, error, _ = find("hf-hub:own/net", endpoint)
    assert (code, again) == (0, path), error


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hf-hub:own/gated", "hf-hub:own/gated is gated; accept its terms .* HF_TOKEN"),
        ("hf-hub:own/missing", "there is no such repository, or it is private"),
        ("hf-hub:own/net@v9", "there is no revision 'v9'"),
        ("hf-hub:own/empty", "holds no weights: none of model.safetensors, "),
        ("hf-hub:a/b/c", "is not OWNER/NAME"),
        ("hf-hub:own/half", "hf-hub:own/half: its weights cannot be fetched"),
    ],
)
def test_a_repository_that_gives_no_weights_is_one_line(name, said, find, tmp_path):
    write_folder(tmp_path / "hub" / "own" / "net")
    (tmp_path / "hub" / "own" / "empty").mkdir()
    (tmp_path / "hub" / "own" / "half").mkdir()
    (tmp_path / "hub" / "own" / "half" / "model.safetensors").write_bytes(b"x" * 5_000_000)
    with hub_server.serve(tmp_path / "hub", gated=("own/gated",), cut=("model.safetensors",)) as endpoint:
        code, _, error, _ = find(name, endpoint)
    assert code == 3
    last = error.splitlines()[-1]
    assert re.search(said, last), error
    assert "Traceback" not in error


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no.such.host.invalid", "a hub that is silent"])
def test_without_a_network_it_is_one_line_within_seconds(endpoint, find):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # which takes connections and never answers
        if endpoint.startswith("a hub"):
            endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        say_that_it_cannot_be_reached(endpoint, find)


def say_that_it_cannot_be_reached(endpoint, find):
    code, _, error, seconds = find("resnet18.a1_in1k", endpoint)
    assert code == 3
    assert "\n" not in error
    assert "hf-hub:timm/resnet18.a1_in1k: its weights cannot be fetched (" in error
    assert "hf download timm/resnet18.a1_in1k" in error
    assert "HF_HOME" in error
    assert "local-dir:FOLDER" in error
    assert seconds < 60  # imports, and one limit of 10 s; the library's own retries take 23 s for each of five files


# ---------------------------------------------------------------------------------------------------------------------
# What a network makes of them


def test_each_network_normalizes_and_resizes_for_its_own_weights(folder):
    name = f"local-dir:{folder}"
    network = build_network(
        name, {}, num_classes=5, image_size=32, description=description_of(name), own_size="own"
    ).eval()
    load_weights(network, name)
    plain = write_folder(folder)
    images = torch.rand(2, 3, 32, 32)
    seen = F.interpolate(images, (48, 48), mode="bicubic", antialias=True)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor([0.5, 0.5, 1.0]).view(3, 1, 1)
    torch.testing.assert_close(network(images).cls, plain((seen - mean) / std), rtol=1e-4, atol=1e-5)
    # Without weights of its own a network sees what it is given, and normalizes as its architecture says.
    assert build_network("resnet10t", SMALL, num_classes=5, image_size=32, own_size="own").image_size is None


def test_a_head_of_other_classes_is_replaced_and_said(folder):
    network = build_network("resnet10t", SMALL, num_classes=3, image_size=32)
    taken, new = start_from(network, str(folder)).notes
    assert taken.startswith("taken: bn1 (5), conv1 (13), layer1 (18)")
    assert new == "new: fc: 5 -> 3 classes"
    state = load_file(folder / "model.safetensors")
    assert all(torch.equal(each, state[key]) for key, each in network.model.state_dict().items() if "fc" not in key)
    assert network.model.fc.weight.abs().max() < 0.01  # it begins with nearly equal logits
    assert network.model.fc.weight.std() > 0
    assert not network.model.fc.bias.any()


def test_a_trunk_without_a_head_and_weights_that_all_fit_are_said(folder):
    network = build_network("resnet10t", SMALL, num_classes=5, image_size=32)
    count = len(network.model.state_dict())
    assert start_from(network, str(folder)).notes == (f"taken: all {count} tensors",)
    state = {key: each for key, each in load_file(folder / "model.safetensors").items() if not key.startswith("fc.")}
    save_file(state | {"projection.weight": torch.ones(3)}, folder / "model.safetensors")
    _, new, left = start_from(network, str(folder)).notes
    assert (new, left) == ("new: fc (2)", "left out: projection")


def test_the_scales_of_layers_of_deit_iii_are_taken(tmp_path):
    source = timm.create_model("deit3_small_patch16_224", img_size=32, num_classes=5, **VIT)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.copy_(torch.rand_like(parameter))
    theirs = source.state_dict()
    save_file(
        {key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): each for key, each in theirs.items()},
        tmp_path / "w.safetensors",
    )
    network = build_network("deit3_small_patch16_224", VIT, num_classes=5, image_size=32)
    assert start_from(network, str(tmp_path / "w.safetensors")).new == frozenset()
    assert torch.equal(network.model.blocks[0].ls1.gamma, theirs["blocks.0.ls1.gamma"])


@pytest.mark.parametrize("num_classes", [5, 3])
@pytest.mark.parametrize(
    ("name", "kwargs", "last"),
    [
        ("caformer_s18", {}, "head.fc.fc2"),
        ("resnetv2_18", {"layers": [1, 1, 1, 1], "channels": [16, 16, 32, 32]}, "head.fc"),
    ],
)
def test_of_a_head_of_several_layers_only_what_is_new_begins_anew(name, kwargs, last, num_classes, tmp_path):
    source = timm.create_model(name, num_classes=5, **kwargs)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.copy_(torch.rand_like(parameter))
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    network = build_network(name, kwargs, num_classes=num_classes, image_size=32)
    start = start_from(network, str(tmp_path / "w.safetensors"))
    theirs, ours = source.state_dict(), network.model.state_dict()
    new = {f"{last}.weight", f"{last}.bias"} if num_classes == 3 else set()
    assert start.new == new
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if key not in new)
    if new:
        assert start.notes[1] == f"new: {last}: 5 -> 3 classes"
        assert ours[f"{last}.weight"].abs().max() < 0.01
    else:
        assert start.notes == (f"taken: all {len(ours)} tensors",)


@pytest.mark.parametrize("teachers", [("inv", "conv"), ("conv", "inv")])
def test_a_cit_starts_from_one_with_the_same_teachers_in_any_order(teachers, tmp_path):
    """A safetensors file keeps its names in alphabetical order."""
    source = timm.create_model("cit_tiny_patch16_224", img_size=32, num_classes=5, teachers=teachers, **TINY_CIT)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    network = build_network("cit_tiny_patch16_224", TINY_CIT, num_classes=5, image_size=32, teachers=teachers)
    assert start_from(network, str(tmp_path / "w.safetensors")).new == frozenset()
    assert all(torch.equal(each, source.state_dict()[key]) for key, each in network.model.state_dict().items())


def test_of_several_other_teachers_no_token_is_guessed(tmp_path):
    source = timm.create_model("cit_tiny_patch16_224", img_size=32, teachers=("inv", "conv"), **TINY_CIT)
    with torch.no_grad():
        source.pos_embed.copy_(torch.rand_like(source.pos_embed))
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    network = build_network("cit_tiny_patch16_224", TINY_CIT, num_classes=5, image_size=32, teachers=("inv",))
    start_from(network, str(tmp_path / "w.safetensors"))
    assert torch.equal(network.model.pos_embed[:, 1], source.pos_embed[:, 0])  # as the class token's
    assert torch.equal(network.model.pos_embed[:, 2:], source.pos_embed[:, 3:])


def test_what_an_advised_student_takes_is_said_under_the_models_own_names(folder):
    network = build_network("resnet10t", SMALL, num_classes=3, image_size=32, teachers=("conv",))
    taken, new = start_from(network, str(folder)).notes
    assert taken == "taken: bn1 (5), conv1 (13), layer1 (18), layer2 (18), layer3 (18), layer4 (18)"
    assert new == "new: fc: 5 -> 3 classes, teacher_heads (2)"


def test_what_a_hubs_description_says_of_sizes_is_no_argument_of_the_user(folder):
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] |= {"num_classes": 5, "in_chans": 3}
    (folder / "config.json").write_text(json.dumps(config))
    assert build_network(f"local-dir:{folder}", {}, num_classes=3, image_size=32).model.num_classes == 3


def test_weights_of_another_architecture_are_refused(folder):
    network = build_network("vit_tiny_patch16_224", {"depth": 1}, num_classes=5, image_size=32)
    before = {key: each.clone() for key, each in network.state_dict().items()}
    with pytest.raises(ConfigError, match="0% fit into VisionTransformer, where they would be 0%; name the network"):
        start_from(network, str(folder))
    assert all(torch.equal(each, before[key]) for key, each in network.state_dict().items())


VIT = {"patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "beit_base_patch16_224"])
def test_position_embeddings_of_timms_vits_are_resampled(name, tmp_path):
    source = timm.create_model(name, img_size=64, num_classes=5, **VIT)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    for exact in (True, False):
        network = build_network(name, VIT, num_classes=5, image_size=96).eval()
        if exact:
            load_weights(network, tmp_path / "w.safetensors")
        else:
            assert start_from(network, str(tmp_path / "w.safetensors")).notes[0].startswith("taken: all ")
        assert torch.isfinite(network(torch.rand(1, 3, 96, 96)).cls).all()


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("source", ["vit", "deit", "distilled", "cit with other teachers"])
def test_a_cit_starts_from_any_vit(source, size, aligned, tmp_path):
    torch.manual_seed(0)
    if source == "cit with other teachers":
        model = timm.create_model("cit_tiny_patch16_224", img_size=64, teachers=("inv",), aligned=aligned, **TINY_CIT)
    else:
        name = {"vit": "vit_tiny_patch16_224", "deit": "deit_tiny_patch16_224"}.get(
            source, "deit_tiny_distilled_patch16_224"
        )
        model = timm.create_model(name, img_size=64, **TINY_CIT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand_like(parameter))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    network = build_network(
        "cit_tiny_patch16_224", {**TINY_CIT, "aligned": aligned}, num_classes=5, image_size=size,
        teachers=("conv", "inv"),
    )  # fmt: skip
    cit = network.model
    said = start_from(network, str(tmp_path / "w.safetensors")).notes
    assert "head: 1000 -> 5 classes" in said[1]
    theirs, ours = model.state_dict(), cit.state_dict()
    for key in ours:
        if key.startswith(("blocks", "norm", "cls_token")):
            assert torch.equal(ours[key], theirs[key]), key
    # Positions: of the class token, and of a teacher that both have; the others start from the nearest that there is.
    prefix = theirs["pos_embed"][:, : model.num_prefix_tokens]
    assert torch.equal(ours["pos_embed"][:, 0], prefix[:, 0])
    other = 1 if source == "distilled" else 0
    assert torch.equal(ours["pos_embed"][:, 1], prefix[:, other])
    assert torch.equal(ours["pos_embed"][:, 2], prefix[:, 1 if source == "cit with other teachers" else other])
    if size == 64:
        assert torch.equal(ours["pos_embed"][:, 3:], theirs["pos_embed"][:, model.num_prefix_tokens :])
    if not aligned and source == "distilled":
        assert torch.equal(cit.teacher_tokens[:, 0], model.dist_token[:, 0])
        assert torch.equal(cit.teacher_tokens[:, 1], model.dist_token[:, 0])
    if aligned and source == "cit with other teachers":
        assert torch.equal(ours["patch_embed.projections.inv.weight"], theirs["patch_embed.projections.inv.weight"])


# ---------------------------------------------------------------------------------------------------------------------
# Classes


def test_columns_are_found_by_name(tmp_path):
    described = {"num_classes": 5, "label_names": LABELS}
    classes = ["Goldfish", "tiger_shark", "tench"]
    assert class_columns(classes, "names", described) == ([1, 3, 0], 5)
    (tmp_path / "names.txt").write_text("\n".join(LABELS) + "\n")
    assert class_columns(classes, str(tmp_path / "names.txt"), {}) == ([1, 3, 0], 5)
    (tmp_path / "map.json").write_text('{"white": "great white shark", "five": 4}')
    assert class_columns(["white", "five", "tench"], str(tmp_path / "map.json"), described) == ([2, 4, 0], 5)
    (tmp_path / "numbers.json").write_text('{"a": 2, "b": 0}')
    assert class_columns(["a", "b"], str(tmp_path / "numbers.json"), {"num_classes": 3}) == ([2, 0], 3)
    with pytest.raises(ConfigError, match="do not say how many classes they have"):
        class_columns(["a", "b"], str(tmp_path / "numbers.json"), {})


def test_columns_of_imagenet_are_found_by_wordnet_id_and_by_word():
    imagenet = {"num_classes": 1000}
    assert class_columns(["n02123045", "tiger cat", "Golden_Retriever"], "names", imagenet)[0] == [281, 282, 207]


@pytest.mark.parametrize(
    ("classes", "how", "said"),
    [
        (["tench", "trout", "pike"], "names", "of the 5 classes of the weights there is no column for: trout, pike;"),
        (["tench", "Tench"], "names", "share a column: Tench, tench"),
        (["tench"], "/no/such/file", "is neither 'names' nor a file of names"),
        (["tench"], "{}/list.json", "is no object from classes"),
        (["five"], "{}/far.json", "no column for: five"),
        (["tench"], "{}/twice.txt", "several columns for: tench"),
    ],
)
def test_classes_without_a_column_of_their_own_are_listed(classes, how, said, tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "far.json").write_text('{"five": 5}')
    (tmp_path / "twice.txt").write_text("tench\ntrout\nTENCH")
    with pytest.raises(ConfigError, match=said) as error:
        class_columns(classes, how.format(tmp_path), {"num_classes": 5, "label_names": LABELS})
    assert "\n" not in str(error.value)


def test_weights_without_names_need_a_file():
    with pytest.raises(ConfigError, match="come without names of their classes; give a file"):
        class_columns(["a"], "names", {"num_classes": 7})


@pytest.mark.parametrize("how", ["pretrained", "weights"])
def test_a_teacher_of_more_classes_advises_by_its_columns(how, folder, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(LABELS))
    name = str(folder / "model.safetensors") if how == "weights" else f"local-dir:{folder}"
    classes = str(tmp_path / "names.txt") if how == "weights" else "names"
    config = TeacherConfig("resnet10t", SMALL, **{how: name}, classes=classes, recipe="finetune")
    assert config.advises_with == name
    teacher = load_teacher(
        "conv", config, DistillConfig(compile=False), classes=["tiger shark", "tench"], image_size=48,
        device=torch.device("cpu"),
    )  # fmt: skip
    whole = build_network("resnet10t", SMALL, num_classes=5, image_size=48, description=description_of(name)).eval()
    load_weights(whole, name)
    images = torch.rand(2, 3, 48, 48)
    torch.testing.assert_close(teacher.forward(images), whole(images).cls[:, [3, 0]], rtol=1e-4, atol=1e-5)


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ConfigError, match=r"give teachers\.conv\.pretrained, or \.weights"):
        check_config(RunConfig(teachers={"conv": TeacherConfig("resnet18", classes="names", recipe="finetune")}))


def test_the_trunk_of_an_advised_model_is_found_under_an_attribute(folder):
    # Copies, as the tensors may be views of the file that is overwritten.
    state = {key: each.clone() for key, each in load_file(folder / "model.safetensors").items()}
    save_file({f"net.{key}": each for key, each in state.items()}, folder / "model.safetensors")
    network = build_network("resnet10t", SMALL, num_classes=5, image_size=32, teachers=("conv",))
    said = start_from(network, str(folder)).notes
    assert said[0] == "the tensors under 'net' are taken"
    assert torch.equal(network.model.trunk.layer1[0].conv1.weight, state["layer1.0.conv1.weight"])


def test_a_mapped_teacher_says_what_its_columns_say(folder):
    name = f"local-dir:{folder}"
    network = build_network(
        name, {}, num_classes=5, image_size=48, description=description_of(name), columns=[3, 0]
    ).eval()
    load_weights(network, name)
    whole = build_network(name, {}, num_classes=5, image_size=48, description=description_of(name)).eval()
    load_weights(whole, name)
    images = torch.rand(2, 3, 48, 48)
    assert torch.equal(network(images).cls, whole(images).cls[:, [3, 0]])
