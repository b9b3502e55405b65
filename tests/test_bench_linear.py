"""cit_scale/bench/linear.py: the features are those that the network's own classifier reads."""

import numpy as np
import torch

from cit_scale.bench.linear import features
from cit_scale.config import DataConfig
from cit_scale.data.reader import Reader
from cit_scale.data.stream import eval_stream
from cit_scale.datasets.sources import open_sources
from cit_scale.distributed.world import World
from cit_scale.models.network import build_network


def test_features_are_what_the_classifier_reads(tmp_path):
    data = DataConfig(train="digits", image_size=32, crop_ratio=1.0, cache_dir=str(tmp_path), decode_threads=1)
    _, evaluation = open_sources(data)
    network = build_network("test_resnet", {}, num_classes=1000, image_size=32).eval()
    found, labels = features(network, evaluation, data)
    assert np.array_equal(labels, evaluation.labels)
    logits = network.model.get_classifier()(torch.from_numpy(found))
    batch = next(eval_stream(Reader(evaluation), data, 64, World(), torch.device("cpu")))
    with torch.no_grad():
        torch.testing.assert_close(logits[:64], network(batch.images).cls)
