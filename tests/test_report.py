"""cit-scale report: the page of a run, number by number, and what it makes of runs that lack something."""

import csv
import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from ranks import run_on_ranks
from safetensors.torch import load_file
from sklearn.metrics import confusion_matrix
from tiny_run import CLASSES, TinyRun, recipe_with, write_teacher

from cit_scale import files
from cit_scale.config import RunConfig
from cit_scale.data.mixing import mix
from cit_scale.data.order import Cursor, repeat_spread
from cit_scale.data.reader import Reader
from cit_scale.data.stream import train_stream
from cit_scale.data.versions import LATEST as VERSIONS
from cit_scale.datasets.pixels import LATEST
from cit_scale.datasets.sources import open_sources
from cit_scale.distributed.stop import StopRequest
from cit_scale.distributed.world import World
from cit_scale.errors import BadDataError, CannotWriteError, ConfigError, MissingInputError, RefusedError
from cit_scale.inference.classifier import open_classifier
from cit_scale.inference.evaluate import evaluate_classifier, evaluation_set
from cit_scale.recipe import build, read_recipe
from cit_scale.report import write
from cit_scale.report.answers import Survey, ask_networks, summarize_answers
from cit_scale.report.at_end import leave_report
from cit_scale.report.commands import report as main
from cit_scale.report.history import MOST_POINTS, History, read_history
from cit_scale.report.networks import open_run_networks
from cit_scale.report.page import Content, Part, render
from cit_scale.report.pictures import _largest, first_images
from cit_scale.report.runs import main as runs_main
from cit_scale.report.write import make_report, run_dir_of
from cit_scale.run.folders import Phase

VOID = {"meta", "link", "img", "br", "path", "use", "rect", "line", "image"}  # elements without an end


class Page(HTMLParser):
    """What a browser would make of a page: its elements with their attributes, its tables by label, its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.tables, self.words = [], {}, []
        self._open, self._rows = [], None
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._rows = self.tables.setdefault(dict(attributes)["aria-label"], [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" in self._open:
            return
        self.words.append(data)
        if self._open and {"td", "th"} & set(self._open):
            self._rows[-1][-1] = " ".join(f"{self._rows[-1][-1]} {data}".split())

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def refuse_what_acts(page):
    """Fail for anything that loads or runs something."""
    assert not {tag for tag, _ in page.elements} & {
        "script",
        "iframe",
        "object",
        "embed",
        "form",
        "base",
        "foreignobject",
    }
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name, value)
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                assert value.startswith(("data:image/", "#", "data:,")), (tag, name, value[:80])
            if name == "style":
                assert "url(" not in value.replace("url(#", ""), (tag, value)
    policies = [each["content"] for tag, each in page.elements if each.get("http-equiv") == "Content-Security-Policy"]
    (policy,) = policies
    assert policy.startswith("default-src 'none'; img-src data:;")


@pytest.fixture(scope="module")
def answers(finished):
    """What the networks of the finished run say."""
    config = build(read_recipe(str(finished / "config.yaml")), RunConfig)
    networks = open_run_networks(str(finished), finished, config, World())
    return ask_networks(networks, World(), open_set=lambda: evaluation_set(config.data, LATEST))


@pytest.fixture(scope="module")
def page(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "report.html"
    assert main([str(finished), "--out", str(out)]) == 0
    return Page(out.read_text())


def page_of(run_dir, *options):
    """The page that the command writes into a run folder."""
    assert main([str(run_dir), *options]) == 0
    return Page((run_dir / "report.html").read_text())


def numbers(text):
    return [float(each) for each in re.findall(r"-?\d+\.?\d*", text)]


# --- The numbers ---


def test_the_networks_have_the_scores_of_evaluate_and_of_results(page, finished):
    rows = {row[0]: row[1:] for row in page.tables["Table of the networks"][1:]}
    results = json.loads((finished / "results.json").read_text())
    found = evaluate_classifier(open_classifier(str(finished), World()), World())
    for head, scores in found.scores.items():
        top1, top5, class_mean, nll, ece, noted = rows[f"student, {head}"]
        assert numbers(top1)[0] == round(scores.top1, 2)
        assert [float(top5), float(class_mean)] == [round(scores.top5, 2), round(scores.class_mean, 2)]
        assert float(nll) == pytest.approx(scores.nll, abs=6e-5)
        assert float(ece) == pytest.approx(scores.ece, abs=6e-3)
        assert float(noted) == round(results["accuracy"]["student"]["top1"][head], 2)
        averaged = results["accuracy"]["student ema"]["top1"][head]
        assert float(rows[f"student ema, {head}"][-1]) == round(averaged, 2)
    teacher = rows["teacher conv (resnet10t)"]
    assert numbers(teacher[0])[0] == float(teacher[-1]) == round(results["teachers"]["conv"]["top1"], 2)


def test_the_confusion_matrix_is_that_of_the_answers(page, answers):
    rows = page.tables["Confusion matrix"][1:]
    expected = confusion_matrix(answers.labels, answers.student.choice, labels=range(CLASSES))
    assert [[int(cell) for cell in row[1:]] for row in rows] == expected.tolist()
    wrong = int((answers.labels != answers.student.choice).sum())
    assert f"Of {wrong} mistakes" in page.text
    assert sum(int(row[2]) for row in page.tables["Table of confused classes"][1:]) == wrong


def test_answers_are_those_of_the_networks_themselves(finished, answers):
    """One image after the other, by the classifier of evaluate, and by the teacher's own network."""
    classifier = open_classifier(str(finished), World())
    for place, sample in enumerate(answers.samples.tolist()):
        images = classifier.prepare(answers.source.read(sample))[None]
        for head, logits in classifier.classify(images).items():
            probs = logits[0].double().softmax(dim=0)
            said = answers.heads[head]
            assert said.choice[place] == int(probs.argmax())
            assert said.prob[place] == pytest.approx(float(probs.max()), rel=1e-4)
            assert said.nll[place] == pytest.approx(-math.log(probs[answers.labels[place]]), rel=1e-4)
            assert said.entropy[place] == pytest.approx(
                float(-(probs * probs.log()).sum()) / math.log(CLASSES), rel=1e-4
            )


