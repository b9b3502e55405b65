"""ImageNet's other judges: ReaL labels, ImageNet-A, -R, V2 and Sketch. Label and class lists are those of timm's wheel.

real    the validation images with all labels that people agreed on (Beyer et al. 2020, arXiv:2006.07159)
a, r    200 classes each, scored among these alone (Hendrycks et al., CVPR 2021 and ICCV 2021)
v2      new images of all 1,000 classes (Recht et al., ICML 2019); folders named 0 to 999 or by WordNet ids
sketch  sketches of all 1,000 classes (Wang et al., NeurIPS 2019)
"""

from __future__ import annotations

import importlib.resources
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from timm.data import ImageNetInfo

from cit_scale.datasets.index import printable, shorten
from cit_scale.datasets.sources import Source
from cit_scale.errors import ConfigError


@dataclass(frozen=True)
class Judged:
    """Which images of a source count, and what is right for them.

    samples: (N,), indices in the source. labels: right columns of each, at least one. columns: those of the
    classifier's logits that are scored, in the order that ``labels`` counts; None: all.
    """

    samples: np.ndarray
    labels: Sequence[Sequence[int]]
    columns: np.ndarray | None = None


def judge(name: str, source: Source, classes: Sequence[str]) -> Judged:
    """Return the images and labels of a judge. classes: the classifier's. Raises ConfigError."""
    synsets = synsets_of("imagenet")
    if list(classes) != synsets and list(classes) != imagenet_words():
        raise ConfigError(
            f"--judge {name} needs a classifier of ImageNet's 1,000 classes in their order, named by WordNet ids or as "
            f"timm names them; this one has {len(classes)} classes ({shorten(list(map(printable, classes)), 3)})"
        )
    samples = np.arange(len(source))
    if name == "real":
        return _real(source)
    subset = synsets_of(f"imagenet_{name}") if name in ("a", "r") else synsets
    by_name = {synset: number for number, synset in enumerate(subset)}
    if name == "v2" and all(each.isascii() and each.isdigit() for each in source.classes):
        by_name = {str(number): number for number in range(len(subset))}
    strangers = [printable(each) for each in source.classes if each not in by_name]
    if strangers:
        raise ConfigError(f"--judge {name}: its class folders have WordNet ids; these are none: {shorten(strangers)}")
    label_of = np.array([by_name[each] for each in source.classes])
    columns = None if subset == synsets else np.array([synsets.index(each) for each in subset])
    return Judged(samples, [(int(label),) for label in label_of[source.labels]], columns)


def _real(source: Source) -> Judged:
    """Images without an agreed label do not count."""
    text = importlib.resources.files("timm.data").joinpath("_info/imagenet_real_labels.json").read_text()
    labels = json.loads(text)
    kept: list[int] = []
    right: list[tuple[int, ...]] = []
    for sample in range(len(source)):
        name = os.path.basename(os.fsdecode(source.key(sample)))
        found = re.match(r"ILSVRC2012_val_(\d{8})\b", name)
        number = int(found[1]) if found else 0
        if not 1 <= number <= len(labels):
            raise ConfigError(
                f"--judge real goes by the names of ImageNet's validation images, ILSVRC2012_val_00000001.JPEG to "
                f"{len(labels):08d}; {printable(name)} is none"
            )
        if labels[number - 1]:
            kept.append(sample)
            right.append(tuple(labels[number - 1]))
    return Judged(np.array(kept, np.int64), right)


def synsets_of(subset: str) -> list[str]:
    """WordNet ids of the classes of ImageNet or of a subset, in the order of the classes."""
    text = importlib.resources.files("timm.data").joinpath(f"_info/{subset}_synsets.txt").read_text()
    return text.split()


def imagenet_words() -> list[str]:
    """The names that ``class_names`` gives the classes of a classifier of ImageNet that comes without names."""
    info = ImageNetInfo("imagenet-1k")
    return [info.index_to_description(index).split(",")[0] for index in range(info.num_classes())]
