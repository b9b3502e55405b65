"""What a run was given: noted with hashes and accuracy before training starts, and described for whoever comes next."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny_run import CLASSES, RECIPE, TINY_CIT, TinyRun

from cit_scale.config import EngineConfig, RunConfig, StudentConfig, TeacherConfig, TrainConfig
from cit_scale.data.reader import Reader
from cit_scale.distributed.world import World
from cit_scale.engines.build import prepare_engine
from cit_scale.errors import ConfigError, MissingInputError
from cit_scale.evaluate import Accuracy
from cit_scale.files import file_sha256
from cit_scale.models.network import build_network
from cit_scale.models.pretrained import find_pretrained
from cit_scale.run.inputs import fingerprints
from cit_scale.run.networks import knowledge
from cit_scale.run.setup import PreparedRun, check_networks, fetch_weights

SMALL = {"channels": [8, 8, 16, 16], "stem_width": 8}


@pytest.fixture
def prepared(tiny_digits, tmp_path):
    """``prepared(teachers, **student)``: a plain run on digits."""

    def prepare(teachers=None, **student):
        config = RunConfig(
            runs_dir=str(tmp_path / "runs"),
            student=StudentConfig(**{"name": "cit_tiny_patch16_224", "kwargs": TINY_CIT, **student}),
            teachers=teachers or {},
            engine=EngineConfig(name="plain"),
            train=TrainConfig(global_batch_size=64, micro_batch_size=64),
        )
        reader = Reader(tiny_digits)
        return PreparedRun(config, prepare_engine(config, World()), reader, reader, {})

    return prepare


@pytest.fixture
def folder(tmp_path):
    """``folder(**description)``: a small network of ten classes in the hub's layout."""

    def write(**description):
        torch.manual_seed(0)
        model = timm.create_model("resnet10t", num_classes=10, **SMALL)
        (tmp_path / "net").mkdir(exist_ok=True)
        save_file(model.state_dict(), tmp_path / "net" / "model.safetensors")
        content = {"architecture": "resnet10t", "num_classes": 10, "pretrained_cfg": {}, **description}
        (tmp_path / "net" / "config.json").write_text(json.dumps(content))
        return tmp_path / "net"

    return write


# ---------------------------------------------------------------------------------------------------------------------
# In the run folder


def test_a_run_notes_what_it_was_given_before_it_trains(calm, tiny_inputs):
    run = calm()
    noted = json.loads((run.run_dir / "networks.json").read_text())
    results = json.loads((run.run_dir / "results.json").read_text())
    assert noted["teachers"] == results["teachers"]
    (teacher,) = noted["teachers"].values()
    assert teacher["sha256"] == file_sha256(find_pretrained(teacher["weights"]).file)
    assert {"model", "top1", "top5", "class_mean", "file"} <= teacher.keys()
    assert noted["student"] == {"model": RECIPE["student"]["name"], "weights": None, "file": None, "sha256": None}
    assert (run.run_dir / "networks.json").stat().st_mtime_ns < (
        run.run_dir / "ckpt" / "step_000012"
    ).stat().st_mtime_ns


def test_a_run_folder_says_what_its_weights_are(calm):
    run = calm()
    found = find_pretrained(str(run.run_dir))
    assert found.file == run.run_dir / "student.safetensors"
    assert (found.architecture, found.arguments) == (RECIPE["student"]["name"], RECIPE["student"]["kwargs"])
    assert len(found.description["label_names"]) == found.description["num_classes"] == CLASSES
    assert found.description["input_size"] == [3, 16, 16]
    assert found.description["mean"] == pytest.approx([0.485, 0.456, 0.406])
    for file in ("student.safetensors", "student_ema.safetensors"):
        assert find_pretrained(str(run.run_dir / file)).description == found.description


def test_a_finished_student_is_trained_further_at_another_size_from_its_run_folder(calm, tiny_inputs, tmp_path):
    more = (f"--student.weights={calm().run_dir}", "--data.image_size=32", "--name=larger", "--train.epochs=1")
    run = TinyRun(tiny_inputs, tmp_path, more=more)
    said = run.finish().outputs[0]
    assert "pos_embed 1x6x32 -> 1x18x32" in said
    assert "new:" not in said
    noted = json.loads((tmp_path / "larger" / "networks.json").read_text())["student"]
    assert noted["sha256"] == file_sha256(calm().run_dir / "student.safetensors")
    assert load_file(tmp_path / "larger" / "student.safetensors")["pos_embed"].shape == (1, 18, 32)


def test_a_run_that_is_not_finished_is_no_source(tmp_path):
    for step in (3, 12):
        (tmp_path / "ckpt" / f"step_{step:06d}").mkdir(parents=True)
        (tmp_path / "ckpt" / f"step_{step:06d}" / "student.safetensors").touch()
    with pytest.raises(MissingInputError, match=r"is not finished; finish it, or copy .*step_000012/student\.safetens"):
        find_pretrained(str(tmp_path))
    (tmp_path / "student.safetensors").touch()
    assert find_pretrained(str(tmp_path)).file == tmp_path / "student.safetensors"


