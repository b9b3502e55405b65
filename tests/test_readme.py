"""What the README says holds: its commands, files, settings and the names it tells the reader to look for."""

import re
import shlex
from pathlib import Path

import pytest

from cit_scale import cli
from cit_scale.config import RunConfig, check_ranges

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def trainer_arguments():
    """The arguments of every command in the README that starts the trainer, and the line they stand in."""
    for language, block in BLOCKS:
        for line in block.splitlines() if language == "bash" else ():
            for command in line.split("#")[0].split("&&"):
                words = shlex.split(command)
                if "cit_scale/train.py" in words:
                    yield pytest.param(words[words.index("cit_scale/train.py") + 1 :], id=command.strip())


@pytest.mark.parametrize("arguments", list(trainer_arguments()))
def test_every_command_of_the_readme_is_a_valid_run(arguments):
    check_ranges(cli.parse_arguments(arguments).config)


def test_the_readme_shows_the_ways_to_start():
    commands = " ".join(block for language, block in BLOCKS if language == "bash")
    for launcher in ("deepspeed", "torchrun", "python", "--hostfile", "pip install -e '.[test]' && pytest"):
        assert launcher in commands


def test_the_python_example_runs(monkeypatch, tmp_path):
    import timm
    from safetensors.torch import save_file

    import cit_scale.models  # noqa: F401

    (example,) = (block for language, block in BLOCKS if language == "python")
    path = tmp_path / re.search(r'"(runs/\S+\.safetensors)"', example)[1]
    path.parent.mkdir(parents=True)
    trained = timm.create_model("cit_small_patch16_224", num_classes=10, img_size=96)
    save_file(trained.state_dict(), path)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)  # the README's own code
    assert (names["model"].head.weight == trained.head.weight).all()


def test_every_file_and_setting_that_the_readme_names_exists():
    table_paths = re.findall(r"`((?:cit_scale|ds_configs|tests|docs)/[\w./]*)`", README)
    assert len(table_paths) > 10
    missing = [path for path in table_paths if not (REPOSITORY / path).exists()]
    assert not missing
    settings = set(re.findall(r"--((?:data|augment|optim|train|engine|student|mixing|distill)\.\w+)", README))
    assert settings
    for setting in settings:
        section, name = setting.split(".")
        assert hasattr(getattr(RunConfig(), section), name), setting


def test_the_readme_names_every_recipe_for_users():
    own = {"digits_teacher"}  # a part of digits
    assert not [name for name in cli.recipe_names() if f"`{name}`" not in README and name not in own]


def test_every_figure_of_the_readme_stands_in_a_measurement_that_says_where_it_comes_from():
    files = sorted((REPOSITORY / "docs" / "measurements").glob("*.md"))
    assert files
    for file in files:
        text = file.read_text().lower()
        for part in ("command", "commit", "hardware", "spread"):
            assert part in text, f"{file.name} does not state its {part}"
    measured = README.split("## Measured")[1].split("\n## ")[0]
    figures = re.findall(r"\d+(?:\.\d+)?(?= (?:s|%|images/s|MB)\b)", measured)
    assert figures
    everything = "\n".join(file.read_text() for file in files)
    assert not [figure for figure in figures if figure not in everything]
