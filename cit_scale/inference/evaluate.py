"""``cit-scale evaluate``: the scores of a run, of weights or of an exported file on a data set."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cit_scale.config import DataConfig, RunConfig
from cit_scale.datasets.encoded import limit_pixels
from cit_scale.datasets.index import cache_folder, printable, shorten
from cit_scale.datasets.pixels import BY_VERSION, FIRST, LATEST, Pixels
from cit_scale.datasets.sources import Source, open_source, open_sources
from cit_scale.distributed.world import World, first_on_each_node, run_on_all_ranks
from cit_scale.errors import BadDataError, ConfigError
from cit_scale.evaluate import HEADS_MEAN
from cit_scale.inference.classifier import Classifier, open_classifier
from cit_scale.inference.entry import SMALLER_BATCHES, run_command
from cit_scale.inference.judges import Judged, judge
from cit_scale.inference.outputs import check_output, write_output
from cit_scale.inference.scores import ImageScores, Scores, best_temperature, joined, score_images, summarize
from cit_scale.inference.turns import Answers, classify_all, unusable_text
from cit_scale.models.classes import columns_by_class
from cit_scale.recipe import build, read_recipe
from cit_scale.run_folder import CONFIG, STREAM, newest_note


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation has found.

    data: of the images. scores: by head; with several heads ``average`` is their mean logits. temperature: by which to
    divide the logits of the last of the heads for calibrated probabilities; ece, nll: with it. unusable: images that
    could not be used, with the reasons. left_out: images of classes that the classifier does not know.
    seconds: from the first image read to the last one classified.
    """

    name: str
    data: str
    images: int
    scores: dict[str, Scores]
    temperature: float | None
    with_temperature: Scores | None
    unusable: dict[str, str]
    left_out: int
    seconds: float

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "images_per_s": self.images_per_s}


@dataclass
class _Collected:
    """On rank 0, of all images that count, in their order."""

    samples: list[int] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    by_head: dict[str, list[ImageScores]] = field(default_factory=dict)
    logits: list[np.ndarray] = field(default_factory=list)
    """Of the last head."""


def run(arguments: argparse.Namespace) -> int:
    """Run ``cit-scale evaluate``. arguments: parsed by `cit_scale.inference.commands`. Returns an exit code."""

    def work(world: World) -> None:
        if arguments.judge and arguments.only_known:
            raise ConfigError("--judge says which classes --data has; leave out --only-known")
        out = None
        if arguments.json not in (None, "-"):
            out = check_output("--json", arguments.json, [arguments.model, arguments.data or ""])
        classifier = open_classifier(arguments.model, world)
        found = evaluate_classifier(
            classifier,
            world,
            data=arguments.data,
            which=arguments.judge,
            only_known=arguments.only_known,
            batch_size=arguments.batch_size,
            threads=arguments.threads,
        )
        if found is None:
            return
        for note in classifier.notes:
            print(note, file=sys.stderr)
        text = json.dumps(found.to_json(), indent=2) + "\n"
        if arguments.json == "-":
            sys.stdout.write(text)
            return
        if out is not None:
            write_output(out, text)
        print_evaluation(found)

    return run_command(work, needs_less_memory=SMALLER_BATCHES)


def evaluate_classifier(
    classifier: Classifier,
    world: World,
    *,
    data: str | None = None,
    which: str | None = None,
    only_known: bool = False,
    batch_size: int | None = None,
    threads: int = 4,
) -> Evaluation | None:
    """Collective. Evaluate a classifier on a data set. Returns the result on rank 0, None on the others.

    data: as data.eval of a run; None: the evaluation set of the classifier's run. which: one of JUDGES, for ImageNet's
    other judges. only_known: leave out images of classes that the classifier does not know. batch_size: None: by the
    device. threads: that decode, on each rank.
    Raises ConfigError, and BadDataError if no image can be used.
    """
    source = first_on_each_node(world, lambda: open_images(classifier, data))
    judged = run_on_all_ranks(
        world,
        lambda: judge(which, source, classifier.classes) if which else known_images(source, classifier, only_known),
    )
    collected = _Collected()
    label_of = dict(zip(judged.samples.tolist(), judged.labels, strict=True))
    began_at = time.perf_counter()

    def take(answers: Answers) -> bool:
        collected.samples += answers.good
        collected.reasons |= dict(answers.unusable)
        labels = [label_of[sample] for sample in answers.good]
        for head, logits in answers.logits.items():
            scored = logits if judged.columns is None else logits[:, judged.columns]
            collected.by_head.setdefault(head, []).append(score_images(scored, labels))
        if answers.logits:
            collected.logits.append(scored)
        return True

    items = iter(judged.samples.tolist())
    classify_all(items, source.read, classifier, world, take, batch_size=batch_size, threads=threads)
    if not world.is_main:
        return None
    return _summarize(classifier.name, source, judged, collected, time.perf_counter() - began_at, data, label_of)


