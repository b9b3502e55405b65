"""Where the results of evaluate and predict go, and where they must not."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from cit_scale.datasets.encoded import EXTENSIONS
from cit_scale.datasets.index import printable
from cit_scale.errors import ConfigError, MissingInputError, RefusedError
from cit_scale.files import write_text
from cit_scale.run_folder import (
    ATTEMPTS,
    BAD_IMAGES,
    CARD,
    CONFIG,
    CONTENTS,
    DESCRIPTION,
    ENVIRONMENT,
    INSIDE,
    METRICS,
    NETWORKS,
    RESULTS,
    STUDENT,
    STUDENT_BEST,
    STUDENT_EMA,
    STUDENT_EMA_BEST,
    SUBMISSIONS,
    TEACHERS,
    UNFIT_NODES,
)

OF_A_RUN = {
    *(CARD, CONFIG, DESCRIPTION, ENVIRONMENT, METRICS, NETWORKS, RESULTS, CONTENTS, BAD_IMAGES),
    *(STUDENT, STUDENT_BEST, STUDENT_EMA, STUDENT_EMA_BEST, SUBMISSIONS, ATTEMPTS, UNFIT_NODES),
}

NEVER_RESULTS = EXTENSIONS | {".tar", ".safetensors", ".pt", ".pth", ".bin", ".ckpt"}
"""How names of images and weights end: what is there under such a name is no earlier result."""


def check_output(option: str, name: str, inputs: Iterable[str], *, suffixes: Collection[str] = ()) -> Path:
    """Return the file to write, a link's target; a device or a pipe as it is named.

    inputs: what must not be overwritten. suffixes: one of which a file's name has to end with; empty: with any.
    Raises RefusedError for an input, for images and weights, and for a part of a run; ConfigError for a folder and for
    another suffix; MissingInputError for a folder that is not there.
    """
    if not name:
        raise ConfigError(f"{option} is empty; give a file")
    path = Path(os.path.realpath(name))
    if path.is_dir():
        raise ConfigError(f"{option} {printable(name)} is a folder; give a file")
    if not is_replaceable(Path(name)):
        return Path(name)
    if not path.parent.is_dir():
        raise MissingInputError(f"{option} {printable(name)} lies in no folder that exists")
    is_input = any(os.path.exists(each) and os.path.samefile(each, path) for each in inputs if path.exists())
    is_known = path.exists() and path.suffix.lower() in NEVER_RESULTS
    if is_input or is_known or _is_part_of_run(path):
        raise RefusedError(f"{option} {printable(name)} would overwrite an input or a part of a run; give another file")
    if suffixes and path.suffix.lower() not in suffixes:
        raise ConfigError(f"{option} {printable(name)} does not end with {' or '.join(suffixes)}; give such a name")
    return path


def _is_part_of_run(path: Path) -> bool:
    """Whether a file is one of those that a run writes, or lies in one of its own folders."""
    if path.name in OF_A_RUN and (path.parent / CONFIG).is_file():
        return True
    return any(
        inside.name in INSIDE - {TEACHERS} and (inside.parent / CONFIG).is_file()  # a teacher's folder is a run's
        for inside in path.parents
    )


def is_replaceable(path: Path) -> bool:
    """Whether the file may appear by rename. A device or a pipe is written as it is, and so is /dev/stdout, which may
    lead to a file that is open.
    """
    return not str(path).startswith("/dev/") and (path.is_file() or not path.exists())


def write_output(path: Path, text: str) -> None:
    """Write a file atomically, and a device or a pipe in place."""
    if is_replaceable(path):
        write_text(path, text)
    else:
        with path.open("a") as file:
            file.write(text)
