"""Nothing that is loaded is executed: an object is planted in each thing that a run reads, and leaves no mark."""

import ast
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import CLASSES

from cit_scale import cli
from cit_scale.checkpoint.store import FORMAT, _manifest
from cit_scale.errors import ConfigError

pytestmark = pytest.mark.fault

REPOSITORY = Path(__file__).parents[1]


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.command = f"touch {mark}"

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "mark"


def test_the_planted_object_works(mark):
    pickle.loads(pickle.dumps(Planted(mark)))
    assert mark.exists()


def as_pickle(mark, path=None):
    data = pickle.dumps(Planted(mark))
    if path is not None:
        path.write_bytes(data)
    return data


def as_torch(mark, path, state=None):
    torch.save({**(state or {}), "planted": Planted(mark)}, path)


def seal(folder):
    """A manifest that fits what is in the folder now."""
    sums = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
        if path.name != "MANIFEST.json"
    }
    assert json.loads((folder / "MANIFEST.json").read_text())["format"] == FORMAT
    (folder / "MANIFEST.json").write_text(_manifest(int(folder.name[-6:]), sums))


def run_and_look(run, mark, *more, code=None):
    ended = run.run(*more)
    assert not mark.exists(), "it ran"
    assert "Traceback" not in ended.output, ended.output
    assert ended.code in ((0, 2, 3, 4, 7) if code is None else (code,)), ended.output
    return ended


@pytest.fixture
def alone(halted):
    return dataclasses.replace(halted, layout="plain")


CHECKPOINT = ["student.safetensors", "student_ema.safetensors", "optimizer_001.safetensors", "index.json", "meta.json"]


@pytest.mark.parametrize("file", [*CHECKPOINT, "MANIFEST.json"])
@pytest.mark.parametrize("how", [as_pickle, as_torch])
def test_in_a_checkpoint_it_is_damage(file, how, alone, mark):
    how(mark, alone.checkpoint(8) / file)
    assert "continues after step 4" in run_and_look(alone, mark, code=0).outputs[0]


@pytest.mark.parametrize("file", CHECKPOINT)
@pytest.mark.parametrize("how", [as_pickle, as_torch])
def test_in_a_checkpoint_whose_sums_fit_it_is_refused(file, how, alone, mark):
    how(mark, alone.checkpoint(8) / file)
    seal(alone.checkpoint(8))
    run_and_look(alone, mark, code=2)


@pytest.mark.parametrize("where", ["teacher", "student"])
@pytest.mark.parametrize("kind", ["pickle", "torch", "torch in a state dict", "old torch", "released", "safetensors"])
def test_in_weights_it_is_refused(where, kind, tiny_run, mark, tmp_path):
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    match kind:
        case "pickle" | "safetensors":
            as_pickle(mark, path)
        case "torch":
            torch.save(Planted(mark), path)
        case "torch in a state dict":
            as_torch(mark, path, {"head.weight": torch.ones(3, 3)})
        case "old torch":
            torch.save(Planted(mark), path, _use_new_zipfile_serialization=False)
        case "released":  # as mmcls writes them, with a meta entry
            torch.save({"meta": Planted(mark), "state_dict": {"backbone.x": torch.ones(1)}}, path)
    run = dataclasses.replace(tiny_run, layout="plain")
    option = "--teachers.conv.weights" if where == "teacher" else "--student.weights"
    ended = run_and_look(run, mark, option, str(path), code=3 if kind == "safetensors" else 7)
    assert str(path) in ended.outputs[0]
    assert not run.run_dir.exists()


def folder_of_photos(folder, count=24):
    for i in range(count):
        path = folder / f"class{i % CLASSES}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (12, 12, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def plant_in_folder(folder, mark):
    for name in ("a.pkl", "b.png", "c.npy", "d.pth"):
        as_pickle(mark, folder / "class0" / name)
    return folder


def plant_in_table(folder, mark):
    rows = [f"{path.relative_to(folder)},{path.parent.name}" for path in sorted(folder.rglob("*.png"))]
    as_pickle(mark, folder / "planted.png")
    table = folder / "table.csv"
    table.write_text("\n".join(["path,label", *rows, "planted.png,class0", ""]))
    return table


def plant_as_table(folder, mark):
    as_pickle(mark, folder / "table.csv")
    return folder / "table.csv"


