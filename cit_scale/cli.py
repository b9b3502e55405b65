"""A command line to a checked RunConfig, and its teachers' runs. A mistake is one line, exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import io
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from cit_scale.config import NO_DATA, RunConfig, check_config, check_names, split_batch
from cit_scale.distributed.ranks import Ranks
from cit_scale.errors import ConfigError, RunError, error_line, exit_code_of
from cit_scale.recipe import (
    DEFAULT_RECIPE,
    OPTIONS,
    Given,
    Tree,
    build,
    is_shipped,
    lay_options,
    lay_over,
    parse_option,
    read_recipe,
    recipe_names,
    recipe_path,
)
from cit_scale.run.begun import as_begun
from cit_scale.run_folder import INSIDE
from cit_scale.settings import check_rules, flatten, inherit_from_student, inherited_settings, to_yaml
from cit_scale.usage import short_help, whole_help

ASKS_ONLY = {"-h", "--help", "--help-all", "--print_config"}


@dataclass(frozen=True)
class Arguments:
    """given: what of the settings the user gave. fresh: set aside what stands in the run folder, and start over.
    override_resume: go on although what the run learns from changed. local_rank: the deepspeed launcher's, if given."""

    config: RunConfig
    given: Given
    fresh: bool
    override_resume: bool
    local_rank: int | None
    undecided: RunConfig | None = None
    """Of runs that may have begun, ``config`` with its ``auto`` left open: each teacher's run decides for itself."""

    @functools.cached_property
    def teacher_runs(self) -> dict[str, TeacherRun]:
        """As ``resolve_teacher_runs``. Not resolved by who needs only the student's settings, as it reads recipes."""
        if self.undecided is None:
            return resolve_teacher_runs(self.config, self.given)
        return {name: run.as_begun() for name, run in resolve_teacher_runs(self.undecided, self.given).items()}

    @property
    def teacher_run_configs(self) -> dict[str, RunConfig]:
        return {name: run.config for name, run in self.teacher_runs.items()}

    def as_begun(self) -> Arguments:
        """The same for runs that may have begun: what the user does not give is as they began (``run.begun``)."""
        return dataclasses.replace(
            self,
            config=as_begun(self.config, self.given),
            undecided=as_begun(self.config, self.given, decided=False),
        )


@dataclass(frozen=True)
class TeacherRun:
    """The run that trains a teacher. given: in its own recipe, or for what comes from the student's run."""

    config: RunConfig
    given: Given

    def as_begun(self) -> TeacherRun:
        return dataclasses.replace(self, config=as_begun(self.config, self.given))


def read_command_line(argv: Sequence[str], env: Mapping[str, str]) -> Arguments:
    """The run that a command line and its launcher's environment describe.

    Raises a RunError for every mistake in the student's settings that shows without the data, the networks and the slow
    libraries, and for a teacher's recipe that is missing. ``--help`` and ``--print_config`` print on rank 0 and exit
    with code 0.
    """
    ranks = Ranks() if ASKS_ONLY & set(argv) else read_ranks(env)
    with contextlib.nullcontext() if is_first_rank(env) else contextlib.redirect_stdout(io.StringIO()):
        arguments = parse_arguments(argv)
    if arguments.local_rank not in (None, ranks.local_rank):
        raise ConfigError(
            f"--local_rank={arguments.local_rank}, but the environment says {ranks.local_rank}; "
            "leave the flag to the launcher"
        )
    check_config(arguments.config)
    if arguments.config.data.train is None:
        raise ConfigError(NO_DATA)
    split_batch(arguments.config, ranks.world_size)
    _ = arguments.teacher_run_configs  # refuses what cannot be resolved
    return arguments


def is_first_rank(env: Mapping[str, str]) -> bool:
    """Whether this process prints for all ranks. True, too, if the launcher's variables are incomplete."""
    try:
        return Ranks.from_env(env).rank == 0
    except ValueError:
        return True


def read_ranks(env: Mapping[str, str]) -> Ranks:
    """The ranks that the launcher's environment describes. Raises ConfigError."""
    try:
        ranks = Ranks.from_env(env)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if ranks.world_size > 1 and not all(env.get(name, "").strip() for name in ("MASTER_ADDR", "MASTER_PORT")):
        raise ConfigError(
            f"there are {ranks.world_size} ranks, but MASTER_ADDR and MASTER_PORT do not say where they meet; "
            "start with deepspeed or torchrun, source slurm/env.sh in a batch script of Slurm's, or set both"
        )
    port = env.get("MASTER_PORT", "29500")
    if ranks.world_size > 1 and not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise ConfigError(f"MASTER_PORT={port!r} in the environment is not a port from 1 to 65535; launchers set it")
    return ranks


