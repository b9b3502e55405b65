"""``cit-scale evaluate`` and ``predict`` beside their peers: timm's loader and transforms, the trainer's evaluation.

python -m cit_scale.bench.inference --model runs/pets --data photos

Prints the accuracy by both loaders with the images of which they say another class; images/s of predict and of the
trainer's evaluation, in turns; and how much memory predict takes more after all images than after a tenth of them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch

from cit_scale.bench.measure import machine_text, ratio, resident_kib, seconds, spread, table
from cit_scale.config import DataConfig
from cit_scale.data.reader import Reader
from cit_scale.data.stream import eval_stream
from cit_scale.datasets.sources import Source, open_source
from cit_scale.distributed.world import World
from cit_scale.evaluate import evaluate
from cit_scale.inference.classifier import Classifier, OpenedNetwork, classifier_of, open_network
from cit_scale.inference.interface import Interface
from cit_scale.inference.predict import predict
from cit_scale.inference.turns import Answers, classify_all
from cit_scale.models.pretrained import timms_crop_ratio
from cit_scale.text import positive

BATCH = 32


def our_answers(classifier: Classifier, source: Source) -> dict[str, int]:
    """The class of each image by its name, through evaluate's and predict's own path."""
    found: dict[str, int] = {}

    def take(answers: Answers) -> bool:
        if answers.logits:
            classes = list(answers.logits.values())[-1].argmax(axis=1).tolist()
            found.update(
                {source.key(sample).decode(): each for sample, each in zip(answers.good, classes, strict=True)}
            )
        return True

    classify_all(iter(range(len(source))), source.read, classifier, World(), take, batch_size=BATCH, threads=2)
    return found


@torch.inference_mode()
def timms_answers(opened: OpenedNetwork, folder: str) -> dict[str, int]:
    """The same through timm's data set, loader and transforms, by timm's own normalisation."""
    interface = opened.interface
    dataset = timm.data.create_dataset("folder", folder)
    loader: Any = timm.data.create_loader(
        dataset,
        input_size=(3, interface.image_size, interface.image_size),
        batch_size=BATCH,
        use_prefetcher=False,
        interpolation="bicubic",
        mean=tuple(opened.network.statistics["mean"]),
        std=tuple(opened.network.statistics["std"]),
        crop_pct=timms_crop_ratio(interface.image_size, interface.crop_ratio),
        num_workers=1,
        persistent_workers=False,
    )
    model = opened.network.model
    answers = torch.cat([model(images).argmax(dim=1) for images, _ in loader]).tolist()
    return dict(zip(dataset.filenames(absolute=False), answers, strict=True))


def accuracy(answers: dict[str, int], source: Source, interface: Interface) -> float:
    """Percent, over all images of the source."""
    column_of = [interface.classes.index(name) for name in source.classes]
    names = [source.key(sample).decode() for sample in range(len(source))]
    right = [answers[name] == column_of[label] for name, label in zip(names, source.labels.tolist(), strict=True)]
    return 100 * float(np.mean(right))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="as cit-scale evaluate takes it; a network")
    parser.add_argument("--data", required=True, help="a folder of class folders")
    parser.add_argument("--rounds", type=positive, default=3)
    arguments = parser.parse_args()
    opened = open_network(arguments.model, World())
    interface, device = opened.interface, torch.device("cpu")
    source = open_source(arguments.data, Path(DataConfig().cache_dir).expanduser(), "--data")
    classifier = classifier_of(opened, device)
    print(f"{machine_text(device)}; {len(source)} images, {interface.image_size} pixels\n")

    ours, theirs = our_answers(classifier, source), timms_answers(opened, arguments.data)
    differ = [f"{name} ({interface.classes[ours[name]]}, {interface.classes[theirs[name]]})" for name in ours]
    differ = [text for text, name in zip(differ, ours, strict=True) if ours[name] != theirs[name]]
    rows = [["cit-scale evaluate", f"{accuracy(ours, source, interface):.2f}"]]
    rows += [["timm's loader and transforms", f"{accuracy(theirs, source, interface):.2f}"]]
    print(table(["", "top-1 %"], rows))
    print(f"\n{len(differ)} images differ (ours, timm's): {', '.join(differ) or 'none'}\n")

    data = DataConfig(image_size=interface.image_size, crop_ratio=interface.crop_ratio, decode_threads=2)
    memory: list[int] = []

    def by_trainer() -> None:
        with closing(eval_stream(Reader(source), data, BATCH, World(), device)) as batches:
            evaluate(opened.network, batches, World())

    def by_predict() -> None:
        memory.clear()
        with tempfile.TemporaryDirectory() as folder:
            out = str(Path(folder) / "answers.csv")
            watched = watch(classifier, memory)
            predict(watched, [arguments.data], World(), out=out, batch_size=BATCH, threads=2)

    by_trainer()
    by_predict()
    trainer_s, predict_s = [], []
    for _ in range(arguments.rounds):
        trainer_s.append(seconds(by_trainer, device))
        predict_s.append(seconds(by_predict, device))
    rates = {
        name: [len(source) / each for each in times]
        for name, times in (("the trainer's evaluation", trainer_s), ("cit-scale predict", predict_s))
    }
    print(table(["", "images/s"], [[name, spread(each)] for name, each in rates.items()]))
    print(
        f"\npredict over evaluation, seconds: {ratio(predict_s, trainer_s):.2f} (median of {arguments.rounds} rounds)"
    )
    early, late = memory[len(memory) // 10], statistics.median(memory[-5:])
    print(f"resident memory of predict: {early / 1024:.0f} MiB after a tenth, {late / 1024:.0f} MiB at the end")


def watch(classifier: Classifier, memory: list[int]) -> Classifier:
    """The same classifier, which notes the resident memory in KiB at each batch."""

    def classify(images: torch.Tensor) -> dict[str, torch.Tensor]:
        memory.append(resident_kib("VmRSS"))
        return classifier.classify(images)

    return Classifier(classifier.name, classifier.interface, classifier.description, classify)


if __name__ == "__main__":
    main()
