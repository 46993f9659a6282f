"""The paired difference of a metric between two passes over the same images, and how far it may be chance."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from torchthaw.evaluation.arrays import Floats, Ids, log_softmax
from torchthaw.evaluation.intervals import LEVEL
from torchthaw.evaluation.multilabel_figures import FIGURES
from torchthaw.training import label_set_comparison

# Differences of this size are rounding: the same score from the same counts, summed in another order.
ROUNDING = 1e-12
# Two-sided p-value of a normal variate at one standard deviation.
ONE_STANDARD_ERROR = math.erfc(math.sqrt(0.5))


@dataclass(frozen=True)
class Measured:
    """One validation pass.

    Attributes:
        value: The selection metric.
        logits: Shape (images, classes); None if they were not kept.
        labels: Class ids, shape (images,), or what else the problem has, such as (images, classes) for several labels
            per image; None if they were not kept.
    """

    value: float
    logits: np.ndarray | None
    labels: np.ndarray | None


@dataclass(frozen=True)
class Comparison:
    """A metric before and after a stage on the same images.

    Attributes:
        metric: The metric's name.
        before: Its value before the stage.
        after: Its value after the stage.
        difference: `after - before`, whichever of the two is better.
        interval: 95 % interval of the difference; None without a paired test.
        p_value: Two-sided p-value of no difference; None without a paired test.
        method: The test that was made, or why none was, in words.
        wins: Images that only the later model classifies correctly; None without a paired test.
        losses: Images that only the earlier model classifies correctly; None without a paired test.
    """

    metric: str
    before: float
    after: float
    difference: float
    interval: tuple[float, float] | None
    p_value: float | None
    method: str
    wins: int | None
    losses: int | None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON data; a number that is not finite, which JSON cannot hold, becomes None."""
        data = asdict(self)
        for key in ("before", "after", "difference"):
            data[key] = data[key] if math.isfinite(data[key]) else None
        data["interval"] = None if self.interval is None else list(self.interval)
        return data


def supports_test(metric: str) -> bool:
    """Whether `compare` has a paired test for a metric (its bare name, without `eval_`)."""
    return metric in _METRICS or metric in FIGURES


def compare(metric: str, before: Measured, after: Measured, *, seed: int = 0, resamples: int = 2000) -> Comparison:
    """Compares two validation passes over the same images in the same order.

    Accuracy is compared by the exact McNemar test (McNemar, 1947, Psychometrika 12): given the number m of images that
    just one of the models classifies correctly, the later model's share p of these is binomial. The interval is
    m (2 p - 1) / images, with the exact limits of p (Clopper and Pearson, 1934, Biometrika 26); this is the exact
    conditional method of Newcombe (1998, Stat. Med. 17), which excludes 0 just when the test's p-value is below 0.05.

    Macro F1, balanced accuracy and loss are compared by the paired percentile bootstrap: images are drawn with
    replacement, the same for both models (Efron, 1979, Ann. Stat. 7). The p-value is twice the smaller share of
    resampled differences on one side of 0, and at least 1 / (resamples + 1).

    Where images have several labels, accuracy counts those all of whose labels are right, and the other metrics, those
    of `compute_metrics` in `evaluation.multilabel`, are compared by the bootstrap.

    Args:
        metric: Bare name; "accuracy", "macro_f1", "balanced_accuracy" (the last two as `classification_metrics`
            defines them) and "loss" (mean cross entropy in nats) have a paired test; with several labels per image
            "map" and "micro_f1", too.
        before: The pass before the stage.
        after: The pass after it.
        seed: Seed of the bootstrap.
        resamples: Number of bootstrap resamples.

    Returns:
        The comparison. Where a paired test cannot be made (no logits, other labels, a value that is not this metric of
        these logits, ...) there is only the difference, and `method` says why.
    """
    difference = float(after.value) - float(before.value)
    several = label_set_comparison.has_several_labels(before.labels)
    problem = (
        label_set_comparison.why_unpaired(metric, before, after) if several else _why_unpaired(metric, before, after)
    )
    if problem is not None:
        return Comparison(metric, float(before.value), float(after.value), difference, None, None, problem, None, None)
    logits_before, logits_after = np.asarray(before.logits), np.asarray(after.logits)
    labels = np.asarray(before.labels).astype(bool if several else np.int64)
    was_right, is_right = (_is_right(logits, labels) for logits in (logits_before, logits_after))
    wins, losses = int((is_right & ~was_right).sum()), int((was_right & ~is_right).sum())
    if metric == "accuracy":
        interval, p_value = _mcnemar(wins, losses, len(labels))
        method = f"exact McNemar test, {_images(wins)} better and {losses} worse"
    else:
        random = np.random.default_rng(seed)
        if several:
            differences = label_set_comparison.resampled_differences(
                metric, labels, logits_before, logits_after, seed, resamples
            )
        elif metric == "loss":
            changes = _log_losses(logits_after, labels) - _log_losses(logits_before, labels)
            differences = _resampled_means(changes, random, resamples)
        else:
            predicted = logits_before.argmax(axis=1), logits_after.argmax(axis=1)
            differences = _resampled_differences(_SCORES[metric], labels, *predicted, random, resamples)
        interval, p_value = _bootstrap_result(differences)
        method = f"paired bootstrap over {_images(len(labels))}"
    return Comparison(
        metric, float(before.value), float(after.value), difference, interval, p_value, method, wins, losses
    )


