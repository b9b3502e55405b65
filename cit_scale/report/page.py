"""Fills the page of a report: what was found as tables, drawings and sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
from markupsafe import Markup

from cit_scale.report import figures
from cit_scale.report.answers import NetworkAnswers, Survey, spread_places
from cit_scale.report.history import Curve, History
from cit_scale.report.html import render_page
from cit_scale.report.measures import (
    Share,
    agreement_matrix,
    class_shares,
    compare_advice,
    confusion,
    linear_cka,
    most_confused,
    reliability_bins,
    right_where_wrong,
)
from cit_scale.report.pictures import AttendedImage, TrainingSample, file_name
from cit_scale.run.folders import as_dict, dig
from cit_scale.run.show import as_figure, as_time

T = TypeVar("T")

TABLE_CLASSES = 20  # classes of a confusion matrix whose cells are written as numbers; more are a picture
MOST_DRAWN = 2000  # classes of a confusion matrix that is drawn
MOST_PAIRS, FEW_PAIRS = 30, 10  # confused classes that are listed, and beside a table of all
MOST_STARTS = 50  # and ends of jobs, that are listed
MOST_ROWS = 50  # of a curve's numbers
MOST_LISTED = 20  # bad images and bad steps that are listed


@dataclass(frozen=True)
class Part(Generic[T]):
    """A part of the report, or why it is not there."""

    value: T | None = None
    reason: str = ""


@dataclass(frozen=True)
class Example:
    """An image of the evaluation set. place: of it in the survey. image: its address; empty where it is gone."""

    place: int
    image: str


@dataclass(frozen=True)
class Content:
    """All that a report shows.

    record: as ``run_record`` has it. plan: what an update is made of, by name. config_text: config.yaml. histories: by
    phase, the student's under "". is_other_set: the survey is of other images than the results. is_training_set: of
    those that the run was trained on. weights: file of the student's. models: of the teachers, by name. missing: by
    name, why a teacher is not asked. worst, doubtful: examples of both. bad_images: names and reasons. made: when, and
    by what version.
    """

    record: Mapping[str, Any]
    plan: Sequence[tuple[str, str]]
    config_text: str
    histories: Mapping[str, History]
    survey: Part[Survey | None]
    is_other_set: bool
    is_training_set: bool
    weights: str
    models: Mapping[str, str]
    missing: Mapping[str, str]
    worst: Sequence[Example]
    doubtful: Sequence[Example]
    attention: Part[Sequence[AttendedImage]]
    samples: Part[Sequence[TrainingSample]]
    bad_images: Sequence[tuple[str, str]]
    made: str


def render(content: Content) -> str:
    """The whole page as HTML."""
    survey = content.survey.value
    return render_page(
        "report.html",
        content=content,
        record=content.record,
        networks=network_rows(content),
        training=training_drawings(content),
        classes=None if survey is None else class_part(survey),
        confused=None if survey is None else confusion_part(survey),
        calibration=None if survey is None else calibration_part(survey),
        advice=None if survey is None else advice_part(survey),
        examples=None if survey is None else examples_part(survey, content),
        survey=survey,
        facts=fact_rows(content.record, content.plan),
        most_listed=MOST_LISTED,
        most_starts=MOST_STARTS,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The networks, and their training


def network_rows(content: Content) -> list[dict[str, Any]]:
    """A row for each network: what this page's survey found, and what results.json says."""
    results, survey = as_dict(content.record["results"]), content.survey.value
    rows = []
    teachers = as_dict(results.get("teachers"))
    names = dict.fromkeys([*content.models, *teachers])
    for name in names:
        model = content.models.get(name) or dig(teachers, name, "model")
        said = survey.teachers.get(name) if survey else None
        rows.append(_network_row(f"teacher {name}", model, said, survey, dig(teachers, name, "top1")))
    for student, accuracy in (as_dict(results.get("accuracy")) or {"student": {}}).items():
        top1 = as_dict(dig(accuracy, "top1"))
        heads = survey.heads if survey and student == "student" else {}
        for head in dict.fromkeys([*heads, *top1]):
            row = _network_row(f"{student}, {head}", None, heads.get(head), survey, top1.get(head))
            rows.append({**row, "is_whole": survey is not None and student == "student" and head == survey.whole})
    return rows


def _network_row(
    name: str, model: Any, said: NetworkAnswers | None, survey: Survey | None, noted: Any
) -> dict[str, Any]:
    row = {"name": name, "model": model, "noted": noted, "top1": None, "scores": None, "is_whole": False}
    if said is None or survey is None:
        return row
    right = said.choice == survey.labels
    return {**row, "top1": Share(int(right.sum()), len(right)), "scores": survey.scores(said)}


