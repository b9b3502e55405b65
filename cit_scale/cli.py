"""Command line and recipe files to a checked RunConfig, and its teachers' runs. A mistake is one line, exit code 2."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import io
import os
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cit_scale.config import RunConfig, check_config, check_names, expand, split_batch
from cit_scale.distributed.ranks import Ranks
from cit_scale.errors import ConfigError, MissingInputError, RunError, exit_code_of, one_line
from cit_scale.run_folder import INSIDE
from cit_scale.settings import check_values, flatten, inherit_from_student, to_dict

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "digits"

ASKS_ONLY = {"-h", "--help", "--help-all", "--print_config"}

# The text of --help, on one screen; --help-all lists every setting. Printing this text imports no slow library.
HELP = """\
deepspeed cit_scale/train.py --name pets --data.train photos    all GPUs of this machine, or the CPU
cit-scale train --config mine.yaml --train.epochs 100           one process alone

Train a co-advised vision transformer, or any timm model alone. The same command goes on where it
was stopped.

what to train
  --config RECIPE          by name, or a YAML file; {default} without it; repeatable, and later ones
                           override earlier ones
  --name NAME              of the run; its folder is RUNS_DIR/NAME
  --runs_dir DIR           where the folders of runs stand
  --data.train WHERE       class folders, tar shards, a table (.csv, .tsv), an idx file, or digits
  --data.eval WHERE        the same for evaluation; without it a part of the above is held out
  --teachers.NAME.weights FILE
                           a teacher that is trained already, conv or inv; else it is trained first
how
  --train.epochs N         passes over the training set
  --train.global_batch_size N
                           images per update, over all GPUs
  --train.micro_batch_size N
                           images that fit one GPU at once
  --engine.name NAME       zero (DeepSpeed), fsdp2 or plain
  --engine.precision P     float32, bf16 or fp16
  --deepspeed_config FILE  how ZeRO shards: zero0 to zero3, or a file
what stands in the run folder
  --fresh                  set it aside, and start over
  --override-resume        go on although data, teachers or settings of the recipe changed

  --print_config           what the command line amounts to, as a recipe
  --help-all               every setting with its default

recipes: {recipes}
"""


@dataclass(frozen=True)
class Arguments:
    """fresh: set aside what stands in the run folder, and start over. override_resume: go on although what the run
    learns from changed. local_rank: the deepspeed launcher's, if given."""

    config: RunConfig
    fresh: bool
    override_resume: bool
    local_rank: int | None

    @functools.cached_property
    def teacher_run_configs(self) -> dict[str, RunConfig]:
        """As ``resolve_teacher_runs``. Not resolved by who needs only the student's settings, as it reads recipes."""
        return resolve_teacher_runs(self.config)


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The path of a recipe, given by name or by path.

    Raises MissingInputError, with the known names, if there is no such recipe, and OSError if it cannot be opened.
    """
    named, given = RECIPES / f"{name}.yaml", expand(name)
    for path in (named, given):
        if path.is_file():
            _refuse_unreadable(path)
            return path
    raise MissingInputError(
        f"no recipe is called {name!r} and no such file exists; recipes: {', '.join(recipe_names())}"
    )


def _refuse_unreadable(path: Path) -> None:
    """Raise the OSError of a file that cannot be read. The parser would report it as the user's mistake."""
    try:
        path.read_bytes()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


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
    if ranks.world_size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        raise ConfigError(
            f"there are {ranks.world_size} ranks, but MASTER_ADDR and MASTER_PORT do not say where they meet; "
            "start with deepspeed or torchrun, source slurm/env.sh in a batch script of Slurm's, or set both"
        )
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
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(exit_code_of(error)) from error


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Parse a command line. ``--help`` and ``--print_config`` print and exit with code 0.

    Raises ConfigError, and OSError for a recipe that cannot be opened.
    """
    if {"-h", "--help"} & set(argv):
        print(_short_help(), end="")
        raise SystemExit(0)
    argv = _files_first(_with_recipe_paths(argv))
    if not any(argument == "--config" or argument.startswith("--config=") for argument in argv):
        argv = ["--config", str(recipe_path(DEFAULT_RECIPE)), *argv]
    # DeepSpeed's own scripts take a bare --deepspeed, which switches DeepSpeed on. It is on by default here.
    argv = [argument for argument in argv if argument != "--deepspeed"]
    parsed = _parse(["--help" if argument == "--help-all" else argument for argument in argv])
    config = _build(parsed)
    if parsed.deepspeed_config is not None:
        config = dataclasses.replace(
            config, engine=dataclasses.replace(config.engine, ds_config=parsed.deepspeed_config)
        )
    check_names(config)
    taken = INSIDE & set(config.name.split("/")[1:])
    if taken:
        raise ConfigError(
            f"name={config.name!r} lies inside another run's folder, where {min(taken)} is that run's own; give another"
        )
    return Arguments(config, parsed.fresh, parsed.override_resume, parsed.local_rank)


def _short_help() -> str:
    recipes = textwrap.fill(", ".join(recipe_names()), width=90, subsequent_indent=" " * 9)
    return HELP.format(recipes=recipes, default=DEFAULT_RECIPE)


def load_recipe(name: str) -> RunConfig:
    """A recipe alone, by name or path. Raises ConfigError, and OSError where it cannot be opened."""
    path = recipe_path(name)
    return _load_recipe(path, path.read_bytes())


@functools.cache
def _load_recipe(path: Path, content: bytes) -> RunConfig:
    """Parsed once per content: the runs of a sweep share their teachers' recipes."""
    return _build(_parse(["--config", str(path)]))


