"""Recipe files and command-line options: parse them, merge them, and build a RunConfig.

A recipe is a YAML file with some of the settings. ``read_recipe`` and ``parse_option`` check names and types, and
return a tree: a nested dict of the settings that were given. ``lay_over`` merges two trees, and ``build`` adds the
defaults.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
import typing
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeAlias, TypeGuard, TypeVar, cast

import yaml

from cit_scale.config import RunConfig, expand
from cit_scale.errors import ConfigError, MissingInputError, one_line
from cit_scale.settings import SECTIONS, check_values, facts_of, flatten, to_dict

C = TypeVar("C")
Tree: TypeAlias = dict[str, Any]

RECIPES = Path(__file__).parent / "recipes"

DEFAULT_RECIPE = "digits"
"""The recipe of a command line without --config."""


@dataclass(frozen=True)
class Given:
    """What a user has given of a configuration. All else is shipped: the defaults, and what stands in shipped recipes.

    recipes: the shipped recipes, by name, in their order. settings: dotted names of what stands in the user's own
    recipes and on the command line.
    """

    recipes: tuple[str, ...]
    settings: frozenset[str]

    def has(self, name: str) -> bool:
        """Whether a setting was given, in whole or in part, or the section that it stands in."""
        return any(each == name or each.startswith(f"{name}.") or name.startswith(f"{each}.") for each in self.settings)


_SWITCH = {"action": "store_true"}
OPTIONS: dict[str, dict[str, Any]] = {
    "config": {"action": "append"},
    "fresh": _SWITCH,
    "override-resume": _SWITCH,
    "override_resume": _SWITCH,
    "print_config": _SWITCH,
    "help": _SWITCH,
    "help-all": _SWITCH,
    # DeepSpeed's own scripts take a bare --deepspeed, which switches DeepSpeed on. It is on by default here.
    "deepspeed": _SWITCH,
    "deepspeed_config": {},
    "local_rank": {"type": int},
}
"""Options of the command line that are no settings, and which a recipe cannot hold: by name, as argparse adds them."""


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The path of a recipe, given by name or by path.

    Raises MissingInputError, with the known names, if there is no such recipe.
    """
    named, given = RECIPES / f"{name}.yaml", expand(name)
    if named.is_file():
        return named
    if given.exists() and not given.is_dir():  # a pipe, too: --config <(command)
        return given
    near = difflib.get_close_matches(name, [*recipe_names(), *map(str, Path().glob("*.y*ml"))], n=1, cutoff=0.7)
    hint = f"did you mean {near[0]}?" if near else f"recipes: {', '.join(recipe_names())}"
    raise MissingInputError(f"no recipe is called {name!r} and no such file exists; {hint}")


def is_shipped(name: str) -> bool:
    """Whether a recipe, given by name or by path, is one of the package's own."""
    return recipe_path(name).parent == RECIPES


# ---------------------------------------------------------------------------------------------------------------------
# YAML


