"""95 % intervals of accuracy and macro F1."""

import math
from statistics import NormalDist

import numpy as np

from torchthaw.evaluation.arrays import Ids

LEVEL = 0.95


def wilson_interval(successes: int, trials: int) -> list[float]:
    """The 95 % score interval of a proportion, as [low, high] (Wilson, 1927, J. Am. Stat. Assoc. 22).

    Holds its level for small samples and proportions near 0 or 1, where `p ± 1.96 s` does not.
    """
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    proportion = successes / trials
    scale = 1 + z**2 / trials
    centre = (proportion + z**2 / (2 * trials)) / scale
    half = z * math.sqrt(proportion * (1 - proportion) / trials + z**2 / (4 * trials**2)) / scale
    # Both are exact in the formula, but not in floating point.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return [low, high]


def macro_f1_interval(labels: Ids, predicted: Ids, *, seed: int = 0, resamples: int = 1000) -> list[float]:
    """The 95 % percentile bootstrap interval of macro F1 over images, as [low, high] (Efron, 1979, Ann. Stat. 7).

    Macro F1 of a resample is the mean over the classes that occur among the resample's labels. The bootstrap knows
    only the mistakes that were seen: without any, the interval is [1, 1].

    Args:
        labels: Class ids, shape (images,).
        predicted: Class ids, shape (images,).
        seed: The same seed gives the same interval.
        resamples: Number of resamples, each of as many images as there are.
    """
    values = resampled_macro_f1(labels, predicted, seed=seed, resamples=resamples)
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]


def resampled_macro_f1(labels: Ids, predicted: Ids, *, seed: int, resamples: int) -> np.ndarray:
    """Macro F1 of each bootstrap resample, shape (resamples,)."""
    # Drawing images with replacement is a multinomial draw over the cells of the confusion matrix.
    cells, counts = np.unique(np.stack([labels, predicted]), axis=1, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(labels), counts / len(labels), size=resamples)
    weights = draws.astype(np.float64)
    present = np.unique(labels)
    in_class = (cells[0][:, None] == present).astype(np.float64)
    taken_for_class = (cells[1][:, None] == present).astype(np.float64)
    support = weights @ in_class
    hits = weights @ (in_class * taken_for_class)
    f1 = 2 * hits / np.maximum(support + weights @ taken_for_class, 1)
    drawn = support > 0
    mean: np.ndarray = (f1 * drawn).sum(axis=1) / drawn.sum(axis=1)
    return mean
