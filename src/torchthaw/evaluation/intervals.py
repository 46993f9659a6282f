"""95 % intervals of accuracy and macro F1, over images or over groups of them.

All of them see the score as the share of hits among a number of independent images, and take the mid-P interval of
that share. Where images are not independent (they belong to few patients, say), or the score is not a plain share, that
number is the effective one: as many images as would give the variance that was found (Korn and Graubard, 1998, Survey
Methodology 24; compared with other intervals by Franco, Little, Louis and Slud, 2019, J. Surv. Stat. Methodol. 7).

The percentile bootstrap is not used, since it knows only the mistakes that were seen: near 1 and over few groups it
covers the truth far less often than it says (`tests/benchmarks/interval_coverage.py`).
"""

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np
from scipy.optimize import brentq
from scipy.special import betainc
from scipy.stats import t as student_t

from torchthaw.errors import DataError
from torchthaw.evaluation.arrays import Floats, Ids

LEVEL = 0.95
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)


def wilson_interval(successes: int, trials: int) -> list[float]:
    """The 95 % score interval of a proportion, as [low, high] (Wilson, 1927, J. Am. Stat. Assoc. 22).

    Holds its level for small samples and proportions near 0 or 1, where `p ± 1.96 s` does not.
    """
    proportion = successes / trials
    scale = 1 + _Z**2 / trials
    centre = (proportion + _Z**2 / (2 * trials)) / scale
    half = _Z * math.sqrt(proportion * (1 - proportion) / trials + _Z**2 / (4 * trials**2)) / scale
    # Both are exact in the formula, but not in floating point.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return [low, high]


def mid_p_interval(successes: float, trials: float) -> list[float]:
    """The 95 % mid-P interval of a proportion, as [low, high] (Lancaster, 1961, J. Am. Stat. Assoc. 56).

    It holds the shares p for which both tails of the binomial distribution, of which the observed value counts half,
    are above 2.5 %. So it covers close to 95 % where the interval of Clopper and Pearson, of which it counts all,
    covers more (Agresti and Gottard, 2005, Biometrics 61). The tails are those of the beta distribution, by which
    numbers need not be whole.

    Args:
        successes: 0 ... `trials`.
        trials: Above 0.
    """

    def upper_tail(share: float) -> float:
        reached = 1.0 if successes <= 0 else float(betainc(successes, trials - successes + 1, share))
        exceeded = 0.0 if successes >= trials else float(betainc(successes + 1, trials - successes, share))
        return (reached + exceeded) / 2

    tail = (1 - LEVEL) / 2
    low = 0.0 if successes <= 0 else brentq(lambda share: upper_tail(share) - tail, 0, 1)
    high = 1.0 if successes >= trials else brentq(lambda share: upper_tail(share) - (1 - tail), 0, 1)
    return [float(low), float(high)]


def score_intervals(
    labels: Ids, predicted: Ids, groups: Sequence[Hashable] | None = None
) -> tuple[list[float], list[float], str]:
    """The 95 % intervals of accuracy and macro F1, and how they came about.

    Over images they are for new images of the same kind; over groups for images of new groups (patients, say), since
    images of one group tend to be right or wrong together. Then they are wider, and there are as many independent
    observations as groups, not as images.

    Args:
        labels: Class ids, shape (images,).
        predicted: Class ids, shape (images,).
        groups: The group of each image; None where none are known. An image with None is a group of its own.

    Returns:
        The interval of accuracy, that of macro F1 (each [low, high]), and the method in words.

    Raises:
        DataError: `groups` has not one entry per image.
    """
    units = None if groups is None else _numbered(groups, len(labels))
    if units is None:
        number = len(labels)
        return (
            mid_p_interval(float((labels == predicted).sum()), number),
            macro_f1_interval(labels, predicted),
            f"mid-P over {number:,} image{'' if number == 1 else 's'}",
        )
    number = int(units.max()) + 1
    return (
        accuracy_group_interval(labels == predicted, units),
        macro_f1_group_interval(labels, predicted, units),
        f"mid-P with a jackknife over {number:,} group{'' if number == 1 else 's'}",
    )


def macro_f1_interval(labels: Ids, predicted: Ids) -> list[float]:
    """The 95 % interval of macro F1 over images, as [low, high].

    The variance is that of the jackknife, which leaves out one image at a time (Efron and Stein, 1981, Ann. Stat. 9).
    Where all images are right, or all wrong, it is 0; the effective number of images is then that of a mean over the
    classes of the share of images that are right, each from the class's own images.

    Args:
        labels: Class ids, shape (images,).
        predicted: Class ids, shape (images,).
    """
    number = len(labels)
    value, left_out = _leave_one_out_macro_f1(labels, predicted, np.arange(number))
    if 0 < value < 1 and number > 1:
        effective = _effective_number(value, _jackknife_variance(left_out, value), number)
    else:
        _, support = np.unique(labels, return_counts=True)
        effective = len(support) ** 2 / float((1 / support).sum())
    return mid_p_interval(effective * value, effective)


