"""Mixup and cutmix: timm's arithmetic and distributions, keyed by position and the same at every layout."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from counting import counting
from scipy.stats import ks_2samp
from timm.data import mixup as timm_mixup

from cit_scale.batch import Batch
from cit_scale.config import MixingConfig
from cit_scale.data.mixing import draw_group, mix, smooth_one_hot

RECIPE = MixingConfig()


def make_batch(num_images=32, start=0, size=12, num_classes=5):
    """Images whose pixels all differ; a slice of the batch that begins at 0 if `start` is given."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((64, 3, size, size), generator=generator)
    labels = torch.randint(num_classes, (64,), generator=generator)
    taken = slice(start, start + num_images)
    positions = torch.arange(64)[taken]
    return Batch(images[taken], labels[taken], positions, positions)


def the_step_that(mixing, condition):
    """The first step whose group 0 is drawn as `condition` wants."""
    return next(step for step in range(1000) if condition(draw_group(mixing, 0, step, 0, 12, 12)))


@pytest.mark.parametrize("is_cutmix", [False, True])
def test_a_group_is_mixed_as_timm_mixes_a_batch(monkeypatch, is_cutmix):
    step = the_step_that(RECIPE, lambda how: (how.box is not None) == is_cutmix and 0.2 < how.lam < 0.8)
    how = draw_group(RECIPE, 0, step, 0, 12, 12)
    batch = make_batch(8)

    timm = timm_mixup.Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=5)
    monkeypatch.setattr(timm, "_params_per_batch", lambda: (how.lam, is_cutmix))
    if is_cutmix:
        rows, columns = how.box
        box = rows.start, rows.stop, columns.start, columns.stop
        monkeypatch.setattr(timm_mixup, "rand_bbox", lambda *_, **__: box)
    images, targets = timm(batch.images.clone(), batch.labels)

    mixed = mix(batch, RECIPE, num_classes=5, seed=0, step=step)
    torch.testing.assert_close(mixed.images, images)
    torch.testing.assert_close(mixed.targets, targets)


def test_modes_and_lambdas_are_distributed_as_timms():
    ours = [draw_group(RECIPE, 0, step, 0, 50, 50) for step in range(4000)]
    np.random.seed(0)
    timm = timm_mixup.Mixup(0.8, 1.0)
    theirs = {False: [], True: []}
    for _ in range(4000):
        lam, is_cutmix = timm._params_per_batch()
        theirs[bool(is_cutmix)].append(timm_mixup.cutmix_bbox_and_lam((50, 50), lam)[1] if is_cutmix else lam)
    for is_cutmix in (False, True):
        lams = [how.lam for how in ours if (how.box is not None) == is_cutmix]
        assert len(lams) == pytest.approx(2000, abs=5 * np.sqrt(1000))
        assert ks_2samp(lams, theirs[is_cutmix]).pvalue > 1e-4


def test_boxes_stand_anywhere_as_timms_do():
    mixing = replace(RECIPE, mixup_alpha=0.0)
    ours = [draw_group(mixing, 0, step, 0, 50, 40).box for step in range(3000)]
    np.random.seed(0)
    theirs = [timm_mixup.rand_bbox((50, 40), np.random.beta(1, 1)) for _ in range(3000)]
    for axis in (0, 1):
        for edge in ("start", "stop"):
            column = 2 * axis + (edge == "stop")
            assert ks_2samp([getattr(box[axis], edge) for box in ours], [box[column] for box in theirs]).pvalue > 1e-4


def test_cutmixs_lambda_is_the_share_of_pixels_that_stayed():
    mixing = replace(RECIPE, mixup_alpha=0.0)
    step = the_step_that(mixing, lambda how: 0.3 < how.lam < 0.7)
    batch = make_batch(8)
    mixed = mix(batch, mixing, num_classes=5, seed=0, step=step)
    stayed = (mixed.images == batch.images).float().mean()
    assert draw_group(mixing, 0, step, 0, 12, 12).lam == pytest.approx(float(stayed), abs=1e-6)


@pytest.mark.parametrize("micro_batch_size", [8, 16, 32])
def test_every_layout_mixes_alike_bit_for_bit(micro_batch_size):
    whole = mix(make_batch(64), RECIPE, num_classes=5, seed=1, step=3)
    for start in range(0, 64, micro_batch_size):
        part = mix(make_batch(micro_batch_size, start), RECIPE, num_classes=5, seed=1, step=3)
        assert torch.equal(part.images, whole.images[start : start + micro_batch_size])
        assert torch.equal(part.targets, whole.targets[start : start + micro_batch_size])


