"""The augmentation's random numbers: exact generator, timm's distributions, no dependence on the batch."""

import random
import timeit
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import ColorJitter

from cit_scale.config import AugmentConfig
from cit_scale.data import draws
from cit_scale.data.draws import (
    IDENTITY,
    OPERATIONS,
    parse_policy,
    parse_randaugment,
    philox,
    random_words,
)

RECIPE = AugmentConfig(policy="rand-m9-mstd0.5-inc1")
TIMM_NAMES = {
    "auto_contrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "rotate": "Rotate",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}


def draw(samples, *, seed=0, epoch=0, repeats=0, height=375, width=500, image_size=224, **options):
    """Draw for `samples`, with the recipe's options unless told otherwise."""
    samples = np.asarray(samples)
    repeats, heights, widths = (np.broadcast_to(value, samples.shape) for value in (repeats, height, width))
    augment = replace(RECIPE, **options)
    return draws.draw(seed, epoch, samples, repeats, heights, widths, augment, image_size)


def scalar_philox(counter, key):
    """The paper's algorithm, one block at a time, in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [right >> 32 ^ c[1] ^ k[0], right % 2**32, left >> 32 ^ c[3] ^ k[1], left % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def same_distribution(ours, theirs):
    """Two-sample Kolmogorov-Smirnov at a level that a correct program fails once in ten thousand."""
    return ks_2samp(ours, theirs).pvalue > 1e-4


# --- The generator ---


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    assert philox(tuple(np.array([word]) for word in counter), key).ravel().tolist() == list(expected)
    assert scalar_philox(counter, key) == list(expected)


def test_philox_over_arrays_agrees_with_a_scalar_one():
    rng = np.random.default_rng(0)
    counters = rng.integers(0, 2**32, (4, 50))
    key = tuple(int(word) for word in rng.integers(0, 2**32, 2))
    expected = [scalar_philox([int(word) for word in counter], key) for counter in counters.T]
    assert philox(tuple(counters), key).T.tolist() == expected


def test_the_words_of_a_sample_are_philox_at_block_repeat_sample_epoch_under_the_seed():
    words = random_words(seed=5 << 32 | 6, epoch=7, samples=np.array([100, 200]), repeats=np.array([0, 2]), num_words=6)
    assert words.shape == (6, 2)
    expected = scalar_philox((0, 2, 200, 7), (6, 5)) + scalar_philox((1, 2, 200, 7), (6, 5))[:2]
    assert words[:, 1].tolist() == expected


def test_a_seed_outside_64_bits_is_refused():
    with pytest.raises(ValueError, match="seed=-1 is not a 64-bit number"):
        draw([0], seed=-1)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_sample_draws_the_same_alone_and_in_any_batch(batch_size):
    whole = draw(range(600))
    for start in range(0, 600, 20 * batch_size):
        part = draw(range(start, min(start + batch_size, 600)))
        for field in fields(part):
            ours, all_of_them = getattr(part, field.name), getattr(whole, field.name)
            if field.name in ("operations", "arguments"):
                ours, all_of_them = ours.T, all_of_them.T
            assert np.array_equal(ours, all_of_them[start : start + batch_size]), field.name


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"repeats": 1}])
def test_seed_epoch_and_repeat_each_change_the_augmentation(change):
    before, after = draw(range(100)), draw(range(100), **change)
    assert (before.crop != after.crop).any(axis=1).mean() > 0.95
    assert (before.erasing_key != after.erasing_key).all()
    assert 0.3 < (before.flip != after.flip).mean() < 0.7


def test_the_decisions_about_an_image_are_independent_of_each_other():
    often = draw(range(20000), crop_scale=(0.08, 0.3), erase_prob=1.0, policy=f"{RECIPE.policy}-p1")
    seldom = draw(range(20000), erase_prob=0.5)
    y, x, h, w = often.crop.T
    erase_y, erase_x, erase_h, erase_w = often.erasing.T
    decisions = {
        "crop area": h * w,
        "crop ratio": np.log(w / h),
        "crop y": y / (375 - h),
        "crop x": x / (500 - w),
        "flip": often.flip,
        "erased": seldom.erasing[:, 2] > 0,
        "erasing area": erase_h * erase_w,
        "erasing ratio": np.log(erase_h / erase_w),
        "erasing y": erase_y / (224 - erase_h),
        "erasing x": erase_x / (224 - erase_w),
        "erasing key": often.erasing_key,
    }
    for layer in (0, 1):
        decisions[f"operation {layer}"] = often.operations[layer]
        decisions[f"applied {layer}"] = seldom.operations[layer] != IDENTITY
        rotated = often.operations[layer] == list(OPERATIONS).index("rotate")
        decisions[f"angle {layer}"] = np.where(rotated, often.arguments[layer], 0)
    names = list(decisions)
    correlations = np.corrcoef([np.asarray(values, float) for values in decisions.values()])
    together = np.argwhere(np.abs(np.triu(correlations, k=1)) > 5 / np.sqrt(20000))
    assert not len(together), [(names[i], names[j]) for i, j in together]


# --- Crop and flip ---


@pytest.mark.parametrize(("height", "width"), [(375, 500), (8, 8), (60, 200)])
def test_crops_are_distributed_as_timms(height, width):
    ours = draw(range(4000), height=height, width=width).crop
    random.seed(0)
    image = Image.new("L", (width, height))
    crop = RandomResizedCropAndInterpolation
    theirs = np.array([crop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)])
    for name, column in {"y": 0, "x": 1, "height": 2, "width": 3}.items():
        assert same_distribution(ours[:, column], theirs[:, column]), name
    assert same_distribution(ours[:, 2] / ours[:, 3], theirs[:, 2] / theirs[:, 3])
    assert same_distribution(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (7, 1)])
def test_where_no_try_fits_the_crop_is_timms_central_one(height, width):
    ours = draw(range(5), height=height, width=width, crop_scale=(0.9, 1.0)).crop
    image = Image.new("L", (width, height))
    expected = RandomResizedCropAndInterpolation.get_params(image, (0.9, 1.0), (3 / 4, 4 / 3))
    assert ours.tolist() == [list(expected)] * 5


def test_crops_hold_at_least_one_pixel_and_stay_inside_images_of_any_size():
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(1, 40, (2, 5000))
    y, x, h, w = draw(range(5000), height=heights, width=widths).crop.T
    assert (h > 0).all()
    assert (w > 0).all()
    assert (y >= 0).all()
    assert (x >= 0).all()
    assert (y + h <= heights).all()
    assert (x + w <= widths).all()


@pytest.mark.parametrize("prob", [0.0, 0.3, 1.0])
def test_flips_come_with_their_probability(prob):
    assert draw(range(4000), flip_prob=prob).flip.mean() == pytest.approx(prob, abs=0.04)


# --- RandAugment ---


def test_operations_stand_in_timms_order():
    assert [TIMM_NAMES[name] for name in OPERATIONS] == auto_augment._RAND_INCREASING_TRANSFORMS


@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_operations_argument_follows_from_its_level_as_timms_does(monkeypatch, increasing, sign):
    table = draws.INCREASING_OPERATIONS if increasing else OPERATIONS
    names = auto_augment._RAND_INCREASING_TRANSFORMS if increasing else auto_augment._RAND_TRANSFORMS
    monkeypatch.setattr(auto_augment.random, "random", lambda: 0.0 if sign == 1 else 1.0)  # timm negates above 0.5
    magnitudes = np.array([0.0, 0.3, 2.5, 5.0, 8.77, 9.0, 10.0])
    for timm_name, argument in zip(names, table.values(), strict=True):
        ours = argument(magnitudes / 10, np.full(len(magnitudes), float(sign)))
        level_to_arg = auto_augment.LEVEL_TO_ARG[timm_name]
        theirs = [level_to_arg(magnitude, {})[0] if level_to_arg else 0 for magnitude in magnitudes]
        assert ours == pytest.approx(theirs), timm_name


def test_two_layers_draw_every_operation_alike_and_apply_it_half_the_time():
    operations = draw(range(15000)).operations
    assert operations.shape == (2, 15000)
    for layer in operations:
        counts = np.bincount(layer, minlength=IDENTITY + 1)
        assert abs(counts[IDENTITY] - 7500) < 5 * np.sqrt(15000 / 4)
        assert abs(counts[: len(OPERATIONS)] - 500).max() < 5 * np.sqrt(500)
    both = (operations != IDENTITY).all(axis=0).mean()
    assert both == pytest.approx(0.25, abs=0.02)  # the layers are independent
    assert (operations[0] == operations[1]).mean() == pytest.approx(0.25 + 0.25 / 15, abs=0.02)  # with replacement


def test_randaugments_arguments_are_distributed_as_timms():
    """timm's own operators, told to note their argument instead of drawing a picture."""
    text = "rand-m9-mstd0.5-inc1"
    random.seed(0)
    ours = draw(range(60000), policy=text)
    for operator, name in zip(auto_augment.rand_augment_transform(text, {}).ops, OPERATIONS, strict=True):
        operator.prob = 1.0
        operator.aug_fn = lambda image, *arguments, **_: arguments
        theirs = [operator(None) for _ in range(2000)]
        drawn = ours.arguments[ours.operations == list(OPERATIONS).index(name)]
        assert same_distribution(drawn, [arguments[0] if arguments else 0.0 for arguments in theirs]), name


@pytest.mark.parametrize(
    "text", ["rand", "rand-m9-mstd0.5-inc1", "rand-m5-n3-p0.7", "rand-inc1-m10", "rand-m7-mstd1-p1", "rand-inc0-n1"]
)
def test_the_notation_is_read_as_timm_reads_it(text):
    ours = parse_randaugment(text)
    theirs = auto_augment.rand_augment_transform(text, {"img_mean": (0, 0, 0)})
    first = theirs.ops[0]
    assert (ours.magnitude, ours.prob, ours.num_layers) == (first.magnitude, first.prob, theirs.num_layers)
    assert ours.magnitude_std == first.magnitude_std
    assert ours.increasing == (theirs.ops[4].name == "PosterizeIncreasing")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("rnd-m9", "rnd"),
        ("rand-m11", "m11"),
        ("rand-m9-q3", "q3"),
        ("rand-inc2", "inc2"),
        ("rand-p1.5", "p1.5"),
        ("rand-n0", "n0"),
        ("rand-mstd", "mstd"),
        ("rand-m9-", ""),
        ("m9", "m9"),
        ("rand-m11-q3", "m11', 'q3"),
    ],
)
def test_a_notation_that_cannot_be_read_is_refused_with_the_part_that_is_wrong(text, part):
    with pytest.raises(ValueError, match=f"policy='{text}': cannot read '{part}'; write rand"):
        parse_randaugment(text)


