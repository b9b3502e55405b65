"""A linear classifier on a frozen network's features: what a run that starts from that network has to be better than.

python -m cit_scale.bench.linear --model tf_efficientnet_lite0 --pretrained local-dir:FOLDER --train TRAIN --eval TEST

scikit-learn's logistic regression on standardised features of images that are not augmented. Prints the accuracy on
the evaluation set for each strength C, and the seconds from the first image to it.
"""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cit_scale.bench.measure import machine_text, table
from cit_scale.config import DataConfig
from cit_scale.data.reader import Reader
from cit_scale.data.stream import eval_stream
from cit_scale.datasets.sources import Source, open_sources
from cit_scale.distributed.world import World
from cit_scale.models.network import Network, build_network
from cit_scale.models.pretrained import description_of
from cit_scale.models.weights import load_weights
from cit_scale.text import positive

BATCH = 64


def build(name: str, pretrained: str, image_size: int) -> Network:
    """The pretrained network, with the classes that it was trained on, in evaluation mode."""
    description = description_of(pretrained)
    network = build_network(
        name,
        {},
        num_classes=description.get("num_classes", 1000),
        image_size=image_size,
        description=description,
        own_size=image_size,
    )
    load_weights(network, pretrained)
    return network.eval()


@torch.no_grad()
def features(network: Network, source: Source, data: DataConfig) -> tuple[npt.NDArray[np.float32], npt.NDArray[Any]]:
    """What the network's classifier reads, (N, D), and the labels, (N,), of the images that can be decoded."""
    model = cast(Any, network.model)  # of timm
    found, labels = [], []
    with closing(eval_stream(Reader(source), data, BATCH, World(), torch.device("cpu"))) as batches:
        for batch in batches:
            images = ((batch.images - network.mean) / network.std).contiguous(memory_format=torch.channels_last)
            pooled = model.forward_head(model.forward_features(images), pre_logits=True)
            is_there = batch.positions >= 0
            found.append(pooled[is_there])
            labels.append(batch.labels[is_there])
    return torch.cat(found).numpy(), torch.cat(labels).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="timm's name of the network")
    parser.add_argument("--pretrained", required=True, help="its weights, as student.pretrained takes them")
    parser.add_argument("--train", required=True, help="as data.train")
    parser.add_argument("--eval", required=True, help="as data.eval")
    parser.add_argument("--image_size", type=positive, default=96)
    parser.add_argument("--crop_ratio", type=float, default=1.0)
    parser.add_argument("--strengths", type=float, nargs="+", default=[1e-3, 1e-2, 1e-1], help="C of scikit-learn")
    arguments = parser.parse_args()
    data = DataConfig(
        train=arguments.train,
        eval=arguments.eval,
        image_size=arguments.image_size,
        crop_ratio=arguments.crop_ratio,
        decode_threads=2,
    )
    sources = open_sources(data)
    began_at = time.perf_counter()
    network = build(arguments.model, arguments.pretrained, arguments.image_size)
    (train, train_labels), (evaluation, eval_labels) = (features(network, source, data) for source in sources)
    features_s = time.perf_counter() - began_at

    rows = []
    for strength in arguments.strengths:
        began_at = time.perf_counter()
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500))
        classifier.fit(train, train_labels)
        accuracy = 100 * classifier.score(evaluation, eval_labels)
        rows.append([f"{strength:g}", f"{accuracy:.1f}", f"{features_s + time.perf_counter() - began_at:.0f}"])
    print(
        f"{machine_text(torch.device('cpu'))}; {len(train)} and {len(evaluation)} images, {train.shape[1]} features\n"
    )
    print(table(["C", "top-1 %", "seconds"], rows))


if __name__ == "__main__":
    main()
