"""cit-scale export: every format says what the student says, and a file that does not is refused."""

import copy
import json
import pickle
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from scipy.stats import binomtest
from tiny_run import TINY_CIT

import cit_scale.models  # noqa: F401  registers ours with timm
from cit_scale.distributed.world import World
from cit_scale.errors import ConfigError, MissingInputError, RefusedError
from cit_scale.export import onnx as onnx_module
from cit_scale.export import write as write_module
from cit_scale.export.commands import export as main
from cit_scale.export.program import Program, example_images, write_pt2, write_torchscript
from cit_scale.export.proof import Proof, mcnemar
from cit_scale.export.write import Form, export
from cit_scale.inference.classifier import OpenedNetwork, classifier_of, open_classifier, open_network
from cit_scale.inference.exported import open_exported
from cit_scale.inference.images import resize_and_crop
from cit_scale.inference.interface import Interface, read_interface
from cit_scale.models.network import build_network

CPU = torch.device("cpu")
SIZE = 32

NETWORKS = {
    "two stems": ("cit_tiny_patch16_224", TINY_CIT, ("conv", "inv")),
    "one stem": ("cit_tiny_patch16_224", TINY_CIT, ("inv",)),
    "no stem": ("cit_tiny_patch16_224", {**TINY_CIT, "aligned": False}, ("conv", "inv")),
    "rednet": ("rednet26", {"layers": (1, 1, 1, 1), "base_width": 32, "stem_width": 16}, ()),
    "mobilenet": ("mobilenetv3_small_050", {}, ("conv", "inv")),
}


def opened_network(name, kwargs, teachers, own_size=None):
    torch.manual_seed(0)
    network = build_network(name, kwargs, num_classes=10, image_size=SIZE, teachers=teachers, own_size=own_size).eval()
    with torch.no_grad():  # statistics and scales that are not at rest
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
    classes = tuple(f"class {number}" for number in range(10))
    interface = Interface(classes, network.heads, SIZE, 0.875)
    return OpenedNetwork("net", None, network, interface, {"label_names": classes}, None, ())


@pytest.fixture(scope="module", params=NETWORKS)
def opened(request):
    return opened_network(*NETWORKS[request.param])


@pytest.fixture(scope="module")
def two_stems():
    return opened_network(*NETWORKS["two stems"])


@pytest.fixture(scope="module")
def run(calm):
    return calm("plain").run_dir


@pytest.fixture
def run_copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def images(count, seed=0):
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.manual_seed(seed))


def text_of(opened, **changed):
    return copy.copy(Interface(opened.interface.classes, ("logits",), SIZE, 0.875, **changed)).to_json()


def write(opened, kind, path):
    interface = read_interface(text_of(opened), "test")
    program = Program(copy.deepcopy(opened.network))
    writers = {
        "onnx": lambda: onnx_module.write_onnx(program, interface, path, interface.to_json()),
        "pt2": lambda: write_pt2(program, SIZE, path, interface.to_json()),
        "torchscript": lambda: write_torchscript(program, SIZE, path, interface.to_json()),
    }
    writers[kind]()
    return interface


@pytest.mark.parametrize("kind", ["onnx", "pt2", "torchscript"])
def test_a_file_says_what_the_student_says_for_any_number_of_images(opened, kind, tmp_path):
    path = tmp_path / f"net.{kind}"
    write(opened, kind, path)
    student, file = classifier_of(opened, CPU), open_classifier(str(path), World())
    assert file.classes == opened.interface.classes
    for count in (1, 2, 5):
        batch = images(count)
        expected = list(student.classify(batch).values())[-1]
        assert torch.allclose(file.classify(batch)["logits"], expected, atol=2e-5 * expected.abs().max())


def test_an_onnx_file_has_no_operator_of_ours(opened, tmp_path):
    write(opened, "onnx", tmp_path / "net.onnx")
    model = onnx.load(str(tmp_path / "net.onnx"))
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} <= {""}
    assert not model.functions


