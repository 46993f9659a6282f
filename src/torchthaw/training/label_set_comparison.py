"""The gate's comparisons where images have several labels."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from torchthaw.evaluation.arrays import Floats
from torchthaw.evaluation.multilabel_figures import FIGURES, decide, resampled, value_of

if TYPE_CHECKING:
    from torchthaw.training.comparison import Measured


def has_several_labels(labels: Any) -> bool:
    """Whether labels are a 0 or 1 for each image and class."""
    array = None if labels is None else np.asarray(labels)
    return array is not None and array.ndim == 2 and bool(((array == 0) | (array == 1)).all())


def why_unpaired(metric: str, before: "Measured", after: "Measured") -> str | None:
    """Says why there can be no paired test where images have several labels, or returns None."""
    no = "no paired test"
    if metric not in FIGURES:
        return f"{no} for this metric"
    if any(array is None for array in (before.logits, after.logits, after.labels)):
        return f"{no}: logits and labels were not kept"
    labels, logits = np.asarray(before.labels), (np.asarray(before.logits), np.asarray(after.logits))
    if any(array.shape != labels.shape for array in logits) or not np.array_equal(labels, np.asarray(after.labels)):
        return f"{no}: the validations do not have the same images and labels"
    if not all(np.isfinite(array).all() for array in logits):
        return f"{no}: logits are not finite"
    for measured, array in zip((before, after), logits, strict=True):
        value = value_of(FIGURES[metric], array, labels == 1)
        tolerance = 0.005 * abs(value) + 1e-4 if metric == "loss" else 1e-4
        if not abs(measured.value - value) <= tolerance:
            return f"{no}: {metric} of the logits is {value:.4f}, not {measured.value:.4f}"
    return None


def all_right(logits: Floats, labels: np.ndarray) -> np.ndarray:
    """Says of each image whether all of its classes are right, and no other, at thresholds of 0.5."""
    right: np.ndarray = (decide(logits) == labels).all(axis=1)
    return right


def resampled_differences(
    metric: str, labels: np.ndarray, before: Floats, after: Floats, seed: int, resamples: int
) -> npt.NDArray[np.float64]:
    """Difference of a figure in each resample of the images, the same for both models."""
    figure = FIGURES[metric]
    # In an order of their own, so that the order of the images does not matter.
    rows = np.lexsort(np.hstack([labels, before, after]).T)
    labels, before, after = labels[rows], before[rows], after[rows]
    return resampled(
        lambda weights: figure(after, labels, weights) - figure(before, labels, weights),
        *labels.shape,
        seed=seed,
        resamples=resamples,
    )