@pytest.mark.parametrize("mixing", [RECIPE, replace(RECIPE, group_size=None), replace(RECIPE, group_size=3, prob=0.5)])
@pytest.mark.parametrize("size", [5, 12, 33])
def test_groups_mixed_together_are_those_mixed_one_after_the_other(mixing, size):
    batch = make_batch(24, 24, size=size)
    group_size = mixing.group_size or 24
    for step in range(4):
        mixed = mix(batch, mixing, num_classes=5, seed=2, step=step)
        smooth = smooth_one_hot(batch.labels, 5, 0.1)
        for start in range(0, 24, group_size):
            group = slice(start, start + group_size)
            how = draw_group(mixing, 2, step, (24 + start) // group_size, size, size)
            images, mirrored = batch.images[group].clone(), batch.images[group].flip(0)
            if how.box is None:
                images = torch.lerp(mirrored, images, how.lam)
            else:
                images[:, :, *how.box] = mirrored[:, :, *how.box]
            assert mixed.images[group].numpy().tobytes() == images.numpy().tobytes()
            targets = torch.lerp(smooth[group].flip(0), smooth[group], how.lam)
            assert mixed.targets[group].numpy().tobytes() == targets.numpy().tobytes()


@pytest.mark.parametrize("num_images", [8, 64])
def test_mixing_takes_as_many_launches_for_any_number_of_groups_and_reads_nothing(num_images):
    batch = make_batch(num_images)
    with counting() as operators:
        mix(batch, RECIPE, num_classes=5, seed=0, step=0)
    views = {"unsqueeze", "slice", "select", "view", "split_with_sizes", "lift_fresh", "detach"}  # from_numpy makes two
    launches = {name: count for name, count in operators.counts.items() if name not in views}
    # Of the images three: the partners, the weights, the mix. Of the targets four: two to smooth the labels.
    assert launches == {"flip": 2, "addcmul": 1, "lerp": 2, "full": 1, "scatter_": 1}
    assert not operators.reads


def test_without_a_group_size_a_micro_batch_mixes_as_one_batch_of_timms():
    mixing = replace(RECIPE, group_size=None)
    for start, size in ((0, 12), (12, 12), (0, 64)):
        batch = make_batch(size, start)
        step = next(
            step for step in range(1000) if draw_group(mixing, 0, step, start // size, 12, 12).box is None
        )  # mixup
        lam = draw_group(mixing, 0, step, start // size, 12, 12).lam
        mixed = mix(batch, mixing, num_classes=5, seed=0, step=step)
        torch.testing.assert_close(mixed.images, lam * batch.images + (1 - lam) * batch.images.flip(0))


def test_seed_step_and_group_each_change_the_mix():
    lams = {draw_group(RECIPE, *key, 224, 224).lam for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)]}
    assert len(lams) == 5


def test_without_mixing_the_images_stay_and_the_targets_are_smoothed():
    batch = make_batch(8)
    mixed = mix(batch, MixingConfig(mixup_alpha=0.0, cutmix_alpha=0.0), num_classes=5, seed=0, step=0)
    assert torch.equal(mixed.images, batch.images)
    expected = torch.full((8, 5), 0.02)
    expected[range(8), batch.labels] = 0.92
    torch.testing.assert_close(mixed.targets, expected)


def test_a_group_is_left_alone_with_one_minus_the_probability():
    mixing = replace(RECIPE, prob=0.3)
    mixed = np.mean([draw_group(mixing, 0, step, 0, 12, 12).lam < 1 for step in range(2000)])
    assert mixed == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0)])
def test_one_mode_alone_is_always_chosen(alphas):
    mixing = MixingConfig(*alphas)
    boxes = [draw_group(mixing, 0, step, 0, 12, 12).box for step in range(100)]
    assert all((box is None) == (alphas[1] == 0) for box in boxes)


def test_targets_sum_to_one():
    mixed = mix(make_batch(64), RECIPE, num_classes=5, seed=0, step=0)
    torch.testing.assert_close(mixed.targets.sum(dim=1), torch.ones(64))


def test_smoothing_is_spread_over_all_classes():
    targets = smooth_one_hot(torch.tensor([2]), num_classes=4, smoothing=0.2)
    torch.testing.assert_close(targets, torch.tensor([[0.05, 0.05, 0.85, 0.05]]))


def test_the_batch_is_left_as_it_was():
    batch = make_batch(32)
    mix(batch, RECIPE, num_classes=5, seed=0, step=0)
    assert torch.equal(batch.images, make_batch(32).images)


@pytest.mark.parametrize(("num_images", "start"), [(12, 0), (8, 4), (4, 0)])
def test_a_micro_batch_that_cuts_a_group_is_refused(num_images, start):
    with pytest.raises(
        ValueError, match=rf"{num_images} images from position {start} .*micro_batch_size a multiple of .*group_size=8"
    ):
        mix(make_batch(num_images, start), RECIPE, num_classes=5, seed=0, step=0)