@pytest.mark.parametrize("shape", [(32, 32), (50, 77), (200, 151), (20, 33), (300, 37), (33, 20)])
def test_resizing_inside_the_graph_is_the_trainers(two_stems, shape, tmp_path):
    interface = write(two_stems, "onnx", tmp_path / "net.onnx")
    whole = Interface(interface.classes, interface.heads, SIZE, 0.875, pixels=True)
    path = tmp_path / "any.onnx"
    onnx_module.put_making_ready_inside(tmp_path / "net.onnx", whole, path, whole.to_json())
    # The pixels themselves, read where they are ready.
    model = onnx.load(str(path))
    model.graph.output.append(onnx.helper.make_tensor_value_info("ready_images", onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    noise = torch.rand(1, 3, *shape, generator=torch.manual_seed(1))
    pixels = (255 * torch.nn.functional.avg_pool2d(noise, 3, 1, 1)).to(torch.uint8)[0]
    (ready,) = session.run(["ready_images"], {session.get_inputs()[0].name: pixels.permute(1, 2, 0)[None].numpy()})
    difference = np.abs(255 * ready[0] - resize_and_crop(pixels, SIZE, 0.875).numpy())
    assert difference.max() < 1.01
    assert (difference > 0.5).mean() < 0.02
    assert open_classifier(str(path), World()).interface.pixels


def test_a_network_that_sees_another_size_is_exported_with_it(tmp_path):
    opened = opened_network("resnet10t", {"channels": [8, 8, 16, 16], "stem_width": 8}, (), own_size=48)
    write(opened, "onnx", tmp_path / "net.onnx")
    batch = images(3)
    expected = classifier_of(opened, CPU).classify(batch)["cls"]
    found = open_classifier(str(tmp_path / "net.onnx"), World()).classify(batch)["logits"]
    assert torch.allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize(
    "form",
    [
        Form("onnx"),
        Form("onnx", "fp16"),
        Form("onnx", "int8"),
        Form("onnx", "float32", any_size=True),
        Form("onnx", "int8", any_size=True),
        Form("pt2"),
        Form("torchscript"),
        Form("timm"),
    ],
    ids=lambda form: form.file_name("student"),
)
def test_a_run_is_exported_and_measured(run_copy, form):
    path, proof = export(open_network(str(run_copy), World()), form)
    assert path == run_copy / form.file_name("student")
    assert proof.images > 0
    assert proof.complaint() is None
    assert proof.difference > 0 or form.kind in ("pt2", "torchscript")
    assert not list(run_copy.glob(".*partial*"))
    if form.kind != "timm":
        assert main_says(run_copy, path).scores["logits"].top1 == proof.top1


def main_says(run_dir, path):
    from cit_scale.inference.evaluate import evaluate_classifier

    classifier = open_classifier(str(path), World())
    assert classifier.run_dir == run_dir  # in whose folder it lies: its evaluation set is the run's
    return evaluate_classifier(classifier, World())


def test_a_timm_folder_is_opened_by_timm_alone(run_copy):
    path, _ = export(open_network(str(run_copy), World()), Form("timm"))
    model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    opened = open_network(str(run_copy), World())
    batch = torch.rand(2, 3, 16, 16)
    expected = classifier_of(opened, CPU).classify((255 * batch).to(torch.uint8))["average"]
    config = timm.data.resolve_data_config(model=model)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        assert torch.allclose(model(((255 * batch).to(torch.uint8) / 255 - mean) / std), expected, atol=1e-5)
    assert list(model.pretrained_cfg["label_names"]) == list(opened.interface.classes)


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong is refused


def with_another_mean(program):
    program.image_mean += 0.02
    return program


def with_two_classes_swapped(program):
    inner = program.model

    class Swapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, images):
            logits = self.inner(images)
            return logits[:, [1, 0, *range(2, logits.shape[1])]]

    program.model = Swapped()
    return program


@pytest.mark.parametrize("harm", [with_another_mean, with_two_classes_swapped])
@pytest.mark.parametrize(
    "form", [Form("onnx"), Form("onnx", "int8", any_size=True), Form("pt2"), Form("torchscript")], ids=str
)
def test_a_wrong_file_is_not_kept(run_copy, harm, form, monkeypatch, capsys):
    monkeypatch.setattr(write_module, "Program", lambda *arguments: harm(Program(*arguments)))
    arguments = ["--to", form.kind, "--precision", form.precision, *(["--any-size"] if form.any_size else [])]
    assert main([str(run_copy), *arguments]) == RefusedError.exit_code
    assert "is not kept: " in capsys.readouterr().err
    assert not (run_copy / form.file_name("student")).exists()
    assert not list(run_copy.glob(".*partial*"))


def test_a_wrong_timm_folder_is_not_kept(run_copy, monkeypatch):
    from cit_scale.export import timm_folder

    def describe(*arguments, **options):
        description = real(*arguments, **options)
        description["pretrained_cfg"]["mean"] = [0.1] * 3
        return description

    real = timm_folder.describe
    monkeypatch.setattr(timm_folder, "describe", describe)
    with pytest.raises(RefusedError, match="is not kept"):
        export(open_network(str(run_copy), World()), Form("timm"))
    assert not (run_copy / "student_timm").exists()


def test_a_wrong_file_is_kept_on_request_and_said(run_copy, monkeypatch, capsys):
    monkeypatch.setattr(write_module, "Program", lambda *arguments: with_another_mean(Program(*arguments)))
    assert main([str(run_copy), "--to", "onnx", "--allow-loss"]) == 0
    assert "kept by --allow-loss although" in capsys.readouterr().out
    assert (run_copy / "student.onnx").exists()


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (0, 1), (3, 9), (9, 3), (0, 6), (20, 41)])
def test_mcnemars_test_is_the_binomial_one(gained, lost):
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected)


