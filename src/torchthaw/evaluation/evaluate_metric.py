"""The metrics as an `evaluate.Metric`, for everything that takes one."""

from collections.abc import Sequence
from typing import Any, Literal

import datasets
import evaluate
import numpy as np
import transformers
from evaluate.evaluator import base as evaluator_base

from torchthaw.errors import DataError, did_you_mean
from torchthaw.evaluation.metrics import TOP_K, classification_metrics, prediction_metrics

_REFERENCES = datasets.Value("float64")
# What predictions may be; the first that fits the first of them is taken. Ids are read as floats, since `datasets` cuts
# 0.7 to 0 where it is told to expect whole numbers.
_KINDS = (datasets.Value("string"), datasets.Value("float64"), datasets.Sequence(datasets.Value("float64")))


class _WithTensorFlowNames:
    """`transformers`, with names of TensorFlow classes that version 5 no longer has; nothing is an instance of them."""

    TFPreTrainedModel = type("TFPreTrainedModel", (), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(transformers, name)


# The evaluators of evaluate 0.4.6 ask whether a pipeline is a `transformers.TFPreTrainedModel`, and fail where there is
# none. Only their own name for the package is changed; to go when `evaluate` works with transformers 5.
if not hasattr(transformers, "TFPreTrainedModel"):
    evaluator_base.transformers = _WithTensorFlowNames()


class ClassificationMetrics(evaluate.Metric):
    """All figures of `classification_metrics`, as far as the predictions allow; needs no network.

    Predictions are one of these, for all images the same:

    - scores, shape (images, classes): logits, unless `scores` says otherwise. They give all figures;
    - class ids, or class names where `class_names` is given. What takes scores is left out then: top-k accuracy, AUROC,
      loss, ECE and Brier score.

    It works wherever a metric of `evaluate` does, `evaluate.combine([ClassificationMetrics(), ...])` and
    `evaluate.evaluator("image-classification")` included; the latter hands over class names, which
    `label_mapping=model.config.label2id` makes ids:

        >>> ClassificationMetrics().compute(predictions=[0, 1, 1], references=[0, 1, 0])["macro_f1"]
        0.6666666666666666

    Args:
        class_names: In the order of the ids; None names classes by their ids, and takes for the number of classes that
            of the scores, or the highest id + 1.
        top_k: The k of top-k accuracy.
        scores: Whether rows of numbers are "logits" (any that softmax makes probabilities, log-probabilities included)
            or "probabilities".
        only_numbers: Leaves out what is no single number: figures by class, confusion matrix and intervals. For callers
            that take a number for each key, as `evaluator.compute(strategy="bootstrap")` does.
        **options: What `evaluate.Metric` takes, with the same defaults.
    """

    def __init__(
        self,
        class_names: Sequence[str] | None = None,
        *,
        top_k: int = TOP_K,
        scores: Literal["logits", "probabilities"] = "logits",
        only_numbers: bool = False,
        **options: Any,
    ) -> None:
        if scores not in ("logits", "probabilities"):
            raise DataError(f"scores={scores!r} is unknown: write 'logits' or 'probabilities'.")
        super().__init__(**options)
        # As numpy, numbers would be rounded to float32; `MetricInfo` itself takes no format for rows of numbers.
        self.info.format = "arrow"
        self.class_names = None if class_names is None else [str(name) for name in class_names]
        self.top_k = top_k
        self.scores = scores
        self.only_numbers = only_numbers

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy, F1, balanced accuracy, figures by class, confusion matrix and 95 % intervals of "
            "single-label classification; from scores also top-k accuracy, AUROC, loss, ECE and Brier score. Averages "
            "over classes run over the classes that occur in the references.",
            citation="",
            inputs_description="\nArgs:\n    predictions: Class ids, class names, or one row of scores per image.\n"
            "    references: True class ids.\n",
            features=[datasets.Features({"predictions": kind, "references": _REFERENCES}) for kind in _KINDS],
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Adds predictions and references, each a list, array or tensor."""
        if predictions is not None and references is not None and len(predictions) == len(references) == 0:
            raise DataError("Predictions and references are empty: there is nothing to measure. Pass at least one.")
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def _compute(self, *, predictions: Any, references: Any) -> dict[str, Any]:
        given, labels = _as_array(predictions), _whole(_as_array(references), "references")
        if given.ndim == 2:
            names = self.class_names or [str(index) for index in range(given.shape[1])]
            figures = classification_metrics(
                self._logits(given), labels, names, intervals=not self.only_numbers, top_k=self.top_k
            )
        else:
            predicted = self._ids(given) if given.dtype == object else _whole(given, "predictions")
            highest = max(int(labels.max()), int(predicted.max()))
            names = self.class_names or [str(index) for index in range(highest + 1)]
            figures = prediction_metrics(predicted, labels, names, intervals=not self.only_numbers)
        if self.only_numbers:
            return {name: value for name, value in figures.items() if isinstance(value, int | float)}
        return figures

    def _logits(self, scores: np.ndarray) -> np.ndarray:
        if self.scores == "logits":
            return scores
        broken = ~((scores >= 0).all(axis=1) & (np.abs(scores.sum(axis=1) - 1) < 1e-3))
        if broken.any():
            raise DataError(
                f"{int(broken.sum())} of {len(scores)} rows of scores are no probabilities: they are negative, not "
                "finite, or do not sum to 1. Pass scores='logits' for the outputs of a model before softmax."
            )
        # A probability that was rounded to 0 is the smallest above it.
        logits: np.ndarray = np.log(np.maximum(scores, np.finfo(np.float32).smallest_subnormal))
        return logits

    def _ids(self, names: np.ndarray) -> np.ndarray:
        if self.class_names is None:
            raise DataError(
                f"Predictions are names such as {str(names[0])!r}, and which class has which id is not known. Pass "
                "ClassificationMetrics(class_names=[...]) in the order of the ids, or to evaluator.compute "
                "label_mapping=model.config.label2id."
            )
        ids = {name: index for index, name in enumerate(self.class_names)}
        unknown = [str(name) for name in names if str(name) not in ids]
        if unknown:
            raise DataError(
                f"The prediction {unknown[0]!r} (one of {len(unknown)} such) is the name of no class."
                f"{did_you_mean(unknown[0], ids)} Pass class_names as the model's id2label has them."
            )
        return np.array([ids[str(name)] for name in names])


def _as_array(column: Any) -> np.ndarray:
    """Returns a column of Arrow as numbers, shape (images,) or (images, classes), or an object array of texts.

    Raises:
        DataError: rows have different lengths.
    """
    values = column.combine_chunks()
    if not hasattr(values, "value_lengths"):
        array: np.ndarray = values.to_numpy(zero_copy_only=False)
        return array
    lengths = set(values.value_lengths().to_pylist())
    if len(lengths) > 1 or None in lengths:
        raise DataError(
            "Predictions have rows of different lengths. Pass one score per class for each image, or class ids."
        )
    rows: np.ndarray = values.flatten().to_numpy(zero_copy_only=False).reshape(len(values), lengths.pop())
    return rows


def _whole(values: np.ndarray, what: str) -> np.ndarray:
    """Returns numbers as integers.

    Raises:
        DataError: some are not whole, such as scores of one class.
    """
    odd = values[values != np.round(values)]
    if len(odd):
        raise DataError(
            f"The {what} have {float(odd[0])!r}, but class ids are whole numbers. Pass ids, or as predictions one row "
            "per image with a score for each class (for two classes two)."
        )
    return values.astype(np.int64)