def _summarize(
    name: str,
    source: Source,
    judged: Judged,
    collected: _Collected,
    seconds: float,
    data: str | None,
    label_of: dict[int, Sequence[int]],
) -> Evaluation:
    reasons = {source.name(sample): reason for sample, reason in collected.reasons.items()}
    if not collected.samples:
        raise BadDataError(f"none of {len(judged.samples)} images can be used: {unusable_text(reasons.values())}")
    labels = None
    if all(len(each) == 1 for each in judged.labels):
        labels = np.array([label_of[sample][0] for sample in collected.samples])
    heads = {head: joined(parts) for head, parts in collected.by_head.items()}
    scores = {head: summarize(each, labels) for head, each in heads.items()}
    logits = np.concatenate(collected.logits)
    temperature = None if labels is None else best_temperature(logits, labels)
    with_temperature = None
    if temperature is not None and labels is not None:
        with_temperature = summarize(score_images(logits / temperature, [(label,) for label in labels]), labels)
    return Evaluation(
        name=name,
        data=data or "the evaluation set of its run",
        images=len(collected.samples),
        scores=scores,
        temperature=temperature,
        with_temperature=with_temperature,
        unusable=reasons,
        left_out=len(source) - len(judged.samples),
        seconds=seconds,
    )


def open_images(classifier: Classifier, data: str | None, option: str = "--data") -> Source:
    """The images to evaluate on. data: as in ``evaluate_classifier``. option: that names it. Raises ConfigError."""
    if data is not None:
        return named_set(data, option)
    if classifier.run_dir is None:
        raise ConfigError(
            f"{printable(classifier.name)} lies in no run folder, which would say on what; give {option} DIR"
        )
    return evaluation_set(run_config(classifier.run_dir).data, run_pixels(classifier.run_dir))


def named_set(data: str, option: str = "--data") -> Source:
    """Images that an option names, as data.eval of a run does. Raises ConfigError."""
    return open_source(data, cache_folder(DataConfig().cache_dir), option)


def evaluation_set(config: DataConfig, pixels: Pixels) -> Source:
    """The images on which a run is evaluated. Raises ConfigError."""
    if config.eval is not None:  # without the images that it was trained on, which may be gone
        limit_pixels(config.max_pixels)
        cache_dir = cache_folder(config.cache_dir)
        return open_source(config.eval, cache_dir, "data.eval", pixels, label_key=config.label_key)
    return open_sources(config, pixels)[1]


def run_config(run_dir: Path) -> RunConfig:
    """The configuration of a run, from its folder. Raises ConfigError."""
    return build(read_recipe(str(run_dir / CONFIG)), RunConfig)


def run_pixels(run_dir: Path) -> Pixels:
    """The version of pixels with which a run was begun: it decides which images were held out."""
    noted, _ = newest_note(run_dir)
    versions = noted.get(STREAM, {"pixels": FIRST.version}) if noted else {}
    number = versions.get("pixels", LATEST.version) if isinstance(versions, dict) else LATEST.version
    return BY_VERSION.get(number, LATEST)


def known_images(source: Source, classifier: Classifier, only_known: bool) -> Judged:
    """All images whose class the classifier knows, by name. Raises ConfigError for others, unless ``only_known``."""
    columns = columns_by_class(source.classes, classifier.description)
    several = [printable(name) for name, found in zip(source.classes, columns, strict=True) if len(found) > 1]
    if several:
        raise ConfigError(f"several classes of {printable(classifier.name)} are called {shorten(several)}")
    unknown = [printable(name) for name, found in zip(source.classes, columns, strict=True) if not found]
    if unknown and (not only_known or len(unknown) == len(source.classes)):
        known = shorten([repr(printable(each)) for each in classifier.classes], 3)
        all_of = "any" if len(unknown) == len(source.classes) else f"{len(unknown)}"
        hint = "" if len(unknown) == len(source.classes) else "; --only-known leaves them out"
        raise ConfigError(
            f"{printable(classifier.name)} does not know {all_of} of the {len(source.classes)} classes of the data: "
            f"{shorten([repr(each) for each in unknown])}; its {len(classifier.classes)} classes are {known}{hint}"
        )
    column_of = np.array([found[0] if found else -1 for found in columns])[source.labels]
    samples = np.flatnonzero(column_of >= 0)
    return Judged(samples, [(int(column),) for column in column_of[samples]])


def print_evaluation(found: Evaluation) -> None:
    table = Table(title=Text(f"{printable(found.name)} on {printable(found.data)}"), title_justify="left")
    table.add_column("head")
    for column in ("top-1 %", "top-5 %", "class mean %", "NLL", "ECE %"):
        table.add_column(column, justify="right")
    rows = dict(found.scores)
    if found.with_temperature is not None:
        rows[f"{list(rows)[-1]}, T = {found.temperature:.3f}"] = found.with_temperature
    for head, scores in rows.items():
        nll = "" if scores.nll is None else f"{scores.nll:.4f}"
        class_mean = "" if scores.class_mean is None else f"{scores.class_mean:.2f}"
        values = f"{scores.top1:.2f}", f"{scores.top5:.2f}", class_mean, nll, f"{scores.ece:.2f}"
        table.add_row(head, *values, style="bold" if head == HEADS_MEAN else None)
    console = Console(highlight=False)
    console.print(table)
    console.print(f"images   {found.images}, {found.images_per_s:.0f} a second")
    if found.unusable:
        bad = [f"{name} ({reason})" for name, reason in found.unusable.items()]
        console.print(f"unusable {len(bad)}: {shorten(bad)}", soft_wrap=True, markup=False)
    if found.left_out:
        console.print(f"left out {found.left_out} images whose class does not count here")