def answer_early(argv: Sequence[str], env: Mapping[str, str]) -> Arguments:
    """Parse the command line before slow imports. Exits if it asks for help or has a mistake; returns it otherwise."""
    try:
        try:
            return read_command_line(argv, env)
        finally:
            if sys.stdout is not None:  # help that cannot be written is an error, unless nobody wants to read on
                sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except (RunError, OSError) as error:
        if is_first_rank(env) or not isinstance(error, RunError):  # what one rank's disk says no other rank knows
            print(f"error: {error_line(error)}", file=sys.stderr, flush=True)
        raise SystemExit(exit_code_of(error)) from error


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Parse a command line. ``--help``, ``--help-all`` and ``--print_config`` print and exit with code 0.

    Raises ConfigError, and OSError for a recipe that cannot be opened.
    """
    if {"-h", "--help"} & set(argv):
        _print_and_leave(short_help())
    try:
        options, rest = _parser().parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error.argument_name}: {error.message}") from error
    if options.help_all:
        _print_and_leave(whole_help())
    given = list(_settings(rest))
    if options.deepspeed_config is not None:
        given.append(("engine.ds_config", options.deepspeed_config))
    recipes = _read_all(options.config or [DEFAULT_RECIPE])
    config = _compose(recipes, given)
    check_names(config)
    taken = INSIDE & set(config.name.split("/")[1:])
    if taken:
        raise ConfigError(
            f"name={config.name!r} lies inside another run's folder, where {min(taken)} is that run's own; give another"
        )
    if options.print_config:
        check_rules(config)
        _print_and_leave(to_yaml(config))
    given_of_all = _given(recipes, [name for name, _ in given])
    return Arguments(config, given_of_all, options.fresh, options.override_resume, options.local_rank)


def _print_and_leave(text: str) -> NoReturn:
    print(text, end="")
    raise SystemExit(0)


@functools.cache
def _parser() -> argparse.ArgumentParser:
    """Parser of the options that are no settings. An abbreviation would take a misspelt setting for one of them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, added in OPTIONS.items():
        parser.add_argument(f"--{name}", **added)
    return parser


def _settings(rest: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and text of each ``--NAME VALUE`` and ``--NAME=VALUE``. Raises ConfigError for anything else."""
    arguments = iter(rest)
    for argument in arguments:
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not name:
            raise ConfigError(f"unrecognized argument {argument!r}; settings are given as --NAME VALUE")
        near = difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.8)
        if near:
            raise ConfigError(f"there is no option --{name}; did you mean --{near[0]}?")
        if not equals:
            text = next(arguments, "--")
            if text.startswith("--"):
                parse_option(name, "null")  # refuses a name that there is not
                raise ConfigError(f"--{name}: expected one argument; give --{name} VALUE, or --{name}=VALUE")
        yield name, text


def _read_all(recipes: Sequence[str]) -> list[tuple[str, Tree]]:
    """Each recipe's name and settings. Read once: a recipe may come through a pipe."""
    return [(name, read_recipe(name)) for name in recipes]


def _compose(recipes: Sequence[tuple[str, Tree]], settings: Sequence[tuple[str, str]]) -> RunConfig:
    """The configuration of some recipes and settings. Later recipes override earlier ones, and settings all recipes."""
    tree: Tree = {}
    for name, given in recipes:
        try:
            tree = lay_over(tree, given)
        except ConfigError as error:
            raise ConfigError(f"{recipe_path(name)}: {error}") from error
    return build(lay_options(tree, [parse_option(name, text) for name, text in settings]), RunConfig)


def _given(recipes: Sequence[tuple[str, Tree]], settings: Iterable[str]) -> Given:
    own = [flatten(tree) for name, tree in recipes if not is_shipped(name)]
    return Given(
        tuple(recipe_path(name).stem for name, _ in recipes if is_shipped(name)),
        frozenset(itertools.chain(settings, *own)),
    )


def load_recipe(name: str) -> RunConfig:
    """A recipe alone, by name or path. Raises ConfigError, and OSError where it cannot be opened."""
    return _compose(_read_all([name]), [])


def resolve_teacher_runs(config: RunConfig, given: Given) -> dict[str, TeacherRun]:
    """By teacher, for each that comes without weights: the run that trains it on the student's data.

    It is the teacher's recipe, inside the student's run folder, with what the facts of the settings say comes from the
    student's run: what belongs to the data and to the machine. The teacher's model is the student of that run.
    given: of ``config``. Raises ConfigError for a teacher without weights and recipe, and for a recipe that has
    teachers itself.
    """
    runs = {}
    for name, teacher in config.teachers.items():
        if teacher.advises_with is not None:
            continue
        if teacher.recipe is None:
            raise ConfigError(
                f"teacher {name} ({teacher.model}) has neither weights nor a recipe; "
                f"give --teachers.{name}.weights FILE, or --teachers.{name}.recipe NAME to train it first, such as "
                f"{', '.join(each for each in recipe_names() if 'teacher' in each)}"
            )
        recipes = _read_all([teacher.recipe])
        recipe = _compose(recipes, [])
        if recipe.teachers:
            raise ConfigError(f"the recipe of teacher {name} has teachers itself; give one that has none")
        run = dataclasses.replace(
            inherit_from_student(recipe, config),
            name=f"{config.name}/teachers/{name}",
            student=dataclasses.replace(
                recipe.student,
                name=teacher.model,
                kwargs=teacher.kwargs,
                pretrained=teacher.pretrained,
                # Without weights that have a size of their own null, as run folders of before the setting have it.
                image_size=None if teacher.start is None and teacher.image_size == "own" else teacher.image_size,
            ),
        )
        # The user gave what comes from the student's run where it was given there.
        places = {"name": "name", "student": f"teachers.{name}", **{each: each for each in inherited_settings(run)}}
        own = _given(recipes, (place for place, source in places.items() if given.has(source)))
        runs[name] = TeacherRun(run, Given((*given.recipes, *own.recipes), own.settings))
    return runs
