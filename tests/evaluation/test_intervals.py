"""Intervals against definitions, against leaving out one by one, and against the truth in simulations."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from torchthaw.errors import DataError
from torchthaw.evaluation.intervals import (
    accuracy_group_interval,
    macro_f1_interval,
    mid_p_interval,
    score_intervals,
    wilson_interval,
)

_FILE = Path(__file__).parents[1] / "benchmarks" / "interval_coverage.py"
_SPEC = importlib.util.spec_from_file_location("interval_coverage", _FILE)
benchmark = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(benchmark)


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (0, 30), (30, 30), (7, 20), (135, 150), (999, 1000)])
def test_wilson_interval_equals_that_of_scipy(successes, trials):
    expected = scipy.stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx([expected.low, expected.high], abs=1e-12)


def test_wilson_interval_holds_its_level():
    trials, proportion = 150, 0.9
    draws = np.random.default_rng(0).binomial(trials, proportion, size=5000)
    covered = [low <= proportion <= high for low, high in (wilson_interval(int(draw), trials) for draw in draws)]
    assert 0.93 <= np.mean(covered) <= 0.97


def mid_p_upper(successes, trials, share):
    """P(more) + P(as many) / 2."""
    return scipy.stats.binom.sf(successes, trials, share) + scipy.stats.binom.pmf(successes, trials, share) / 2


@pytest.mark.parametrize(("successes", "trials"), [(1, 2), (7, 20), (29, 30), (135, 150), (999, 1000)])
def test_mid_p_limits_leave_two_and_a_half_percent_on_each_side(successes, trials):
    low, high = mid_p_interval(successes, trials)
    assert mid_p_upper(successes, trials, low) == pytest.approx(0.025, abs=1e-9)
    assert 1 - mid_p_upper(successes, trials, high) == pytest.approx(0.025, abs=1e-9)
    exact = scipy.stats.binomtest(successes, trials).proportion_ci(0.95, method="exact")
    assert exact.low < low < successes / trials < high < exact.high


@pytest.mark.parametrize("trials", [1, 30, 2.5])
def test_all_or_none_leave_one_side_open(trials):
    assert mid_p_interval(trials, trials) == pytest.approx([0.05 ** (1 / trials), 1.0])
    assert mid_p_interval(0, trials) == pytest.approx([0.0, 1 - 0.05 ** (1 / trials)])


@pytest.mark.parametrize("trials", [30, 100, 400])
@pytest.mark.parametrize("accuracy", [0.5, 0.8, 0.95, 0.99])
def test_the_accuracy_interval_holds_its_level(trials, accuracy):
    """Coverage over images is a finite sum; it is exact here."""
    numbers = np.arange(trials + 1)
    limits = np.array([mid_p_interval(int(number), trials) for number in numbers])
    inside = (limits[:, 0] <= accuracy) & (accuracy <= limits[:, 1])
    chances = scipy.stats.binom.pmf(numbers, trials, accuracy)
    covered = chances[inside].sum()
    assert covered >= 0.93
    # With one mistake more or less in the interval, coverage jumps where few mistakes are to be expected.
    assert covered <= 0.97 or covered - chances[inside].min() < 0.95 or trials * (1 - accuracy) < 2


# Scenario, number of images or groups -> coverage of accuracy and macro F1 in 400 draws.
SIMULATED = {
    "few images": (benchmark.Population(2, 0.8), 30),
    "many classes": (benchmark.Population(10, 0.8), 100),
    "near 1": (benchmark.Population(5, 0.95), 100),
    "more images": (benchmark.Population(5, 0.95), 400),
    "few groups": (benchmark.Population(2, 0.8, 0.4, True), 10),
    "groups": (benchmark.Population(2, 0.8, 0.4, True), 20),
    "groups of one class": (benchmark.Population(2, 0.8, 0.4), 40),
    "groups near 1": (benchmark.Population(2, 0.95, 0.1, True), 40),
}


@pytest.mark.parametrize("name", SIMULATED)
def test_intervals_hold_their_level(name):
    population, number = SIMULATED[name]
    found = benchmark.coverage(population, number, 400, seed=1)
    assert 0.93 <= found["accuracy"].covered <= 0.975
    assert 0.93 <= found["macro_f1"].covered <= 0.975


def test_intervals_over_images_miss_where_images_belong_together():
    """What the group interval is for: the same test sets, taken for single images."""
    population, covered = benchmark.Population(2, 0.8, 0.4, True), []
    for seed in range(200):
        labels, predicted, _ = population.draw(20, np.random.default_rng(seed))
        low, high = score_intervals(labels, predicted)[0]
        covered.append(low <= 0.8 <= high)
    assert np.mean(covered) < 0.8


def draw(seed, images=60, groups=9):
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, images)
    predicted = np.where(random.random(images) < 0.7, labels, random.integers(0, 6, images))
    labels[0] = 5
    return labels, predicted, np.concatenate([np.arange(groups), random.integers(0, groups, images - groups)])


def f1_of(labels, predicted):
    return f1_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0)


@pytest.mark.parametrize("seed", range(4))
def test_the_interval_of_macro_f1_is_that_of_leaving_out_one_by_one(seed):
    labels, predicted, _ = draw(seed)
    value, others = f1_of(labels, predicted), [np.arange(60) != number for number in range(60)]
    left_out = np.array([f1_of(labels[rest], predicted[rest]) for rest in others])
    effective = value * (1 - value) / (59 / 60 * ((left_out - value) ** 2).sum())
    assert macro_f1_interval(labels, predicted) == pytest.approx(mid_p_interval(effective * value, effective))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("number", [2, 9])
def test_the_intervals_over_groups_are_those_of_leaving_out_one_by_one(seed, number):
    labels, predicted, groups = draw(seed, groups=number)
    names = [f"patient {group}" for group in groups]
    right = labels == predicted

    def kish(values):
        values = np.array(values, dtype=float)
        return values.sum() ** 2 / (values**2).sum()

    sizes, hits = np.bincount(groups), np.bincount(groups, weights=right)
    weight = min(kish(hits), kish(sizes - hits)) ** 2
    scores = (lambda labels, predicted: (labels == predicted).mean(), f1_of)
    for score, found in zip(scores, score_intervals(labels, predicted, names)[:2], strict=True):
        value = score(labels, predicted)
        left_out = np.array([score(labels[groups != g], predicted[groups != g]) for g in range(number)])
        variance = (number - 1) / number * ((left_out - value) ** 2).sum()
        largest = max(variance, value * (1 - value) / kish(sizes))
        variance = (weight * variance + largest) / (weight + 1)
        effective = min(60, value * (1 - value) / variance)
        effective *= (1.959964 / scipy.stats.t.ppf(0.975, max(kish(sizes) - 1, 1))) ** 2
        assert found == pytest.approx(mid_p_interval(effective * value, effective), abs=1e-6)


def test_more_images_of_the_same_patients_do_not_narrow_the_interval():
    labels, predicted, groups = draw(0)
    once = score_intervals(labels, predicted, groups.tolist())
    often = score_intervals(*(np.repeat(ids, 10) for ids in (labels, predicted)), np.repeat(groups, 10).tolist())
    assert often[0] == pytest.approx(once[0])
    assert often[1] == pytest.approx(once[1])
    assert score_intervals(np.repeat(labels, 10), np.repeat(predicted, 10))[0][0] > often[0][0] + 0.05


def test_without_mistakes_only_the_number_of_groups_counts():
    labels, groups = np.arange(60) % 3, np.arange(60) % 5
    accuracy, macro_f1, method = score_intervals(labels, labels, groups.tolist())
    assert accuracy == macro_f1 == pytest.approx([0.05 ** (1 / 5), 1.0])
    assert method == "mid-P with a jackknife over 5 groups"


def test_one_group_says_nothing():
    labels, predicted, _ = draw(0)
    accuracy, macro_f1, method = score_intervals(labels, predicted, ["a"] * 60)
    assert method == "mid-P with a jackknife over 1 group"
    for low, high in (accuracy, macro_f1):
        assert low < 0.01
        assert high > 0.99


def test_groups_of_one_image_each_are_images():
    labels, predicted, _ = draw(0)
    over_images = score_intervals(labels, predicted)
    assert over_images[2] == "mid-P over 60 images"
    assert score_intervals(labels, predicted, range(60)) == over_images
    # Images without a group belong to no other.
    assert score_intervals(labels, predicted, [None] * 60) == over_images
    assert score_intervals(labels, predicted, [None] * 58 + ["a", "a"])[2] == "mid-P with a jackknife over 59 groups"


def test_groups_that_do_not_fit_are_refused():
    labels, predicted, groups = draw(0)
    with pytest.raises(DataError, match="9 groups for 60 images"):
        score_intervals(labels, predicted, groups[:9].tolist())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=40), st.data())
def test_intervals_hold_the_score_and_depend_on_no_order(rows, data):
    labels, predicted, groups = np.array(rows).T
    mixed = np.array(data.draw(st.permutations(rows))).T
    for own in (None, groups.tolist()):
        accuracy, macro_f1, _ = score_intervals(labels, predicted, own)
        values = (labels == predicted).mean(), f1_of(labels, predicted)
        for value, (low, high) in zip(values, (accuracy, macro_f1), strict=True):
            assert 0 <= low <= value + 1e-9
            assert value - 1e-9 <= high <= 1
        again = score_intervals(mixed[0], mixed[1], None if own is None else mixed[2].tolist())
        for first, second in zip((accuracy, macro_f1), again, strict=False):
            assert second == pytest.approx(first, abs=1e-6)


def test_the_group_interval_takes_the_whole_range_of_scores():
    groups = np.repeat(np.arange(8), 5)
    for hits in range(9):
        low, high = accuracy_group_interval(groups < hits, groups)
        assert low <= hits / 8 <= high
        assert (low == 0) == (hits == 0)
        assert (high == 1) == (hits == 8)
