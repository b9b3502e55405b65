"""Fingerprints of a run's inputs, the data and the files of weights. Paths may change between starts, bytes may not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from cit_scale.config import TeacherConfig
from cit_scale.datasets import contents
from cit_scale.datasets.index import shorten
from cit_scale.distributed.world import World, gather
from cit_scale.errors import MissingInputError, RefusedError
from cit_scale.models.classes import class_columns
from cit_scale.models.pretrained import FOLDER, HUB, description_of, find_pretrained
from cit_scale.run.noted import noted_inputs
from cit_scale.run.setup import PreparedRun
from cit_scale.run_folder import CONTENTS

DATA = "data"
"""Name of the training images."""

EVALUATION_DATA = "evaluation data"
"""Name of the input that changes the results of a run, but not its weights."""

DATA_CONTENTS, EVALUATION_CONTENTS = "data, contents", f"{EVALUATION_DATA}, contents"
"""With data.verify. Without, these are as they were noted, and not compared."""

OF_EVALUATION = (EVALUATION_DATA, EVALUATION_CONTENTS)

FIRST_WEIGHTS = "the student's first weights"

# What a network takes from the description of its weights: how images are normalised and sized, which class is which.
DESCRIBES = ("mean", "std", "input_size", "label_names", "label_offset", "columns", "architecture", "arguments")

NONE = "none"


def fingerprints(prepared: PreparedRun, teachers: Mapping[str, TeacherConfig]) -> dict[str, str]:
    """Fingerprints of data and weights, by name, and NONE for weights that there are not.

    teachers: those without weights yet are left out. The weights from which a run that has begun started may be gone:
    they count as they were noted then.
    """
    config = prepared.config
    versions = prepared.versions
    found = {
        DATA: versions.fingerprint(prepared.train_set.fingerprint),
        EVALUATION_DATA: versions.fingerprint(prepared.eval_set.fingerprint),
    }
    noted, _ = noted_inputs(config.run_dir)
    readers = {DATA_CONTENTS: prepared.train_images, EVALUATION_CONTENTS: prepared.eval_images}
    for name, reader in readers.items():
        if reader.hashes is not None:
            found[name] = contents.digest_of(reader.hashes)
        elif name in noted:
            found[name] = noted[name]
    start = config.student.start
    try:
        found[FIRST_WEIGHTS] = NONE if start is None else find_pretrained(start).sha256
        found[f"{FIRST_WEIGHTS}, description"] = _description_hash(description_of(start))
    except (MissingInputError, OSError):
        if FIRST_WEIGHTS not in noted:
            raise
        found |= {name: value for name, value in noted.items() if name.startswith(FIRST_WEIGHTS)}
    for name, teacher in teachers.items():
        if teacher.advises_with is None:
            continue
        description = dict(description_of(teacher.weights, teacher.start))
        if teacher.classes is not None:
            description["columns"] = class_columns(prepared.train_set.classes, teacher.classes, description)[0]
        if teacher.model.startswith((HUB, FOLDER)):
            model = find_pretrained(teacher.model)
            description |= {"architecture": model.architecture, "arguments": model.arguments}
        found[f"teacher {name}"] = find_pretrained(teacher.advises_with).sha256
        found[f"teacher {name}, description"] = _description_hash(description)
    return found


def _description_hash(description: Mapping[str, Any]) -> str:
    used = {key: description[key] for key in DESCRIBES if key in description}
    return hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest() if used else NONE


def refuse_different(world: World, inputs: Mapping[str, str]) -> None:
    """Collective. Raise RefusedError if ranks read different files."""
    for rank, theirs in enumerate(gather(world, inputs)):
        different = [name for name in inputs if theirs[name] != inputs[name]]
        if different:
            raise RefusedError(
                f"ranks {min(rank, world.rank)} and {max(rank, world.rank)} read different files as "
                f"{', '.join(different)}; put one copy where all nodes see it"
            )


def changed_inputs(noted: Mapping[str, Any], here: Mapping[str, str]) -> list[str]:
    """Names of the inputs whose fingerprints differ from ``noted``. Inputs that are not noted are not compared."""
    return [name for name in here if noted.get(name, here[name]) != here[name]]


def refuse_other_inputs(prepared: PreparedRun, teachers: Mapping[str, TeacherConfig]) -> None:
    """Raise RefusedError if the run folder belongs to other training data or teachers, or, unless its run is finished,
    to other evaluation data.

    Called for all runs before the first is trained, because any one of the teachers' runs may belong to other data.
    """
    config = prepared.config
    noted, is_finished = noted_inputs(config.run_dir)
    if not noted:  # nothing to compare with: hashing gigabytes of weights can wait until they are loaded
        return
    here = fingerprints(prepared, teachers)
    other = [name for name in changed_inputs(noted, here) if not (is_finished and name in OF_EVALUATION)]
    if other:
        shown = "; ".join(f"{name}: {noted[name]:.12} -> {here[name]:.12}" for name in other)
        if images := changed_images(prepared):
            shown = f"images with other bytes: {shorten(images, 3)}; {shown}"
        raise RefusedError(
            f"{config.run_dir} holds a run of other files ({shown}); bring those back, give this run another --name, "
            "set that one aside with --fresh, or go on with it all the same with --override-resume"
        )


def keep_hashes(prepared: PreparedRun) -> None:
    """Write the hashes of all images into the run folder, for ``changed_images``; nothing without data.verify."""
    path = prepared.config.run_dir / CONTENTS
    train, evaluation = prepared.train_images.hashes, prepared.eval_images.hashes
    if train is not None and evaluation is not None:
        contents.save_hashes(path, (train, evaluation))


def changed_images(prepared: PreparedRun) -> list[str]:
    """Keys of the images whose bytes differ from those that the run began with, where both are known."""
    train, evaluation = prepared.train_images.hashes, prepared.eval_images.hashes
    if train is None or evaluation is None:
        return []
    path = prepared.config.run_dir / CONTENTS
    return contents.changed_images(path, (prepared.train_set, prepared.eval_set), (train, evaluation))
