"""Metrics of single-label classification.

Averages over classes (macro F1, balanced accuracy) run over the classes that occur among the true labels, as in
scikit-learn with `labels=` set to these. A class that has no images is left out of the mean; images that are taken for
it still count as misses of their own class.
"""

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import precision_recall_fscore_support

from torchthaw.errors import DataError
from torchthaw.evaluation.arrays import (
    Ids,
    as_class_ids,
    as_class_names,
    as_logits,
    log_softmax,
)
from torchthaw.evaluation.calibration import brier_score, expected_calibration_error
from torchthaw.evaluation.intervals import score_intervals
from torchthaw.evaluation.ranking import mean_auroc, one_vs_rest_auroc, top_k_accuracy

if TYPE_CHECKING:
    from transformers import EvalPrediction

TOP_K = 5
# Its size grows with their square.
_MOST_CLASSES_OF_MATRIX = 100


def classification_metrics(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    class_names: Sequence[str],
    *,
    groups: Sequence[Hashable] | None = None,
    intervals: bool = True,
    top_k: int = TOP_K,
) -> dict[str, Any]:
    """Measures how well logits predict labels.

    Args:
        logits: Shape (images, classes), in any float type; the prediction is the first highest column.
        labels: Class ids, shape (images,).
        class_names: One name per column of `logits`.
        groups: The group of each image (patient, product, scene ...), where images of one are alike; the intervals are
            then over groups. An image with None is a group of its own.
        intervals: Whether to add the two 95 % intervals.
        top_k: The k of top-k accuracy, at least 1.

    Returns:
        A dictionary that `json` can write:

        - `accuracy`, in 0 ... 1;
        - `macro_f1` and `balanced_accuracy`: mean F1 and mean recall over the classes that occur in `labels`;
        - `weighted_f1`: mean F1 weighted by images;
        - `top5_accuracy` (or what else `top_k` is): share of images whose class is among the k highest, where there are
          more than k classes;
        - `auroc`: area under the ROC curve of the second of two classes, or mean over the classes that occur, each
          against the rest; None where all images are of one class;
        - `loss`: mean log loss in nats, computed in float64;
        - `brier`: Brier score over all classes, 0 ... 2;
        - `ece`: expected calibration error with 15 bins of equal width (Guo et al., 2017, arXiv:1706.04599);
        - `per_class`: class name -> `precision`, `recall`, `f1` (0 where undefined), `support` in images, and `auroc`
          against the rest (None where the class has no images, or all);
        - `confusion_matrix`: rows are true classes, columns predictions, up to 100 classes;
        - `num_images`;
        - `accuracy_interval` and `macro_f1_interval`: [low, high] at 95 %, and `interval_method`, how they came about
          (see `torchthaw.evaluation.intervals`).

    Raises:
        DataError: Logits that are not finite, arrays and names that do not fit each other, or `top_k` below 1.
    """
    checked = as_logits(logits)
    num_images, num_classes = checked.shape
    ids = as_class_ids(labels, num_images, num_classes)
    names = as_class_names(class_names, num_classes)
    if top_k < 1:
        raise DataError(f"top_k={top_k!r} does not work: write a whole number of at least 1, such as {TOP_K}.")
    log_probabilities = log_softmax(checked.astype(np.float64))
    probabilities = np.exp(log_probabilities)
    areas = one_vs_rest_auroc(log_probabilities, ids)
    metrics = prediction_metrics(checked.argmax(axis=1), ids, names, groups=groups, intervals=intervals)
    if num_classes > top_k:
        metrics[f"top{top_k}_accuracy"] = top_k_accuracy(checked, ids, top_k)
    for figures, area in zip(metrics["per_class"].values(), areas, strict=True):
        figures["auroc"] = area
    return {
        **metrics,
        "auroc": mean_auroc(areas),
        "loss": -float(log_probabilities[np.arange(num_images), ids].mean()),
        "ece": expected_calibration_error(probabilities, ids),
        "brier": brier_score(probabilities, ids),
    }


def prediction_metrics(
    predicted: npt.ArrayLike,
    labels: npt.ArrayLike,
    class_names: Sequence[str],
    *,
    groups: Sequence[Hashable] | None = None,
    intervals: bool = True,
) -> dict[str, Any]:
    """Measures how well predicted classes fit labels, without scores.

    Args:
        predicted: Class ids, shape (images,).
        labels: Class ids, shape (images,).
        class_names: In the order of the ids.
        groups: As for `classification_metrics`.
        intervals: As for `classification_metrics`.

    Returns:
        What `classification_metrics` gives, as far as it takes no scores.

    Raises:
        DataError: Arrays and names that do not fit each other.
    """
    num_images, num_classes = len(np.asarray(labels)), len(class_names)
    names = as_class_names(class_names, num_classes)
    if num_images == 0:
        raise DataError("Predictions and references are empty: there is nothing to measure. Pass at least one.")
    ids, guesses = (as_class_ids(array, num_images, num_classes) for array in (labels, predicted))
    precision, recall, f1, support = precision_recall_fscore_support(
        ids, guesses, labels=np.arange(num_classes), average=None, zero_division=0
    )
    metrics = {
        **_scalars(ids, guesses),
        "weighted_f1": float(np.average(f1, weights=support)),
        "per_class": {
            name: {
                "precision": float(precision[index]),
                "recall": float(recall[index]),
                "f1": float(f1[index]),
                "support": int(support[index]),
            }
            for index, name in enumerate(names)
        },
        "num_images": num_images,
    }
    if num_classes <= _MOST_CLASSES_OF_MATRIX:
        cells = np.bincount(ids * num_classes + guesses, minlength=num_classes**2)
        metrics["confusion_matrix"] = cells.reshape(num_classes, num_classes).tolist()
    if intervals:
        accuracy, macro_f1, method = score_intervals(ids, guesses, groups)
        metrics |= {"accuracy_interval": accuracy, "macro_f1_interval": macro_f1, "interval_method": method}
    return metrics


def compute_metrics(eval_prediction: "EvalPrediction") -> dict[str, float]:
    """Computes what `Trainer(compute_metrics=...)` asks for: `accuracy`, `macro_f1` and `balanced_accuracy`.

    Args:
        eval_prediction: Its `predictions` are logits, shape (images, classes), or a tuple that starts with them; its
            `label_ids` are class ids, shape (images,), or soft labels, shape (images, classes), of which the class
            with the largest share counts.

    Raises:
        DataError: Logits that are not finite, or labels that do not fit them.
    """
    predictions = eval_prediction.predictions
    logits = as_logits(predictions[0] if isinstance(predictions, tuple) else predictions)
    labels = np.asarray(eval_prediction.label_ids)
    if labels.ndim == 2:
        labels = labels.argmax(axis=1)
    ids = as_class_ids(labels, *logits.shape)
    return _scalars(ids, logits.argmax(axis=1))


def _scalars(labels: Ids, predicted: Ids) -> dict[str, float]:
    # Over the classes that occur.
    _, recall, f1, _ = precision_recall_fscore_support(
        labels, predicted, labels=np.unique(labels), average="macro", zero_division=0
    )
    return {
        "accuracy": float((labels == predicted).mean()),
        "macro_f1": float(f1),
        "balanced_accuracy": float(recall),
    }
