"""cit-scale evaluate: the numbers of training's own evaluation, for runs, weights and whatever else classifies."""

import json
import shutil

import pytest
import timm
import torch
from PIL import Image
from ranks import run_on_ranks
from safetensors.torch import load_file, save_file
from tiny_run import CLASSES

from cit_scale.distributed.world import World
from cit_scale.errors import ConfigError, MissingInputError
from cit_scale.inference.classifier import open_classifier, open_network
from cit_scale.inference.commands import evaluate as main
from cit_scale.inference.evaluate import evaluate_classifier


def scores_of(name, **options):
    return evaluate_classifier(open_classifier(str(name), World()), World(), **options)


def test_a_run_gets_the_numbers_of_its_closing_table(finished):
    found = scores_of(finished)
    results = json.loads((finished / "results.json").read_text())
    noted = results["accuracy"]["student"]
    assert found.images == results["eval_images"]
    for head, scores in found.scores.items():
        assert (scores.top1, scores.class_mean) == (noted["top1"][head], pytest.approx(noted["class_mean"][head]))
    assert list(found.scores) == ["cls", "conv", "average"]


def test_weights_beside_their_description_are_as_good_as_the_run(finished):
    average = scores_of(finished / "student_ema.safetensors")
    noted = json.loads((finished / "results.json").read_text())["accuracy"]["student ema"]
    assert average.scores["average"].top1 == noted["top1"]["average"]


def test_a_run_that_goes_on_is_read_at_its_newest_checkpoint(copy, capsys):
    (copy / "results.json").unlink()
    newest = max(path.name for path in (copy / "ckpt").glob("step_*"))
    assert main([str(copy)]) == 0
    assert f"its checkpoint of step {int(newest[5:])} is taken" in capsys.readouterr().err


def test_a_checkpoint_that_is_deleted_meanwhile_is_not_the_end(copy, monkeypatch):
    from cit_scale.inference import classifier

    (copy / "results.json").unlink()
    steps, asked = classifier.saved_steps(copy / "ckpt"), []

    def list_late(folder):
        asked.append(folder)
        return [*steps, 99] if len(asked) == 1 else steps

    monkeypatch.setattr(classifier, "saved_steps", list_late)
    assert open_network(str(copy), World()).notes[0].endswith(f"step {max(steps)} is taken")


def test_a_checkpoint_that_cannot_be_read_gives_way_to_the_one_before(copy):
    (copy / "results.json").unlink()
    newest = max((copy / "ckpt").glob("step_*"))
    (newest / "student.safetensors").write_bytes(b"cut")
    older = sorted((copy / "ckpt").glob("step_*"))[-2]
    assert open_network(str(copy), World()).file == older / "student.safetensors"


def test_what_a_description_leaves_open_is_said(copy):
    description = json.loads((copy / "config.json").read_text())
    del description["pretrained_cfg"]["crop_pct"]
    (copy / "config.json").write_text(json.dumps(description))
    assert any("does not say crop_pct" in note for note in open_network(str(copy), World()).notes)


def test_a_run_without_a_checkpoint_says_so(copy):
    (copy / "results.json").unlink()
    shutil.rmtree(copy / "ckpt")
    with pytest.raises(MissingInputError, match="has no checkpoint yet"):
        open_network(str(copy), World())