@pytest.mark.parametrize(
    ("class_mean", "num_classes", "is_near"),
    [(10.0, 10, True), (14.4, 10, True), (14.6, 10, False), (52.0, 2, True), (60.0, 2, False), (0.1, 1000, True)],
)
def test_a_teacher_near_chance_is_said(class_mean, num_classes, is_near):
    accuracy = Accuracy(images=100, top1={"conv": 71.25}, top5={}, class_mean={"conv": class_mean})
    line = knowledge("conv", "resnet10t", accuracy, num_classes)
    assert line.startswith("teacher conv (resnet10t) knows 71.25 % of the evaluation images")
    assert ("is near chance" in line) == is_near


# ---------------------------------------------------------------------------------------------------------------------
# What a description changes


def test_other_statistics_are_another_input(prepared, folder):
    def inputs(**description):
        teacher = TeacherConfig("resnet10t", SMALL, weights=str(folder(**description)))
        return fingerprints(prepared(weights=str(folder(**description))), {"conv": teacher})

    plain = inputs()
    described = inputs(pretrained_cfg={"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]})
    assert described.keys() - plain.keys() == {"teacher conv, description", "the student's first weights, description"}
    other = inputs(pretrained_cfg={"mean": [0.5, 0.5, 0.25], "std": [0.5, 0.5, 0.5]})
    assert {name for name in other if other[name] != described[name]} == described.keys() - plain.keys()


def test_a_teacher_normalizes_as_its_folder_says(prepared, folder):
    statistics = {"mean": [0.5, 0.25, 0.125], "std": [0.5, 0.5, 1.0]}
    for name in ("", "model.safetensors"):
        weights = str(folder(pretrained_cfg={**statistics, "input_size": [3, 48, 48]}) / name)
        teacher = prepared().build_teacher_without_weights(TeacherConfig("resnet10t", SMALL, weights=weights))
        assert teacher.statistics == statistics
        assert teacher.image_size == 48


def test_weights_of_the_same_classes_in_another_order_are_refused(prepared, folder):
    classes = [str(digit) for digit in range(10)]

    def build(names, **settings):
        teacher = TeacherConfig("resnet10t", SMALL, weights=str(folder(label_names=names)), **settings)
        return prepared().build_teacher_without_weights(teacher)

    swapped = ["0", "2", "1", *classes[3:]]
    with pytest.raises(ConfigError, match=r"another order: number 1 is 2 there, and 1 in the data; .* classes=names"):
        build(swapped)
    assert build(swapped, classes="names").columns.tolist() == [0, 2, 1, *range(3, 10)]
    assert build(classes).columns is None
    assert build([f"digit {name}" for name in classes]).columns is None  # names of another kind say nothing


def test_a_file_of_too_few_names_is_said_to_be_that(prepared, folder, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(str(digit) for digit in range(10)) + "\nmore")
    teacher = TeacherConfig("resnet10t", SMALL, weights=str(folder()), classes=str(names))
    with pytest.raises(ConfigError, match=r"have 10 classes, and there are names of 11; give one for each"):
        check_networks(prepared({"conv": teacher}))


# ---------------------------------------------------------------------------------------------------------------------
# Found before anything is trained


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda each: each.fill_(float("nan")), "are not finite, in"),
        (lambda each: each.to(torch.int8), "in int8, from"),
    ],
)
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_first_weights_that_are_no_numbers_are_found_on_the_meta_device(harm, said, suffix, prepared, tmp_path):
    torch.manual_seed(0)
    state = timm.create_model("resnet10t", num_classes=10, **SMALL).state_dict()
    state["layer1.0.conv1.weight"] = harm(state["layer1.0.conv1.weight"])
    path = tmp_path / f"harmed.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(state, path)
    run = prepared(name="resnet10t", kwargs=SMALL, weights=str(path))
    with pytest.raises(ConfigError, match=said):
        check_networks(run)
    teacher = TeacherConfig("resnet10t", SMALL, weights=str(path))
    with pytest.raises(ConfigError, match=said):
        check_networks(prepared({"conv": teacher}))


def test_an_own_size_that_nothing_says_is_refused(prepared):
    with pytest.raises(ConfigError, match=r"student\.image_size=own: the weights do not say .*; give a number"):
        check_networks(prepared(name="resnet10t", kwargs=SMALL, image_size="own"))


def test_all_weights_of_a_run_are_looked_for_at_once(prepared, folder):
    fine = TeacherConfig("resnet10t", SMALL, weights=str(folder()))
    fetch_weights([prepared({"conv": fine}, name=f"local-dir:{folder()}").config])
    for gone in (
        TeacherConfig("resnet10t", SMALL, pretrained="local-dir:nowhere", recipe="finetune"),
        TeacherConfig("local-dir:nowhere", weights=str(folder())),
    ):
        with pytest.raises(MissingInputError, match="no weights are in the folder nowhere"):
            fetch_weights([prepared({"conv": gone}).config])


def test_resampled_positions_are_said_of_a_teacher(tmp_path, prepared):
    kwargs = {key: value for key, value in TINY_CIT.items()}
    network = build_network("vit_tiny_patch16_224", kwargs, num_classes=10, image_size=16)
    save_file(network.model.state_dict(), tmp_path / "vit.safetensors")
    teacher = TeacherConfig("vit_tiny_patch16_224", kwargs, weights=str(tmp_path / "vit.safetensors"))
    said = check_networks(prepared({"conv": teacher}))
    assert said[-1] == "teachers.conv.weights: resampled: pos_embed 1x5x32 -> 1x785x32"