@dataclass(frozen=True)
class Drawing:
    """A drawing with its legend: (name, number of its colour). rows: (update, values by curve), some of its points, for
    those who do not see it. points: how many there are. note: what else is to be said of it.
    """

    title: str
    svg: Markup
    legend: Sequence[tuple[str, int]]
    rows: Sequence[tuple[int, Sequence[float | None]]]
    points: int
    note: str = ""


def training_drawings(content: Content) -> dict[str, list[Drawing]]:
    """By phase, the curves of the student's training, and loss and accuracy of the teachers that the run trained; empty
    where no phase has any.
    """
    drawings: dict[str, list[Drawing]] = {}
    for phase, history in content.histories.items():
        terms = {f"loss, {curve.name}": curve for curve in history.named("loss_")}
        losses = {"loss": history.curves["loss"]} if "loss" in history.curves else {}
        losses |= terms if len(terms) > 1 else {}  # the only term is the loss
        accuracy = {curve.name: curve for curve in history.named("top1_") if not curve.name.startswith("ema_")}
        accuracy |= {f"ema, {curve.name}": curve for curve in history.named("top1_ema_")}
        groups: list[tuple[str, str, Mapping[str, Curve], bool]] = [
            ("loss terms", "loss", losses, False),
            ("accuracy by head", "top-1 %", accuracy, False),
        ]
        if not phase:
            groups += [
                (title, label, {title: history.curves[key]} if key in history.curves else {}, logarithmic)
                for title, label, key, logarithmic in (
                    ("learning rate", "learning rate", "lr", False),
                    ("gradient norm", "norm before clipping", "grad_norm", True),
                    ("speed", "images/s", "images_per_s", False),
                )
            ]
        drawings[phase] = [
            _curves(f"phase-{len(drawings)}-", title, label, drawn, history, logarithmic)
            for title, label, drawn, logarithmic in groups
            if any(np.isfinite(curve.values).any() for curve in drawn.values())
        ]
    return drawings if any(drawings.values()) else {}


def _curves(
    whose: str, title: str, label: str, drawn: Mapping[str, Curve], history: History, logarithmic: bool
) -> Drawing:
    name = whose + title.replace(" ", "-")
    svg = figures.curves(
        drawn, name, label=label, resumed=history.resumed, skipped=list(history.skipped), logarithmic=logarithmic
    )
    by_step = [dict(zip(curve.steps.tolist(), curve.values.tolist(), strict=True)) for curve in drawn.values()]
    steps = sorted({step for each in by_step for step in each})
    chosen = [steps[place] for place in spread_places(len(steps), MOST_ROWS)]
    rows = [(int(step), [each.get(step) for each in by_step]) for step in chosen]
    thinned = max(curve.thinned for curve in drawn.values())
    note = f"Each point is the mean of {thinned} lines." if thinned > 1 else ""
    legend = [(each, number % len(figures.SERIES)) for number, each in enumerate(drawn)]
    return Drawing(title, svg, legend, rows, len(steps), note)


# ---------------------------------------------------------------------------------------------------------------------
# The evaluation set


def class_part(survey: Survey) -> dict[str, Any]:
    """Per-class accuracy of the student, the worst first; classes without images last."""
    shares = class_shares(survey.labels, survey.correct, len(survey.classes))
    order = sorted(range(len(shares)), key=lambda place: (not shares[place].count, shares[place].value, place))
    rows = [{"number": place, "share": shares[place], "bar": _bar(shares[place])} for place in order]
    with_images = [share for share in shares if share.count]
    drawing = None
    if len(with_images) > TABLE_CLASSES:
        values = np.array([100 * share.value for share in with_images])
        drawing = figures.histogram(values, "class-accuracy", label="accuracy of a class, %", counted="classes")
    return {"rows": rows, "empty": len(shares) - len(with_images), "drawing": drawing}


def _bar(share: Share) -> Markup:
    """A share as a bar, with its interval as a line over it; the numbers stand beside it."""
    if not share.count:
        return Markup("")
    low, high = (100 * bound for bound in share.interval)
    return Markup(
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true" focusable="false">'
        '<rect width="{:.1f}" height="10"/><line x1="{:.1f}" x2="{:.1f}" y1="5" y2="5"/></svg>'
    ).format(100 * share.value, low, high)


def confusion_part(survey: Survey) -> dict[str, Any]:
    """The confusion matrix as a table or a picture, and the classes that are most often taken for each other."""
    labels, choices, count = survey.labels, survey.student.choice, len(survey.classes)
    table, drawing, side = None, None, 1
    if count <= MOST_DRAWN:
        matrix = confusion(labels, choices, count)
        if count <= TABLE_CLASSES:
            rows = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
            table = [
                [{"count": int(cell), "share": float(share)} for cell, share in zip(cells, shares, strict=True)]
                for cells, shares in zip(matrix, rows, strict=True)
            ]
        else:
            drawing, side = figures.confusion_picture(matrix, "confusion")
    pairs = most_confused(labels, choices, MOST_PAIRS if table is None else FEW_PAIRS)
    wrong = int((labels != choices).sum())
    return {"table": table, "drawing": drawing, "side": side, "pairs": pairs, "wrong": wrong}