def figure(value: float, sign: str = "") -> str:
    """Returns a number as messages show it, with four places, or as a power of ten where it is small."""
    if 0 < abs(value) < 0.001:
        return f"{value:{sign}.1e}"
    return f"{value + 0.0:{sign}.4f}"


def _images(number: int) -> str:
    return f"{number} image{'' if number == 1 else 's'}"


def _is_right(logits: Floats, labels: np.ndarray) -> np.ndarray:
    """Says of each image whether its class is right, or all of its classes are."""
    if labels.ndim == 2:
        return label_set_comparison.all_right(logits, labels)
    right: np.ndarray = logits.argmax(axis=1) == labels
    return right


# What can be compared


def _why_unpaired(metric: str, before: Measured, after: Measured) -> str | None:
    """Says why there can be no paired test, or returns None."""
    no = "no paired test"
    if metric not in _METRICS:
        return f"{no} for this metric"
    arrays = (before.logits, before.labels, after.logits, after.labels)
    if any(array is None for array in arrays):
        return f"{no}: logits and labels were not kept"
    logits_before, labels_before, logits_after, labels_after = (np.asarray(array) for array in arrays)
    if labels_before.ndim != 1 or labels_before.dtype.kind not in "iu" or logits_before.ndim != 2:
        return f"{no}: the labels are not one class per image"
    if logits_before.shape != logits_after.shape or len(logits_before) != len(labels_before):
        return f"{no}: the validations do not have the same number of images and classes"
    if not np.array_equal(labels_before, labels_after):
        return f"{no}: the validations do not have the same labels"
    if len(labels_before) == 0 or labels_before.min() < 0 or labels_before.max() >= logits_before.shape[1]:
        return f"{no}: the labels are not one class per image"
    if not (np.isfinite(logits_before).all() and np.isfinite(logits_after).all()):
        return f"{no}: logits are not finite"
    for measured, logits in ((before, logits_before), (after, logits_after)):
        # A metric of the same name may be another one, in percent, say, or a loss with label smoothing.
        value = _METRICS[metric](logits, labels_before.astype(np.int64))
        tolerance = 0.005 * abs(value) + 1e-4 if metric == "loss" else 1e-4
        if not abs(measured.value - value) <= tolerance:
            return f"{no}: {metric} of the logits is {figure(value)}, not {figure(measured.value)}"
    return None


# Metrics of weighted images

_Score = Callable[[Ids, Ids, Floats], float]


