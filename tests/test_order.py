"""The order of samples: a pure function that every rank cuts the same way."""

import itertools
from collections import Counter

import numpy as np
import pytest

from cit_scale.data.order import (
    Cursor,
    balanced_order,
    class_quotas,
    epoch_order,
    permutation,
    rank_slice,
    repeat_spread,
    share_together,
    steps_per_epoch,
)


def global_batch(order, samples_seen, global_batch_size, micro_batch_size, world_size):
    """positions, samples, repeats of one global batch, put together from what each rank takes."""
    shares = [
        rank_slice(order, samples_seen, global_batch_size, micro_batch_size, rank, world_size)
        for rank in range(world_size)
    ]
    return [
        np.concatenate([getattr(share, name).ravel() for share in shares])
        for name in ("positions", "samples", "repeats")
    ]


def test_an_epoch_holds_every_sample_once():
    samples, repeats = epoch_order(1000, seed=3, epoch=5)
    assert sorted(samples) == list(range(1000))
    assert not repeats.any()


def test_the_order_is_the_same_on_every_machine_and_version():
    """Recorded once: a change here is a change of every run's data, and of all stored teacher logits."""
    assert epoch_order(8, seed=0, epoch=0)[0].tolist() == [6, 4, 2, 7, 3, 5, 0, 1]
    assert epoch_order(8, seed=7, epoch=2)[0].tolist() == [7, 1, 3, 2, 4, 5, 6, 0]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(epoch_order(50, seed, epoch)[0]) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16  # in particular (1, 2) and (2, 1): seeds are combined, not added


def test_every_sample_comes_first_equally_often():
    first = np.bincount([permutation(10, trial)[0] for trial in range(4000)], minlength=10)
    assert abs(first - 400).max() < 5 * np.sqrt(400 * 0.9)


def test_repeated_augmentation_repeats_a_run_of_samples_and_keeps_the_epochs_length():
    samples, repeats = epoch_order(10, seed=0, epoch=0, repeats=3)
    once = epoch_order(10, seed=0, epoch=0)[0].tolist()
    assert samples.tolist() == [*once[:4], *once[:4], *once[:2]]
    assert repeats.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]


def test_the_repeats_of_a_sample_are_in_one_global_batch_but_never_in_one_mixing_group():
    samples, _ = epoch_order(5000, seed=0, epoch=0, repeats=3)
    groups = samples.reshape(-1, 8)
    assert all(len(set(group)) == 8 for group in groups.tolist())
    places = {}
    for place, sample in enumerate(samples.tolist()):
        places.setdefault(sample, []).append(place)
    assert max(last[-1] - last[0] for last in places.values()) == 128
    assert np.bincount([len(found) for found in places.values()], minlength=4)[3] >= 0.97 * len(places)


@pytest.mark.parametrize("group_size", [2, 8, 16])
def test_repeats_are_two_mixing_groups_apart_so_that_a_batch_of_64_has_some(group_size):
    spread = repeat_spread(2, group_size)
    samples, _ = epoch_order(5000, seed=0, epoch=0, repeats=3, spread=spread)
    whole = samples[: 5000 // group_size * group_size].reshape(-1, group_size)
    assert all(len(set(group)) == group_size for group in whole.tolist())
    assert share_together(samples, 64) > 0.6
    assert share_together(samples, 64) == pytest.approx(share_by_hand(samples, 64))


def test_the_first_version_has_no_repeats_in_a_batch_of_64():
    samples, _ = epoch_order(5000, seed=0, epoch=0, repeats=3, spread=repeat_spread(1, 8))
    assert share_together(samples, 64) == 0
    assert share_together(samples, 1024) == pytest.approx(share_by_hand(samples, 1024))
    assert share_together(epoch_order(500, seed=0, epoch=0)[0], 64) == 0


def share_by_hand(samples, size):
    batches = [samples[first : first + size].tolist() for first in range(0, len(samples) - size + 1, size)]
    counts = Counter(itertools.chain(*batches))
    repeated = [(batch, sample) for batch in batches for sample in batch if counts[sample] > 1]
    return sum(batch.count(sample) > 1 for batch, sample in repeated) / len(repeated)


@pytest.mark.parametrize("num_samples", [1, 2, 7, 64, 129, 1000])
@pytest.mark.parametrize("repeats", [2, 3, 9])
def test_no_repeat_of_a_sample_stands_twice_in_an_epoch_of_any_length(num_samples, repeats):
    order = epoch_order(num_samples, seed=0, epoch=0, repeats=repeats)
    assert len(set(zip(*(column.tolist() for column in order), strict=True))) == num_samples


def test_repeats_below_one_are_refused():
    with pytest.raises(ValueError, match=r"repeats=0.*1 or more"):
        epoch_order(10, seed=0, epoch=0, repeats=0)


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 24), (1, 4), (2, 12), (2, 3), (3, 8), (4, 2)])
def test_every_rank_layout_sees_the_same_global_batch(world_size, micro_batch_size):
    order = epoch_order(100, seed=1, epoch=0, repeats=3)
    positions, samples, repeats = global_batch(order, 48, 24, micro_batch_size, world_size)
    assert positions.tolist() == list(range(24))
    assert samples.tolist() == order[0][48:72].tolist()
    assert repeats.tolist() == order[1][48:72].tolist()


def test_a_rank_owns_one_stretch_of_positions_and_its_micro_steps_cut_it_in_order():
    order = epoch_order(100, seed=1, epoch=0)
    share = rank_slice(order, 0, global_batch_size=24, micro_batch_size=4, rank=1, world_size=3)
    assert share.positions.tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]]


