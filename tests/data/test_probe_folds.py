"""Folds of whole units for choosing a penalty."""

import warnings

import numpy as np
import pytest

from torchthaw.data.probe_folds import joined_units, probe_folds

LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [200, 80, 20]))
# Units of 1 to 9 images, of mixed classes.
UNITS = np.random.default_rng(1).integers(0, 70, len(LABELS))


def folds_of(units, folds):
    return {unit: set(folds[units == unit].tolist()) for unit in np.unique(units)}


def test_every_image_is_in_one_of_five_folds_with_its_share_of_each_class():
    folds = probe_folds(LABELS)
    assert folds.dtype == np.int64
    for label, count in enumerate([200, 80, 20]):
        assert np.bincount(folds[label == LABELS], minlength=5).tolist() == [count // 5] * 5


def test_units_are_never_split_and_classes_stay_about_even():
    folds = probe_folds(LABELS, units=[f"subject {unit}" for unit in UNITS])
    assert all(len(found) == 1 for found in folds_of(UNITS, folds).values())
    assert set(folds) == {0, 1, 2, 3, 4}
    for label, count in enumerate([200, 80, 20]):
        assert abs(np.bincount(folds[label == LABELS], minlength=5) - count / 5).max() <= 3


@pytest.mark.parametrize("units", [None, UNITS])
def test_same_folds_for_the_same_seed_whatever_the_global_random_state(units):
    def made(seed, limit=2000):
        np.random.seed(seed + limit)
        before = np.random.get_state()[1].copy()
        folds = probe_folds(LABELS, units=units, seed=seed, limit=limit)
        assert (np.random.get_state()[1] == before).all()
        np.random.seed(99)
        assert (probe_folds(LABELS, units=units, seed=seed, limit=limit) == folds).all()
        return folds.tolist()

    assert made(0) != made(1)
    assert [fold >= 0 for fold in made(0, 100)] != [fold >= 0 for fold in made(1, 100)]


@pytest.mark.parametrize("limit", [60, 150, 299])
def test_beyond_the_limit_a_stratified_sample_is_dealt_out(limit):
    folds = probe_folds(LABELS, limit=limit)
    assert abs((folds >= 0).sum() - limit) <= 3
    for label, count in enumerate([200, 80, 20]):
        of_class = folds[label == LABELS]
        assert abs((of_class >= 0).sum() - limit * count / 300) <= 1
        dealt = np.bincount(of_class[of_class >= 0], minlength=5)
        assert dealt.max() - dealt.min() <= 1


def test_beyond_the_limit_units_are_taken_whole():
    folds = probe_folds(LABELS, units=UNITS, limit=150)
    assert all(len(found) == 1 for found in folds_of(UNITS, folds).values())
    assert abs((folds >= 0).sum() - 150) <= 20
    shares = [(folds[label == LABELS] >= 0).mean() for label in range(3)]
    assert shares == pytest.approx([0.5] * 3, abs=0.2)


def test_up_to_the_limit_all_images_are_dealt_out():
    assert probe_folds(LABELS, limit=len(LABELS)).min() == 0


def test_a_sample_has_a_unit_of_every_class():
    labels = np.repeat(np.arange(50), [500] + [3] * 49)
    folds = probe_folds(labels, limit=100)
    assert set(labels[folds >= 0]) == set(range(50))


def test_a_unit_counts_for_its_most_frequent_class():
    # The one unit of class 1 is taken, as every class has one; those of class 0 have a lone image of class 1 as well.
    labels = np.array([1, 0, 0, 0] * 40 + [1] * 4)
    units = np.repeat(np.arange(41), 4)
    taken = probe_folds(labels, units=units, limit=80) >= 0
    assert taken[-4:].all()
    assert taken[:-4].sum() == 80


@pytest.mark.parametrize(
    ("labels", "units", "expected"),
    [
        ([0, 1] * 10, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2] + [2] * 8, 3),
        ([0, 0, 0, 1, 1], None, 3),
        ([0] * 7, None, 5),
        ([3, 3], None, 2),
    ],
    ids=["three units", "three images of the largest class", "one class", "two images"],
)
def test_fewer_folds_where_there_cannot_be_five(labels, units, expected):
    folds = probe_folds(labels, units=units)
    assert sorted(set(folds)) == list(range(expected))


@pytest.mark.parametrize(
    ("labels", "units", "wanted"),
    [
        ([], None, 5),
        ([0], None, 5),
        ([0, 1, 2], None, 5),
        ([0, 1] * 5, ["a"] * 10, 5),
        ([0, 1] * 5, None, 1),
    ],
    ids=["no image", "one image", "one image per class", "one unit", "one fold"],
)
def test_no_folds_where_there_cannot_be_two(labels, units, wanted):
    folds = probe_folds(labels, units=units, folds=wanted)
    assert folds.tolist() == [-1] * len(labels)


def test_no_fold_is_empty_where_a_few_units_have_most_images():
    random = np.random.default_rng(0)
    for _ in range(50):
        units = random.choice(6, 30, p=[0.6, 0.3, 0.04, 0.03, 0.02, 0.01])
        folds = probe_folds(random.integers(0, 3, 30), units=units)
        assert sorted(set(folds)) == list(range(len(set(folds))))


@pytest.mark.parametrize("units", [None, UNITS])
def test_small_classes_and_units_cause_no_warning(units):
    labels = LABELS.copy()
    labels[:2] = 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert probe_folds(labels, units=units).max() == 4


def test_images_that_share_a_value_in_any_column_are_one_unit():
    subjects = ["a", "b", "c", "a", None, None, "d"]
    contents = [1, 2, 2, 3, 4, 5, 3]
    # 1 and 2 by content; 0 and 3 by subject, 3 and 6 by content.
    assert joined_units(subjects, contents).tolist() == [0, 1, 1, 0, 2, 3, 0]


def test_unknown_values_join_nothing_and_columns_do_not_mix():
    assert joined_units([None, None, None]).tolist() == [0, 1, 2]
    assert joined_units(["x", "y"], ["y", "x"]).tolist() == [0, 1]
    assert joined_units([], []).tolist() == []


def test_a_chain_of_images_is_one_unit():
    assert set(joined_units([row // 2 for row in range(100)], [(row + 1) // 2 for row in range(100)])) == {0}


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError):
        joined_units(["a", "b"], ["a"])