def _macro_f1(labels: Ids, predicted: Ids, weights: Floats) -> float:
    """Mean F1 over the classes that occur among the labels."""
    support, hits, taken = _counts(labels, predicted, weights)
    occurs = support > 0
    return float((2 * hits[occurs] / (support[occurs] + taken[occurs])).mean())


def _balanced_accuracy(labels: Ids, predicted: Ids, weights: Floats) -> float:
    """Mean recall over the classes that occur among the labels."""
    support, hits, _ = _counts(labels, predicted, weights)
    occurs = support > 0
    return float((hits[occurs] / support[occurs]).mean())


def _counts(labels: Ids, predicted: Ids, weights: Floats) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images of each class, those of them that are found, and images that are taken for it, each (classes,)."""
    classes = int(max(labels.max(), predicted.max())) + 1
    support = np.bincount(labels, weights, minlength=classes)
    hits = np.bincount(labels, weights * (labels == predicted), minlength=classes)
    return support, hits, np.bincount(predicted, weights, minlength=classes)


def _log_losses(logits: Floats, labels: Ids) -> Floats:
    """Log loss of each image in nats, shape (images,)."""
    losses: Floats = -log_softmax(logits.astype(np.float64))[np.arange(len(labels)), labels]
    return losses


_SCORES: dict[str, _Score] = {"macro_f1": _macro_f1, "balanced_accuracy": _balanced_accuracy}
_METRICS: dict[str, Callable[[Floats, Ids], float]] = {
    "accuracy": lambda logits, labels: float((logits.argmax(axis=1) == labels).mean()),
    "macro_f1": lambda logits, labels: _macro_f1(labels, logits.argmax(axis=1), np.ones(len(labels))),
    "balanced_accuracy": lambda logits, labels: _balanced_accuracy(labels, logits.argmax(axis=1), np.ones(len(labels))),
    "loss": lambda logits, labels: float(_log_losses(logits, labels).mean()),
}


# Tests


def _mcnemar(wins: int, losses: int, images: int) -> tuple[tuple[float, float], float]:
    """Interval of the difference of accuracies, and two-sided p-value."""
    discordant = wins + losses
    if discordant == 0:
        return (0.0, 0.0), 1.0
    test = binomtest(wins, discordant)
    share = test.proportion_ci(LEVEL, method="exact")
    low, high = (discordant * (2 * float(limit) - 1) / images for limit in (share.low, share.high))
    return (low, high), float(test.pvalue)


def _resampled_differences(
    score: _Score, labels: Ids, before: Ids, after: Ids, random: np.random.Generator, resamples: int
) -> npt.NDArray[np.float64]:
    """Difference of a score in each resample of the images, shape (resamples,)."""
    # Images of the same class that both models take for the same are alike, so that drawing images with replacement is
    # a multinomial draw over these kinds.
    kinds, counts = np.unique(np.stack([labels, before, after]), axis=1, return_counts=True)
    differences = np.empty(resamples)
    for number in range(resamples):
        weights = random.multinomial(len(labels), counts / len(labels)).astype(np.float64)
        differences[number] = score(kinds[0], kinds[2], weights) - score(kinds[0], kinds[1], weights)
    return differences


def _resampled_means(values: Floats, random: np.random.Generator, resamples: int) -> npt.NDArray[np.float64]:
    """Mean of each resample of the values, shape (resamples,)."""
    # Sorted, so that the order of the images does not matter.
    ordered = np.sort(values)
    return np.array([ordered[random.integers(len(ordered), size=len(ordered))].mean() for _ in range(resamples)])


def _bootstrap_result(differences: npt.NDArray[np.float64]) -> tuple[tuple[float, float], float]:
    """Percentile interval and two-sided p-value of resampled differences."""
    differences = np.where(np.abs(differences) <= ROUNDING, 0.0, differences)
    low, high = np.quantile(differences, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    one_sided = min((differences <= 0).mean(), (differences >= 0).mean())
    return (float(low), float(high)), float(np.clip(2 * one_sided, 1 / (len(differences) + 1), 1))