def numbers_on(world, run):
    torch.set_num_threads(4 // world.world_size)  # as a machine with four cores would have it
    found = evaluate_classifier(open_classifier(run, world), world, batch_size=3)
    return None if found is None else {**found.to_json(), "seconds": 0, "images_per_s": 0}


def test_the_numbers_are_the_same_at_any_number_of_ranks(finished):
    one, two, four = (run_on_ranks(ranks, numbers_on, str(finished)) for ranks in (1, 2, 4))
    assert one[0]["images"] > 0
    assert one[0] == two[0] == four[0]
    assert two[1] is None


def test_json_on_the_screen_is_all_that_is_printed(finished, capsys):
    assert main([str(finished), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] > 0


@pytest.fixture
def photos_of(tmp_path):
    """``photos_of(*classes)``: a folder with two images of each class."""

    def make(*classes):
        for number, name in enumerate(classes):
            folder = tmp_path / "photos" / name
            folder.mkdir(parents=True)
            for image in range(2):
                Image.new("RGB", (20, 30), (60 * number, 90 * image, 120)).save(folder / f"{image}.png")
        return tmp_path / "photos"

    return make


def test_unknown_classes_are_refused_or_left_out(finished, photos_of):
    folder = photos_of("0", "1", "a cat")
    with pytest.raises(ConfigError, match=r"does not know 1 of the 3 classes of the data: 'a cat'.*--only-known"):
        scores_of(finished, data=str(folder))
    found = scores_of(finished, data=str(folder), only_known=True)
    assert (found.images, found.left_out) == (4, 2)


def test_classes_that_differ_by_case_alone_are_told_apart(tmp_path, finished):
    from cit_scale.models.classes import columns_by_class

    names = {"label_names": ["Cat", "cat", "dog_1"]}
    assert columns_by_class(["cat", "Cat", "dog 1", "bird"], names) == [[1], [0], [2], []]


def test_where_no_class_is_known_nothing_is_evaluated(finished, photos_of):
    with pytest.raises(ConfigError, match="does not know any of the 2 classes of the data"):
        scores_of(finished, data=str(photos_of("cat", "dog")), only_known=True)


def test_an_image_that_cannot_be_used_is_left_out_and_named(finished, photos_of, capsys):
    folder = photos_of("0", "1")
    data = (folder / "0" / "0.png").read_bytes()
    (folder / "0" / "0.png").write_bytes(data[: len(data) // 2])
    assert main([str(finished), "--data", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "unusable 1" in printed
    assert "0.png" in printed
    assert "images   3," in printed


def test_a_folder_in_the_hubs_layout_is_classified_by_its_own_names(tmp_path, photos_of):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=2, channels=[8, 8, 16, 16], stem_width=8)
    (tmp_path / "net").mkdir()
    save_file(model.state_dict(), tmp_path / "net" / "model.safetensors")
    content = {
        "architecture": "resnet10t",
        "num_classes": 2,
        "label_names": ["wild_dog", "Cat"],
        "model_args": {"channels": [8, 8, 16, 16], "stem_width": 8},
        "pretrained_cfg": {"input_size": [3, 32, 32], "interpolation": "bilinear", "crop_pct": 0.9},
    }
    (tmp_path / "net" / "config.json").write_text(json.dumps(content))
    found = open_classifier(f"local-dir:{tmp_path / 'net'}", World())
    assert found.classes == ("wild_dog", "Cat")
    assert any("interpolation is bilinear" in note for note in found.notes)
    assert evaluate_classifier(found, World(), data=str(photos_of("cat", "wild dog"))).images == 4


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda content: content.update(label_names=["a"]), "1 label_names and num_classes=3"),
        (lambda content: content["pretrained_cfg"].update(input_size=[3, 16, 24]), "only square ones"),
        (lambda content: content["pretrained_cfg"].update(crop_pct=0), "crop_pct=0 must be"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(copy, harm, said):
    content = json.loads((copy / "config.json").read_text())
    harm(content)
    (copy / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=said):
        open_network(str(copy), World())


def test_weights_without_a_description_are_refused(finished, tmp_path):
    save_file(load_file(finished / "student.safetensors"), tmp_path / "weights.safetensors")
    with pytest.raises(ConfigError, match=r"without a config\.json"):
        open_network(str(tmp_path / "weights.safetensors"), World())


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nothing_here.onnx"], 3, "does not exist"),
        (["runs/nothing_here"], 3, "runs/nothing_here does not exist"),
        ([""], 2, "name is empty"),
        (["RUN", "--json", "RUN/student.safetensors"], 7, "would overwrite"),
        (["RUN", "--data", "nowhere"], 3, "does not exist"),
        (["RUN", "--judge", "a"], 2, "needs a classifier of ImageNet"),
        (["RUN", "--json", "no/such/folder/x.json"], 3, "lies in no folder that exists"),
        (["RUN", "--judge", "a", "--only-known"], 2, "leave out --only-known"),
        (["RUN/config.json"], 2, "describes weights; give the folder in which both lie"),
    ],
)
def test_bad_input_is_one_line(finished, arguments, code, said, capsys):
    assert main([each.replace("RUN", str(finished)) for each in arguments]) == code
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert error.startswith("error: ")


def test_the_data_has_as_many_classes_as_the_run(finished):
    assert len(open_network(str(finished), World()).interface.classes) == CLASSES