def proof_with(**changed):
    same = {
        "images": 1000,
        "student_top1": 80.0,
        "top1": 80.0,
        "changed": 0,
        "difference": 0.0,
        "scale": 10.0,
        "tolerance": 0.5,
        "p_value": 1.0,
        "latency_ms": {},
        "student_latency_ms": {},
    }
    return Proof(**{**same, **changed})


def test_a_loss_is_refused_only_beyond_a_tenth_of_a_point_and_chance():
    assert proof_with(top1=79.0, p_value=0.01).complaint() is not None
    assert proof_with(top1=79.0, p_value=0.2).complaint() is None
    assert proof_with(top1=79.95, p_value=0.01).complaint() is None
    assert proof_with(top1=81.0, p_value=0.01).complaint() is None


@pytest.mark.parametrize("difference", [5.1, float("nan"), float("inf")])
def test_logits_that_the_arithmetic_does_not_explain_are_refused(difference):
    assert proof_with(difference=5.0).complaint() is None
    assert "its logits differ" in proof_with(difference=difference).complaint()


# ---------------------------------------------------------------------------------------------------------------------
# Files and how they are opened


def test_onnxruntime_alone_classifies_a_photograph(run_copy, tmp_path):
    """As docs/using.md shows it: nothing of this project, nor torch."""
    path, _ = export(open_network(str(run_copy), World()), Form("onnx", any_size=True))
    program = """
import json, sys
import numpy as np, onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1])
classes = session.get_modelmeta().custom_metadata_map["classes"].split("\\n")
pixels = np.asarray(Image.open(sys.argv[2]).convert("RGB"))[None]  # (1, H, W, 3) uint8
logits = session.run(None, {session.get_inputs()[0].name: pixels})[0][0]
print(classes[logits.argmax()])
assert "torch" not in sys.modules and "cit_scale" not in sys.modules
"""
    image = tmp_path / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(image)
    ended = subprocess.run([sys.executable, "-c", program, path, image], capture_output=True, text=True, check=True)
    classifier = open_classifier(str(run_copy), World())
    logits = classifier.classify(classifier.prepare(image.read_bytes())[None])["average"]
    assert ended.stdout.strip() == classifier.classes[logits.argmax()]