def test_agreement_and_following_are_those_of_the_answers(page, answers):
    voices = {
        "teacher conv": answers.teachers["conv"],
        **{f"student, {name}": said for name, said in answers.heads.items()},
    }
    rows = {row[0]: row[1:] for row in page.tables["Agreement matrix"][1:]}
    for name, said in voices.items():
        expected = [100 * np.mean(said.choice == other.choice) for other in voices.values()]
        assert [float(cell) for cell in rows[name]] == pytest.approx(expected, abs=0.06)
    own = next(row for row in page.tables["Table of following"][1:] if row[:2] == ["conv", "conv"])
    teacher, head = answers.teachers["conv"].choice, answers.heads["conv"].choice
    wrong = teacher != answers.labels
    assert numbers(own[2])[0] == pytest.approx(100 * np.mean(teacher == head), abs=6e-3)
    assert numbers(own[4])[0] == pytest.approx(100 * np.mean((teacher == head)[wrong]), abs=6e-3)
    assert float(own[-1]) == pytest.approx(answers.divergences["conv", "conv"].mean(), abs=6e-5)


def test_cka_and_calibration_are_printed_as_they_are(page, answers):
    for row in page.tables["Table of CKA"][1:]:
        x, y = answers.head_features[row[0]], answers.teacher_features["conv"]
        x, y = (each - each.mean(axis=0) for each in (x.astype(np.float64), y.astype(np.float64)))
        norm = np.linalg.norm
        expected = norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y))
        assert numbers(row[1])[0] == pytest.approx(expected, abs=6e-4)
    prob, correct = answers.student.prob, answers.student.choice == answers.labels
    rows = page.tables["Table of the reliability diagram"][1:]
    assert sum(int(row[2]) for row in rows) == 9
    for low, high, count, mean, right in rows:
        inside = (prob > float(low)) & (prob <= float(high) + 1e-3)
        if int(count):
            assert float(mean) == pytest.approx(100 * prob[inside].mean(), abs=0.02)
            assert float(right) == pytest.approx(100 * correct[inside].mean(), abs=0.02)


