"""The layering of the package, read from its imports."""

import ast
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "cit_scale"

# A module imports only from strictly lower levels.
LEVELS = {
    0: "errors run_folder slurm_job",
    1: "config files world batch stop watchdog data.order data.draws data.encoded data.progress portable "
    "models.released models.involution_loop models.involution_triton",
    2: "cli lock roll_call data.dali data.idx data.index data.mixing models.involution_cpu models.fold losses optim "
    "metrics results checkpoint engines.base engines.loss_scale engines.batch_norm",
    3: "data.folders data.shards models.involution engines.state bench.measure saver",
    4: "data.sources engines.hosted models.rednet",
    5: "data.pack data.reader engines.plain engines.zero engines.fsdp2 models.cit",
    6: "data.stream data.video bad_images engines.build models",
    7: "models.network bench.decode bench.involution",
    8: "teachers evaluate bench.fidelity bench.soak bench.checkpoint",
    9: "task bench.teachers",
    10: "run_state run_plan",
    11: "bad_steps",
    12: "train",
    13: "job",
}
LEVEL_OF = {name: level for level, names in LEVELS.items() for name in names.split()}

ONLY_IMPORTERS = {
    "deepspeed": {"engines.zero"},
    "nvidia": {"data.dali", "bench.decode"},  # the benchmark's own is the peer that ours is timed against
    "triton": {"models.involution_triton"},
    "submitit": {"launchers.submit"},
    "ffmpeg": {"data.video"},
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


def test_every_module_has_a_level_and_every_level_names_a_module():
    empty = {name for name, path in modules().items() if path.name == "__init__.py" and not path.read_text().strip()}
    assert set(modules()) - empty == set(LEVEL_OF)


def test_imports_point_down():
    known = modules()
    upward = []
    for name, path in known.items():
        for line, imported in imports(path):
            target = own_module(imported, known)
            if target in LEVEL_OF and LEVEL_OF[target] >= LEVEL_OF[name]:
                upward.append(f"{path.relative_to(REPOSITORY)}:{line}: {name} imports {target}, which is not lower")
    assert not upward, "\n".join(upward)


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