def test_class_names_with_line_breaks_survive(tmp_path):
    opened = opened_network(*NETWORKS["two stems"])
    names = tuple(f'a\n"{number}"\r<b>' for number in range(10))
    interface = Interface(names, ("logits",), SIZE, 0.875)
    program = Program(opened.network)
    onnx_module.write_onnx(program, interface, tmp_path / "net.onnx", interface.to_json())
    write_pt2(program, SIZE, tmp_path / "net.pt2", interface.to_json())
    write_torchscript(program, SIZE, tmp_path / "net.torchscript", interface.to_json())
    for file in tmp_path.iterdir():
        assert open_classifier(str(file), World()).classes == names


@pytest.mark.parametrize("name", ["net.onnx", "net.pt2", "net.torchscript"])
def test_what_is_no_such_file_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(MissingInputError, match="cannot be opened as"):
        open_classifier(str(tmp_path / name), World())


def test_an_onnx_file_of_another_program_is_refused(tmp_path):
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:])
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), str(tmp_path / "x.onnx"))
    with pytest.raises(ConfigError, match="was not written by cit-scale export"):
        open_classifier(str(tmp_path / "x.onnx"), World())


def test_a_file_with_other_classes_than_logits_is_refused(two_stems, tmp_path):
    interface = write(two_stems, "onnx", tmp_path / "net.onnx")
    fewer = Interface(interface.classes[:3], interface.heads, SIZE, 0.875)
    onnx_module.note_in(tmp_path / "net.onnx", fewer, fewer.to_json())
    with pytest.raises(ConfigError, match="names 3 classes; export it again"):
        open_classifier(str(tmp_path / "net.onnx"), World())


@pytest.mark.parametrize("kind", ["onnx", "pt2", "torchscript"])
def test_a_damaged_file_is_refused(two_stems, kind, tmp_path):
    path = tmp_path / f"net.{kind}"
    write(two_stems, kind, path)
    data = path.read_bytes()
    refused = 0
    for place in np.random.default_rng(0).integers(0, len(data), 8):
        changed = bytearray(data)
        changed[place] ^= 0x10
        path.write_bytes(changed)
        try:
            found = open_classifier(str(path), World())
        except ConfigError:
            refused += 1
        else:  # the bit was in the padding of a zip file
            path.write_bytes(data)
            whole = open_classifier(str(path), World())
            assert torch.equal(found.classify(images(2))["logits"], whole.classify(images(2))["logits"])
    assert refused >= 6


class Planted:
    def __reduce__(self):
        return print, ("planted",)


def with_pickles(name, data):
    """Weights that torch.export.load would read by pickle without restriction."""
    if name.endswith("weights_config.json"):
        content = json.loads(data)
        for each in content["config"].values():
            each["use_pickle"] = True
        return json.dumps(content).encode()
    return pickle.dumps(Planted()) if "/weights/weight_" in name else data


def with_a_guard(name, data):
    """Guards are executed as Python."""
    if not name.endswith("models/model.json"):
        return data
    content = json.loads(data)
    content["guards_code"] = ["print('planted') is None"]
    return json.dumps(content).encode()


def with_an_expression(name, data):
    """sympy evaluates expressions of sizes as Python."""
    planted = "__import__('builtins').print('planted') or Symbol('s0', positive=True, integer=True)"
    return re.sub(rb'"expr_str": "[^"]*"', json.dumps({"expr_str": planted})[1:-1].encode(), data)


@pytest.mark.parametrize("plant", [with_pickles, with_a_guard, with_an_expression])
def test_a_pt2_file_cannot_run_code(two_stems, tmp_path, plant, capsys):
    good, bad = tmp_path / "net.pt2", tmp_path / "bad.pt2"
    write(two_stems, "pt2", good)
    changed = 0
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(bad, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, plant(name, data))
            changed += plant(name, data) != data
    assert changed
    with pytest.raises(RefusedError, match="can execute code when it is loaded"):
        open_exported(bad, CPU)
    assert "planted" not in capsys.readouterr().out