@pytest.mark.parametrize(("group", "ranks"), [(2, 1), (2, 2), (None, 1), (None, 2)])
def test_training_images_are_those_of_the_first_update(finished, group, ranks):
    """Of rank 0, in the first micro-step of the run with so many ranks."""
    config = build(read_recipe(str(finished / "config.yaml")), RunConfig)
    mixing = replace(config.mixing, group_size=group, mixup_alpha=0.8)
    config = replace(config, mixing=mixing, train=replace(config.train, micro_batch_size=4))
    train_set, _ = open_sources(config.data)
    found = first_images(train_set, config, VERSIONS, ranks, torch.device("cpu"))
    stream = train_stream(
        Reader(train_set),
        config.augment,
        config.data,
        seed=config.seed,
        cursor=Cursor.at_step(0, len(train_set), 8),
        global_batch_size=8,
        micro_batch_size=4,
        world=World(0, 0, ranks, ranks),
        device=torch.device("cpu"),
        spread=repeat_spread(VERSIONS.order, group),
        draws_version=VERSIONS.draws,
    )
    with closing(stream):
        expected = mix(next(stream), mixing, CLASSES, seed=config.seed, step=0)
    assert torch.equal(found.images[:4], expected.images)
    assert torch.equal(found.targets[:4], expected.targets)


def test_mixed_images_are_named_by_both_classes_and_smoothing_by_none():
    def named(targets):
        return [(name, round(share, 3)) for name, share in _largest(torch.tensor(targets), ("a", "b", "c", "d"))]

    assert named([0.025, 0.925, 0.025, 0.025]) == [("b", 1)]
    assert named([0.025, 0.7, 0.025, 0.25]) == [("b", 0.75), ("d", 0.25)]
    assert named([0.0, 0.0, 1.0, 0.0]) == [("c", 1)]


def test_training_images_that_are_others_now_are_not_shown(copy, tiny_inputs):
    text = (copy / "config.yaml").read_text()
    others = str(tiny_inputs / "eval" / "images-idx3-ubyte")
    (copy / "config.yaml").write_text(text.replace(str(tiny_inputs / "train" / "images-idx3-ubyte"), others))
    page = page_of(copy)
    assert "has other images than the run was trained on" in page.text
    assert "Table of attention" in page.tables


def test_features_are_what_heads_and_teachers_classify_by(finished, answers):
    assert list(answers.head_features) == ["cls", "conv"]
    classifier = open_classifier(str(finished), World())
    head = load_file(finished / "student.safetensors")
    logits = torch.from_numpy(answers.head_features["conv"]) @ head["teacher_heads.conv.weight"].T
    logits += head["teacher_heads.conv.bias"]
    images = torch.stack([classifier.prepare(answers.source.read(sample)) for sample in answers.samples.tolist()])
    assert torch.allclose(logits, classifier.classify(images)["conv"], atol=1e-5)
    assert answers.teacher_features["conv"].shape == (9, 16)


def test_ranks_together_say_the_same(finished, answers, tmp_path):
    first, _ = run_on_ranks(2, _report_on_a_rank, str(finished), str(tmp_path / "report.html"))
    assert first == []
    rows = Page((tmp_path / "report.html").read_text()).tables["Table of the networks"]
    alone = tmp_path / "alone.html"
    make_report(finished, alone, World())
    assert rows == Page(alone.read_text()).tables["Table of the networks"]


def _report_on_a_rank(world, run_dir, out, data=None):
    try:
        return make_report(Path(run_dir), Path(out), world, data=data)
    except BadDataError as error:
        return str(error)


def test_ranks_fail_together(finished, tmp_path):
    for number in range(CLASSES):
        (tmp_path / "broken" / str(number)).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(whole := tmp_path / "whole.png")
        cut = whole.read_bytes()
        (tmp_path / "broken" / str(number) / "cut.png").write_bytes(cut[: len(cut) - 40])
    arguments = str(finished), str(tmp_path / "report.html"), str(tmp_path / "broken")
    first, second = run_on_ranks(2, _report_on_a_rank, *arguments)
    assert first == second
    assert "none of 3 images can be used" in first
    assert not (tmp_path / "report.html").exists()


def test_curves_are_the_lines_of_metrics(finished):
    history = read_history(Phase("", finished))
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    expected = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert (
        dict(zip(history.curves["loss"].steps.tolist(), history.curves["loss"].values.tolist(), strict=True))
        == expected
    )
    results = json.loads((finished / "results.json").read_text())
    accuracy = history.curves["top1_average"]
    assert (accuracy.steps[-1], accuracy.values[-1]) == (12, results["accuracy"]["student"]["top1"]["average"])


