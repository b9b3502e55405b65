"""What a run was given: noted with hashes and accuracy before training starts, and described for whoever comes next."""

import dataclasses
import json
import shutil

import pytest
import sabotage
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_run import CLASSES, RECIPE, TINY_CIT, TinyRun, assert_same_end

from cit_scale import cli
from cit_scale.config import DataConfig, EngineConfig, RunConfig, StudentConfig, TeacherConfig, TrainConfig
from cit_scale.data.reader import Reader
from cit_scale.data.versions import LATEST
from cit_scale.distributed.world import World
from cit_scale.engines.build import prepare_engine
from cit_scale.errors import ConfigError, MissingInputError
from cit_scale.evaluate import Accuracy
from cit_scale.files import file_sha256
from cit_scale.models.network import build_network
from cit_scale.models.pretrained import find_pretrained
from cit_scale.run.inputs import fingerprints
from cit_scale.run.networks import describe_student, teacher_line
from cit_scale.run.setup import (
    PreparedRun,
    check_all_settings,
    check_networks,
    fetch_weights,
    seen_before,
    with_images,
)


def test_weights_that_have_seen_the_evaluation_images_are_noted(tmp_path):
    theirs = {"train": str(tmp_path / "photos"), "eval": str(tmp_path / "others"), "holdout": 0.2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": theirs}))
    weights = str(tmp_path / "student.safetensors")

    def noted(**data):
        return seen_before(weights, DataConfig(**{"train": theirs["train"], **data}))

    assert "give --data.eval" in noted()[0]
    assert noted(eval=theirs["eval"]) == []
    assert noted(eval=theirs["train"], train="elsewhere")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {**theirs, "eval": None}}))
    assert noted() == noted(holdout=0.1) == []
    assert "give --data.holdout 0.2" in noted(holdout=0.3)[0]
    assert seen_before(str(tmp_path), DataConfig(train=theirs["train"], holdout=0.3))
    assert seen_before("resnet18.a1_in1k", DataConfig(train=theirs["train"])) == seen_before(None, DataConfig()) == []


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
    config = yaml.safe_load((run.run_dir / "config.yaml").read_text())
    assert teacher["sha256"] == file_sha256(find_pretrained(config["teachers"]["conv"]["weights"]).file)
    assert {"model", "top1", "top5", "class_mean"} <= teacher.keys()
    assert noted["student"] == {"model": RECIPE["student"]["name"], "weights": None, "sha256": "none", "new": None}
    assert (run.run_dir / "networks.json").stat().st_mtime_ns < (
        run.run_dir / "ckpt" / "step_000012"
    ).stat().st_mtime_ns


def test_a_run_folder_says_what_its_weights_are(calm):
    run = calm()
    found = find_pretrained(str(run.run_dir))
    assert found.file == run.run_dir / "student.safetensors"
    assert found.architecture == RECIPE["student"]["name"]
    assert found.arguments == {**RECIPE["student"]["kwargs"], "teachers": ["conv"], "img_size": 16}
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
    (tmp_path / "student.safetensors").touch()  # of before it was trained on
    with pytest.raises(
        MissingInputError, match=r"is not finished, and its weights change; .*step_000012/student\.safetens"
    ):
        find_pretrained(str(tmp_path))
    (tmp_path / "results.json").touch()
    assert find_pretrained(str(tmp_path)).file == tmp_path / "student.safetensors"


@pytest.mark.parametrize(
    ("class_mean", "num_classes", "is_near"),
    [(10.0, 10, True), (14.4, 10, True), (14.6, 10, False), (52.0, 2, True), (60.0, 2, False), (0.1, 1000, True)],
)
def test_a_teacher_near_chance_is_said(class_mean, num_classes, is_near):
    accuracy = Accuracy(images=100, top1={"conv": 71.25}, top5={}, class_mean={"conv": class_mean})
    line = teacher_line("conv", "resnet10t", accuracy, num_classes)
    assert line.startswith("teacher conv (resnet10t): top-1 71.25 % on the evaluation set")
    assert ("is near chance" in line) == is_near


