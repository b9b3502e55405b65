"""The layering of the package, read from its imports."""

import ast
import graphlib
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "cit_scale"

# Each room, a module or a folder of the package, and the rooms, or the one module of a room, that it may import from.
WALLS = {
    "errors": "",
    "files": "",
    "run_folder": "",
    "text": "",
    "batch": "",
    "config": "errors settings",
    "settings": "errors",
    "losses": "batch",
    "optim": "config errors models",
    "distributed": "errors run_folder",
    "models": "batch distributed errors files run_folder",
    "datasets": "config data.order distributed errors files text",
    "data": "batch config datasets distributed errors",
    "engines": "batch config distributed errors models optim settings",
    "checkpoint": "config distributed engines errors files run_folder",
    "teachers": "batch config errors files models settings",
    "evaluate": "batch distributed",
    "recipe": "config errors settings",
    "usage": "config recipe settings",
    "cli": "config distributed.ranks errors recipe run.begun run_folder settings usage",
    "run": "batch checkpoint config data datasets distributed engines errors evaluate files losses models optim "
    "recipe run_folder settings teachers text",
    "report": "batch config data datasets distributed errors evaluate files inference models run run_folder settings "
    "teachers text",
    "train": "batch checkpoint cli config data datasets distributed engines errors evaluate files losses models optim "
    "report run run_folder settings teachers text",
    "inference": "cli config datasets distributed errors evaluate files models recipe run_folder text",
    "export": "config datasets distributed errors files inference models run_folder text",
    "doctor": "batch bench config data datasets distributed engines errors files models run teachers text train",
    "where": "config text",
    "__main__": "cli config text",
    "job": "distributed doctor errors text train",
    "bench": "batch checkpoint config data datasets distributed engines errors evaluate export files inference models "
    "run settings teachers text train",
}

# They only bear a name that people call, and lead to the command.
DOORS = {"data.pack", "data.video"}

ONLY_IMPORTERS = {
    "deepspeed": {"engines.zero", "engines.ds_config"},
    "nvidia": {"data.dali", "bench.decode"},  # the benchmark's own is the peer that ours is timed against
    "triton": {"models.involution_triton"},
    "submitit": {"launchers.submit", "launchers.executors"},
    "ffmpeg": {"datasets.video"},
    "onnx": {"export.onnx"},
    "onnxruntime": {"export.onnx", "inference.exported"},
    "pyarrow": {"inference.tables"},
    "matplotlib": {"report.figures"},
    "jinja2": {"report.html"},
}

# The one file of launchers/ that runs Slurm's commands, and the commands, with or without their folder.
SLURM_DOOR = "slurm.py"
SLURM_COMMAND = r"(\S*/)?(squeue|sacct|scontrol|sinfo|sbatch|scancel)"


def modules() -> dict[str, Path]:
    """Every module by its name inside the package; a package goes by its folder's name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def launchers() -> dict[str, Path]:
    """The modules above the package, which import what they like of it; those that run by path are scripts."""
    return {f"launchers.{path.stem}": path for path in sorted((REPOSITORY / "launchers").glob("*.py"))}


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, absolute name) of everything a file imports, at its top and inside functions."""
    return imports_in(path.read_text(), path)


