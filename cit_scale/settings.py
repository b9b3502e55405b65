"""What is known of a setting beside its type and default, and what follows from that for any configuration.

A configuration is a frozen dataclass of settings, of sections (dataclasses again) and of sections by name (a dict of
them). Nothing here knows which settings there are: ``config`` says so, each in one place.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import yaml

from cit_scale.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = TypeVar("C", bound="DataclassInstance")
T = TypeVar("T")

# ---------------------------------------------------------------------------------------------------------------------
# Facts


@dataclass(frozen=True)
class Rule:
    """What holds for every allowed value. text: continues the sentence "NAME=VALUE ..."."""

    holds: Callable[[Any], bool]
    text: str


# Written as "inside", so that NaN is outside.
POSITIVE = Rule(lambda value: value > 0, "must be above 0")
POSITIVE_OR_TEXT = Rule(lambda value: isinstance(value, str) or 0 < value <= 65535, "must be from 1 to 65535")
NOT_NEGATIVE = Rule(lambda value: value >= 0, "must not be negative")
SHARE = Rule(lambda value: 0 <= value <= 1, "must be between 0 and 1")
UP_TO_1024 = Rule(lambda value: value <= 1024, "must be at most 1024")
UP_TO_65535 = Rule(lambda value: value <= 65535, "must be at most 65535, the most pixels of a side of a JPEG")
FROM_0_TO_BELOW_1 = Rule(lambda value: 0 <= value < 1, "must be from 0 to below 1")
ABOVE_0_TO_1 = Rule(lambda value: 0 < value <= 1, "must be above 0 and at most 1")
POSITIVE_RANGE = Rule(lambda pair: 0 < pair[0] <= pair[1], "must be two numbers above 0, the smaller first")
NAMES = Rule(all, "must not hold an empty name")
BETAS = Rule(lambda pair: all(map(FROM_0_TO_BELOW_1.holds, pair)), "must be two numbers from 0 to below 1")


@dataclass(frozen=True)
class Facts:
    """What is known of one setting."""

    rules: Sequence[Rule] = ()
    """What its value has to satisfy, unless it is None."""

    may_change: bool = False
    """Whether it may change when a run goes on: it decides neither which images make an update nor what is learned from
    them. How images are cut over ranks and micro-steps may change, and does reach BatchNorm and drop path, so only the
    same cut continues bit for bit, and on a GPU only with engine.deterministic. Paths may change: images and weights
    are compared by their fingerprints."""

    for_teachers: bool | None = None
    """Whether the run that trains a teacher takes it from the student's run instead of its own recipe. None: as the
    section says."""

    in_listing: bool = False
    """Whether ``cit-scale runs show`` lists it."""

    drops: Sequence[str] = ()
    """The settings beside it that belong to its value: where a later recipe gives another value, the earlier recipe's
    are dropped."""


AUTO: Literal["auto"] = "auto"
"""Value of a setting that is decided at a run's first start, and then kept (``run.auto``)."""


def decided(value: T | Literal["auto"]) -> T:
    """The value of a setting that may be AUTO, of a configuration in which it no longer is."""
    assert value != AUTO
    return value


NO_FACTS = Facts()
FACTS = "facts"
SECTIONS = "sections"


def setting(
    default: Any,
    *,
    rules: Sequence[Rule] = (),
    may_change: bool = False,
    for_teachers: bool | None = None,
    in_listing: bool = False,
    drops: Sequence[str] = (),
) -> Any:
    """A dataclass field with a default, or MISSING, and its ``Facts``. A plain default is one without
    facts."""
    facts = Facts(tuple(rules), may_change, for_teachers, in_listing, tuple(drops))
    return field(default=default, metadata={FACTS: facts})


def section(of: type, *, for_teachers: bool | None = None) -> Any:
    """A dataclass field that holds a section of settings, all at their defaults."""
    return field(default_factory=of, metadata={FACTS: Facts(for_teachers=for_teachers)})


def sections_by_name(of: type) -> Any:
    """A dataclass field that holds any number of sections of one type, by name; none by default."""
    return field(default_factory=dict, metadata={SECTIONS: of})


def facts_of(each: dataclasses.Field) -> Facts:
    return each.metadata.get(FACTS, NO_FACTS)


class Setting(NamedTuple):
    """One setting of a configuration. name: dotted, such as optim.lr. default: None if it has to be given."""

    name: str
    type: Any
    facts: Facts
    default: Any
    value: Any


def walk(config: Any, prefix: str = "") -> Iterator[Setting]:
    """Every setting. A dict of free arguments is one setting; so is a section that is none."""
    types = typing.get_type_hints(type(config))
    for each in fields(config):
        name, value = f"{prefix}{each.name}", getattr(config, each.name)
        if is_dataclass(value):
            yield from walk(value, f"{name}.")
        elif SECTIONS in each.metadata and isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(inner, f"{name}.{key}.")
        else:
            yield Setting(name, types[each.name], facts_of(each), _default(each), value)


# ---------------------------------------------------------------------------------------------------------------------
# What follows


