"""Metrics of multi-label classification: each class a question of its own, answered by the sigmoid of its logit.

Averages over classes run over the classes that occur among the true labels, as in scikit-learn with `labels=` set to
these; that of AUROC over the classes that some images have and others have not.
"""

from collections.abc import Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit
from sklearn.metrics import average_precision_score, precision_recall_fscore_support, roc_auc_score

from torchthaw.errors import DataError
from torchthaw.evaluation.arrays import Floats, as_class_names, as_logits
from torchthaw.evaluation.intervals import score_intervals
from torchthaw.evaluation.multilabel_figures import (
    FIGURES,
    THRESHOLD,
    Table,
    balanced_accuracy,
    decide,
    interval,
    log_loss,
    macro_f1,
    mean_average_precision,
    micro_f1,
    resampled,
    value_of,
)

if TYPE_CHECKING:
    from transformers import EvalPrediction

DEFAULT_METRIC = "map"
# What asks for thresholds that are chosen on validation images, one for each class.
PER_CLASS = "per_class"
_BINS = 15
_RESAMPLES = 1000


def as_label_table(labels: npt.ArrayLike, num_images: int, num_classes: int) -> Table:
    """Returns labels as a table of shape (images, classes), true where an image is of a class.

    Raises:
        DataError: The labels are not one 0 or 1 for each image and class, or there is no 1 among them.
    """
    array = np.asarray(labels)
    if array.shape != (num_images, num_classes):
        raise DataError(
            f"Labels have the shape {array.shape}, but one 0 or 1 for each image and class is needed: pass an array "
            f"of shape ({num_images}, {num_classes})."
        )
    table: Table = array == 1
    if not (table | (array == 0)).all():
        wrong = array[~(table | (array == 0))][0]
        raise DataError(f"Labels hold {wrong!r}, but are 0 or 1 for each image and class; measure without mixup.")
    if not table.any():
        raise DataError(
            f"None of the {num_images} images is of any class, so there is nothing to find; add images that are."
        )
    return table


