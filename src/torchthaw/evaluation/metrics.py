"""Metrics of single-label classification.

Averages over classes (macro F1, balanced accuracy) run over the classes that occur among the true labels, as in
scikit-learn with `labels=` set to these. A class that has no images is left out of the mean; images that are taken for
it still count as misses of their own class.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import datasets
import evaluate
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
from torchthaw.evaluation.intervals import macro_f1_interval, wilson_interval
from torchthaw.evaluation.ranking import auroc, top_k_accuracy

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
    intervals: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures how well logits predict labels.

    Args:
        logits: Shape (images, classes), in any float type; the prediction is the first highest column.
        labels: Class ids, shape (images,).
        class_names: One name per column of `logits`.
        intervals: Whether to add the two 95 % intervals.
        seed: Seed of the bootstrap behind `macro_f1_interval`.

    Returns:
        A dictionary that `json` can write:

        - `accuracy`, in 0 ... 1;
        - `macro_f1` and `balanced_accuracy`: mean F1 and mean recall over the classes that occur in `labels`;
        - `weighted_f1`: mean F1 weighted by images;
        - `top5_accuracy`: share of images whose class is among the five highest, where there are more than five;
        - `auroc`: area under the ROC curve of the second of two classes, or mean over the classes that occur, each
          against the rest; None where all images are of one class;
        - `loss`: mean log loss in nats, computed in float64;
        - `brier`: Brier score over all classes, 0 ... 2;
        - `ece`: expected calibration error with 15 bins of equal width (Guo et al., 2017, arXiv:1706.04599);
        - `per_class`: class name -> `precision`, `recall`, `f1` (0 where undefined) and `support` in images;
        - `confusion_matrix`: rows are true classes, columns predictions, up to 100 classes;
        - `num_images`;
        - `accuracy_interval` (Wilson) and `macro_f1_interval` (percentile bootstrap over images, 1000 resamples):
          [low, high] at 95 %.

    Raises:
        DataError: Logits that are not finite, or arrays and names that do not fit each other.
    """
    checked = as_logits(logits)
    num_images, num_classes = checked.shape
    ids = as_class_ids(labels, num_images, num_classes)
    names = as_class_names(class_names, num_classes)
    predicted = checked.argmax(axis=1)

    precision, recall, f1, support = precision_recall_fscore_support(
        ids, predicted, labels=np.arange(num_classes), average=None, zero_division=0
    )
    log_probabilities = log_softmax(checked.astype(np.float64))
    probabilities = np.exp(log_probabilities)
    metrics = {
        **_scalars(ids, predicted),
        "weighted_f1": float(np.average(f1, weights=support)),
        **({"top5_accuracy": top_k_accuracy(checked, ids, TOP_K)} if num_classes > TOP_K else {}),
        "auroc": auroc(log_probabilities, ids),
        "loss": -float(log_probabilities[np.arange(num_images), ids].mean()),
        "ece": expected_calibration_error(probabilities, ids),
        "brier": brier_score(probabilities, ids),
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
        cells = np.bincount(ids * num_classes + predicted, minlength=num_classes**2)
        metrics["confusion_matrix"] = cells.reshape(num_classes, num_classes).tolist()
    if intervals:
        metrics["accuracy_interval"] = wilson_interval(int((predicted == ids).sum()), num_images)
        metrics["macro_f1_interval"] = macro_f1_interval(ids, predicted, seed=seed)
    return metrics


class ClassificationMetrics(evaluate.Metric):
    """Accuracy, macro F1, balanced accuracy and weighted F1 of class ids; needs no network.

    Works wherever a metric of `evaluate` does, `evaluate.combine([ClassificationMetrics(), ...])` included:

        >>> ClassificationMetrics().compute(predictions=[0, 1, 1], references=[0, 1, 0])["macro_f1"]
        0.6666666666666666

    All options are those of `evaluate.Metric`, with the same defaults.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy, macro F1, balanced accuracy and weighted F1 of single-label classification. "
            "Averages over classes run over the classes that occur in the references.",
            citation="",
            inputs_description="\nArgs:\n    predictions: Predicted class ids.\n    references: True class ids.\n",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
            format="numpy",
        )

    def _compute(self, *, predictions: Ids, references: Ids) -> dict[str, float]:
        if len(references) == 0:
            raise DataError("Predictions and references are empty: there is nothing to measure. Pass at least one.")
        *_, weighted_f1 = _averages(references, predictions, "weighted")
        return {**_scalars(references, predictions), "weighted_f1": weighted_f1}


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
    # In memory, because each process of a distributed run computes this and files in the cache would need locks.
    scores = ClassificationMetrics(keep_in_memory=True).compute(predictions=logits.argmax(axis=1), references=ids)
    return {name: scores[name] for name in ("accuracy", "macro_f1", "balanced_accuracy")}


def _scalars(labels: Ids, predicted: Ids) -> dict[str, float]:
    balanced_accuracy, macro_f1 = _averages(labels, predicted, "macro")
    return {
        "accuracy": float((labels == predicted).mean()),
        "macro_f1": macro_f1,
        "balanced_accuracy": balanced_accuracy,
    }


def _averages(labels: Ids, predicted: Ids, average: str) -> tuple[float, float]:
    """Recall and F1, averaged over the classes that occur in `labels`."""
    _, recall, f1, _ = precision_recall_fscore_support(
        labels, predicted, labels=np.unique(labels), average=average, zero_division=0
    )
    return float(recall), float(f1)
