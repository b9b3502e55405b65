"""Expand a sweep into runs: ``--sweep lr=0.001,0.002 --sweep seed=0,1`` is four runs."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Sequence

from cit_scale.config import RunConfig
from cit_scale.errors import ConfigError
from cit_scale.settings import flatten, to_dict

NOT_SWEPT = ("name", "runs_dir")


def sweep(config: RunConfig, axes: Sequence[str]) -> list[list[str]]:
    """The arguments that each run adds to the command line: its settings and its --name.

    axes: SETTING=V1,V2 as typed. The runs are all combinations of the values; the last axis varies fastest. Raises
    ConfigError.
    """
    known = list(flatten(to_dict(config)))
    values: dict[str, list[str]] = {}
    for axis in axes:
        typed, equals, listed = axis.partition("=")
        if typed in NOT_SWEPT:
            raise ConfigError(f"--sweep {typed}: what each run is called follows from the other settings")
        setting = full_name(typed, known)
        if not equals or not all(split_values(listed)):
            raise ConfigError(f"--sweep {axis} gives no values, or an empty one; write --sweep {typed}=V1,V2")
        if setting in values:
            raise ConfigError(f"--sweep names {setting} twice; give all its values at once")
        values[setting] = split_values(listed)
    labels = short_names(list(values))
    runs = []
    for combination in itertools.product(*values.values()):
        suffixes = [f"{label}={value}" for label, value in zip(labels, combination, strict=True)]
        name = "-".join([config.name, *(re.sub(r"[^\w.,=+-]", "_", suffix) for suffix in suffixes)])
        settings = [f"--{setting}={value}" for setting, value in zip(values, combination, strict=True)]
        runs.append([*settings, f"--name={name}"])
    names = [run[-1] for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"--sweep gives two runs the name {twice.removeprefix('--name=')}; give each value once")
    return runs


def full_name(typed: str, known: Sequence[str]) -> str:
    """The full name of a setting, typed in full or by an ending that no other has. Raises ConfigError."""
    # timm.create_model takes any of many arguments, so the known settings do not list all kwargs.
    if typed in known or ".kwargs." in typed:
        return typed
    matches = [name for name in known if name.endswith(f".{typed}")]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ConfigError(f"--sweep {typed} may be any of {', '.join(matches)}; write one of them in full")
    last_parts: dict[str, list[str]] = {}
    for name in known:
        last_parts.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    near = difflib.get_close_matches(typed.rsplit(".", 1)[-1], last_parts, n=3)
    listed = ", ".join(name for part in near for name in last_parts[part])
    raise ConfigError(f"--sweep {typed}: there is no such setting; {f'near it: {listed}' if listed else 'see --help'}")


def split_values(listed: str) -> list[str]:
    """Split at commas outside brackets: ``[0.9,0.99],[0.9,0.95]`` is two values."""
    values, depth = [""], 0
    for character in listed:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            values.append("")
        else:
            values[-1] += character
    return values


def short_names(settings: Sequence[str]) -> list[str]:
    """The last part of each dotted name; the whole name where two end in the same part."""
    last = [setting.rsplit(".", 1)[-1] for setting in settings]
    return [part if last.count(part) == 1 else setting for setting, part in zip(settings, last, strict=True)]
