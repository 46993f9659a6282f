import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import f1_score

from torchthaw.evaluation.intervals import macro_f1_interval, resampled_macro_f1, wilson_interval


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (0, 30), (30, 30), (7, 20), (135, 150), (999, 1000)])
def test_wilson_interval_equals_that_of_scipy(successes, trials):
    expected = scipy.stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx([expected.low, expected.high], abs=1e-12)


def test_wilson_interval_holds_its_level():
    trials, proportion = 150, 0.9
    draws = np.random.default_rng(0).binomial(trials, proportion, size=5000)
    covered = [low <= proportion <= high for low, high in (wilson_interval(int(draw), trials) for draw in draws)]
    assert 0.93 <= np.mean(covered) <= 0.97


CONFUSION = np.array([[0.42, 0.05, 0.03], [0.04, 0.22, 0.04], [0.03, 0.02, 0.15]])


def draw_images(random, number):
    return np.divmod(random.choice(9, size=number, p=CONFUSION.ravel()), 3)


def test_macro_f1_interval_holds_its_level():
    hits, either = np.diag(CONFUSION), CONFUSION.sum(0) + CONFUSION.sum(1)
    truth = (2 * hits / either).mean()
    random = np.random.default_rng(0)
    covered = []
    for seed in range(1000):
        low, high = macro_f1_interval(*draw_images(random, 300), seed=seed)
        covered.append(low <= truth <= high)
    assert 0.93 <= np.mean(covered) <= 0.97


def test_resamples_are_spread_as_images_drawn_one_by_one():
    random = np.random.default_rng(1)
    labels, predicted = draw_images(random, 40)
    labels[labels == 2] = 1
    labels[:2] = 2
    values = resampled_macro_f1(labels, predicted, seed=0, resamples=20000)
    one_by_one = []
    for _ in range(1500):
        drawn = random.integers(0, 40, size=40)
        present = np.unique(labels[drawn])
        one_by_one.append(f1_score(labels[drawn], predicted[drawn], labels=present, average="macro", zero_division=0))
    assert scipy.stats.ks_2samp(values, one_by_one).pvalue > 0.01


def test_macro_f1_interval_is_the_same_for_the_same_seed_only():
    labels, predicted = draw_images(np.random.default_rng(0), 100)
    assert macro_f1_interval(labels, predicted, seed=3) == macro_f1_interval(labels, predicted, seed=3)
    assert macro_f1_interval(labels, predicted, seed=3) != macro_f1_interval(labels, predicted, seed=4)


@pytest.mark.parametrize(("shift", "expected"), [(0, [1.0, 1.0]), (1, [0.0, 0.0])])
def test_macro_f1_interval_of_only_hits_or_only_misses(shift, expected):
    labels = np.arange(30) % 3
    assert macro_f1_interval(labels, (labels + shift) % 3) == expected
