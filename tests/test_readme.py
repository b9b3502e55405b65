"""What the README says holds: its commands, files, settings and the names it tells the reader to look for."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cit_scale import cli
from cit_scale.__main__ import VERBS
from cit_scale.config import RunConfig, check_config
from cit_scale.datasets.commands import pack_parser, video_parser
from cit_scale.export.commands import export_parser
from cit_scale.inference.commands import evaluate_parser, predict_parser
from cit_scale.recipe import recipe_names
from cit_scale.report.commands import report_parser

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


def test_the_python_examples_run(calm, monkeypatch, tmp_path, capsys):
    """Of docs/using.md: with timm, and with onnxruntime alone."""
    from cit_scale.distributed.world import World
    from cit_scale.export.write import Form, export
    from cit_scale.inference.classifier import open_classifier, open_network

    (tmp_path / "runs").mkdir()
    run_dir = shutil.copytree(calm("plain").run_dir, tmp_path / "runs" / "digits")
    export(open_network(str(run_dir), World()), Form("onnx", any_size=True))
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("digit.png")
    capsys.readouterr()
    examples = [block for language, block in BLOCK.findall(PAGES["docs/using.md"]) if language == "python"]
    for example in examples:
        exec(example, {})  # the page's own code
    classifier = open_classifier("runs/digits", World())
    logits = classifier.classify(classifier.prepare(Path("digit.png").read_bytes())[None])["average"]
    expected = classifier.classes[logits.argmax()]
    answers = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert answers == [expected, expected]


PARSERS = {
    "pack": pack_parser,
    "video": video_parser,
    "evaluate": evaluate_parser,
    "predict": predict_parser,
    "report": report_parser,
    "export": export_parser,
}


@pytest.mark.parametrize("verb", PARSERS)
def test_every_command_before_and_after_training_is_understood(verb):
    parse = PARSERS[verb]().parse_args
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
