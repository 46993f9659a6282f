"""What test-time augmentation brings: figures of the same images without and with it."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from torchthaw.evaluation.arrays import Floats
from torchthaw.evaluation.augmented_predictions import VIEWS, mean_prediction
from torchthaw.evaluation.metrics import classification_metrics
from torchthaw.evaluation.multilabel import multilabel_metrics
from torchthaw.training.comparison import Measured, compare

# Those of several labels that need no thresholds, which a paired test does not know.
_COMPARED = {False: ("accuracy", "macro_f1", "loss"), True: ("map", "loss")}


class AugmentedFigures:
    """Measures the mean over views of the images of some splits, beside the plain scores.

    Args:
        method: A key of `VIEWS`.
        class_names: In the order of the logits.
        several_labels: Whether images may have several labels.
        thresholds: Where they may, the probability of each class from which on an image is given it; None for 0.5.
            They are those of the model, whether they were chosen on plain scores or not.
    """

    def __init__(
        self,
        method: str,
        class_names: Sequence[str],
        *,
        several_labels: bool = False,
        thresholds: Sequence[float] | None = None,
    ) -> None:
        self.method = method
        self._names = class_names
        self._several = several_labels
        self._thresholds = thresholds
        self._document: dict[str, Any] = {"method": method, "views": VIEWS[method], "averages": "probabilities"}

    def measure(
        self,
        split: str,
        logits: Floats,
        labels: np.ndarray,
        groups: Sequence[Hashable] | None = None,
        *,
        compared: bool = True,
    ) -> dict[str, Any]:
        """Returns the figures of a split with test-time augmentation, and keeps them for `to_dict`.

        Args:
            split: Its name.
            logits: Of each view, shape (views, images, classes), the first one without augmentation; divided by the
                model's temperature, if it has one, so that calibrated probabilities are averaged.
            labels: Class ids, shape (images,), or a 0 or 1 for each image and class.
            groups: The group of each image, where groups are known.
            compared: Whether `differences` shall be of these images.
        """
        mean = mean_prediction(logits, several_labels=self._several)
        figures = self._figures(mean, labels, groups=groups)
        self._document[split] = figures
        if compared:
            plain = self._figures(logits[0], labels, intervals=False)
            self._document["differences"] = {
                metric: compare(
                    metric, Measured(plain[metric], logits[0], labels), Measured(figures[metric], mean, labels)
                ).to_dict()
                for metric in _COMPARED[self._several]
            }
        return figures

    def to_dict(self) -> dict[str, Any]:
        """Returns `tta` of `results.json`.

        `method`, `views` and what is averaged; the figures of each split with it; and `differences`, by metric what
        `compare` gives: `before` without, `after` with it.
        """
        return self._document

    def _figures(self, logits: Floats, labels: np.ndarray, **options: Any) -> dict[str, Any]:
        if self._several:
            return multilabel_metrics(logits, labels, self._names, thresholds=self._thresholds, **options)
        return classification_metrics(logits, labels, self._names, **options)


def difference_line(document: dict[str, Any], metric: str) -> str:
    """Writes in a line what test-time augmentation changed.

    Args:
        document: What `AugmentedFigures.to_dict` gives, with `differences`.
        metric: Preferred; the first one is taken where there is no such difference.
    """
    differences = document["differences"]
    metric = metric if metric in differences else next(iter(differences))
    found = differences[metric]
    name = {"map": "mAP", "macro_f1": "macro F1"}.get(metric, metric)
    line = f"{name} {found['before']:.4f} -> {found['after']:.4f} with tta {document['method']}"
    if found["interval"] is None:
        return f"{line} ({found['difference']:+.4f})"
    low, high = found["interval"]
    return f"{line} ({found['difference']:+.4f}, 95 % interval {low:+.4f} to {high:+.4f})"
