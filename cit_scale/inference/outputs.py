"""Where the results of evaluate and predict go, and where they must not."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from cit_scale.datasets.index import printable
from cit_scale.errors import ConfigError, MissingInputError, RefusedError
from cit_scale.files import write_text
from cit_scale.run_folder import (
    CARD,
    CONFIG,
    DESCRIPTION,
    ENVIRONMENT,
    METRICS,
    NETWORKS,
    RESULTS,
    STUDENT,
    STUDENT_BEST,
    STUDENT_EMA,
    STUDENT_EMA_BEST,
)

OF_A_RUN = {
    *(CARD, CONFIG, DESCRIPTION, ENVIRONMENT, METRICS, NETWORKS, RESULTS),
    *(STUDENT, STUDENT_BEST, STUDENT_EMA, STUDENT_EMA_BEST),
}


def check_output(option: str, name: str, inputs: Iterable[str]) -> Path:
    """Return the file to write, a link's target. inputs: what must not be overwritten.

    Raises RefusedError for an input and for a file of a run, ConfigError for a folder, MissingInputError for a folder
    that is not there.
    """
    if not name:
        raise ConfigError(f"{option} is empty; give a file")
    path = Path(os.path.realpath(name))
    if path.is_dir():
        raise ConfigError(f"{option} {printable(name)} is a folder; give a file")
    if not path.parent.is_dir():
        raise MissingInputError(f"{option} {printable(name)} lies in no folder that exists")
    is_input = any(os.path.exists(each) and os.path.samefile(each, path) for each in inputs if path.exists())
    if is_input or (path.name in OF_A_RUN and (path.parent / CONFIG).is_file()):
        raise RefusedError(f"{option} {printable(name)} would overwrite an input or a part of a run; give another file")
    return path


def is_replaceable(path: Path) -> bool:
    """Whether the file may appear by rename. A device or a named pipe is written as it is."""
    return path.is_file() or not path.exists()


def write_output(path: Path, text: str) -> None:
    """Write a file as a whole, or what is no file as it is."""
    if is_replaceable(path):
        write_text(path, text)
    else:
        path.write_text(text)
