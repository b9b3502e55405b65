"""What a run that goes on keeps of its first start: whatever its user has not given.

Defaults, shipped recipes and what ``auto`` stands for change from version to version and from machine to machine. A run
that has begun goes on with what it began with: each of its starts notes, beside the whole configuration, what its user
gave. Imports neither torch nor the data libraries: launchers ask on login nodes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cit_scale.config import RunConfig
from cit_scale.errors import ConfigError, RefusedError, one_line
from cit_scale.recipe import Given, build, parse_recipe
from cit_scale.run_folder import CONFIG, ENVIRONMENT, newest_note
from cit_scale.settings import AUTO, to_dict, walk

GIVEN = "given"
"""Key of an entry of env.json: what the user gave at that start."""


def as_begun(config: RunConfig, given: Given, *, decided: bool = True) -> RunConfig:
    """``config`` with the settings that its run began with and that its user gives neither now nor gave then.

    A setting that is ``auto`` now is what it was decided to be then, given or not; with ``decided=False`` it stays
    ``auto``. Without a run folder, and for what its files do not tell, ``config`` itself: what may not change is
    compared later, and damage is reported there. Raises RefusedError for a value that no run can have.
    """
    began = _began_with(config.run_dir)
    if began is None:
        return config
    started_with, gave = began
    tree = to_dict(config)
    for name, *_, value in walk(config):
        is_shipped = gave is not None and gave.recipes == given.recipes and not given.has(name) and not gave.has(name)
        is_kept = decided if value == AUTO else is_shipped
        *sections, last = name.split(".")
        then, now = started_with, tree
        for section in sections:
            then, now = then.get(section, {}) if isinstance(then, dict) else {}, now[section]
        if is_kept and isinstance(then, dict) and then.get(last, AUTO) != AUTO:
            now[last] = then[last]
    if tree == to_dict(config):
        return config
    try:
        return build(parse_recipe(yaml.safe_dump(tree).encode(), CONFIG), RunConfig)
    except ConfigError as error:
        raise RefusedError(
            f"{config.run_dir} holds settings that no run can have ({one_line(error)}); mend them, or start over with "
            "--fresh"
        ) from error


def given_note(given: Given | None) -> dict[str, Any]:
    """The entry of env.json, to be read at a later start; none where it is not known."""
    return {} if given is None else {GIVEN: {"recipes": list(given.recipes), "settings": sorted(given.settings)}}


def _began_with(run_dir: Path) -> tuple[Mapping[str, Any], Given | None] | None:
    """The settings of the run's newest start, and what its user gave; None in its place, where a version noted no such
    thing. None where there is no run, or a file cannot be read.
    """
    try:
        started_with = yaml.safe_load((run_dir / CONFIG).read_text())
    except FileNotFoundError:
        started_with = newest_note(run_dir)[0].get("config")  # a checkpoint's
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(started_with, dict):
        return None
    try:
        starts = json.loads((run_dir / ENVIRONMENT).read_text())
        noted = [start[GIVEN] for start in starts if isinstance(start, dict) and GIVEN in start]
        return started_with, Given(tuple(noted[-1]["recipes"]), frozenset(noted[-1]["settings"]))
    except (OSError, ValueError, LookupError, TypeError):
        return started_with, None