def accuracy_group_interval(correct: np.ndarray, units: Ids) -> list[float]:
    """The 95 % interval of accuracy over groups, as [low, high]; see `_group_interval`.

    Args:
        correct: Whether each image is classified correctly, shape (images,).
        units: The group of each image, numbered from 0, shape (images,).
    """
    sizes = np.bincount(units)
    hits = np.bincount(units, weights=correct)
    value = float(hits.sum() / sizes.sum())
    if len(sizes) == 1:
        return _group_interval(value, np.array([value]), hits, sizes)
    left_out = (hits.sum() - hits) / (sizes.sum() - sizes)
    return _group_interval(value, left_out, hits, sizes)


def macro_f1_group_interval(labels: Ids, predicted: Ids, units: Ids) -> list[float]:
    """The 95 % interval of macro F1 over groups, as [low, high]; see `_group_interval`.

    Args:
        labels: Class ids, shape (images,).
        predicted: Class ids, shape (images,).
        units: The group of each image, numbered from 0, shape (images,).
    """
    value, left_out = _leave_one_out_macro_f1(labels, predicted, units)
    hits = np.bincount(units, weights=labels == predicted)
    return _group_interval(value, left_out, hits, np.bincount(units))


def _group_interval(value: float, left_out: Floats, hits: np.ndarray, sizes: np.ndarray) -> list[float]:
    """The interval of a score over groups.

    The variance is that of the jackknife over groups. It is too small where few groups have the mistakes, and none
    where there are none. So it is averaged with the largest, that of groups which are all right or all wrong; that
    counts as one observation, the found one as the square of the effective number of groups that have mistakes (or
    hits, where these are rarer). The number of images that follows is made smaller by the ratio of the quantiles of
    the normal and of Student's t distribution, with the effective number of groups less one as degrees of freedom, as
    Korn and Graubard do. Effective numbers of groups are those of Kish (1965, Survey Sampling): (sum of sizes)² / sum
    of squared sizes.
    """
    images, groups = float(sizes.sum()), _kish(sizes)
    largest = value * (1 - value) / groups
    variance = _jackknife_variance(left_out, value) if len(sizes) > 1 else largest
    weight = min(_kish(sizes - hits), _kish(hits)) ** 2
    variance = (weight * variance + max(largest, variance)) / (weight + 1)
    effective = _effective_number(value, variance, images) if 0 < value < 1 else groups
    quantile = float(student_t.ppf((1 + LEVEL) / 2, max(groups - 1, 1)))
    effective *= (_Z / quantile) ** 2 if 0 < value < 1 else 1
    return mid_p_interval(effective * value, effective)


def _numbered(groups: Sequence[Hashable], images: int) -> Ids | None:
    """Numbers the groups of images from 0; None where each image is a group of its own."""
    if len(groups) != images:
        raise DataError(f"There are {len(groups)} groups for {images} images. Pass the group of each image.")
    numbers: dict[Hashable, int] = {}
    # An image without a group is one of its own: its place is no other's key.
    keys = [("none", place) if group is None else ("group", group) for place, group in enumerate(groups)]
    units = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
    return None if len(numbers) == images else units


def _effective_number(value: float, variance: float, images: float) -> float:
    """How many independent images would give a share this variance; at most as many as there are."""
    return min(images, value * (1 - value) / variance) if variance > 0 else images


def _jackknife_variance(left_out: Floats, value: float) -> float:
    units = len(left_out)
    return float((units - 1) / units * ((left_out - value) ** 2).sum())


def _kish(sizes: np.ndarray) -> float:
    squares = float((sizes.astype(np.float64) ** 2).sum())
    return float(sizes.sum()) ** 2 / squares if squares else 0.0


def _leave_one_out_macro_f1(labels: Ids, predicted: Ids, units: Ids) -> tuple[float, Floats]:
    """Macro F1 of all images, and without each unit (shape (units,)); a lone unit is not left out.

    A mean over the classes that occur among the labels, with and without the unit.
    """
    classes = int(max(labels.max(), predicted.max())) + 1
    support, taken = (np.bincount(ids, minlength=classes) for ids in (labels, predicted))
    hits = np.bincount(labels[labels == predicted], minlength=classes)
    f1 = 2 * hits / np.maximum(support + taken, 1)
    occurs = support > 0
    total, present = float(f1[occurs].sum()), int(occurs.sum())
    number = int(units.max()) + 1
    if number == 1:
        return total / present, np.array([total / present])
    # What changes without a unit are only the classes of its own labels and predictions.
    own_support, own_taken = units * classes + labels, units * classes + predicted
    cells, places = np.unique(np.concatenate([own_support, own_taken]), return_inverse=True)
    unit, of_class = np.divmod(cells, classes)
    length, right = len(labels), labels == predicted
    rest_support = support[of_class] - np.bincount(places[:length], minlength=len(cells))
    rest_taken = taken[of_class] - np.bincount(places[length:], minlength=len(cells))
    rest_hits = hits[of_class] - np.bincount(places[:length][right], minlength=len(cells))
    without = np.where(rest_support > 0, 2 * rest_hits / np.maximum(rest_support + rest_taken, 1), 0.0)
    change = without - np.where(occurs, f1, 0.0)[of_class]
    lost = (rest_support == 0) & occurs[of_class]
    totals = total + np.bincount(unit, weights=change, minlength=number)
    return total / present, totals / (present - np.bincount(unit, weights=lost, minlength=number))