def test_a_history_passes_over_damage_and_takes_the_later_of_two(tmp_path):
    lines = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": "nan", "skipped_not": 1},
        {"step": 1, "loss": 2.0},
        {"step": 3, "skipped": "loss not finite"},
        {"step": "four", "loss": 1.0},
    ]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"step": 5, "lo\n[]\n\xff'
    (tmp_path / "metrics.jsonl").write_text(text, encoding="latin-1")
    (tmp_path / "env.json").write_text(json.dumps([{"step": 0}, {"step": 2}, {"step": 3}]))
    history = read_history(Phase("", tmp_path))
    assert history.curves["loss"].steps.tolist() == [1, 2]
    assert history.curves["loss"].values.tolist() == pytest.approx([2.0, math.nan], nan_ok=True)
    assert history.skipped == {3: "loss not finite"}
    assert history.resumed == [2, 3]


def test_a_long_curve_is_drawn_as_means(tmp_path):
    lines = (json.dumps({"step": step, "loss": float(step)}) for step in range(1, 2 * MOST_POINTS + 1))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    curve = read_history(Phase("", tmp_path)).curves["loss"]
    assert curve.thinned == 2
    assert curve.values[:2].tolist() == [1.5, 3.5]
    assert curve.steps[-1] == 2 * MOST_POINTS


# --- The page ---


def test_the_page_loads_and_runs_nothing(page):
    refuse_what_acts(page)
    assert len({each["id"] for _, each in page.elements if "id" in each}) == sum(
        "id" in each for _, each in page.elements
    )


def test_the_page_has_every_part(page):
    for label in (
        "Table of the networks",
        "Confusion matrix",
        "Table of attention",
        "Table of following",
        "Table of CKA",
    ):
        assert len(page.tables[label]) > 1
    assert len([1 for tag, each in page.elements if each.get("alt", "").startswith("training image")]) == 8
    assert not [each for tag, each in page.elements if each.get("class") == "absent"]


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }} $\\frac{1}{0}$ %s {0}",
    "\u202eright to left \u05d0\u05d1",
    "\u72ac " + "x" * 4000,
    "' onmouseover='alert(1)",
    "</style></title><svg/onload=alert(1)>",
]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run on classes of such names, from files of such names."""
    folder = tmp_path_factory.mktemp("hostile")
    rows, random = [], np.random.default_rng(0)
    for number, name in enumerate(HOSTILE):
        for image in range(2):
            file = f"{image} {name.replace('/', '_')[:40]}{number}.png"
            Image.fromarray(random.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / file)
            rows.append((file, name))
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    recipe = recipe_with(
        name="<b onclick=x>",
        teachers={},
        data={"train": str(folder / "list.csv"), "eval": str(folder / "list.csv")},
        train={"epochs": 1, "global_batch_size": 8},
    )
    recipe["student"] = {
        "name": "vit_tiny_patch16_224",
        "kwargs": {"patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    TinyRun(folder, folder / "runs", "plain").finish()
    return folder / "runs" / "<b onclick=x>"


def test_hostile_names_are_text(hostile):
    page = page_of(hostile)
    refuse_what_acts(page)
    assert not {tag for tag, _ in page.elements} & {"b", "script"}
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7 * 7 }} $\\frac{1}{0}$ %s {0}" in page.text
    assert "\u202e" in page.text
    assert "x" * 100 not in page.text
    names = {row[0] for row in page.tables["Table of the classes"][1:]}
    assert len(names) == len(HOSTILE)


def test_names_that_no_table_could_hold_are_one_line():
    names = ["a\nb\tc\0d\u2028e", "\ud800 half a pair", os.fsdecode(b"\xff no text"), "", " "]
    page = Page(page_about(made_up([*HOSTILE, *names], 100)))
    refuse_what_acts(page)
    for name in ("a\\x0ab\\x09c\\x00d\\u2028e", "\\xed\\xa0\\x80 half a pair", "\\xff no text", "(no name)"):
        assert name in page.text


def made_up(classes, count, seed=0):
    """A survey that nobody made, of random answers. classes: their names."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, len(classes), count)

    class Source:
        def key(self, sample):
            return f"{labels[sample]}/{sample}.jpg".encode()

    def said():
        logits = random.standard_normal((count, len(classes))).astype(np.float32)
        logits[np.arange(count), labels] += 3
        return summarize_answers(logits, labels)

    heads, teachers = {name: said() for name in ("cls", "conv", "average")}, {"conv": said()}
    return Survey(
        data="made up",
        source=Source(),
        samples=np.arange(count),
        labels=labels,
        classes=tuple(classes),
        heads=heads,
        teachers=teachers,
        whole="average",
        divergences={("conv", head): random.random(count) for head in heads},
        head_features={name: random.standard_normal((count, 8)) for name in ("cls", "conv")},
        teacher_features={"conv": random.standard_normal((count, 9))},
        unusable={},
        left_out=0,
    )