class _Loader(yaml.SafeLoader):
    """Loads plain YAML types only: a tag that names a Python object is an error. A date is text, 1e-3 is a number."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float", ":int"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Raises for a key that a mapping has twice. PyYAML would keep the last one without a warning."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:null":
                raise yaml.constructor.ConstructorError(None, None, "a key has to be a text", key.start_mark)
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


# Floats of YAML 1.2. PyYAML follows YAML 1.1, in which 1e-3 is text.
_FLOAT = r"""(?x)
    [-+]? (\d[\d_]*\.[\d_]*([eE][-+]?\d+)? | \d[\d_]*[eE][-+]?\d+ | \.\d[\d_]*([eE][-+]?\d+)? | \.(inf|Inf|INF)) $
    | \.(nan|NaN|NAN) $"""
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789."))

# Integers of YAML 1.2: in YAML 1.1, 010 is 8 and 1:30 is 90.
_INT = r"[-+]?(0x[0-9a-fA-F]+|0o[0-7]+|\d[\d_]*)$"
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(_INT), list("-+0123456789"))
_Loader.add_constructor(
    "tag:yaml.org,2002:int",
    lambda loader, node: int(node.value, 0 if "x" in node.value or "o" in node.value else 10),
)


class _Blank:
    """Value of a key without a value. YAML reads it as null, but here only a written null removes a setting."""

    def __repr__(self) -> str:
        return "nothing"


_BLANK = _Blank()
_Loader.add_constructor("tag:yaml.org,2002:null", lambda loader, node: None if node.value else _BLANK)


def _blank_place(value: Any, name: str) -> str | None:
    """Name of the first blank in a value, or None."""
    if value is _BLANK:
        return name
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return next(filter(None, (_blank_place(each, f"{name}.{key}") for key, each in inner)), None)


def _load(text: str, source: str) -> Any:
    """Parse a YAML text. Raises ConfigError."""
    try:
        loaded = _Loader(text).get_single_data()
        json.dumps(loaded, default=str)  # raises ValueError for an alias that holds itself
        return loaded
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark and "\n" in text.strip() else ""
        raise ConfigError(f"{source}{line}: {one_line(error.problem or error)}") from error
    except Exception as error:  # of a tag beside a value that it does not fit, each constructor raises its own
        raise ConfigError(f"{source} is not YAML: {one_line(error)}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Trees


def read_recipe(name: str) -> Tree:
    """Read a recipe, given by name or path. Returns the tree of its settings.

    Raises ConfigError for invalid YAML, an unknown setting or a value of the wrong type; MissingInputError, and OSError
    if the file cannot be opened.
    """
    path = recipe_path(name)
    return parse_recipe(path.read_bytes(), str(path))


@functools.cache
def parse_recipe(content: bytes, source: str) -> Tree:
    """As ``read_recipe``. source: name of the file in messages. Cached, because the runs of a sweep share recipes."""
    try:
        tree = _load(content.decode("utf-8-sig"), source)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not a text in UTF-8: {error}") from error
    if not isinstance(tree, dict):
        held = "no settings" if tree in (None, _BLANK) else f"{tree!r:.60}, and no settings"
        raise ConfigError(f"{source} holds {held}; write some, such as 'train: {{epochs: 100}}'")
    return _check_section(tree, RunConfig, f"{source}: ")


def parse_option(name: str, text: str) -> Tree:
    """Parse ``--name text``. name: dotted. Returns a tree of one setting. Raises ConfigError."""
    kind = _kind_of_setting(name)
    # Whole sections and free arguments are parsed as YAML. An empty text is kept.
    value = _load(text, f"--{name}") if text and not _is_leaf(kind) else text
    return _check_section({name: value}, RunConfig, "--")


def _kind_of_setting(name: str) -> Any:
    return functools.reduce(_kind_of, name.split("."), RunConfig)


@dataclass(frozen=True)
class _ByName:
    """The kind of a field that holds sections of one dataclass by name."""

    of: type


def _kind_of(outer: Any, name: str) -> Any:
    """Kind of the entry ``name`` in a kind: a dataclass for a section, a ``_ByName``, or the type of a setting. Any for
    an unknown name, and inside free arguments."""
    if isinstance(outer, _ByName):
        return outer.of
    if not _is_section(outer) or name not in typing.get_type_hints(outer):
        return Any
    of = next(each for each in fields(outer) if each.name == name).metadata.get(SECTIONS)
    return typing.get_type_hints(outer)[name] if of is None else _ByName(of)


def _is_section(kind: Any) -> TypeGuard[type]:
    return isinstance(kind, type) and is_dataclass(kind)


def _is_leaf(kind: Any) -> bool:
    """Whether a kind is the type of a setting other than a dict of free arguments."""
    return not (kind is Any or _is_section(kind) or isinstance(kind, _ByName) or typing.get_origin(kind) is dict)


def _check_section(tree: Any, of: type, source: str, prefix: str = "") -> Tree:
    """Check the keys of one section, and convert each value to the type of its setting. Raises ConfigError.

    source: start of every message. prefix: the section's dotted name and a dot; empty for the whole configuration.
    """
    checked: Tree = {}
    for key, value in _mapping(tree, source, prefix, fields(of)[0].name).items():
        name, *inside = key.split(".")  # "train.epochs: 3" is "train: {epochs: 3}"
        for part in reversed(inside):
            value = {part: value}
        if name not in {each.name for each in fields(of)}:
            raise ConfigError(f"{source}{_unknown(name, value, of, prefix)}")
        given = _check_value(value, _kind_of(of, name), source, f"{prefix}{name}")
        checked[name] = _join(checked[name], given, f"{source}{prefix}{name}") if name in checked else given
    return checked


def _check_value(value: Any, kind: Any, source: str, name: str) -> Any:
    """Check one entry: a section, sections by name, or the value of a setting. Raises ConfigError."""
    if _is_section(kind):
        return _check_section(value, kind, source, f"{name}.")
    types = typing.get_args(kind) if isinstance(kind, UnionType) else (kind,)
    takes_text = str in types or typing.get_origin(kind) is Literal
    if value is _BLANK and (isinstance(kind, _ByName) or typing.get_origin(kind) is dict):
        raise ConfigError(f"{source}{name}: nothing stands below it; leave it out, or give null to remove all")
    blank = None if isinstance(kind, _ByName) else _blank_place(value, name)
    if blank is not None:
        raise ConfigError(f"{source}{blank} has no value; leave it out, or write null")
    if value == "" and not takes_text:
        raise ConfigError(f"{source}{name} is empty; give a value or leave it out")
    is_null, is_bool = value == "null" and type(None) in types, value in ("true", "false") and bool in types
    if isinstance(value, str) and (not takes_text or is_null or is_bool):
        value = _load(value, f"{source}{name}")
    if value is None:  # removes an entry, or sets a setting to null: lay_over and check_values know which
        return None
    if isinstance(kind, _ByName):
        sections = _mapping(value, source, f"{name}.", f"NAME.{fields(kind.of)[0].name}").items()
        return {
            key: None if each is None else _check_section(each, kind.of, source, f"{name}.{key}.")
            for key, each in sections
        }
    from pydantic import TypeAdapter, ValidationError  # here: --help does without it

    try:
        # In pydantic's strict mode true is no number, and a list no tuple.
        return TypeAdapter(kind).validate_python(tuple(value) if isinstance(value, list) else value, strict=True)
    except ValidationError as error:
        kinds = dict.fromkeys(each["msg"].removeprefix("Input should be ") for each in error.errors())
        wrong = f"should be {' or '.join(kinds)}"
        if typing.get_origin(kind) is tuple:
            of = typing.get_args(kind)
            wrong = "should be a list of texts" if of[-1] is ... else f"should be a list of {len(of)} numbers"
        elif str in types and isinstance(value, (bool, int, float)):
            wrong = "should be a text; write it in quotes"
        raise ConfigError(f"{source}{name}={value!r:.80} {wrong}") from error


def _mapping(tree: Any, source: str, prefix: str, example: str) -> dict[str, Any]:
    """Return ``tree`` if it is a mapping from texts. Raises ConfigError. example: a setting that may stand in it."""
    if not isinstance(tree, dict):
        held = "has nothing below it" if tree is _BLANK else "is null" if tree is None else f"is given as {tree!r:.60}"
        raise ConfigError(
            f"{source}{prefix[:-1]} {held}, but it is a section; set what stands in it, such as {prefix}{example}, or "
            "leave it out"
        )
    for key in tree:
        if not isinstance(key, str):
            raise ConfigError(
                f"{source}{prefix}{key}: YAML takes this key for a {type(key).__name__}; write it in quotes"
            )
    return tree


def _join(first: Any, second: Any, name: str) -> Any:
    """Join what one file gives in two places, as a section and by dotted names. Raises ConfigError for a setting that
    is given twice."""
    if not isinstance(first, dict) or not isinstance(second, dict):
        raise ConfigError(f"{name} is given twice")
    return first | {
        key: _join(first[key], value, f"{name}.{key}") if key in first else value for key, value in second.items()
    }


def _unknown(key: str, value: Any, of: type, prefix: str) -> str:
    """Message for a key that is no setting, with the nearest settings."""
    if not prefix and key in OPTIONS:
        return f"{key}: this is an option of the command line, not a setting; give it there"
    full = ".".join([f"{prefix}{key}", *_first_path(value)])
    known = list(flatten(to_dict(RunConfig())))
    beside = [f"{prefix}{each.name}" for each in fields(of)]
    last = full.rsplit(".", 1)[-1]
    near = (
        [name for name in known if name.rsplit(".", 1)[-1] == last and "." not in full]
        or [name for name in [_corrected(full)] if name]
        or difflib.get_close_matches(full, {*beside, *known}, n=1, cutoff=0.75)
        or [name for name in known if name.rsplit(".", 1)[-1] == last]
        or [f"{prefix}{name}" for name in difflib.get_close_matches(key, [each.name for each in fields(of)], n=1)]
        or [name for name in known if last in name.rsplit(".", 1)[-1] and len(last) > 3]
        or [name for name in known if difflib.get_close_matches(name.rsplit(".", 1)[-1], [last], cutoff=0.75)]
    )
    hint = f"did you mean {' or '.join(near)}?" if near else "see --help-all"
    return f"{full}: there is no such setting; {hint}"


def _corrected(full: str) -> str | None:
    """A dotted name with each misspelt part replaced by the nearest one; None where none is near."""
    kind, corrected = cast(Any, RunConfig), list[str]()
    for part in full.split("."):
        known = [each.name for each in fields(kind)] if _is_section(kind) else [part]
        near = [part] if part in known else difflib.get_close_matches(part, known, n=1, cutoff=0.75)
        if not near:
            return None
        corrected += near
        kind = _kind_of(kind, near[0])
    return ".".join(corrected)


def _first_path(value: Any) -> list[str]:
    """First key of each nested mapping, from the outermost in."""
    if not isinstance(value, dict) or not value:
        return []
    key = next(iter(value))
    return [str(key), *_first_path(value[key])]


# ---------------------------------------------------------------------------------------------------------------------
# From trees to a configuration


def lay_over(earlier: Tree, later: Tree) -> Tree:
    """Merge two trees of a run's settings. Returns ``earlier``, overridden by ``later``.

    Dictionaries are merged key by key, at any depth, and null removes a key, or all of them. Where ``later`` names
    another network, the settings that belong to the earlier network are dropped. Raises ConfigError if a section to
    remove does not exist, and for an empty dictionary over a full one, which is ambiguous.
    """
    return _merge(_without_dropped(earlier, later, RunConfig), later, RunConfig)


def lay_options(tree: Tree, options: Sequence[Tree]) -> Tree:
    """Merge options, in the order in which they were typed, into the tree of the recipes.

    As ``lay_over``, but options drop settings of recipes only: what is typed is meant for the network that is typed.
    """
    tree = _without_dropped(tree, functools.reduce(_lay_free, options, {}), RunConfig)
    return functools.reduce(lambda merged, option: _merge(merged, option, RunConfig), options, tree)


def _without_dropped(earlier: Tree, later: Tree, of: type) -> Tree:
    """``earlier`` without the settings that belong to networks for which ``later`` names others (``Facts.drops``)."""
    kept = dict(earlier)
    for each in fields(of):
        before, after, kind = earlier.get(each.name), later.get(each.name), _kind_of(of, each.name)
        if before is None or after is None:
            continue
        if _is_section(kind):
            kept[each.name] = _without_dropped(before, after, kind)
        elif isinstance(kind, _ByName):
            kept[each.name] = {key: _without_dropped(one, after.get(key) or {}, kind.of) for key, one in before.items()}
        elif after != before:
            for dropped in facts_of(each).drops:
                kept.pop(dropped, None)
    return kept


def _merge(earlier: Tree, later: Tree, of: type, prefix: str = "") -> Tree:
    """``lay_over`` for one section, without dropping."""
    merged = dict(earlier)
    for key, value in later.items():
        kind, name, before = _kind_of(of, key), f"{prefix}{key}", merged.get(key) or {}
        if _is_section(kind):
            merged[key] = _merge(before, value, kind, f"{name}.")
        elif _is_leaf(kind):
            merged[key] = value
        elif value is None:
            merged[key] = {}
        elif value == {} and before:
            raise ConfigError(
                f"{name}={{}} adds nothing to {', '.join(before)}; leave it out, or give null to remove all"
            )
        elif isinstance(kind, _ByName):
            merged[key] = _merge_sections(before, value, kind.of, f"{name}.")
        else:
            merged[key] = _lay_free(before, value)
    return merged


def _merge_sections(
    earlier: Mapping[str, Tree], later: Mapping[str, Tree | None], of: type, prefix: str
) -> dict[str, Tree]:
    merged = dict(earlier)
    for key, value in later.items():
        if value is not None:
            merged[key] = _merge(merged.get(key, {}), value, of, f"{prefix}{key}.")
        elif merged.pop(key, None) is None:
            raise ConfigError(
                f"{prefix}{key}=null, but there is none to remove; there are: {', '.join(earlier) or 'none'}"
            )
    return merged


def _lay_free(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(earlier)
    for key, value in later.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            before = merged.get(key)
            merged[key] = _lay_free(before if isinstance(before, dict) else {}, value)
        else:
            merged[key] = value
    return merged


def build(tree: Tree, of: type[C], prefix: str = "") -> C:
    """Build the configuration of a tree; settings that are not given get their defaults. Raises ConfigError for a
    missing or invalid value."""
    given: dict[str, Any] = {}
    for each in fields(cast(Any, of)):
        kind = _kind_of(of, each.name)
        if each.name not in tree:
            if each.default is MISSING and each.default_factory is MISSING:
                raise ConfigError(f"{prefix}{each.name} is missing; give it beside the other settings of {prefix[:-1]}")
        elif _is_section(kind):
            given[each.name] = build(tree[each.name], kind, f"{prefix}{each.name}.")
        elif isinstance(kind, _ByName):
            sections = tree[each.name].items()
            given[each.name] = {key: build(value, kind.of, f"{prefix}{each.name}.{key}.") for key, value in sections}
        else:
            given[each.name] = tree[each.name]
    config = of(**given)
    if not prefix:
        check_values(config)
    return config