def check_values(config: Any, prefix: str = "") -> None:
    """Raise ConfigError for the first value that a parser lets in and that no setting of its type can have.

    That is null where the type does not name it, a number that is not finite or has over 64 bits, and what JSON does
    not know, such as bytes: a checkpoint holds the settings as JSON.
    """
    for name, of, _, default, value in walk(config, prefix):
        if value is None and type(None) not in typing.get_args(of):
            shown = "" if is_dataclass(default) else f", {_as_lists(default)}"
            way_out = "give one" if default is None else f"leave it out for its default{shown}"
            raise ConfigError(f"{name}=null, and null is no value of this setting; {way_out}")
        wrong = _first_unusable(value)
        if wrong is not None:
            raise ConfigError(
                f"{name}={_as_lists(value)}: {wrong}; a number has to be finite and below 2^63, and all else text"
            )


def _first_unusable(value: Any) -> str | None:
    """What in ``value`` is no value of any setting, in words; None if there is nothing."""
    if isinstance(value, dict):
        keys = (None if isinstance(key, str) else f"the key {key!r} is not a text" for key in value)
        return next(filter(None, [*keys, *map(_first_unusable, value.values())]), None)
    if isinstance(value, (list, tuple)):
        return next(filter(None, map(_first_unusable, value)), None)
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not finite"
    if isinstance(value, int) and abs(value) >= 2**63:
        return f"{value} has more than 64 bits"
    if value is None or isinstance(value, (bool, int, float, str)):
        return None
    return f"{value!r} is a {type(value).__name__}"


def check_rules(config: Any) -> None:
    """Raise ConfigError for the first value that breaks a rule of its setting."""
    for name, _, facts, _, value in walk(config):
        for rule in facts.rules:
            if value is not None and not rule.holds(value):
                raise ConfigError(f"{name}={_as_lists(value)} {rule.text}")


def inherit_from_student(recipe: C, student: C, by_default: bool = False) -> C:
    """The run that trains a teacher: ``recipe`` with the settings that such a run takes from the student's run.

    by_default: what the section around the settings says.
    """
    inherited = {}
    for each in fields(recipe):
        own, students = getattr(recipe, each.name), getattr(student, each.name)
        declared = facts_of(each).for_teachers
        inherits = by_default if declared is None else declared
        if is_dataclass(own):
            inherited[each.name] = inherit_from_student(own, students, inherits)
        elif inherits:
            inherited[each.name] = students
    return dataclasses.replace(recipe, **inherited)


def inherited_settings(config: Any, by_default: bool = False, prefix: str = "") -> Iterator[str]:
    """The dotted names of the settings that ``inherit_from_student`` takes from the student's run."""
    for each in fields(config):
        own, declared = getattr(config, each.name), facts_of(each).for_teachers
        inherits = by_default if declared is None else declared
        if is_dataclass(own):
            yield from inherited_settings(own, inherits, f"{prefix}{each.name}.")
        elif inherits:
            yield f"{prefix}{each.name}"


def changed_settings(started_with: Mapping[str, Any], config: Any) -> list[str]:
    """``key: old -> new`` for what differs and may not change when a run goes on.

    started_with: as ``to_dict`` gave it, maybe by an earlier version.
    """
    # With a dot: free arguments, such as kwargs, are one setting and several keys.
    free = tuple(f"{each.name}." for each in walk(config) if each.facts.may_change)
    before, after = flatten(with_defaults(started_with, type(config))), flatten(to_dict(config))
    keys = [*before, *(key for key in after if key not in before)]
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in keys
        if before.get(key) not in (after.get(key), AUTO) and not f"{key}.".startswith(free)
    ]


def listed_settings(of: type) -> list[str]:
    """The dotted names of the settings that a listing of runs shows."""
    return [each.name for each in walk(of()) if each.facts.in_listing]


# ---------------------------------------------------------------------------------------------------------------------
# As JSON and YAML know it


def to_dict(config: Any) -> dict[str, Any]:
    """The whole configuration, tuples as lists."""
    return _as_lists(dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    """The whole configuration as a recipe file that ``--config`` reads back to an equal one."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def with_defaults(saved: Mapping[str, Any], of: type) -> dict[str, Any]:
    """A configuration as an earlier version wrote it, with the settings that it did not know at their defaults."""
    filled = dict(saved)
    for each in fields(of):
        default = _default(each)
        value = filled.setdefault(each.name, _as_lists(default))
        if is_dataclass(default) and isinstance(value, dict):
            filled[each.name] = with_defaults(value, type(default))
        elif SECTIONS in each.metadata and isinstance(value, dict):
            filled[each.name] = {
                name: with_defaults(inner, each.metadata[SECTIONS]) if isinstance(inner, dict) else inner
                for name, inner in value.items()
            }
    return filled


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key. An empty dict has none."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _default(each: dataclasses.Field) -> Any:
    """None where a setting has no default."""
    if each.default_factory is not MISSING:
        return each.default_factory()
    return None if each.default is MISSING else each.default


def _as_lists(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    if isinstance(value, dict):
        return {key: _as_lists(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_lists(item) for item in value]
    return value
