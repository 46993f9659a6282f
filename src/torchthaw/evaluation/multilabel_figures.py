"""Figures of multi-label classification as functions of weighted images, so that they can be resampled.

Each takes logits and labels of shape (images, classes), and weights of shape (resamples, images), and gives one value
for each row of weights. Weights of 1 give the figure itself. Averages over classes run over the classes that occur.
"""

from collections.abc import Callable, Hashable, Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from torchthaw.evaluation.arrays import Floats
from torchthaw.evaluation.intervals import LEVEL

Table = npt.NDArray[np.bool_]
Figure = Callable[[Floats, Table, Floats], Floats]

THRESHOLD = 0.5
# Numbers that one step of a bootstrap holds at once, and that all of them go through.
_CHUNK, _WORK = 4_000_000, 400_000_000
_FEWEST_RESAMPLES = 200


def decide(logits: Floats, thresholds: npt.ArrayLike = THRESHOLD) -> Table:
    """Says which classes each image is given: those whose probability, in float32, is at or above the threshold.

    Args:
        logits: Shape (images, classes).
        thresholds: One for all classes, or one for each.
    """
    given: Table = expit(logits.astype(np.float32)) >= np.asarray(thresholds, dtype=np.float64)
    return given


def mean_average_precision(logits: Floats, labels: Table, weights: Floats) -> Floats:
    """Mean over classes of the average precision: the precision at each image of the class, averaged.

    Images of equal scores count at once, as in scikit-learn's `average_precision_score`.
    """
    total, classes = np.zeros(len(weights)), np.zeros(len(weights))
    for scores, truth in zip(logits.T, labels.T, strict=True):
        if not truth.any():
            continue
        order = np.argsort(-scores, kind="stable")
        ordered = scores[order]
        ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
        in_order = weights[:, order]
        taken = in_order.cumsum(axis=1)[:, ends]
        hits = (in_order * truth[order]).cumsum(axis=1)[:, ends]
        gained = np.diff(hits, axis=1, prepend=0.0)
        support = hits[:, -1]
        precision = hits / np.where(taken > 0, taken, 1)
        occurs = support > 0
        total += np.where(occurs, (gained * precision).sum(axis=1) / np.where(occurs, support, 1), 0)
        classes += occurs
    return total / np.maximum(classes, 1)


def macro_f1(logits: Floats, labels: Table, weights: Floats, thresholds: npt.ArrayLike = THRESHOLD) -> Floats:
    """Mean over classes of F1."""
    hits, taken, support = _counts(decide(logits, thresholds), labels, weights)
    occurs = support > 0
    f1 = 2 * hits / np.where(taken + support > 0, taken + support, 1)
    mean: Floats = (f1 * occurs).sum(axis=1) / np.maximum(occurs.sum(axis=1), 1)
    return mean


def micro_f1(logits: Floats, labels: Table, weights: Floats, thresholds: npt.ArrayLike = THRESHOLD) -> Floats:
    """F1 of all pairs of image and class together."""
    hits, taken, support = (part.sum(axis=1) for part in _counts(decide(logits, thresholds), labels, weights))
    f1: Floats = 2 * hits / np.where(taken + support > 0, taken + support, 1)
    return f1


def subset_accuracy(logits: Floats, labels: Table, weights: Floats, thresholds: npt.ArrayLike = THRESHOLD) -> Floats:
    """Share of images all of whose classes are right, and no other."""
    share: Floats = weights @ (decide(logits, thresholds) == labels).all(axis=1) / weights.sum(axis=1)
    return share


def balanced_accuracy(logits: Floats, labels: Table, weights: Floats, thresholds: npt.ArrayLike = THRESHOLD) -> Floats:
    """Mean over classes of the mean of sensitivity and specificity, of the classes that some images have, not all."""
    hits, taken, support = _counts(decide(logits, thresholds), labels, weights)
    others = weights.sum(axis=1, keepdims=True) - support
    known = (support > 0) & (others > 0)
    rates = hits / np.where(support > 0, support, 1) + (others - taken + hits) / np.where(others > 0, others, 1)
    mean: Floats = (rates / 2 * known).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    return mean


def log_loss(logits: Floats, labels: Table, weights: Floats) -> Floats:
    """Mean binary cross entropy over images and classes in nats, the loss that the model is validated by."""
    exact = logits.astype(np.float64)
    by_image = (np.logaddexp(0, exact) - exact * labels).mean(axis=1)
    mean: Floats = weights @ by_image / weights.sum(axis=1)
    return mean


FIGURES: dict[str, Figure] = {
    "map": mean_average_precision,
    "macro_f1": macro_f1,
    "micro_f1": micro_f1,
    "accuracy": subset_accuracy,
    "balanced_accuracy": balanced_accuracy,
    "loss": log_loss,
}


def value_of(figure: Figure, logits: Floats, labels: Table) -> float:
    """Returns a figure of all images."""
    return float(figure(logits, labels, np.ones((1, len(labels))))[0])


def resampled(
    figures: Callable[[Floats], Floats],
    num_images: int,
    num_classes: int,
    *,
    seed: int,
    resamples: int,
    groups: Sequence[Hashable] | None = None,
) -> npt.NDArray[np.float64]:
    """Returns a figure of each bootstrap resample of the images (Efron, 1979, Ann. Stat. 7).

    Args:
        figures: Takes weights (resamples, images), gives a value for each row.
        num_images: Number of images.
        num_classes: Number of classes.
        seed: The same seed gives the same resamples.
        groups: The group of each image, where whole groups are to be drawn.
        resamples: How many; fewer, but at least 200, where images times classes are many.
    """
    number = int(np.clip(_WORK // (num_images * num_classes), min(_FEWEST_RESAMPLES, resamples), resamples))
    random, values, step = np.random.default_rng(seed), [], max(1, _CHUNK // num_images)
    units = np.arange(num_images) if groups is None else _numbered(groups)
    num_units = int(units.max()) + 1
    shares = np.full(num_units, 1 / num_units)
    for start in range(0, number, step):
        draws = random.multinomial(num_units, shares, size=min(step, number - start))
        values.append(figures(draws[:, units].astype(np.float64)))
    return np.concatenate(values)


def interval(values: npt.NDArray[np.float64]) -> list[float]:
    """Returns the 95 % percentile interval of resampled figures, as [low, high]."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]


def _numbered(groups: Sequence[Hashable]) -> npt.NDArray[np.int64]:
    numbers: dict[Hashable, int] = {}
    # An image without a group is one of its own.
    own = [("", row) if group is None else group for row, group in enumerate(groups)]
    return np.array([numbers.setdefault(group, len(numbers)) for group in own], dtype=np.int64)


def _counts(given: Table, labels: Table, weights: Floats) -> tuple[Floats, Floats, Floats]:
    """For each class the images that are rightly given it, all that are given it, and all of it."""
    return weights @ (given & labels), weights @ given, weights @ labels