def calibration_part(survey: Survey) -> dict[str, Any]:
    said = survey.student
    bins = reliability_bins(said.prob, survey.correct)
    mean, right = math.fsum(said.prob) / len(said.prob), Share(int(survey.correct.sum()), len(survey.correct))
    return {
        "drawing": figures.reliability_diagram(bins, "reliability"),
        "bins": bins,
        "ece": survey.scores(said).ece,
        "mean": mean,
        "right": right.value,
        "word": "over" if mean > right.value else "under",
    }


def examples_part(survey: Survey, content: Content) -> dict[str, list[dict[str, Any]]]:
    describe = partial(_example, survey)
    return {"worst": [*map(describe, content.worst)], "doubtful": [*map(describe, content.doubtful)]}


def _example(survey: Survey, example: Example) -> dict[str, Any]:
    place = example.place
    sample = int(survey.samples[place])
    label, said = int(survey.labels[place]), survey.student
    everyone = [(f"teacher {name}", each) for name, each in survey.teachers.items()]
    everyone += [(name, each) for name, each in survey.heads.items() if name != survey.whole or len(survey.heads) == 1]
    return {
        "image": example.image,
        "file": file_name(survey.source, sample),
        "label": label,
        "choice": int(said.choice[place]),
        "prob": float(said.prob[place]),
        "label_prob": math.exp(-float(said.nll[place])),
        "entropy": float(said.entropy[place]),
        "said": [
            {"who": who, "choice": int(each.choice[place]), "prob": float(each.prob[place])} for who, each in everyone
        ],
    }


# ---------------------------------------------------------------------------------------------------------------------
# What the advice did


def advice_part(survey: Survey) -> dict[str, Any]:
    """How teachers and heads agree, who was right where the student is wrong, how heads follow their teachers, CKA."""
    voices = {f"teacher {name}": said for name, said in survey.teachers.items()}
    voices |= {f"student, {name}": said for name, said in survey.heads.items()}
    matrix = agreement_matrix([said.choice for said in voices.values()])
    whole = survey.student.choice
    helped = []
    for name, said in voices.items():
        if said is survey.student:
            continue
        other_right, whole_right = right_where_wrong(survey.labels, whole, said.choice)
        both = (whole != survey.labels) & (said.choice == whole)
        helped.append(
            {
                "name": name,
                "other_right": other_right,
                "whole_right": whole_right,
                "same_mistake": Share(int(both.sum()), other_right.count),
            }
        )
    followed = [
        {
            "teacher": teacher,
            "head": head,
            "is_own": head == teacher,
            "advice": compare_advice(survey.labels, advisor.choice, said.choice),
            "divergence": math.fsum(survey.divergences[teacher, head]) / len(survey.labels),
        }
        for teacher, advisor in survey.teachers.items()
        for head, said in survey.heads.items()
    ]
    features, theirs = survey.head_features, survey.teacher_features
    compared = len(next(iter(theirs.values()), ()))
    cka = [
        {"head": head, "cells": [linear_cka(ours, each) for each in theirs.values()]} for head, ours in features.items()
    ]
    any_right = np.zeros(len(whole), bool)
    for said in survey.teachers.values():
        any_right |= said.choice == survey.labels
    return {
        "names": list(voices),
        "agreement": matrix,
        "helped": helped,
        "any_teacher": Share(int(any_right[whole != survey.labels].sum()), int((whole != survey.labels).sum())),
        "followed": followed,
        "cka": cka if theirs else [],
        "cka_teachers": list(theirs),
        "compared": compared,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The run


def fact_rows(record: Mapping[str, Any], plan: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """What the run was to do and what became of it, from ``run_record`` and its plan."""
    total = record["total_steps"]
    rows = [
        ("state", f"{record['state']} {record['detail']}".strip()),
        ("updates", f"{record['step']} of {'?' if total is None else total}" if record["step"] is not None else ""),
        ("speed", f"{as_figure(record['images_per_s'], '.0f')} images/s" if record["images_per_s"] else ""),
        ("goodput", as_figure(record["goodput"], ".1%")),
        ("time left", as_time(record["left_s"])),
        ("images that cannot be used", str(record["bad_images"])),
        ("bad steps", "" if record["bad_steps"] is None else str(record["bad_steps"])),
        ("folder", str(record["folder"])),
        *plan,
        *((name, str(value)) for name, value in record["config"].items()),
    ]
    return [(name, value) for name, value in rows if value]