def page_about(answers):
    content = Content(
        record={"results": None, "state": "finished", "detail": "", "name": "made up", "folder": "", "config": {}}
        | dict.fromkeys(("step", "total_steps", "images_per_s", "goodput", "left_s", "bad_steps"))
        | {"bad_images": 0, "starts": [], "attempts": []},
        plan=[],
        config_text="",
        histories={"": History({}, [], {})},
        survey=Part(answers),
        is_other_set=False,
        is_training_set=False,
        weights="student.safetensors",
        models={"conv": "regnety"},
        missing={},
        worst=[],
        doubtful=[],
        attention=Part(reason="none"),
        samples=Part(reason="none"),
        bad_images=[],
        made="now",
    )
    return render(content)


def test_a_thousand_classes_of_long_names_fit_into_five_megabytes():
    text = page_about(made_up([f"{number} {'very long ' * 400}" for number in range(1000)], 10_000))
    assert len(text) < 5e6
    page = Page(text)
    refuse_what_acts(page)
    assert "Confusion matrix" not in page.tables
    assert len(page.tables["Table of the classes"]) == 1001
    assert len(page.tables["Table of confused classes"]) == 31


@pytest.mark.parametrize(("classes", "count"), [(1, 5), (1, 1), (2, 1), (3, 3), (2001, 40)])
def test_any_number_of_classes_and_images_has_a_page(classes, count):
    page = Page(page_about(made_up([str(number) for number in range(classes)], count)))
    refuse_what_acts(page)
    assert len(page.tables["Table of the networks"]) == 5
    assert "nan" not in page.text.lower()


# --- What is not there ---


def test_a_run_that_goes_on_has_a_page_of_its_newest_checkpoint(copy, capsys):
    (copy / "results.json").unlink()
    page = page_of(copy)
    assert "its checkpoint of step 12 is taken" in capsys.readouterr().err
    assert "with step_000012/student.safetensors" in page.text
    assert "Stopped (at step 12)" in page.text


def test_a_run_without_a_checkpoint_has_its_curves(copy):
    for name in ("results.json", "student.safetensors"):
        (copy / name).unlink()
    shutil.rmtree(copy / "ckpt")
    page = page_of(copy)
    assert "No image was asked about: the student has no checkpoint yet" in page.text
    assert sum(tag == "svg" for tag, _ in page.elements) > 5
    assert "Table of the classes" not in page.tables


def test_a_run_that_has_only_been_queued_has_a_page(tmp_path):
    (tmp_path / "queued").mkdir()
    (tmp_path / "queued" / "job.json").write_text("[]")
    page = page_of(tmp_path / "queued")
    assert "Not started" in page.text
    assert "There are no curves" in page.text


def test_damaged_files_leave_a_page(copy):
    for name in ("metrics.jsonl", "env.json", "results.json", "networks.json", "bad_images.tsv"):
        (copy / name).write_bytes(b'{"step": [\xff\x00')
    page = page_of(copy)
    assert float(page.tables["Table of the networks"][-1][2]) > 0  # its top-5: the networks are whole
    assert "There are no curves" in page.text


def test_evaluation_images_that_are_gone_leave_the_rest(copy, tiny_inputs):
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace(str(tiny_inputs / "eval"), str(copy / "gone")))
    page = page_of(copy)
    assert re.search(r"No image was asked about: data\.eval=\S*gone", page.text)
    assert "Table of attention" not in page.tables
    assert len(page.tables["Table of the networks"]) == 8  # of results.json: one teacher, two students of three rows


def test_a_set_that_was_asked_for_has_to_be_there(copy, capsys):
    out = copy / "report.html"
    assert main([str(copy), "--data", str(copy / "nowhere"), "--out", str(out)]) == MissingInputError.exit_code
    assert "nowhere" in capsys.readouterr().err
    assert not out.exists()


