"""What the README says holds: its commands, files, settings and the names it tells the reader to look for."""

import re
import shlex
from pathlib import Path

import pytest

from cit_scale import cli
from cit_scale.__main__ import VERBS
from cit_scale.config import RunConfig, check_config
from cit_scale.datasets.commands import pack_parser, video_parser
from cit_scale.recipe import recipe_names
from cit_scale.settings import to_yaml

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
PAGES = {"README.md": README, **{f"docs/{path.name}": path.read_text() for path in (REPOSITORY / "docs").glob("*.md")}}
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
BLOCKS = BLOCK.findall(README)


def commands():
    """Every command that a page shows, as words, and how it is written."""
    for page, text in PAGES.items():
        for language, block in BLOCK.findall(text):
            for line in block.splitlines() if language == "bash" else ():
                for command in line.split("#")[0].split("&&"):
                    yield shlex.split(command), f"{page}: {command.strip()}"


def trainer_arguments():
    """The arguments of every command that starts the trainer."""
    for words, written in commands():
        if "cit_scale/train.py" in words:
            yield pytest.param(words[words.index("cit_scale/train.py") + 1 :], id=written)


@pytest.mark.parametrize("arguments", list(trainer_arguments()))
def test_every_command_that_trains_is_a_valid_run(arguments):
    if "--print_config" in arguments:
        arguments.remove("--print_config")
    check_config(cli.parse_arguments(arguments).config)


def test_the_readme_shows_the_ways_to_start():
    commands = " ".join(block for language, block in BLOCKS if language == "bash")
    for launcher in ("deepspeed", "torchrun", "python", "--hostfile", "pip install -e '.[test]' && pytest"):
        assert launcher in commands


def test_the_python_example_runs(monkeypatch, tmp_path):
    from safetensors.torch import save_file

    from cit_scale.models.network import build_network

    (example,) = (block for language, block in BLOCKS if language == "python")
    path = tmp_path / re.search(r'"(runs/\S+\.safetensors)"', example)[1]
    path.parent.mkdir(parents=True)
    config = cli.parse_arguments([]).config
    (path.parent / "config.yaml").write_text(to_yaml(config))
    network = build_network(
        config.student.name,
        config.student.kwargs,
        num_classes=10,
        image_size=config.data.image_size,
        teachers=tuple(config.teachers),
    )
    trained = network.model
    save_file(trained.state_dict(), path)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)  # the README's own code
    assert (names["model"].head.weight == trained.head.weight).all()


@pytest.mark.parametrize("verb", ["pack", "video"])
def test_every_command_that_prepares_data_is_understood(verb):
    parse = {"pack": pack_parser, "video": video_parser}[verb]().parse_args
    shown = [words[2:] for words, _ in commands() if words[:2] == ["cit-scale", verb]]
    assert shown
    for arguments in shown:
        parse(arguments)


def test_every_verb_that_is_shown_exists():
    shown = {words[1] for words, _ in commands() if words[:1] == ["cit-scale"]}
    assert {"pack", "video", "runs"} <= shown <= set(VERBS)


def test_the_readme_stays_short():
    assert len(README.splitlines()) < 200


def test_every_link_leads_to_a_file_and_every_page_is_linked():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\((?!http)([^)#]*)", text):
            assert (REPOSITORY / page).parent.joinpath(target).exists(), f"{page} links {target}"
    linked = set(re.findall(r"\]\((docs/[^)#]*\.md)", README))
    assert set(PAGES) - {"README.md"} <= linked


def test_every_file_and_setting_that_the_pages_name_exists():
    paths = re.findall(r"`((?:cit_scale|ds_configs|tests|docs|launchers|slurm)/[\w./]*)`", "".join(PAGES.values()))
    assert len(paths) > 10
    missing = [path for path in paths if not (REPOSITORY / path).exists() and path != "launchers/cluster.yaml"]
    assert not missing
    everything = "".join(PAGES.values())
    settings = set(re.findall(r"--((?:data|augment|optim|train|engine|student|mixing|distill)\.\w+)", everything))
    assert len(settings) > 10
    for setting in settings:
        section, name = setting.split(".")
        assert hasattr(getattr(RunConfig(), section), name), setting


def test_the_readme_names_every_recipe_for_users():
    own = {"digits_teacher"}  # a part of digits
    assert not [name for name in recipe_names() if f"`{name}`" not in README and name not in own]


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