# ---------------------------------------------------------------------------------------------------------------------
# What a description changes


def test_other_statistics_are_another_input(prepared, folder):
    def inputs(**description):
        teacher = TeacherConfig("resnet10t", SMALL, weights=str(folder(**description)))
        return fingerprints(prepared(weights=str(folder(**description))), {"conv": teacher})

    plain = inputs()
    described = inputs(pretrained_cfg={"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]})
    descriptions = {"teacher conv, description", "the student's first weights, description"}
    assert {name for name in plain if plain[name] == "none"} == descriptions
    other = inputs(pretrained_cfg={"mean": [0.5, 0.5, 0.25], "std": [0.5, 0.5, 0.5]})
    for one in (plain, other):
        assert {name for name in one if one[name] != described[name]} == descriptions


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
        TeacherConfig("resnet10t", SMALL, pretrained="local-dir:nowhere"),
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


# ---------------------------------------------------------------------------------------------------------------------
# What has begun goes on as it was


@pytest.fixture
def source(tmp_path):
    """``source(**pretrained_cfg)``: a folder with the tiny run's student, of other statistics than timm's."""

    def write(**pretrained_cfg):
        torch.manual_seed(5)
        kwargs = {key: value for key, value in RECIPE["student"]["kwargs"].items() if key != "drop_path_rate"}
        network = build_network(
            RECIPE["student"]["name"], kwargs, num_classes=CLASSES, image_size=16, teachers=("conv",)
        )
        (tmp_path / "source").mkdir(exist_ok=True)
        save_file(network.model.state_dict(), tmp_path / "source" / "model.safetensors")
        content = {"architecture": RECIPE["student"]["name"], "num_classes": CLASSES, "pretrained_cfg": pretrained_cfg}
        (tmp_path / "source" / "config.json").write_text(json.dumps(content))
        return tmp_path / "source"

    return write


HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_run_that_has_begun_does_not_need_what_it_started_from(prefix, source, tiny_inputs, tmp_path):
    more = (f"--student.weights={prefix}{source(**HALF)}", "--train.freeze=[batch_norm, blocks.0]")
    whole = TinyRun(tiny_inputs, tmp_path / "whole", "plain", more)
    whole.finish()
    run = TinyRun(tiny_inputs, tmp_path / "runs", "plain", more)
    ended = run.run(sabotage=(sabotage.at, 0, "backward", 6, sabotage.send, 15))
    assert ended.codes == [75], ended.output
    (tmp_path / "source").rename(tmp_path / "elsewhere")
    ended = run.finish()
    assert "not finished" not in ended.output
    assert_same_end(run, whole)
    results = [json.loads((each.run_dir / "results.json").read_text())["accuracy"] for each in (run, whole)]
    assert results[0] == results[1]  # evaluated with the statistics with which it was trained
    assert json.loads((run.run_dir / "config.json").read_text())["pretrained_cfg"]["mean"] == HALF["mean"]
    run.finish()


def test_a_finished_run_without_checkpoints_that_is_trained_again_starts_from_its_source(source, tiny_inputs, tmp_path):
    more = (f"--student.weights={source(**HALF)}", "--train.freeze=[blocks.0]")
    run = TinyRun(tiny_inputs, tmp_path / "runs", "plain", more)
    run.finish()
    shutil.rmtree(run.run_dir / "ckpt")
    run.finish("--train.epochs=3", "--override-resume")
    found, first = (load_file(each) for each in (run.run_dir / "student.safetensors", source() / "model.safetensors"))
    kept = [key for key in first if key.startswith("blocks.0.")]
    assert kept
    assert all(torch.equal(found[key], first[key]) for key in kept)


@pytest.mark.parametrize("change", ["statistics", "given later", "dropped"])
def test_other_first_weights_or_statistics_are_refused_for_a_run_that_was_begun(change, source, tiny_inputs, tmp_path):
    given = (f"--student.weights={source(**HALF)}",)
    first = () if change == "given later" else given
    run = TinyRun(tiny_inputs, tmp_path / "runs", "plain", first)
    ended = run.run(sabotage=(sabotage.at, 0, "backward", 6, sabotage.send, 15))
    assert ended.codes == [75], ended.output
    if change == "statistics":
        source(mean=[0.25] * 3, std=[0.5] * 3)
    again = dataclasses.replace(run, more=() if change == "dropped" else given).run()
    assert again.codes == [7], again.output
    assert "the student's first weights" in again.output


def test_another_class_map_is_another_input(prepared, folder, tmp_path):
    def hashes(mapping):
        (tmp_path / "map.json").write_text(json.dumps(mapping))
        names = [f"digit {number}" for number in range(10)]
        weights = str(folder(label_names=names))
        teacher = TeacherConfig("resnet10t", SMALL, weights=weights, classes=str(tmp_path / "map.json"))
        return fingerprints(prepared(), {"conv": teacher})

    ordered, swapped = {str(number): number for number in range(10)}, {str(number): 9 - number for number in range(10)}
    one, other = hashes(ordered), hashes(swapped)
    assert {name for name in one if one[name] != other[name]} == {"teacher conv, description"}


def test_a_head_of_other_classes_is_left_out_and_one_of_the_same_is_put_in_order(prepared, folder):
    digits = [str(number) for number in range(10)]
    state = load_file(folder() / "model.safetensors")

    def start(names, **settings):
        run = prepared(name="resnet10t", kwargs=SMALL, weights=str(folder(label_names=names)), **settings)
        network = run.build_student_without_weights()
        started = run.start_student(network)
        return network.model.fc.weight, started

    weight, started = start(digits)
    assert torch.equal(weight, state["fc.weight"])
    assert started.new == frozenset()
    weight, started = start(digits[::-1])
    assert torch.equal(weight, state["fc.weight"].flip(0))
    assert "of the head's 10 classes the data's are taken, by name" in started.notes
    weight, started = start(list("abcdefghij"))
    assert started.new == {"fc.weight", "fc.bias"}
    assert weight.abs().max() < 0.01
    assert "the head is of 10 other classes (a, b, c, ...) and is left out" in started.notes


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"pretrained_cfg": {"mean": [float("nan")] * 3, "std": [0.5] * 3}},
            r"mean=\[nan, nan, nan\] must be a number",
        ),
        ({"pretrained_cfg": {"mean": [123.7, 116.3, 103.5], "std": [58.4, 57.1, 57.4]}}, r"for pixels in 0\.\.1"),
        ({"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5, 0, 0.5]}}, r"std=.* must be a number above 0"),
        ({"pretrained_cfg": {"mean": [0.5] * 3}}, "of mean and std it has one"),
        ({"pretrained_cfg": {"mean": 0.5, "std": [0.5] * 3}}, r"mean=0\.5 must be a number for each channel"),
        ({"pretrained_cfg": {"input_size": [3, "224", "224"]}}, r"input_size=.* must be three numbers"),
        ({"pretrained_cfg": {"input_size": []}}, r"input_size=\[\] must be three numbers"),
        ({"pretrained_cfg": {"input_size": [3, 100000, 100000]}}, "input_size=.* must be three numbers"),
        ({"pretrained_cfg": {"label_offset": "x"}}, "label_offset='x' must be a number"),
        ({"label_names": 7}, "label_names=7 must be a list of texts"),
        ({"num_classes": "3"}, "num_classes='3' must be a number"),
        ({"architecture": None}, "architecture=None must be a name"),
    ],
)
def test_a_description_that_cannot_be_is_refused_with_its_value(content, said, folder):
    with pytest.raises(ConfigError, match=rf"config\.json does not describe a model: .*{said}"):
        find_pretrained(str(folder(**content)))


