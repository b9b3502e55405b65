"""The two texts of help of the trainer: the short one, on one screen, and the whole one with every setting."""

from __future__ import annotations

import ast
import inspect
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from cit_scale.config import TRAIN_COMMAND, RunConfig
from cit_scale.recipe import DEFAULT_RECIPE, recipe_names
from cit_scale.settings import SECTIONS

# Printing this imports no slow library.
HELP = """\
{command} --name pets --data.train photos    all GPUs of this machine, or the CPU
cit-scale train --config digits --config mine.yaml    one process alone

Train a co-advised vision transformer, or any timm model alone. The same command goes on where it
was stopped.

what to train
  --config RECIPE          by name, or a YAML file; {default} without it; repeatable, and later ones
                           override earlier ones. One alone stands over the paper's numbers, without
                           teachers: give --config {default} --config mine.yaml for those of {default}
  --name NAME              of the run; its folder is RUNS_DIR/NAME
  --runs_dir DIR           where the folders of runs stand
  --data.train WHERE       class folders, tar shards, a table (.csv, .tsv), idx file, builtin:digits
  --data.eval WHERE        the same for evaluation; without it a part of the above is held out
  --teachers.NAME.weights FILE
                           a teacher that is trained already, conv or inv; else it is trained first
  --teachers.NAME.pretrained WEIGHTS
                           where its training starts: a timm model with its tag, or
                           hf-hub:OWNER/NAME, or local-dir:FOLDER; --student.pretrained likewise
how
  --train.epochs N         passes over the training set
  --train.global_batch_size N
                           images per update, over all GPUs
  --train.micro_batch_size N
                           images that fit one GPU at once
  --engine.name NAME       zero (DeepSpeed), fsdp2 or plain
  --engine.precision P     float32, bf16, fp16 or auto
  --deepspeed_config FILE  how ZeRO shards: zero0 to zero3, or a file
what stands in the run folder
  --fresh                  set it aside, and start over
  --override-resume        go on although data, teachers or settings of the recipe changed

  --print_config           what the command line amounts to, as a recipe
  --help-all               every setting with its default

recipes: {recipes}
"""

WIDTH = 100


def short_help() -> str:
    """The text of ``--help``."""
    recipes = textwrap.fill(", ".join(recipe_names()), width=90, subsequent_indent=" " * 9)
    return HELP.format(recipes=recipes, default=DEFAULT_RECIPE, command=TRAIN_COMMAND)


def whole_help() -> str:
    """The text of ``--help-all``: the short one, and every setting with its type, meaning and default."""
    return f"{short_help()}\nevery setting, as --NAME VALUE or in a recipe\n{''.join(_settings(RunConfig, ''))}"


def _settings(of: type, prefix: str) -> Iterator[str]:
    """The lines of a section's own settings, then those of the sections in it."""
    types, meanings = typing.get_type_hints(of), _meanings(of)
    inner = []
    for each in fields(of):
        if is_dataclass(types[each.name]):
            inner.append((types[each.name], f"{prefix}{each.name}."))
            continue
        if SECTIONS in each.metadata:
            inner.append((each.metadata[SECTIONS], f"{prefix}{each.name}.NAME."))
        default = each.default if each.default_factory is MISSING else each.default_factory()
        told = "has to be given" if default is MISSING else f"default: {_as_yaml(default)}"
        yield f"  --{prefix}{each.name} {_type_name(types[each.name], each.metadata)}\n"
        text = f"{meanings.get(each.name, '')} ({told})".strip()
        yield (
            textwrap.fill(text, WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8, break_on_hyphens=False) + "\n"
        )
    for section, inside in inner:
        yield f"\n{inside[:-1]}: {(section.__doc__ or '').splitlines()[0]}\n"
        yield from _settings(section, inside)


def _meanings(of: type) -> dict[str, str]:
    """What stands below each field of a dataclass."""
    body = ast.parse(inspect.getsource(of)).body[0]
    assert isinstance(body, ast.ClassDef)
    pairs = zip(body.body, body.body[1:], strict=False)
    return {
        field.target.id: " ".join(str(below.value.value).split())
        for field, below in pairs
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
    }


def _type_name(of: Any, metadata: Any) -> str:
    """Name of a type in the notation of recipes."""
    arguments = [_type_name(each, {}) for each in typing.get_args(of)]
    if SECTIONS in metadata:
        return "{NAME: {...}}"
    if typing.get_origin(of) is dict:
        return "{KEY: VALUE}"
    if typing.get_origin(of) is tuple:
        return f"[{','.join(arguments)}]"
    if arguments:  # a union or a Literal
        return "|".join(arguments)
    return "null" if of is type(None) else str(getattr(of, "__name__", of))


def _as_yaml(default: Any) -> str:
    """A default as a recipe has it."""
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return str(list(default)) if isinstance(default, tuple) else str(default)
