"""The model card of a finished run: README.md in its folder, in the form of the Hugging Face hub."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from cit_scale.config import RunConfig
from cit_scale.datasets.index import printable
from cit_scale.files import read_notes
from cit_scale.run.networks import licence_of
from cit_scale.run.setup import PreparedRun
from cit_scale.run_folder import DESCRIPTION, ENVIRONMENT, STUDENT

MOST_CLASSES = 50  # that are named; config.json names all

FRONT = """\
---
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
- cit-scale
license: {licence}
---
"""

USE = """\
```python
import timm
from PIL import Image, ImageOps
import cit_scale.models  # registers the architecture with timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:OWNER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
image = ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB")  # upright
probs = model(transform(image)[None]).softmax(dim=1)[0]
print(model.pretrained_cfg["label_names"][probs.argmax()], probs.max().item())
```
"""


def card_text(prepared: PreparedRun, results: Mapping[str, Any]) -> str:
    """The card of a run. results: contents of results.json."""
    config = prepared.config
    licence = licence_of(config.run_dir)
    images, classes = len(prepared.train_set), prepared.train_set.classes
    start = next((each for each in read_notes(config.run_dir / ENVIRONMENT) if "command" in each), None)
    lines = [
        FRONT.format(licence=json.dumps(licence)),
        f"# {plain(config.name)}",
        "",
        f"{plain(config.student.name)}, trained on {images} images in {len(classes)} classes, "
        f"{plain(teachers_text(config, results))}.",
        "",
        f"Accuracy on {results.get('eval_images')} images that were not trained on, in percent:",
        "",
        "| network | top-1 | top-5 | mean over classes |",
        "|---|---|---|---|",
        *_rows(results),
        "",
        *_best(results),
        USE,
        f"Weights: `{STUDENT}`, a timm state dict; `{DESCRIPTION}` has the classes, and how images are made ready: "
        f"{config.data.image_size} x {config.data.image_size} pixels.",
        "",
        f"Classes: {', '.join(map(plain, classes[:MOST_CLASSES]))}"
        f"{f' and {len(classes) - MOST_CLASSES} more' if len(classes) > MOST_CLASSES else ''}.",
        "",
        f"Licence: {plain(licence)}. It is taken from `license` in `{DESCRIPTION}`, where it can be set.",
    ]
    if start is not None:
        commit = f" at commit {start['commit']}" if start.get("commit") else ""
        lines += ["", f"Made by CiT-Scale{plain(commit)}, with", "", *_code(printable(start["command"]))]
    return "\n".join(lines) + "\n"


def teachers_text(config: RunConfig, results: Mapping[str, Any]) -> str:
    if not config.teachers:
        return "without teachers"
    found = results.get("teachers", {})
    names = [
        f"{teacher.model} ({found[name]['top1']:.2f} %)" if name in found else teacher.model
        for name, teacher in config.teachers.items()
    ]
    return f"advised by {' and '.join(names)}"


def _rows(results: Mapping[str, Any]) -> Iterator[str]:
    for student, accuracy in results.get("accuracy", {}).items():
        for head in accuracy["top1"]:
            values = (f"{accuracy[which][head]:.2f}" for which in ("top1", "top5", "class_mean"))
            yield f"| {student}, {plain(head)} | {' | '.join(values)} |"


def _best(results: Mapping[str, Any]) -> list[str]:
    """The weights that were best in evaluation, with what their accuracy is worth."""
    found = results.get("best", {}).values()
    if not found:
        return []
    named = [f"`{best['file']}` (step {best['step']}, {best['top1']:.2f} %)" for best in found]
    return [f"Best in evaluation: {', '.join(named)}. They were chosen by these images, which flatters them.", ""]


def _code(text: str) -> list[str]:
    """A block of code, with a fence that does not stand in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return [fence, text, fence]


def plain(text: str) -> str:
    """Text that stands in a line of Markdown as it is, without being markup, a link or a new line."""
    escaped = re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(printable(text), quote=False))
    return escaped.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")