def test_a_checkpoints_student_is_described_by_its_run_folder(calm):
    run = calm()
    step = sorted((run.run_dir / "ckpt").iterdir())[-1]
    for name in (step / "student.safetensors", step):
        assert find_pretrained(str(name)).description == find_pretrained(str(run.run_dir)).description


def test_a_run_of_a_network_that_was_named_by_a_folder_leaves_its_name_and_arguments(prepared, folder):
    run = prepared(name=f"local-dir:{folder(model_args=SMALL)}", kwargs={}, pretrained=True)
    network = run.build_student()
    described = describe_student(run, network)
    assert (described["architecture"], described["model_args"]) == ("resnet10t", SMALL)
    alone = prepared(name=f"local-dir:{folder(model_args=SMALL)}", kwargs={})
    assert check_networks(alone)[-1].endswith("not its weights; student.pretrained=true takes both")


def test_more_classes_than_images_are_refused(prepared, monkeypatch):
    run = prepared()
    monkeypatch.setattr(PreparedRun, "num_classes", 2000)
    with pytest.raises(ConfigError, match=r"has 2000 classes and 1797 images; give at least one image of each class"):
        check_networks(run)


def test_batch_norms_of_a_network_from_nothing_are_not_frozen(prepared):
    run = prepared(name="resnet10t", kwargs=SMALL)
    frozen = dataclasses.replace(run.config.train, freeze=("batch_norm",))
    with pytest.raises(ConfigError, match=r"train\.freeze=batch_norm: the network starts from nothing"):
        check_networks(dataclasses.replace(run, config=dataclasses.replace(run.config, train=frozen)))


