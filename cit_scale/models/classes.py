"""Maps the classes of a data set to the columns of a classifier that knows more classes, by name."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset

from cit_scale.errors import ConfigError, MissingInputError, one_line

BY_NAME = "names"  # the value of the setting that asks for the names that come with the weights
MOST_SHOWN = 20


def class_columns(classes: Sequence[str], how: str, description: Mapping[str, Any]) -> tuple[list[int], int]:
    """Columns of a classifier's logits for the classes of a data set, in their order, and how many columns it has.

    how: BY_NAME, or a file: a line per column with its name, or names with commas between; or a JSON object from the
    data set's classes to names or numbers of columns. description: timm's pretrained_cfg of the weights; without names
    in it, those of ImageNet for a classifier of as many classes (WordNet ids and words).
    A name fits if it is equal but for upper case, and for underscores, hyphens and blanks.
    Raises ConfigError with all classes that have no column, or more than one; MissingInputError.
    """
    given: dict[str, Any] = {}  # by plain name of a class
    if how == BY_NAME:
        labels = _described_labels(description)
    else:
        labels, given = _read_file(how, description)
        known = {_plain(name): name for name in classes}
        unknown = [name for name in given if _plain(name) not in known]
        if unknown:
            nearest = ", ".join(difflib.get_close_matches(unknown[0], classes, n=3, cutoff=0.0))
            raise ConfigError(f"classes={how}: {unknown[0]!r} is no class of the data; the nearest are {nearest}")
        given = {_plain(name): value for name, value in given.items()}
    columns = _columns_by_name(labels)
    found: list[int] = []
    missing: list[str] = []
    ambiguous: list[str] = []
    for name in classes:
        wanted = given.get(_plain(name), name)
        fits = [wanted] if isinstance(wanted, int) else columns.get(_plain(str(wanted)), [])
        fits = [column for column in fits if 0 <= column < len(labels)]
        if len(fits) == 1:
            found.append(fits[0])
        else:
            (ambiguous if fits else missing).append(name)
    if missing or ambiguous:
        said = [
            f"{what}: {', '.join(names[:MOST_SHOWN])}{' ...' if len(names) > MOST_SHOWN else ''}"
            for what, names in (("no column for", missing), ("several columns for", ambiguous))
            if names
        ]
        raise ConfigError(
            f"classes={how}: of the {len(labels)} classes of the weights there is {'; '.join(said)}; give a JSON file "
            'such as {"CLASS OF THE DATA": "NAME OR NUMBER OF THE COLUMN"}, or train the teacher first'
        )
    counts = Counter(found)
    twice = sorted({name for name, column in zip(classes, found, strict=True) if counts[column] > 1})
    if twice:
        raise ConfigError(f"classes={how}: these classes of the data share a column: {', '.join(twice[:MOST_SHOWN])}")
    return found, len(labels)


def refuse_other_order(classes: Sequence[str], description: Mapping[str, Any]) -> None:
    """Raise ConfigError for weights of the same classes in another order: each logit would be taken for another's.

    Names that differ in more say nothing: folders are often named otherwise.
    """
    names = description.get("label_names") or ()
    theirs, ours = [_plain(name) for name in names], [_plain(name) for name in classes]
    if theirs != ours and sorted(theirs) == sorted(ours):
        first = next(index for index, name in enumerate(ours) if theirs[index] != name)
        raise ConfigError(
            f"the weights know the same classes in another order: number {first} is {names[first]} there, and "
            f"{classes[first]} in the data; map them by name with classes={BY_NAME}"
        )


def rows_of_classes(classes: Sequence[str], description: Mapping[str, Any]) -> list[int] | None:
    """Rows of a head, of weights that are described, for the classes of a data set in their order.

    None where the weights come without names of their classes; empty where not all classes are among them.
    """
    names = description.get("label_names")
    if not names:
        return None
    rows = {_plain(name): row for row, name in reversed(list(enumerate(names)))}
    ours = [_plain(name) for name in classes]
    return [rows[name] for name in ours] if all(name in rows for name in ours) else []


def columns_by_class(classes: Sequence[str], description: Mapping[str, Any]) -> list[list[int]]:
    """The columns of a classifier's logits that bear the name of each class: one, none, or several.

    description: timm's pretrained_cfg of the classifier. Names fit as in ``class_columns``; numbers of columns, where
    the classifier's classes have no names.
    """
    try:
        labels = _described_labels(description)
    except ConfigError:
        labels = [[name] for name in class_names(description)]
    columns = _columns_by_name(labels)
    exact: dict[str, list[int]] = {}
    for column, names in enumerate(labels):
        for name in dict.fromkeys(names):
            exact.setdefault(name, []).append(column)
    return [exact.get(name) or columns.get(_plain(name), []) for name in classes]


def _columns_by_name(labels: Sequence[Sequence[str]]) -> dict[str, list[int]]:
    """Columns by plain name. labels: the names of each column."""
    columns: dict[str, list[int]] = {}
    for column, names in enumerate(labels):
        for name in dict.fromkeys(map(_plain, names)):
            columns.setdefault(name, []).append(column)
    return columns


def class_names(description: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a classifier's classes, in the order of its logits.

    Without names in its description, ImageNet's words for a classifier of as many classes, otherwise numbers. Raises
    ConfigError where it is not known how many there are.
    """
    if "num_classes" not in description and not description.get("label_names"):
        raise ConfigError("config.json says neither num_classes nor label_names; add one of them")
    try:
        names = description.get("label_names") or [labels[1] for labels in _described_labels(description)]
    except ConfigError:
        return tuple(map(str, range(description["num_classes"])))
    if len(names) != description.get("num_classes", len(names)):
        raise ConfigError(
            f"config.json has {len(names)} label_names and num_classes={description['num_classes']}; make them agree"
        )
    return tuple(map(str, names))


def _described_labels(description: Mapping[str, Any]) -> list[list[str]]:
    """Names of each column."""
    names = description.get("label_names")
    if names:
        return [[*str(name).split(","), str(name)] for name in names]
    subset = infer_imagenet_subset(dict(description)) if "num_classes" in description else None
    if subset is None:
        raise ConfigError(f"classes={BY_NAME}: the weights come without names of their classes; give a file of them")
    info = ImageNetInfo(subset)
    return [
        [info.index_to_label_name(index), *info.index_to_description(index).split(",")]
        for index in range(info.num_classes())
    ]


def _read_file(how: str, description: Mapping[str, Any]) -> tuple[list[list[str]], dict[str, Any]]:
    """Names of each column, and what a JSON file says of the data set's classes."""
    path = Path(how).expanduser()
    if not path.is_file():
        raise MissingInputError(f"classes={how} is neither {BY_NAME!r} nor a file of names")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix != ".json":
            return [[*line.split(","), line] for line in text.splitlines() if line.strip()], {}
        content = json.loads(text)
        if not isinstance(content, dict) or not all(
            isinstance(each, str | int) and not isinstance(each, bool) for each in content.values()
        ):
            raise ValueError("it is no object from classes to names or numbers of columns")
    except (OSError, ValueError) as error:
        raise ConfigError(f"classes={how} cannot be read: {one_line(error)}") from error
    try:
        return _described_labels(description), content
    except ConfigError:  # columns can be given by number without names
        if "num_classes" not in description:
            raise ConfigError(
                f"classes={how}: the weights do not say how many classes they have; give a file with a line for each"
            ) from None
        return [[] for _ in range(description["num_classes"])], content


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("-", " ").split()).casefold()
