"""What a run's networks are: a description of its student, the hashes of given weights, its teachers' accuracy.

Noted in the run folder before training starts: a teacher at chance is seen then, and not after days.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cit_scale.batch import Batch
from cit_scale.config import TeacherConfig
from cit_scale.distributed.world import broadcast, run_on_all_ranks
from cit_scale.evaluate import Accuracy, evaluate
from cit_scale.files import write_text
from cit_scale.models.network import Network, describe
from cit_scale.models.pretrained import OTHER_LICENCE
from cit_scale.run.inputs import EVALUATION_DATA, FIRST_WEIGHTS
from cit_scale.run.setup import PreparedRun, noted_networks, writing
from cit_scale.run_folder import DESCRIPTION, NETWORKS, STUDENT
from cit_scale.settings import to_dict
from cit_scale.teachers import Teacher, run_teachers

# A teacher is near chance below chance and this share of what is missing to 100 %: below 14.5 % in ten classes.
LEAST_ABOVE_CHANCE = 0.05


def describe_student(prepared: PreparedRun, network: Network) -> dict[str, Any]:
    """The student as timm describes a model, for config.json beside the weights that the run leaves."""
    data = prepared.config.data
    return describe(
        network,
        given_size=data.image_size,
        crop_ratio=data.crop_ratio,
        classes=prepared.train_set.classes,
        file=STUDENT,
        licence=licence_of(prepared.config.run_dir),
    )


def licence_of(run_dir: Path) -> str:
    """The licence that the user has set in the run's config.json; "other" where there is none."""
    try:
        licence = json.loads((run_dir / DESCRIPTION).read_text())["pretrained_cfg"]["license"]
    except (OSError, ValueError, KeyError, TypeError):
        return OTHER_LICENCE
    return licence if isinstance(licence, str) else OTHER_LICENCE


def evaluate_teachers(
    prepared: PreparedRun,
    teachers: Mapping[str, TeacherConfig],
    frozen: Sequence[Teacher],
    inputs: Mapping[str, str],
    new: Collection[str] | None,
    eval_batches: Callable[[], Iterator[Batch]],
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Collective. Evaluate the teachers, and note their accuracy and all given weights in networks.json.

    Not again if an earlier start has noted the same teachers on the same images. teachers, frozen: the same teachers,
    as configured and as loaded. inputs: from ``inputs.fingerprints``. new: ``Network.new`` of the student; None: as
    an earlier start noted it. Returns the teachers' part of results.json, by name.
    """
    world, config = prepared.world, prepared.config
    noted = broadcast(world, noted_networks(config))
    asked = {
        "inputs": {key: value for key, value in inputs.items() if key.startswith("teacher ") or key == EVALUATION_DATA},
        "teachers": {name: to_dict(teacher) for name, teacher in teachers.items()},
        "precision": config.distill.teacher_precision,
        "images": [config.data.image_size, config.data.crop_ratio],
    }
    asked = json.loads(json.dumps(asked))  # as it is read again
    if noted.get("asked") == asked and noted["teachers"].keys() == teachers.keys():
        return noted["teachers"]
    accuracy: dict[str, dict[str, Any]] = {}
    if frozen:
        measured = evaluate(lambda images: run_teachers(frozen, images), eval_batches(), world)
        for teacher in frozen:
            model = teachers[teacher.name].model
            accuracy[teacher.name] = {
                "model": model,
                "sha256": teacher.sha256,
                "top1": measured.top1[teacher.name],
                "top5": measured.top5[teacher.name],
                "class_mean": measured.class_mean[teacher.name],
            }
            say(teacher_line(teacher.name, model, measured, prepared.num_classes))

    def write() -> None:
        if not world.is_main:
            return
        student = noted.get("student")
        if not prepared.has_begun or student is None:
            start = config.student.start
            student = {"model": config.student.name, "weights": start, "sha256": inputs[FIRST_WEIGHTS]}
            student["new"] = None if start is None or new is None else sorted(new)
        content = {"student": student, "teachers": accuracy, "asked": asked}
        write_text(config.run_dir / NETWORKS, json.dumps(content, indent=2) + "\n")

    with writing(config.run_dir):
        run_on_all_ranks(world, write)
    return accuracy


def teacher_line(name: str, model: str, measured: Accuracy, num_classes: int) -> str:
    """A line about a teacher's accuracy. One answer to all images is chance as a mean over classes."""
    chance = 100 / num_classes
    line = f"teacher {name} ({model}): top-1 {measured.top1[name]:.2f} % on the evaluation set"
    if measured.class_mean[name] >= chance + LEAST_ABOVE_CHANCE * (100 - chance):
        return line
    return (
        f"{line}, and {measured.class_mean[name]:.2f} % as a mean over {num_classes} classes, which is near chance "
        f"({chance:.2f} %); check that its weights are of these classes in this order, and its mean and std"
    )