def test_without_randaugment_there_are_no_layers_and_all_else_stays():
    plain, recipe = draw(range(50), policy=None), draw(range(50))
    assert plain.operations.shape == plain.arguments.shape == (0, 50)
    assert np.array_equal(plain.crop, recipe.crop)
    assert np.array_equal(plain.erasing, recipe.erasing)


def test_three_augment_is_distributed_as_timms_and_torchvisions():
    ours = draw(range(30000), policy="3a")
    first, *jitter = ours.operations
    names = np.array(draws.NAMES)[first]
    counts = {name: int((names == name).sum()) for name in ("solarize", "color", "gaussian_blur")}
    assert sum(counts.values()) == 30000
    assert max(abs(count - 10000) for count in counts.values()) < 5 * np.sqrt(30000 * 2 / 9)

    random.seed(0)
    policy = auto_augment.auto_augment_transform("3a", {"img_mean": (0, 0, 0)}).policy
    arguments = {operator.name: operator for (operator,) in policy}
    assert set(ours.arguments[0, names == "solarize"]) == set(arguments["Solarize"].level_fn(5, {})) == {128}
    assert arguments["Desaturate"].level_fn(10, {}) == (1.0,)  # all of the colour is taken away
    assert set(ours.arguments[0, names == "color"]) == {0}
    sigmas = []
    blurred = Image.new("RGB", (2, 2))
    blurred.filter = lambda filter: sigmas.append(filter.radius)
    for _ in range(3000):
        auto_augment.gaussian_blur_rand(blurred, *arguments["GaussianBlurRand"].level_fn(10, {}))
    assert same_distribution(ours.arguments[0, names == "gaussian_blur"], sigmas)

    torch.manual_seed(0)
    theirs = [ColorJitter.get_params([0.7, 1.3], [0.7, 1.3], [0.7, 1.3], None) for _ in range(3000)]
    for name, column in (("brightness", 1), ("contrast", 2), ("color", 3)):
        drawn = np.concatenate([ours.arguments[1 + i][row == draws.NAMES.index(name)] for i, row in enumerate(jitter)])
        assert len(drawn) == 30000  # each exactly once
        assert same_distribution(drawn, [parameters[column] for parameters in theirs]), name
    orders = np.unique(np.stack(jitter), axis=1, return_counts=True)[1]
    assert len(orders) == 6
    assert abs(orders - 5000).max() < 5 * np.sqrt(5000)


