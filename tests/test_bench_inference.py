"""cit_scale/bench/inference.py: evaluate and predict say what timm's own loader and transforms say."""

import numpy as np
import pytest
from PIL import Image

from cit_scale.bench.inference import accuracy, our_answers, timms_answers
from cit_scale.datasets.sources import open_source
from cit_scale.distributed.world import World
from cit_scale.inference.classifier import classifier_of, open_network
from cit_scale.inference.evaluate import evaluate_classifier


@pytest.mark.parametrize("shape", [(16, 16), (37, 53)], ids=["as the network sees them", "to be resized"])
def test_images_get_the_classes_that_timm_finds(calm, tmp_path, shape):
    opened = open_network(str(calm("plain").run_dir), World())
    random = np.random.default_rng(0)
    for name in opened.interface.classes:
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(20):
            pixels = random.integers(0, 256, (*shape, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{number}.png")
    source = open_source(str(tmp_path / "data"), tmp_path / "cache", "--data")
    classifier = classifier_of(opened, World().device)
    ours, theirs = our_answers(classifier, source), timms_answers(opened, str(tmp_path / "data"))
    differ = [name for name in ours if ours[name] != theirs[name]]
    assert len(differ) <= (0 if shape == (16, 16) else 1)
    assert len(ours) == len(theirs) == 60
    if not differ:
        found = evaluate_classifier(classifier, World(), data=str(tmp_path / "data"))
        assert found.scores["average"].top1 == pytest.approx(accuracy(theirs, source, opened.interface))