def imports_in(source: str, path: Path) -> list[tuple[int, str]]:
    """As ``imports``. path: named where the source is refused."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import hides which level it reaches"
            names += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return names


def is_script(source: str) -> bool:
    """Whether a file does something when it is run by path."""
    tests = [node.test for node in ast.walk(ast.parse(source)) if isinstance(node, ast.If)]
    return any(isinstance(node, ast.Name) and node.id == "__name__" for test in tests for node in ast.walk(test))


def slurm_commands(source: str) -> list[int]:
    """The lines in which a file names a Slurm command for a process to run.

    A text that is a command's name and no more counts wherever it stands: a list, a tuple, an argument of a helper. A
    line of shell counts where a process is started with it. Docstrings and messages are neither.
    """
    tree = ast.parse(source)
    starters = {"subprocess"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            starters |= {alias.asname or alias.name for alias in node.names if alias.name == "subprocess"}
        elif isinstance(node, ast.ImportFrom) and node.module == "subprocess":
            starters |= {alias.asname or alias.name for alias in node.names}
    lines = {line for line, text in texts(tree) if re.fullmatch(SLURM_COMMAND, text)}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function = ast.unparse(call.func)
        if function.split(".")[0] in starters or re.match(r"os\.(system|popen|exec|spawn|posix_spawn)", function):
            shell = rf"(^|[;&|(])\s*{SLURM_COMMAND}(?=\s|$)"
            lines |= {line for line, text in texts(call) if re.search(shell, text)}
    return sorted(lines)


def texts(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, text) of the string literals below a node, without docstrings."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    literals = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings]
    return [(node.lineno, node.value) for node in literals if isinstance(node.value, str)]


def own_module(name: str, known: dict[str, Path]) -> str | None:
    """The module of ours that an imported name lies in: the longest prefix that is one."""
    parts = name.split(".")
    if parts[0] != "cit_scale":
        return None
    prefixes = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
    return next((prefix for prefix in prefixes if prefix in known), None)


def room_of(name: str) -> str:
    return name.split(".")[0]


def own_imports() -> list[tuple[str, str, str]]:
    """(importing module, imported module, where it stands) inside the package."""
    known = modules()
    return [
        (name, target, f"{path.relative_to(REPOSITORY)}:{line}")
        for name, path in known.items()
        for line, imported in imports(path)
        if (target := own_module(imported, known)) is not None and target != name
    ]


def test_every_module_stands_in_a_room_with_walls():
    assert {room_of(name) for name in modules()} - {""} == set(WALLS)


def test_imports_keep_the_walls():
    through = [
        f"{place}: {room_of(name)} must not import from {room_of(target)} ({target})"
        for name, target, place in own_imports()
        if not {target, room_of(target)} & {room_of(name), *WALLS[room_of(name)].split()} and name not in DOORS
    ]
    assert not through, "\n".join(through)


def test_no_modules_import_each_other_in_a_circle():
    # The package's own file is imported with any of its modules; it only lists them.
    graph: dict[str, set[str]] = {}
    for name, target, _ in own_imports():
        if "models" not in (name, target):
            graph.setdefault(name, set()).add(target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" imports ".join(reversed(error.args[1]))) from error


def test_the_package_knows_nothing_of_its_launchers():
    knowing = [name for name, path in modules().items() for _, each in imports(path) if each.startswith("launchers")]
    assert not knowing


def test_each_large_library_has_one_door():
    strays = [
        f"{path.relative_to(REPOSITORY)}:{line}: only {', '.join(doors)} may import {library}"
        for library, doors in ONLY_IMPORTERS.items()
        for name, path in {**modules(), **launchers()}.items()
        for line, imported in imports(path)
        if imported.split(".")[0] == library and name not in doors
    ]
    assert not strays, "\n".join(strays)


def test_every_library_that_is_imported_is_a_dependency():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = [each for extra in project["optional-dependencies"].values() for each in extra]
    declared = {re.split(r"[^\w.-]", each)[0].lower() for each in [*project["dependencies"], *extras]}
    imported = {
        each.split(".")[0]
        for path in {**modules(), **launchers()}.values()
        for _, each in imports(path)
        if each.split(".")[0] not in {*sys.stdlib_module_names, "cit_scale", "launchers"}
    }
    distributions = importlib.metadata.packages_distributions()
    missing = {
        library
        for library in imported
        if not {re.sub(r"[-_.]+", "-", each).lower() for each in distributions.get(library, [library])} & declared
    }
    # With torch, where there is a GPU; with pydantic; for type checkers alone.
    assert missing - {"triton", "pydantic_core", "_typeshed"} == set()


def test_only_one_file_of_the_launchers_runs_slurms_commands():
    strays = [
        f"{path.relative_to(REPOSITORY)}:{line}: only launchers/{SLURM_DOOR} runs a Slurm command; add a question there"
        for path in launchers().values()
        if path.name != SLURM_DOOR
        for line in slurm_commands(path.read_text())
    ]
    assert not strays, "\n".join(strays)
    assert slurm_commands((REPOSITORY / "launchers" / SLURM_DOOR).read_text())


@pytest.mark.parametrize(
    "source",
    [
        'import subprocess\nsubprocess.run(["squeue", "--me"])',
        'from subprocess import check_output as ask\nask("/usr/bin/sinfo --all", shell=True)',
        'import os\nos.popen(f"cd x && scancel {job_id}")',
        'import subprocess, shlex\nsubprocess.Popen(shlex.split("sacct -X"))',
        'COMMAND = ("scontrol", "requeue")',
        'from elsewhere import run\nrun("sbatch", "--test-only")',
    ],
)
def test_the_scan_finds_slurms_commands(source):
    assert slurm_commands(source) == [source.count("\n") + 1]


def test_the_scan_passes_over_what_is_only_said_of_slurm():
    said = '"""sbatch takes it."""\nimport subprocess\nsubprocess.run(["tail", "-n", "1"])\n'
    assert not slurm_commands(said + 'print(f"sbatch refuses: {error}")')


def test_no_launcher_imports_a_script():
    scripts = {name for name, path in launchers().items() if is_script(path.read_text())}
    assert scripts == {"launchers.submit", "launchers.runs", "launchers.requeue", "launchers.this_job"}
    strays = [
        f"{path.relative_to(REPOSITORY)}:{line}: {script} is a script; what both need belongs in a module of its own"
        for path in launchers().values()
        for line, script in imported_scripts(path.read_text(), path, scripts)
    ]
    assert not strays, "\n".join(strays)


def imported_scripts(source: str, path: Path, scripts: set[str]) -> list[tuple[int, str]]:
    found = [(line, ".".join(imported.split(".")[:2])) for line, imported in imports_in(source, path)]
    return [(line, name) for line, name in found if name in scripts]


@pytest.mark.parametrize(
    "source", ["import launchers.runs", "from launchers import runs", "def f():\n    from launchers.runs import logs"]
)
def test_the_scan_finds_an_imported_script(source):
    found = imported_scripts(source, Path("planted.py"), {"launchers.runs"})
    assert found == [(source.count("\n") + 1, "launchers.runs")]


def test_package_init_files_are_empty_but_the_one_that_registers_models():
    filled = [name for name, path in modules().items() if path.name == "__init__.py" and path.read_text().strip()]
    assert filled == ["models"]


def test_no_module_bears_a_library_name():
    libraries = {"torch", "deepspeed", "timm", "nvidia", "submitit", "ffmpeg", "pytest", "numpy", "safetensors", "yaml"}
    assert not libraries & {path.stem for path in [*modules().values(), *launchers().values()]}
