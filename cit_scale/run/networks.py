"""What a run was given: the weights of its networks, with their hashes, and what its teachers know.

Noted in the run folder before training starts: a teacher that knows nothing is seen then, and not after days.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cit_scale.batch import Batch
from cit_scale.config import TeacherConfig
from cit_scale.distributed.world import broadcast, run_on_all_ranks
from cit_scale.evaluate import Accuracy, evaluate
from cit_scale.files import read_note, write_text
from cit_scale.models.network import Network
from cit_scale.models.pretrained import describe, find_pretrained
from cit_scale.run.inputs import EVALUATION_DATA, FIRST_WEIGHTS
from cit_scale.run.setup import PreparedRun, writing
from cit_scale.run_folder import NETWORKS
from cit_scale.teachers import Teacher, run_teachers

# A teacher is near chance that knows less than this share of what guessing does not: 14.5 % of ten classes.
LEAST_KNOWLEDGE = 0.05


def describe_student(prepared: PreparedRun, network: Network) -> dict[str, Any]:
    """The student as timm describes a model, for config.json beside the weights that the run leaves."""
    config = prepared.config
    return describe(
        config.student.name,
        config.student.kwargs,
        statistics=network.statistics,
        image_size=network.image_size or config.data.image_size,
        crop_ratio=config.data.crop_ratio,
        classes=prepared.train_set.classes,
    )


def know_teachers(
    prepared: PreparedRun,
    teachers: Mapping[str, TeacherConfig],
    frozen: Sequence[Teacher],
    inputs: Mapping[str, str],
    eval_batches: Callable[[], Iterator[Batch]],
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Collective. Evaluate the teachers and note their accuracy and all given weights, unless an earlier start did.

    teachers, frozen: the same teachers, as configured and as loaded. inputs: from ``inputs.fingerprints``.
    Returns the teachers' part of results.json, by name.
    """
    world, config, path = prepared.world, prepared.config, prepared.config.run_dir / NETWORKS
    noted = broadcast(world, run_on_all_ranks(world, lambda: read_note(path) if world.is_main else {}))
    given = {name: value for name, value in inputs.items() if name.startswith("teacher ") or name == EVALUATION_DATA}
    if noted.get("inputs") == given and "teachers" in noted:
        return noted["teachers"]
    known: dict[str, dict[str, Any]] = {}
    if frozen:
        measured = evaluate(lambda images: run_teachers(frozen, images), eval_batches(), world)
        for teacher in frozen:
            about = teachers[teacher.name]
            known[teacher.name] = {
                "model": about.model,
                "weights": about.ready,
                "file": str(find_pretrained(about.ready).file) if about.ready else None,
                "sha256": teacher.sha256,
                "top1": measured.top1[teacher.name],
                "top5": measured.top5[teacher.name],
                "class_mean": measured.class_mean[teacher.name],
            }
            say(knowledge(teacher.name, about.model, measured, prepared.num_classes))
    start = config.student.start
    student = {
        "model": config.student.name,
        "weights": start,
        "file": str(find_pretrained(start).file) if start else None,
        "sha256": inputs.get(FIRST_WEIGHTS),
    }
    text = json.dumps({"student": student, "teachers": known, "inputs": given}, indent=2) + "\n"
    with writing(config.run_dir):
        run_on_all_ranks(world, lambda: write_text(path, text) if world.is_main else None)
    return known


def knowledge(name: str, model: str, measured: Accuracy, num_classes: int) -> str:
    """A line about what a teacher knows; by the mean over classes, in which one answer to all images is chance."""
    chance = 100 / num_classes
    known = f"teacher {name} ({model}) knows {measured.top1[name]:.2f} % of the evaluation images"
    if measured.class_mean[name] >= chance + LEAST_KNOWLEDGE * (100 - chance):
        return known
    return (
        f"{known}, and as a mean over {num_classes} classes {measured.class_mean[name]:.2f} %, which is near chance "
        f"({chance:.2f} %): its advice is noise; are its weights of these classes, in this order?"
    )