# ---------------------------------------------------------------------------------------------------------------------
# The recipes for own images


def parse(*argv):
    return cli.parse_arguments(["--engine.name", "plain", *argv])


@pytest.mark.slow
def test_the_recipe_own_starts_from_what_it_names(tiny_digits, tmp_path):
    """With weights of the same networks that nobody has trained, in folders instead of the hub."""
    for name in ("deit_small_patch16_224", "regnety_040"):
        (tmp_path / name).mkdir()
        save_file(timm.create_model(name).state_dict(), tmp_path / name / "model.safetensors")
    arguments = parse(
        "--config", "own", "--data.train", "digits", "--runs_dir", str(tmp_path),
        "--student.pretrained", f"local-dir:{tmp_path / 'deit_small_patch16_224'}",
        "--teachers.conv.pretrained", f"local-dir:{tmp_path / 'regnety_040'}",
    )  # fmt: skip
    runs = arguments.teacher_run_configs
    assert {name: run.student.name for name, run in runs.items()} == {"conv": "regnety_040", "inv": "rednet50"}
    setups = check_all_settings(arguments.config, runs, World(), same_run=True)
    said = check_networks(
        with_images(arguments.config, runs, setups, {LATEST.pixels: (Reader(tiny_digits), Reader(tiny_digits))})
    )
    (trunk,) = (line for line in said if line.startswith("student.pretrained") and ": taken" in line)
    assert "taken: blocks (144), cls_token, norm (2), pos_embed; pos_embed 1x197x384 -> 1x199x384" in trunk
    assert any("teachers.conv.pretrained" in line and "new: head.fc: 1000 -> 10 classes" in line for line in said)


def test_the_recipes_for_own_images_say_how_long_they_take_and_evaluate_early():
    for recipe in ("own", "own_scratch"):
        arguments = parse("--config", recipe, "--data.train", "digits")
        first = next(iter(arguments.teacher_run_configs.values())).train
        assert arguments.config.train.forecast
        assert first.eval_every_epochs / first.epochs <= 0.15  # of the first of three runs: within a tenth of all