def test_a_torchscript_file_cannot_write_files(tmp_path):
    target = tmp_path / "victim"
    target.write_text("precious")

    class Writes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.place = str(target)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            torch.save(images, self.place)
            return images.mean(dim=(2, 3))

    noted = Interface(("a", "b", "c"), ("logits",), SIZE, 0.875).to_json()
    torch.jit.save(torch.jit.script(Writes()), str(tmp_path / "x.torchscript"), _extra_files={"cit_scale.json": noted})
    with pytest.raises(RefusedError, match="does more than compute: aten::save"):
        open_exported(tmp_path / "x.torchscript", CPU)
    assert target.read_text() == "precious"


def test_a_torchscript_file_cannot_write_files_while_it_is_loaded(tmp_path):
    target = tmp_path / "victim"
    target.write_text("precious")

    class Loads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.place = str(target)

        @torch.jit.export
        def __getstate__(self):
            return self.place, self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[str, bool]):
            self.place, self.training = state
            torch.save(torch.zeros(1), self.place)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean(dim=(2, 3))

    noted = Interface(("a", "b", "c"), ("logits",), SIZE, 0.875).to_json()
    torch.jit.save(torch.jit.script(Loads()), str(tmp_path / "x.torchscript"), _extra_files={"cit_scale.json": noted})
    with pytest.raises(RefusedError, match="runs methods when it is loaded"):
        open_exported(tmp_path / "x.torchscript", CPU)
    assert target.read_text() == "precious"


def test_weights_that_differ_have_files_of_other_names(run_copy):
    first, _ = export(open_network(str(run_copy), World()), Form("torchscript"))
    second, _ = export(open_network(str(run_copy / "student_ema.safetensors"), World()), Form("torchscript"))
    assert (first.name, second.name) == ("student.torchscript", "student_ema.torchscript")


def test_a_broken_image_does_not_end_the_calibration(run_copy, tmp_path):
    for name in open_network(str(run_copy), World()).interface.classes:
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "data" / name / "0.png")
        data = (tmp_path / "data" / name / "0.png").read_bytes()
        (tmp_path / "data" / name / "1.png").write_bytes(data[: len(data) - 20])
    path, _ = export(open_network(str(run_copy), World()), Form("onnx", "int8"), calibration=str(tmp_path / "data"))
    assert path.exists()


def test_a_file_that_has_no_answer_for_an_image_is_refused(run_copy, monkeypatch):
    from cit_scale.export import proof

    real, calls = proof.classify_all, []

    def lose_one(items, *arguments, **options):
        calls.append(arguments)
        kept = list(items)
        real(iter(kept if len(calls) == 1 else kept[1:]), *arguments, **options)

    monkeypatch.setattr(proof, "classify_all", lose_one)
    with pytest.raises(RefusedError, match="has an answer for"):
        export(open_network(str(run_copy), World()), Form("torchscript"))


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["RUN", "--to", "pt2", "--precision", "int8"], 2, "are for --to onnx"),
        (["RUN", "--to", "onnx", "--out", "FOLDER"], 2, "is a folder; give a file"),
        (["RUN", "--to", "onnx", "--out", "x.pt2"], 2, "does not end in .onnx"),
        (["RUN", "--to", "onnx", "--out", "no/such/folder/x.onnx"], 3, "lies in no folder that exists"),
        (["RUN", "--to", "timm", "--out", "RUN"], 2, "exists and is not overwritten; give a new folder by --out"),
        (["nothing", "--to", "onnx"], 3, "do not exist"),
        (["RUN", "--to", "onnx", "--data", "nowhere"], 3, "does not exist"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, arguments, code, said, capsys):
    places = {"RUN": str(run), "FOLDER": str(tmp_path)}
    assert main([places.get(each, each) for each in arguments]) == code
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_without_the_packages_the_extra_is_named(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main([str(run), "--to", "onnx"]) == 2
    assert "pip install 'cit-scale[export]'" in capsys.readouterr().err


def test_example_images_are_two():
    assert example_images(8).shape == (2, 3, 8, 8)