def test_a_global_batch_that_micro_batches_do_not_fill_is_refused_with_the_next_that_is_filled():
    order = epoch_order(100, seed=1, epoch=0)
    with pytest.raises(ValueError, match=r"global_batch_size=20 .* 4 x 3 = 12; the next one that is: 24"):
        rank_slice(order, 0, global_batch_size=20, micro_batch_size=4, rank=0, world_size=3)


def test_the_incomplete_last_batch_is_dropped():
    assert steps_per_epoch(100, 24) == 4
    assert steps_per_epoch(96, 24) == 4


def test_a_set_smaller_than_a_global_batch_is_refused_with_the_largest_that_fits():
    with pytest.raises(ValueError, match=r"23 training images .* global batch of 24.* at most 23"):
        steps_per_epoch(23, 24)


def test_a_cursor_and_its_step_lead_to_each_other():
    assert Cursor.at_step(9, num_samples=100, global_batch_size=24) == Cursor(epoch=2, samples_seen=24)
    for step in range(12):
        assert Cursor.at_step(step, 100, 24).step(100, 24) == step


def test_a_cursor_of_another_global_batch_size_is_refused():
    with pytest.raises(ValueError, match="samples_seen=24 is not a multiple of global_batch_size=16"):
        Cursor(epoch=0, samples_seen=24).step(100, 16)


# ---------------------------------------------------------------------------------------------------------------------
# Balance

LABELS = np.repeat([0, 1, 2], [600, 300, 100])


@pytest.mark.parametrize(
    ("balance", "places", "quotas"),
    [
        ("none", 1000, [600, 300, 100]),
        ("sqrt", 1000, [473, 334, 193]),
        ("full", 1000, [334, 333, 333]),
        ("full", 960, [320, 320, 320]),  # what complete global batches of 64 hold of 1000 samples
    ],
)
def test_classes_stand_in_an_epoch_as_often_as_is_asked(balance, places, quotas):
    assert class_quotas(np.bincount(LABELS), balance, places).tolist() == quotas
    for epoch in range(3):
        samples, _ = balanced_order(LABELS, balance, places, 0, epoch)
        found = np.bincount(LABELS[samples])
        assert found.tolist() == class_quotas(np.bincount(LABELS), balance, places, epoch).tolist()
        assert np.abs(found - quotas).max() <= 1  # what is left after rounding goes round


def test_where_there_are_fewer_places_than_classes_each_has_its_turn():
    labels = np.arange(20).repeat(2)
    seen = [labels[balanced_order(labels, "full", 16, 0, epoch)[0]] for epoch in range(5)]
    assert all(len(set(each)) == 16 for each in seen)
    assert np.bincount(np.concatenate(seen)).tolist() == [4] * 20


@pytest.mark.parametrize("repeats", [2, 5])
def test_with_repeats_the_quotas_are_those_of_the_different_samples(repeats):
    samples, _ = balanced_order(LABELS, "sqrt", 640, 0, 1, repeats)
    quotas = class_quotas(np.bincount(LABELS), "sqrt", 640 // repeats, epoch=1)
    assert np.bincount(LABELS[samples]).tolist() == (repeats * quotas).tolist()


@pytest.mark.parametrize("counts", [[5, 0, 3], [1, 1, 1000], [7], [3, 3, 3, 2]])
@pytest.mark.parametrize("balance", ["none", "sqrt", "full"])
def test_quotas_fill_an_epoch_and_leave_no_class_out(counts, balance):
    quotas = class_quotas(np.array(counts), balance, sum(counts))
    assert quotas.sum() == sum(counts)
    assert ((quotas > 0) == (np.array(counts) > 0)).all()
    assert balance != "none" or quotas.tolist() == counts


def test_no_sample_of_a_class_is_seen_more_than_once_more_than_another():
    seen = np.zeros(1000, int)
    for epoch in range(7):
        samples, _ = balanced_order(LABELS, "full", 1000, 3, epoch)
        seen += np.bincount(samples, minlength=1000)
    for label in range(3):
        assert np.ptp(seen[label == LABELS]) <= 1


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_sample_that_stands_several_times_in_an_epoch_is_augmented_anew_each_time(repeats):
    samples, numbers = balanced_order(LABELS, "full", 1000, 0, 2, repeats)
    pairs = set(zip(samples.tolist(), numbers.tolist(), strict=True))
    assert len(pairs) == 1000
    assert numbers.max() > repeats


def test_a_balanced_order_is_a_pure_function_and_mixes_the_classes():
    first = balanced_order(LABELS, "sqrt", 1000, 1, 4)
    again = balanced_order(LABELS, "sqrt", 1000, 1, 4)
    assert all((one == other).all() for one, other in zip(first, again, strict=True))
    assert (balanced_order(LABELS, "sqrt", 1000, 1, 5)[0] != first[0]).any()
    assert all(len(set(LABELS[part])) == 3 for part in np.split(first[0], 10))
    for world_size in (1, 2, 4):
        whole = global_batch(first, 200, 40, 5, world_size)
        assert all(
            (ours == theirs).all() for ours, theirs in zip(whole, global_batch(first, 200, 40, 10, 1), strict=True)
        )


def test_the_balanced_order_is_the_same_on_every_machine_and_version():
    labels = np.array([0, 0, 0, 0, 0, 1, 1, 2])
    samples, repeats = balanced_order(labels, "full", 8, 0, 1)
    assert (samples.tolist(), repeats.tolist()) == ([2, 7, 7, 5, 7, 4, 0, 5], [0, 2, 1, 0, 0, 0, 0, 1])
