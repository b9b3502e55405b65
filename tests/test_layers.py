"""The layering of the package, read from its imports."""

import ast
import graphlib
from pathlib import Path

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
    "optim": "config errors",
    "distributed": "errors run_folder",
    "models": "batch distributed errors files",
    "datasets": "config data.order distributed errors files text",
    "data": "batch config datasets distributed errors",
    "engines": "batch config distributed errors models optim settings",
    "checkpoint": "config distributed engines errors files run_folder",
    "teachers": "batch config errors files models",
    "evaluate": "batch distributed",
    "cli": "config distributed.ranks errors run_folder settings",
    "run": "batch checkpoint config data datasets distributed engines errors files models optim run_folder settings "
    "teachers text",
    "train": "batch checkpoint cli config data datasets distributed engines errors evaluate files losses models optim "
    "run run_folder settings teachers text",
    "__main__": "cli text",
    "job": "distributed errors text train",
    "bench": "checkpoint config data datasets distributed engines errors files models run teachers",
}

# They only bear a name that people call, and lead to the command.
DOORS = {"data.pack", "data.video"}

ONLY_IMPORTERS = {
    "deepspeed": {"engines.zero", "engines.ds_config"},
    "nvidia": {"data.dali", "bench.decode"},  # the benchmark's own is the peer that ours is timed against
    "triton": {"models.involution_triton"},
    "submitit": {"launchers.submit", "launchers.executors"},
    "ffmpeg": {"datasets.video"},
}


def modules() -> dict[str, Path]:
    """Every module by its name inside the package; a package goes by its folder's name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def launchers() -> dict[str, Path]:
    """The scripts above the package, which import what they like of it and of each other."""
    return {f"launchers.{path.stem}": path for path in sorted((REPOSITORY / "launchers").glob("*.py"))}


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, absolute name) of everything a file imports, at its top and inside functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import hides which level it reaches"
            names += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return names


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


def test_package_init_files_are_empty_but_the_one_that_registers_models():
    filled = [name for name, path in modules().items() if path.name == "__init__.py" and path.read_text().strip()]
    assert filled == ["models"]


def test_no_module_bears_a_library_name():
    libraries = {"torch", "deepspeed", "timm", "nvidia", "submitit", "ffmpeg", "pytest", "numpy", "safetensors", "yaml"}
    assert not libraries & {path.stem for path in [*modules().values(), *launchers().values()]}
