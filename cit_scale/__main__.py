"""``cit-scale VERB``, the same as ``python -m cit_scale VERB``: what a person does before, with and after training."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from cit_scale import cli, text
from cit_scale.config import TRAIN_COMMAND

INTERRUPTED = 130  # 128 + SIGINT, as a shell says it


class Verb(NamedTuple):
    """A row of the help, and the function that takes the arguments and returns an exit code: imported when called."""

    summary: str
    module: str
    function: str = "main"
    prints_results: bool = False
    """What it prints is what it is called for: a full disk that does not take it is an error."""


VERBS = {
    "train": Verb("train a student and the teachers that advise it", "cit_scale.train"),
    "pack": Verb("any data set to checked tar shards", "cit_scale.datasets.commands", "pack"),
    "video": Verb("class folders of videos to class folders of frames", "cit_scale.datasets.commands", "video"),
    "evaluate": Verb(
        "the scores of a run, of weights or of an exported file",
        "cit_scale.inference.commands",
        "evaluate",
        prints_results=True,
    ),
    "predict": Verb(
        "the classes of images, a row for each", "cit_scale.inference.commands", "predict", prints_results=True
    ),
    "report": Verb("a page about a run: curves, mistakes, attention, advice", "cit_scale.report.commands", "report"),
    "export": Verb("a measured file: ONNX, pt2, TorchScript, timm", "cit_scale.export.commands", "export"),
    "doctor": Verb("is this machine fit to train", "cit_scale.doctor.commands", prints_results=True),
    "runs": Verb("list and show run folders", "cit_scale.report.runs", prints_results=True),
    "where": Verb("print the folder of launchers/, slurm/ and ds_configs/", "cit_scale.where", prints_results=True),
}


def usage() -> str:
    rows = "\n".join(f"  {name:<8} {verb.summary}" for name, verb in VERBS.items())
    return f"""\
cit-scale train --name pets --data.train photos
cit-scale runs show pets

Train co-advised vision transformers: a convolution and an involution teacher
advise one plain ViT student.

{rows}

cit-scale VERB --help says more. Training on several GPUs is started by a
launcher: {TRAIN_COMMAND}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Call a verb with the arguments that follow it. Returns its exit code; 2 for a verb that there is not."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0].startswith("--local_rank="):  # the deepspeed command puts it there
        del given[0]
    name, *arguments = given or ["--help"]
    if name in ("-h", "--help"):
        print(usage(), end="")
        return 0
    if name == "--version":
        print(importlib.metadata.version("cit-scale"))
        return 0
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}"
        print(f"error: cit-scale has no verb {name!r}; {hint}", file=sys.stderr)
        return 2
    verb = VERBS[name]
    # Before the import, which takes seconds.
    parsed = {"arguments": cli.answer_early(arguments, os.environ)} if name == "train" else {}
    text.outlive_readers(and_full_disks=not verb.prints_results)
    try:
        return getattr(importlib.import_module(verb.module), verb.function)(arguments, **parsed)
    except KeyboardInterrupt:  # also during the imports
        return INTERRUPTED


if __name__ == "__main__":
    raise SystemExit(main())