def test_another_set_is_named(copy, tiny_inputs):
    train_set = tiny_inputs / "train" / "images-idx3-ubyte"
    page = page_of(copy, "--data", str(train_set), "--out", str(copy / "report.html"))
    assert "of 48 images" in page.text
    assert str(train_set)[-20:] in page.text
    assert "The scores are too good: the run was trained on images of this set" in page.text
    assert "These are not the images" not in page.text


def test_teachers_that_are_gone_or_others_are_not_asked(finished, tmp_path, tiny_inputs):
    """Both as a run has them: by a path in its configuration."""
    copy = shutil.copytree(finished, tmp_path / "copy")
    weights = tmp_path / "teacher.safetensors"
    shutil.copyfile(tiny_inputs / "conv.safetensors", weights)
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace(str(tiny_inputs / "conv.safetensors"), str(weights)))
    assert len(page_of(copy).tables["Table of following"]) == 4

    teacher = recipe_with()["teachers"]["conv"]
    write_teacher(weights, teacher["model"], teacher["kwargs"], seed=2)
    assert "has changed since it advised the run" in page_of(copy).text

    weights.unlink()
    page = page_of(copy)
    assert "Without teacher conv" in page.text
    assert "Table of following" not in page.tables
    assert len(page.tables["Agreement matrix"]) == 4  # of the heads alone


@pytest.mark.parametrize("name", ["", "nowhere", "."])
def test_what_is_no_run_is_one_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([name]) == MissingInputError.exit_code
    assert capsys.readouterr().err.count("\n") == 1


def test_weights_in_a_run_are_of_that_run(copy):
    assert run_dir_of(str(copy / "student.safetensors")) == copy
    assert run_dir_of(str(copy / "ckpt" / "step_000012" / "student.safetensors")) == copy
    page = page_of(copy)
    assert main([str(copy / "student_ema.safetensors"), "--out", str(copy / "ema.html")]) == 0
    averaged = Page((copy / "ema.html").read_text())
    assert "with student_ema.safetensors" in averaged.text
    assert averaged.tables["Table of the networks"] != page.tables["Table of the networks"]


def test_a_full_disk_leaves_the_page_before(copy, monkeypatch, capsys):
    page_of(copy)
    before = (copy / "report.html").read_text()

    def full(path):
        assert path.stat().st_size > 100_000  # the page was there to be kept
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(files, "sync", full)
    assert main([str(copy)]) == CannotWriteError.exit_code
    assert "No space left" in capsys.readouterr().err
    assert (copy / "report.html").read_text() == before
    assert not list(copy.glob("report.html.*"))


def test_a_page_that_cannot_be_written_is_refused_before_the_images_are_read(copy, monkeypatch, capsys):
    monkeypatch.setattr(write, "open_run_networks", lambda *_: pytest.fail("the networks were opened"))
    (copy / "report.html").mkdir()
    assert main([str(copy)]) == ConfigError.exit_code
    assert main([str(copy), "--out", "/proc/report.html"]) == MissingInputError.exit_code
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.parametrize("options", [("--data", "somewhere"), ()])
def test_the_page_of_a_run_is_of_its_own_weights_and_images(copy, options, capsys):
    name = copy if options else copy / "student_ema.safetensors"
    assert main([str(name), *options]) == ConfigError.exit_code
    assert "--out" in capsys.readouterr().err


def test_weights_that_were_asked_for_have_to_be_there(copy, capsys):
    page_of(copy)
    before = (copy / "report.html").read_text()
    assert main([str(copy / "metrics.jsonl"), "--out", str(copy / "report.html")]) in (2, 3)
    assert capsys.readouterr().err.count("\n") == 1
    assert (copy / "report.html").read_text() == before


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_run_may_be_the_folder_that_one_is_in(copy, is_finished, monkeypatch):
    monkeypatch.chdir(copy)
    if not is_finished:
        (copy / "results.json").unlink()
    assert main(["."]) == 0
    page = Page((copy / "report.html").read_text())
    assert [tag for tag, _ in page.elements].count("h1") == 1
    assert page.text.startswith("copy: ")


def test_what_is_no_file_is_written_as_it_is(copy):
    pipe = copy / "pipe"
    os.mkfifo(pipe)
    reader = ThreadPoolExecutor(1).submit(pipe.read_text)
    assert main([str(copy), "--out", str(pipe)]) == 0
    refuse_what_acts(Page(reader.result(timeout=60)))
    assert pipe.is_fifo()