def plant_in_shards(folder, mark):
    shards = folder.with_name("shards")
    shards.mkdir()
    with tarfile.open(shards / "000000.tar", "w") as tar:
        for i, path in enumerate(sorted(folder.rglob("*.png"))):
            members = {"png": path.read_bytes(), "cls": path.parent.name[-1].encode()}
            if i == 1:
                members = {"pkl": as_pickle(mark), **members}
            if i == 2:
                members["png"] = as_pickle(mark)
            for kind, data in members.items():
                info = tarfile.TarInfo(f"{i:03d}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return shards


def plant_as_idx(folder, mark):
    for name in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        as_pickle(mark, folder / name)
    return folder / "images-idx3-ubyte"


DATA = [plant_in_folder, plant_in_table, plant_as_table, plant_in_shards, plant_as_idx]


@pytest.mark.parametrize("plant", DATA)
def test_in_a_data_set_it_is_no_image(plant, tiny_run, mark, tmp_path):
    data = plant(folder_of_photos(tmp_path / "photos"), mark)
    run = dataclasses.replace(tiny_run, layout="plain")
    cache = ["--data.cache_dir", str(tmp_path / "cache")]
    run_and_look(run, mark, "--data.train", str(data), "--data.eval", "null", *cache)


@pytest.mark.parametrize("kind", ["pickle", "pickles in an npz", "object arrays"])
def test_in_the_cache_of_a_data_set_it_is_not_read(kind, tiny_run, mark, tmp_path):
    data = folder_of_photos(tmp_path / "photos")
    run = dataclasses.replace(tiny_run, layout="plain")
    arguments = ["--data.train", str(data), "--data.eval", "null", "--data.cache_dir", str(tmp_path / "cache")]
    assert run.run(*arguments, "--train.epochs", "1").code == 0
    found = list((tmp_path / "cache").rglob("*.npz"))
    assert found
    for path in found:
        names = zipfile.ZipFile(path).namelist()
        if kind == "pickle":
            as_pickle(mark, path)
        elif kind == "object arrays":
            np.savez(path, **{name.removesuffix(".npy"): np.array([Planted(mark)], object) for name in names})
        else:
            with zipfile.ZipFile(path, "w") as file:
                for name in names:
                    file.writestr(name, as_pickle(mark))
    run_and_look(run, mark, *arguments, "--fresh", "--train.epochs", "1")


TAGS = {
    "apply": "!!python/object/apply:os.system ['touch MARK']",
    "new": "!!python/object/new:os.system ['touch MARK']",
    "class path": "{class_path: os.system, init_args: {command: 'touch MARK'}}",
    "subprocess": "{class_path: subprocess.Popen, init_args: {args: 'touch MARK', shell: true}}",
}


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("key", ["name", "student", "student.kwargs", "teachers", "train.epochs"])
def test_in_a_recipe_it_is_a_mistake(tag, key, tiny_run, mark, tmp_path):
    text = TAGS[tag].replace("MARK", str(mark))
    for part in reversed(key.split(".")):
        text = f"{{{part}: {text}}}"
    (tmp_path / "planted.yaml").write_text(text)
    try:
        cli.parse_arguments([*tiny_run.argv, "--config", str(tmp_path / "planted.yaml")])
    except ConfigError:
        pass
    else:  # kwargs are anything: they are what timm gets, which takes no such key
        assert key in ("student.kwargs", "name", "teachers")
    value = TAGS[tag].replace("MARK", str(mark))
    with contextlib.suppress(ConfigError):
        cli.parse_arguments([*tiny_run.argv, f"--{key}={value}"])
    assert not mark.exists()


@pytest.mark.parametrize("key", ["student", "data", "teachers.conv"])
def test_a_module_that_a_recipe_names_is_not_imported(key, tiny_run, mark, tmp_path, monkeypatch):
    """Parsers that build what class_path names would import the module, and run it by that."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "planted_module.py").write_text(f"open({str(mark)!r}, 'w')\nclass Planted: pass\n")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    text = "{class_path: planted_module.Planted}"
    for part in reversed(key.split(".")):
        text = f"{{{part}: {text}}}"
    (tmp_path / "planted.yaml").write_text(text)
    with pytest.raises(ConfigError):
        cli.parse_arguments([*tiny_run.argv, "--config", str(tmp_path / "planted.yaml")])
    assert not mark.exists()


@pytest.mark.parametrize("tag", ["apply", "new"])
def test_in_the_settings_that_a_run_left_it_is_refused(tag, alone, mark):
    path = alone.run_dir / "config.yaml"
    path.write_text(path.read_text() + f"planted: {TAGS[tag].replace('MARK', str(mark))}\n")
    run_and_look(alone, mark, code=7)


@pytest.mark.parametrize("kind", ["pickle", "yaml"])
def test_in_a_ds_config_it_is_a_mistake(kind, tiny_run, mark, tmp_path):
    path = tmp_path / "zero.json"
    if kind == "pickle":
        as_pickle(mark, path)
    else:
        path.write_text(f'{{"zero_optimization": {TAGS["apply"].replace("MARK", str(mark))}}}')
    run_and_look(tiny_run, mark, "--engine.ds_config", str(path), code=2)


def test_in_what_a_run_notes_of_itself_it_is_nothing(halted, mark):
    for name in ("results.json", "env.json", "metrics.jsonl"):
        as_pickle(mark, halted.run_dir / name)
    run_and_look(dataclasses.replace(halted, layout="plain"), mark, code=0)


# --- No way to do it ---

CALLED = "called"

FORBIDDEN = {
    "eval": None,
    "exec": None,
    "compile": CALLED,
    "__import__": None,
    "pickle.load": None,
    "pickle.loads": None,
    "pickle.Unpickler": None,
    "cPickle.load": None,
    "dill.load": None,
    "dill.loads": None,
    "joblib.load": None,
    "marshal.load": None,
    "marshal.loads": None,
    "shelve.open": None,
    "runpy.run_path": None,
    "torch.load": ("weights_only", True),
    "torch.jit.load": None,
    "torch.hub.load": None,
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "yaml.load": None,
    "yaml.load_all": None,
    "yaml.full_load": None,
    "yaml.unsafe_load": None,
    "yaml.unsafe_load_all": None,
    "shutil.unpack_archive": None,
    "os.system": None,
    "dist_checkpoint.load": None,
}
"""Calls by their dotted name as imported; where a keyword makes one harmless, that keyword and its value. np.load's may
be left out, which means the same. CALLED: the name alone may be a variable's."""

FORBIDDEN_METHODS = ("extractall", "load_checkpoint", "read_pickle")
FORBIDDEN_IMPORTS = ("shelve", "marshal", "joblib", "dill", "cloudpickle", "torch.distributed.checkpoint")


def executed_loads(source: str) -> list[str]:
    """What in a module could execute what it reads."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            imported = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module or ""]
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        else:
            continue
        found += [f"import of {name}" for name in imported if name.startswith(FORBIDDEN_IMPORTS)]
    for node in ast.walk(tree):
        # A function that is passed on is as good as called.
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
            name = ast.unparse(node)
            first, _, rest = name.partition(".")
            name = names.get(first, first) + (f".{rest}" if rest else "")
            name = {"numpy.load": "np.load"}.get(name, name)
            if isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_METHODS:
                found.append(f"line {node.lineno}: {name}")
            if name in FORBIDDEN and not _is_harmless(tree, node, FORBIDDEN[name]):
                found.append(f"line {node.lineno}: {name}")
    return found


def _is_harmless(tree, function, way_out):
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.func is function]
    if way_out is CALLED:
        return not calls
    if way_out is None or not calls:
        return False
    keyword, value = way_out
    given = {each.arg: each.value for each in calls[0].keywords}
    if keyword == "allow_pickle" and keyword not in given:
        return len(calls[0].args) < 3 and None not in given
    return isinstance(given.get(keyword), ast.Constant) and given[keyword].value is value


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(f)",
        "import pickle as p\np.loads(f)",
        "from pickle import loads\nloads(f)",
        "from pickle import Unpickler as U\nU(f).load()",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import torch\ntorch.load(f, weights_only=flag)",
        "import torch\nmap(torch.load, files)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import numpy\nnumpy.load(f, None, True)",
        "import numpy as np\nnp.load(f, **options)",
        "import yaml\nyaml.load(f, Loader=yaml.SafeLoader)",
        "import yaml\nyaml.unsafe_load(f)",
        "from yaml import full_load\nfull_load(f)",
        "eval('1')",
        "exec(text)",
        "compile(text, '', 'exec')",
        "tar.extractall(folder)",
        "import shelve",
        "import joblib\njoblib.load(f)",
        "from marshal import loads",
        "import torch.distributed.checkpoint as dcp",
        "engine.load_checkpoint(folder)",
        "import os\nos.system(text)",
    ],
)
def test_the_scan_finds(source):
    assert executed_loads(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(f, weights_only=True)\nmodule.eval()\nmodule.compile()\ntorch.compile(module)",
        "import numpy as np\nnp.load(f)\nnp.load(f, allow_pickle=False)",
        "import json, yaml, pickle\njson.loads(t)\nyaml.safe_load(t)\npickle.dumps(x)\npickle.UnpicklingError",
        "import re\nre.compile('x')",
    ],
)
def test_the_scan_lets_pass(source):
    assert not executed_loads(source)


def test_nothing_in_the_package_can_execute_what_it_reads():
    folders = [REPOSITORY / name for name in ("cit_scale", "launchers")]
    files = [path for folder in folders if folder.exists() for path in sorted(folder.rglob("*.py"))]
    assert len(files) > 40
    found = {str(path.relative_to(REPOSITORY)): executed_loads(path.read_text()) for path in files}
    # Looked at before and after it is loaded, and before it is run: test_export plants files.
    found["cit_scale/inference/exported.py"] = [
        line for line in found["cit_scale/inference/exported.py"] if not line.endswith(": torch.jit.load")
    ]
    found = {path: lines for path, lines in found.items() if lines}
    assert not found, found