def resolve_teacher_runs(config: RunConfig) -> dict[str, RunConfig]:
    """By teacher, for each that comes without weights: the run that trains it on the student's data.

    It is the teacher's recipe, inside the student's run folder, with what the facts of the settings say comes from the
    student's run: what belongs to the data and to the machine. The teacher's model is the student of that run.
    Raises ConfigError for a teacher without weights and recipe, and for a recipe that has teachers itself.
    """
    runs = {}
    for name, teacher in config.teachers.items():
        if teacher.weights is not None:
            continue
        if teacher.recipe is None:
            raise ConfigError(
                f"teacher {name} ({teacher.model}) has neither weights nor a recipe; "
                f"give --teachers.{name}.weights FILE, or --teachers.{name}.recipe NAME to train it first"
            )
        recipe = load_recipe(teacher.recipe)
        if recipe.teachers:
            raise ConfigError(f"the recipe of teacher {name} has teachers itself; give one that has none")
        runs[name] = dataclasses.replace(
            inherit_from_student(recipe, config),
            name=f"{config.name}/teachers/{name}",
            student=dataclasses.replace(recipe.student, name=teacher.model, kwargs=teacher.kwargs),
        )
    return runs


@functools.cache
def _parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser, set_parsing_settings  # here: --help does without it

    # A recipe holds values only. Without "*", a class_path in a recipe would import its module, and so execute code.
    set_parsing_settings(
        docstring_parse_attribute_docstrings=True,
        import_path_denylist=["*"],
        import_path_allowlist=["cit_scale.config"],
    )
    parser = ArgumentParser(
        prog="train.py",
        usage="train.py [--config RECIPE ...] [--SETTING VALUE ...]",
        exit_on_error=False,
        allow_abbrev=False,
        description="Train a co-advised vision transformer, or any timm model alone. "
        f"Recipes: {', '.join(recipe_names())}; without --config: {DEFAULT_RECIPE}.",
        epilog="Later files override earlier ones, and options the files, wherever they stand: "
        "--config cit_base --config deit --train.epochs 100",
    )
    parser.add_argument(
        "--config", action="config", metavar="RECIPE", help="a recipe by name or a YAML file; repeatable"
    )
    parser.add_argument("--fresh", action="store_true", help="set aside what stands in the run folder, and start over")
    parser.add_argument(
        "--override-resume",
        action="store_true",
        help="go on with what stands in the run folder although data, teachers or settings of the recipe changed",
    )
    parser.add_argument("--deepspeed_config", type=str, metavar="FILE", help="the same as --engine.ds_config")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    parser.add_class_arguments(RunConfig)
    return parser


def _with_recipe_paths(argv: Sequence[str]) -> list[str]:
    """``--config NAME`` and ``--config=NAME`` with the recipe's path in place of its name."""
    resolved = list(argv)
    for place, argument in enumerate(resolved):
        if argument.startswith("--config="):
            resolved[place] = f"--config={recipe_path(argument.removeprefix('--config='))}"
        elif place and resolved[place - 1] == "--config":
            resolved[place] = str(recipe_path(argument))
    return resolved


def _files_first(argv: Sequence[str]) -> list[str]:
    """Move --config to the front: recipes set a name, too, and an option overrides a recipe wherever it stands."""
    files: list[str] = []
    options: list[str] = []
    for place, argument in enumerate(argv):
        is_file = (
            argument == "--config" or argument.startswith("--config=") or (place and argv[place - 1] == "--config")
        )
        (files if is_file else options).append(argument)
    return [*files, *options]


def _parse(argv: Sequence[str]) -> Namespace:
    parser = _parser()
    try:
        return parser.instantiate(parser.parse_args(list(argv)))
    except OSError:  # of printing to a full disk: not the user's mistake
        raise
    except Exception as error:  # argparse, YAML and type errors: the input is wrong
        raise ConfigError(_explain(error)) from error


def _build(parsed: Namespace) -> RunConfig:
    config = RunConfig(**{field.name: parsed[field.name] for field in dataclasses.fields(RunConfig)})
    check_values(config)  # the parser lets null in everywhere
    return config


def _explain(error: Exception) -> str:
    """jsonargparse's message on one line, with the nearest known setting where a name is unknown."""
    message = re.sub(r"Problem with given class_path '[^']*': ?", "", one_line(error))
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    unknown = re.search(r"(?:accept option|Option|unrecognized arguments:) '?(?:--)?([\w.-]+)", message)
    if unknown is None:
        return message
    known = list(flatten(to_dict(RunConfig())))
    names = {name.rsplit(".", 1)[-1]: name for name in known} | {name: name for name in known}
    near = difflib.get_close_matches(unknown[1], names, n=1)
    hint = f"did you mean {names[near[0]]}?" if near else "see --help"
    return f"{message}; {hint}"
