"""What the report counts, beside other libraries, other formulas, and numbers worked by hand."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix

from cit_scale.inference.scores import calibration_error
from cit_scale.report.measures import (
    Share,
    agreement_matrix,
    class_shares,
    compare_advice,
    confusion,
    kl_divergence,
    linear_cka,
    most_confused,
    reliability_bins,
    right_where_wrong,
)


@pytest.fixture
def said():
    """(labels, choices) of 200 images in seven classes, of which one has no image."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 6, 200)
    return labels, np.where(random.random(200) < 0.6, labels, random.integers(0, 7, 200))


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (5, 5), (1, 3), (37, 100), (9_990, 10_000)])
def test_intervals_are_wilsons(hits, count):
    expected = binomtest(hits, count).proportion_ci(method="wilson")
    assert Share(hits, count).interval == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_without_images_nothing_is_known():
    nothing = Share(0, 0)
    assert math.isnan(nothing.value)
    assert nothing.interval == (0.0, 1.0)


def test_the_confusion_matrix_is_that_of_scikit_learn(said):
    assert np.array_equal(confusion(*said, 7), confusion_matrix(*said, labels=range(7)))


def test_the_most_confused_pairs_are_the_largest_cells_beside_the_diagonal(said):
    matrix = confusion_matrix(*said, labels=range(7))
    cells = [(-matrix[i, j], i, j) for i in range(7) for j in range(7) if i != j and matrix[i, j]]
    expected = [(i, j, -count, matrix[i].sum()) for count, i, j in sorted(cells)[:5]]
    assert [(each.label, each.choice, each.count, each.of) for each in most_confused(*said, 5)] == expected


def test_without_mistakes_nothing_is_confused():
    labels = np.array([0, 1, 2])
    assert most_confused(labels, labels, 5) == []


def test_classes_are_counted_one_by_one(said):
    labels, choices = said
    shares = class_shares(labels, labels == choices, 7)
    for number, share in enumerate(shares):
        images = [choice for label, choice in zip(labels, choices, strict=True) if label == number]
        assert (share.hits, share.count) == (images.count(number), len(images))
    assert shares[6].count == 0


def test_the_bins_of_the_diagram_add_up_to_the_calibration_error():
    random = np.random.default_rng(1)
    confidence = np.concatenate([random.random(500), [1.0, 1 / 15, 2 / 15]])
    correct = random.random(503) < confidence
    bins = reliability_bins(confidence, correct)
    gaps = [each.count / 503 * abs(each.accuracy - each.confidence) for each in bins if each.count]
    assert 100 * sum(gaps) == pytest.approx(calibration_error(confidence, correct))
    assert sum(each.count for each in bins) == 503
    assert all(each.low < each.confidence <= each.high for each in bins if each.count)


def test_agreement_is_counted_image_by_image():
    choices = [np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2]), np.array([1, 1, 1, 1])]
    assert agreement_matrix(choices).tolist() == [[1, 0.75, 0.25], [0.75, 1, 0.5], [0.25, 0.5, 1]]


def test_a_head_follows_its_teacher_in_what_is_right_and_in_what_is_wrong():
    labels, teacher = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 1, 0, 0, 1])
    head = np.array([0, 2, 1, 0, 1, 0])
    advice = compare_advice(labels, teacher, head)
    assert advice.agrees == Share(3, 6)  # images 0, 2, 3
    assert advice.when_right == Share(1, 3)  # of 0, 1, 5
    assert advice.when_wrong == Share(2, 3)  # of 2, 3, 4
    assert advice.mends == Share(1, 3)  # 4


def test_who_is_right_where_the_other_is_wrong():
    labels, whole, other = np.array([0, 0, 0, 1]), np.array([0, 1, 1, 0]), np.array([1, 0, 1, 1])
    assert right_where_wrong(labels, whole, other) == (Share(2, 3), Share(1, 2))


def test_the_divergence_is_that_of_torch():
    random = np.random.default_rng(2)
    teacher, head = 5 * random.standard_normal((2, 6, 4))
    logs = [torch.from_numpy(each).log_softmax(dim=1) for each in (head, teacher)]
    expected = torch.nn.functional.kl_div(*logs, reduction="none", log_target=True).sum(dim=1)
    assert kl_divergence(teacher, head) == pytest.approx(expected.numpy())
    assert kl_divergence(head, head) == pytest.approx(np.zeros(6))


def features(count, channels, seed):
    return np.random.default_rng(seed).standard_normal((count, channels)).astype(np.float32)


def test_cka_is_that_of_cross_covariances():
    """Kornblith et al. (2019), by the matrices of features instead of images."""
    x, y = features(40, 7, 0), features(40, 5, 1)
    y[:, :3] += x[:, :3]
    x0, y0 = (each - each.mean(axis=0) for each in (x, y))
    norm = np.linalg.norm
    assert linear_cka(x, y).plain == pytest.approx(norm(y0.T @ x0) ** 2 / (norm(x0.T @ x0) * norm(y0.T @ y0)), rel=1e-5)


def test_the_debiased_cka_is_that_of_u_centered_matrices():
    """Székely and Rizzo (2014): the unbiased HSIC is the inner product of U-centered Gram matrices."""

    def u_centered(gram):
        count = len(gram)
        gram = gram - np.diag(np.diag(gram))
        rows = gram.sum(axis=0) / (count - 2)
        centered = gram - rows[:, None] - rows[None] + gram.sum() / ((count - 1) * (count - 2))
        return centered - np.diag(np.diag(centered))

    x, y = features(20, 7, 0).astype(np.float64), features(20, 5, 1).astype(np.float64)
    y[:, :3] += x[:, :3]
    first, second = u_centered(x @ x.T), u_centered(y @ y.T)
    expected = (first * second).sum() / math.sqrt((first * first).sum() * (second * second).sum())
    assert linear_cka(x, y).debiased == pytest.approx(expected)


def test_cka_knows_rotations_and_scales():
    x = features(30, 6, 0)
    rotation, _ = np.linalg.qr(features(6, 6, 3))
    found = linear_cka(x, 3 * x @ rotation + 1)
    assert found.plain == pytest.approx(1, abs=1e-5)
    assert found.debiased == pytest.approx(1, abs=1e-5)


def test_wide_features_of_few_images_are_alike_by_the_plain_estimate_alone():
    found = linear_cka(features(50, 2000, 0), features(50, 2000, 1))
    assert found.plain > 0.9
    assert abs(found.debiased) < 0.05


@pytest.mark.parametrize("count", [1, 2, 3])
def test_too_few_images_have_no_debiased_estimate(count):
    assert math.isnan(linear_cka(features(count, 4, 0), features(count, 4, 1)).debiased)


def test_a_network_that_says_the_same_of_all_images_is_like_none():
    found = linear_cka(np.ones((10, 3)), features(10, 4, 1))
    assert math.isnan(found.plain)
    assert math.isnan(found.debiased)
