"""Scores against independent computations."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.metrics import log_loss, top_k_accuracy_score

from cit_scale.errors import ConfigError
from cit_scale.inference.judges import imagenet_words, judge, synsets_of
from cit_scale.inference.scores import best_temperature, calibration_error, score_images, summarize


@pytest.fixture
def guesses():
    """Logits (500, 7) of a classifier that is often right, and labels."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 7, 500)
    labels[:7] = np.arange(7)
    logits = 3 * random.normal(size=(500, 7)).astype(np.float32)
    logits[np.arange(500), labels] += 3
    return logits, labels


def probabilities(logits):
    return torch.from_numpy(logits).double().softmax(dim=1).numpy()


def test_accuracy_and_likelihood_are_scikit_learns(guesses):
    logits, labels = guesses
    scores = summarize(score_images(logits, [(label,) for label in labels]), labels)
    assert scores.top1 == pytest.approx(100 * (logits.argmax(axis=1) == labels).mean())
    assert scores.top5 == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=5, labels=range(7)))
    assert scores.nll == pytest.approx(log_loss(labels, probabilities(logits), labels=range(7)), rel=1e-12)
    by_class = [(logits[labels == each].argmax(axis=1) == each).mean() for each in range(7)]
    assert scores.class_mean == pytest.approx(100 * np.mean(by_class))


def test_calibration_error_is_that_of_a_loop_over_images(guesses):
    logits, labels = guesses
    probs = probabilities(logits)
    bins = {}
    for row, label in zip(probs, labels, strict=True):
        place = next(place for place in range(15) if row.max() <= (place + 1) / 15)
        bins.setdefault(place, []).append((row.max(), row.argmax() == label))
    expected = sum(abs(sum(right for _, right in each) - sum(sure for sure, _ in each)) for each in bins.values())
    found = summarize(score_images(logits, [(label,) for label in labels]), labels).ece
    assert found == pytest.approx(100 * expected / len(labels), rel=1e-12)


def test_a_sure_and_right_classifier_is_calibrated_and_a_sure_and_wrong_one_is_not():
    sure = np.ones(4)
    assert calibration_error(sure, np.ones(4, bool)) == 0
    assert calibration_error(sure, np.zeros(4, bool)) == 100


def test_the_temperature_has_the_lowest_likelihood(guesses):
    logits, labels = guesses
    by_search = minimize_scalar(
        lambda log_t: log_loss(labels, probabilities(logits / np.exp(log_t)), labels=range(7)), (-1, 1), tol=1e-12
    )
    assert best_temperature(logits, labels) == pytest.approx(np.exp(by_search.x), rel=1e-4)


def test_there_is_no_temperature_for_a_classifier_without_mistakes():
    assert best_temperature(np.eye(3, dtype=np.float32), np.arange(3)) is None


def test_an_image_with_several_right_classes_counts_for_any_of_them():
    logits = np.array([[3, 2, 1, 0, -1, -2, -3], [0, 1, 2, 3, 4, 5, 6]], np.float32)
    found = score_images(logits, [(5, 0), (0, 1)])
    assert found.correct.tolist() == [True, False]
    assert found.in_five.tolist() == [True, False]
    scores = summarize(found, None)
    assert scores.top1 == 50
    assert scores.nll is None
    assert scores.class_mean is None


def test_sums_do_not_depend_on_the_order_of_the_images(guesses):
    logits, labels = guesses
    order = np.random.default_rng(1).permutation(len(labels))
    one = summarize(score_images(logits, [(label,) for label in labels]), labels)
    other = summarize(score_images(logits[order], [(label,) for label in labels[order]]), labels[order])
    assert one == other
    assert best_temperature(logits, labels) == best_temperature(logits[order], labels[order])


class Folder:
    """A source of which only the names matter."""

    def __init__(self, classes, names):
        self.classes, self._names = tuple(classes), names
        self.labels = np.array([self.classes.index(name.split("/")[0]) for name in names])

    def __len__(self):
        return len(self._names)

    def key(self, index):
        return self._names[index].encode()


def test_a_subset_is_scored_among_its_own_classes():
    subset = synsets_of("imagenet_a")
    source = Folder(sorted(subset[:3]), [f"{name}/x.jpg" for name in subset[:3]])
    judged = judge("a", source, synsets_of("imagenet"))
    assert [synsets_of("imagenet")[column] for column in judged.columns] == subset
    assert judged.labels == [(0,), (1,), (2,)]


@pytest.mark.parametrize("classes", [["7", "999"], ["n01440764", "n15075141"]])
def test_v2_goes_by_numbers_or_by_wordnet_ids(classes):
    source = Folder(classes, [f"{name}/x.jpg" for name in classes])
    expected = [int(name) if name.isdigit() else synsets_of("imagenet").index(name) for name in classes]
    judged = judge("v2", source, imagenet_words())
    assert judged.labels == [(each,) for each in expected]
    assert judged.columns is None


def test_real_goes_by_the_names_of_the_images_and_leaves_out_those_without_a_label():
    from timm.data.real_labels import RealLabelsImagenet

    names = [f"n/ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 50001)]
    judged = judge("real", Folder(["n"], names), synsets_of("imagenet"))
    theirs = RealLabelsImagenet(names).real_labels
    expected = {name: tuple(theirs[name.split("/")[1]]) for name in names if theirs[name.split("/")[1]]}
    assert {names[sample]: labels for sample, labels in zip(judged.samples, judged.labels, strict=True)} == expected
    assert len(judged.samples) == 46837  # as in the paper


@pytest.mark.parametrize(
    ("which", "source", "classes", "said"),
    [
        ("a", Folder(["cat"], ["cat/x.jpg"]), synsets_of("imagenet"), "these are none: cat"),
        ("sketch", Folder(["cat"], ["cat/x.jpg"]), ["cat", "dog"], "needs a classifier of ImageNet's 1,000 classes"),
        ("real", Folder(["n"], ["n/x.jpg"]), synsets_of("imagenet"), "x.jpg is none"),
    ],
)
def test_what_a_judge_cannot_judge_is_refused(which, source, classes, said):
    with pytest.raises(ConfigError, match=said):
        judge(which, source, classes)


def test_the_mean_of_likelihoods_is_exactly_rounded():
    logits = np.array([[1e8, 0], [0, 0]], np.float32)
    scores = summarize(score_images(logits, [(1,), (0,)]), np.array([1, 0]))
    assert scores.nll == math.fsum([1e8, math.log(2)]) / 2