@pytest.mark.parametrize(
    "part", ["results.json", "bad_images.tsv", "ckpt/scores.html", "student.safetensors", "ckpt/step_000012/meta.json"]
)
def test_a_part_of_the_run_is_not_overwritten(copy, part, capsys):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    assert main([str(copy), "--out", str(copy / part)]) == RefusedError.exit_code
    assert "would overwrite" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_images_are_not_overwritten(copy, tmp_path, tiny_inputs, capsys):
    """Neither those with an image's name, nor those of a run, which may have any."""
    image = tmp_path / "photo.JPG"
    image.write_bytes(b"a photo")
    assert main([str(copy), "--out", str(image)]) == RefusedError.exit_code
    assert main([str(copy), "--out", str(tiny_inputs / "eval" / "images-idx3-ubyte")]) == ConfigError.exit_code
    assert "does not end with .html" in capsys.readouterr().err
    assert image.read_bytes() == b"a photo"


def test_the_page_goes_down_a_pipe(finished):
    command = [sys.executable, "-m", "cit_scale", "report", str(finished), "--out", "/dev/stdout"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    refuse_what_acts(Page(ended.stdout))
    assert ended.stdout.endswith("</html>")


ODD_VALUES = [10**400, -(10**23), 1e308, 1e-320, "text", None, True, [], {}, [[]]]


@pytest.mark.parametrize("value", ODD_VALUES, ids=repr)
def test_odd_values_in_a_runs_files_leave_a_page(copy, value):
    """Every number that the page or the list of runs reads."""

    def spoiled(tree):
        if isinstance(tree, dict):
            return {name: spoiled(each) for name, each in tree.items()}
        if isinstance(tree, list):
            return [spoiled(each) for each in tree]
        return value if isinstance(tree, (int, float)) else tree

    (copy / "ckpt" / "scores.json").write_text('{"4": 50.0}')
    for name in ("results.json", "env.json", "networks.json", "ckpt/scores.json"):
        (copy / name).write_text(json.dumps(spoiled(json.loads((copy / name).read_text()))))
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    changed = [spoiled(line) | ({"step": line["step"]} if place % 2 else {}) for place, line in enumerate(lines)]
    (copy / "metrics.jsonl").write_text("\n".join(map(json.dumps, changed)) + "\n" + "[" * 100_000)
    refuse_what_acts(page_of(copy))
    assert runs_main(["--html", "--runs-dir", str(copy.parent)]) == 0


def test_a_configuration_that_no_run_can_have_leaves_the_rest(copy):
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(re.sub(r"global_batch_size: \d+", "global_batch_size: 0", text))
    page = page_of(copy)
    assert "Table of attention" in page.tables
    assert "There are none to show" in page.text


# --- At the end of a run ---


def test_a_finished_run_leaves_its_report_once(tiny_inputs, tmp_path):
    run = TinyRun(tiny_inputs, tmp_path / "runs", "plain", ("--train.report", "true", "--train.epochs", "1"))
    assert "report.html" in run.finish().output
    first = (run.run_dir / "report.html").stat().st_mtime_ns
    run.finish()
    assert (run.run_dir / "report.html").stat().st_mtime_ns == first


@pytest.fixture
def config(copy):
    return replace(build(read_recipe(str(copy / "config.yaml")), RunConfig), runs_dir=str(copy.parent), name=copy.name)


def test_a_report_that_fails_does_not_fail_the_run(config, monkeypatch, capsys):
    monkeypatch.setattr(write, "_assemble", lambda *_: [][0])
    with StopRequest() as stop:
        leave_report(config, World(), stop)
    said = capsys.readouterr().out
    assert "no report was written: IndexError: list index out of range; cit-scale report" in said
    assert said.count("\n") == 1
    assert not (config.run_dir / "report.html").exists()


def test_a_library_that_is_missing_does_not_fail_the_run(config, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cit_scale.report.write", None)
    with StopRequest() as stop:
        leave_report(config, World(), stop)
    assert "no report was written: import of cit_scale.report.write" in capsys.readouterr().out


def test_a_report_that_was_cut_off_is_made_by_the_next_start(config):
    """As is one that is older than the results."""
    page = config.run_dir / "report.html"
    with StopRequest() as stop:
        leave_report(config, World(), stop)
        first = page.stat().st_mtime_ns
        leave_report(config, World(), stop)
        assert page.stat().st_mtime_ns == first
        os.utime(page, (0, 0))
        leave_report(config, World(), stop)
        assert page.stat().st_mtime_ns > first


def test_a_run_that_is_asked_to_stop_does_without(config, capsys):
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        leave_report(config, World(), stop)
    assert "as the run was asked to stop" in capsys.readouterr().out
    assert not (config.run_dir / "report.html").exists()


def test_a_run_that_is_evaluated_on_other_images_has_their_page(tiny_inputs, tmp_path):
    run = TinyRun(tiny_inputs, tmp_path / "runs", "plain", ("--train.report", "true", "--train.epochs", "1"))
    run.finish()
    assert "of 9 images" in Page((run.run_dir / "report.html").read_text()).text
    run.finish("--data.eval", str(tiny_inputs / "train" / "images-idx3-ubyte"))
    page = Page((run.run_dir / "report.html").read_text())
    assert "of 48 images" in page.text
    assert "These are not the images" not in page.text
    rows = {row[0]: row[1:] for row in page.tables["Table of the networks"][1:]}
    assert numbers(rows["student, average"][0])[0] == float(rows["student, average"][-1])
    # By config.yaml, which stays as the run was trained.
    assert "These are not the images of results.json" in page_of(run.run_dir).text


def test_a_screen_that_is_not_there_is_not_missed(finished, tmp_path):
    out = tmp_path / "page.html"
    env = {**os.environ, "MPLBACKEND": "no backend", "MATPLOTLIBRC": str(tmp_path), "HOME": "/proc"}
    command = [sys.executable, "-m", "cit_scale", "report", str(finished), "--out", str(out)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.count("Traceback")) == (0, 0), ended.stderr
    refuse_what_acts(Page(out.read_text()))


# --- The page of all runs ---


def test_the_page_of_all_runs_links_to_their_reports(copy, capsys):
    runs = copy.parent
    strange = runs / "javascript:alert(1)" / "<b>?#&"
    shutil.copytree(copy, strange)
    (strange / "report.html").write_text("there")
    assert runs_main(["--html", "--runs-dir", str(runs)]) == 0
    assert capsys.readouterr().out.strip() == str(runs / "index.html")
    page = Page((runs / "index.html").read_text())
    rows = page.tables["Table of the runs"][1:]
    assert [row[0] for row in rows] == ["copy", "javascript:alert(1)/<b>?#&"]
    assert rows[0][1] == "finished"
    assert (
        rows[0][2] == f"{json.loads((copy / 'results.json').read_text())['accuracy']['student']['top1']['average']:.2f}"
    )
    links = [each["href"] for tag, each in page.elements if tag == "a" and not each["href"].startswith("#")]
    assert links == ["./javascript%3Aalert%281%29/%3Cb%3E%3F%23%26/report.html"]
    assert (runs / unquote(links[0])).read_text() == "there"


def test_the_page_of_all_runs_takes_the_place_of_no_report(copy, capsys):
    (copy / "report.html").write_text("there")
    assert runs_main(["--html", str(copy / "report.html"), "--runs-dir", str(copy.parent)]) == RefusedError.exit_code
    assert runs_main(["--html", str(copy.parent), "--runs-dir", str(copy.parent)]) == ConfigError.exit_code
    assert runs_main(["--html", str(copy / "page"), "--runs-dir", str(copy.parent)]) == ConfigError.exit_code
    assert capsys.readouterr().err.count("\n") == 3
    assert (copy / "report.html").read_text() == "there"


def test_the_page_of_all_runs_lies_where_it_is_asked_for(copy, tmp_path_factory):
    out = tmp_path_factory.mktemp("elsewhere") / "all.html"
    (copy / "report.html").write_text("there")
    assert runs_main(["list", "--html", str(out), "--runs-dir", str(copy.parent)]) == 0
    link = next(each["href"] for tag, each in Page(out.read_text()).elements if each.get("href", "").startswith("./"))
    assert (out.parent / unquote(link)).read_text() == "there"


def test_no_runs_are_a_page_too(tmp_path):
    assert runs_main(["--html", "--runs-dir", str(tmp_path)]) == 0
    assert "0 runs" in Page((tmp_path / "index.html").read_text()).text


def test_the_page_of_all_runs_needs_a_folder(tmp_path, capsys):
    assert runs_main(["--html", "--runs-dir", str(tmp_path / "none")]) == MissingInputError.exit_code
    assert capsys.readouterr().err.count("\n") == 1