def test_an_unknown_policy_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="policy='augmix' is not known; use 3a, rand-m9-mstd"):
        parse_policy("augmix")


def test_a_sample_takes_less_than_ten_microseconds():
    samples = np.arange(1024)
    best = min(timeit.repeat(lambda: draw(samples), number=3, repeat=5)) / 3
    assert best / len(samples) < 10e-6


# --- Random erasing ---


@pytest.mark.parametrize("image_size", [32, 100])
def test_erasing_boxes_are_distributed_as_timms(image_size):
    ours = draw(range(4000), image_size=image_size, erase_prob=0.5).erasing
    ours = ours[ours[:, 2] > 0]
    random.seed(0)
    eraser = RandomErasing(probability=0.5, mode="pixel", device="cpu")
    theirs = []
    for _ in range(4000):
        rows, columns = torch.nonzero(eraser(torch.zeros(1, image_size, image_size))[0], as_tuple=True)
        if len(rows):
            y, x = int(rows.min()), int(columns.min())
            theirs.append((y, x, int(rows.max()) - y + 1, int(columns.max()) - x + 1))
    theirs = np.array(theirs)
    assert len(ours) == pytest.approx(len(theirs), abs=5 * np.sqrt(2000))
    for name, column in {"y": 0, "x": 1, "height": 2, "width": 3}.items():
        assert same_distribution(ours[:, column], theirs[:, column]), name
    assert same_distribution(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])


def test_erasing_boxes_stay_inside_the_image():
    y, x, h, w = draw(range(5000), image_size=16, erase_prob=1.0).erasing.T
    assert (y >= 0).all()
    assert (x >= 0).all()
    assert (y + h <= 16).all()
    assert (x + w <= 16).all()


def test_nothing_is_erased_with_probability_zero():
    assert not draw(range(1000), erase_prob=0.0).erasing.any()