def multilabel_metrics(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    class_names: Sequence[str],
    *,
    thresholds: Sequence[float] | None = None,
    groups: Sequence[Hashable] | None = None,
    intervals: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures how well logits predict which classes images are of.

    Args:
        logits: Shape (images, classes), in any float type.
        labels: A 0 or 1 for each image and class, shape (images, classes).
        class_names: One name per column of `logits`.
        thresholds: For each class the probability from which on an image is given it; None for 0.5.
        groups: The group of each image (patient, product, scene ...), where images of one are alike; the intervals are
            then over groups.
        intervals: Whether to add the three 95 % intervals.
        seed: Seed of the bootstrap behind two of them.

    Returns:
        A dictionary that `json` can write:

        - `map`: mean over classes of the average precision; needs no thresholds;
        - `auroc`: mean over classes of the area under the ROC curve; None if there is no class that some images have
          and others have not; needs no thresholds either;
        - `macro_f1`, `micro_f1`: mean F1 over classes, and F1 of all pairs of image and class together;
        - `accuracy`: subset accuracy, the share of images all of whose classes are right, and no other;
        - `balanced_accuracy`: mean over classes of the mean of sensitivity and specificity;
        - `hamming_loss`: share of pairs of image and class that are wrong;
        - `loss`: mean binary cross entropy over images and classes in nats, computed in float64;
        - `brier`: mean over images and classes of the squared distance of probability and truth, 0 ... 1;
        - `ece`: mean gap between the probability of a class and the share of images that are of it, over all pairs of
          image and class in 15 bins of equal width;
        - `per_class`: class name -> `average_precision` and `auroc` (None where undefined), `precision`, `recall`, `f1`
          (0 where undefined), `support` in images, and `threshold`;
        - `num_images`;
        - `accuracy_interval` (as in `classification_metrics`), `map_interval` and `macro_f1_interval` (percentile
          bootstrap over images or groups, 1000 resamples, fewer where there are many images and classes; too narrow
          where there are few): [low, high] at 95 %; and `interval_method`, how they came about.

    Raises:
        DataError: Logits that are not finite, or arrays and names that do not fit each other.
    """
    checked = as_logits(logits)
    num_images, num_classes = checked.shape
    truth = as_label_table(labels, num_images, num_classes)
    names = as_class_names(class_names, num_classes)
    limits = np.full(num_classes, THRESHOLD) if thresholds is None else np.asarray(thresholds, dtype=np.float64)
    given = decide(checked, limits)
    precision, recall, f1, support = precision_recall_fscore_support(truth, given, average=None, zero_division=0)
    probabilities = expit(checked.astype(np.float64))
    areas = [_area(checked[:, column], truth[:, column]) for column in range(num_classes)]
    known = [area for area in areas if area is not None]
    right = (given == truth).all(axis=1)
    metrics: dict[str, Any] = {
        "map": value_of(mean_average_precision, checked, truth),
        "auroc": float(np.mean(known)) if known else None,
        "macro_f1": float(f1[support > 0].mean()),
        "micro_f1": value_of(partial(micro_f1, thresholds=limits), checked, truth),
        "accuracy": float(right.mean()),
        "balanced_accuracy": value_of(partial(balanced_accuracy, thresholds=limits), checked, truth),
        "hamming_loss": float((given != truth).mean()),
        "loss": value_of(log_loss, checked, truth),
        "brier": float(((probabilities - truth) ** 2).mean()),
        "ece": _calibration_error(probabilities, truth),
        "per_class": {
            name: {
                "average_precision": _average_precision(checked[:, index], truth[:, index]),
                "auroc": areas[index],
                "precision": float(precision[index]),
                "recall": float(recall[index]),
                "f1": float(f1[index]),
                "support": int(support[index]),
                "threshold": float(limits[index]),
            }
            for index, name in enumerate(names)
        },
        "num_images": num_images,
    }
    if intervals:
        size: dict[str, Any] = {
            "num_images": num_images,
            "num_classes": num_classes,
            "seed": seed,
            "resamples": _RESAMPLES,
            "groups": groups,
        }
        accuracy, _, method = score_intervals(np.ones(num_images, np.int64), right.astype(np.int64), groups)
        unit = "images" if groups is None else "groups"
        metrics["accuracy_interval"] = accuracy
        metrics["interval_method"] = f"{method}; of mAP and macro F1 percentile bootstrap over {unit}"
        of_map = resampled(lambda weights: mean_average_precision(checked, truth, weights), **size)
        of_f1 = resampled(lambda weights: macro_f1(checked, truth, weights, limits), **size)
        metrics |= {"map_interval": interval(of_map), "macro_f1_interval": interval(of_f1)}
    return metrics


def choose_thresholds(logits: npt.ArrayLike, labels: npt.ArrayLike) -> list[float]:
    """Returns for each class the threshold of its probability that gives the best F1 on these images.

    It lies half way between two scores; of several as good, the one nearest to 0.5 is taken. A class without images
    gets 0.5. F1 on the images that thresholds were chosen by is too good; measure on others.

    Args:
        logits: Shape (images, classes).
        labels: A 0 or 1 for each image and class, of the same shape.

    Raises:
        DataError: As for `multilabel_metrics`.
    """
    checked = as_logits(logits)
    truth = as_label_table(labels, *checked.shape)
    probabilities = expit(checked.astype(np.float32)).astype(np.float64)
    return [_best_threshold(probabilities[:, k], truth[:, k]) for k in range(checked.shape[1])]


def compute_metrics(eval_prediction: "EvalPrediction") -> dict[str, float]:
    """Computes what `Trainer(compute_metrics=...)` asks for, with thresholds of 0.5: all of `FIGURES` but the loss.

    Args:
        eval_prediction: Its `predictions` are logits, shape (images, classes), or a tuple that starts with them; its
            `label_ids` a 0 or 1 for each image and class.

    Raises:
        DataError: Logits that are not finite, or labels that do not fit them.
    """
    predictions = eval_prediction.predictions
    logits = as_logits(predictions[0] if isinstance(predictions, tuple) else predictions)
    truth = as_label_table(np.asarray(eval_prediction.label_ids), *logits.shape)
    return {name: value_of(figure, logits, truth) for name, figure in FIGURES.items() if name != "loss"}


def _average_precision(scores: Floats, truth: npt.NDArray[np.bool_]) -> float | None:
    return float(average_precision_score(truth, scores)) if truth.any() else None


def _area(scores: Floats, truth: npt.NDArray[np.bool_]) -> float | None:
    return float(roc_auc_score(truth, scores)) if truth.any() and not truth.all() else None


def _calibration_error(probabilities: Floats, truth: Table) -> float:
    index = np.digitize(probabilities.ravel(), np.linspace(0, 1, _BINS + 1)[1:-1], right=True)
    expected = np.bincount(index, weights=probabilities.ravel(), minlength=_BINS)
    found = np.bincount(index, weights=truth.ravel(), minlength=_BINS)
    return float(np.abs(expected - found).sum() / truth.size)


def _best_threshold(probabilities: Floats, truth: npt.NDArray[np.bool_]) -> float:
    if not truth.any():
        return THRESHOLD
    scores, place = np.unique(-probabilities, return_inverse=True)
    taken = np.bincount(place).cumsum()
    hits = np.bincount(place, weights=truth).cumsum()
    f1 = 2 * hits / (taken + truth.sum())
    ordered = -scores
    between = (ordered + np.append(ordered[1:], 0)) / 2
    best = np.flatnonzero(f1 >= f1.max() - 1e-12)
    return float(between[best[np.abs(between[best] - THRESHOLD).argmin()]])
