"""Temperature scaling: one number that brings confidence and accuracy together, and leaves every prediction as it is.

Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017, arXiv:1706.04599): logits are divided by a
temperature, which minimises the log loss of images that were not trained on.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from sklearn.model_selection import KFold

from torchthaw.evaluation.arrays import Floats, Ids, as_class_ids, as_logits, log_softmax, softmax
from torchthaw.evaluation.calibration import brier_score, expected_calibration_error

METHODS = ("none", "temperature")
# A temperature outside says that the images are too few, or all right, or all wrong, rather than what scores should be.
LOWEST, HIGHEST = 0.1, 10.0
_FOLDS = 5


@dataclass(frozen=True)
class TemperatureFit:
    """A fitted temperature.

    Attributes:
        temperature: What to divide logits by; 1 where there is a `problem`.
        problem: Why no temperature could be told from these images; None if one could.
    """

    temperature: float
    problem: str | None = None


def fit_temperature(logits: npt.ArrayLike, labels: npt.ArrayLike) -> TemperatureFit:
    """Finds the temperature between 0.1 and 10 with the least mean log loss.

    The log loss is convex in 1 / temperature, so that its derivative has one root at most. Where it has none between
    the bounds, as when every image is right by far, so that ever more confidence would be ever better, the images do
    not tell how confident to be, and logits stay as they are.

    Args:
        logits: Shape (images, classes).
        labels: Class ids, shape (images,).

    Raises:
        DataError: logits that are not finite, or labels that do not fit them.
    """
    checked = as_logits(logits).astype(np.float64)
    ids = as_class_ids(labels, *checked.shape)
    true = checked[np.arange(len(ids)), ids]

    def slope(log_temperature: float) -> float:
        """Derivative of the mean log loss by 1 / temperature."""
        probabilities = softmax(checked / np.exp(log_temperature))
        return float(((probabilities * checked).sum(axis=1) - true).mean())

    low, high = np.log(LOWEST), np.log(HIGHEST)
    if slope(low) <= 0:
        return TemperatureFit(1.0, f"their log loss is least at a temperature of {LOWEST} or below")
    if slope(high) >= 0:
        return TemperatureFit(1.0, f"their log loss is least at a temperature of {HIGHEST:g} or above")
    return TemperatureFit(float(np.exp(brentq(slope, low, high, xtol=1e-10))))


def scaled(logits: Floats, temperature: float) -> Floats:
    """Divides logits by a temperature in their own precision, as the model does in eval mode."""
    result: Floats = logits if temperature == 1 else logits / logits.dtype.type(temperature)
    return result


def cross_fitted(logits: Floats, labels: Ids, *, seed: int = 0) -> Floats:
    """Scales the logits of each of five random parts of the images by what was fitted on the other four.

    Args:
        logits: Shape (images, classes), of at least two images.
        labels: Class ids, shape (images,).
        seed: Of the parts.
    """
    result = np.empty_like(logits)
    parts = KFold(min(_FOLDS, len(labels)), shuffle=True, random_state=seed)
    for rest, part in parts.split(labels):
        result[part] = scaled(logits[part], fit_temperature(logits[rest], labels[rest]).temperature)
    return result


class TemperatureScaling:
    """Fits a temperature on the validation images of a run, and scales its splits.

    Args:
        seed: Of the parts for cross-fitting.

    Attributes:
        temperature: What was fitted; 1 before that.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self.temperature = 1.0
        self._seed = seed
        self._fitted: dict[str, Any] | None = None
        self._figures: dict[str, dict[str, dict[str, float]]] = {"ece": {}, "loss": {}, "brier": {}}

    def __call__(self, split: str, logits: Floats, labels: Ids) -> Floats:
        """Returns the logits of a split scaled; the first split has to be `validation`, on which it is fitted.

        Raises:
            DataError: logits that are not finite, or labels that do not fit them.
        """
        versions = {"before": logits}
        if split == "validation":
            fit = fit_temperature(logits, labels)
            self.temperature = fit.temperature
            self._fitted = {"problem": fit.problem, "num_images": len(labels)}
            if fit.problem is None and len(labels) > 1:
                versions["cross_fitted"] = cross_fitted(logits, labels, seed=self._seed)
        assert self._fitted is not None, f"{split} came before validation"
        versions["after"] = scaled(logits, self.temperature)
        for version, values in versions.items():
            for name, value in _figures(values, labels).items():
                self._figures[name].setdefault(split, {})[version] = value
        return versions["after"]

    def to_dict(self) -> dict[str, Any]:
        """Returns `calibration` of `results.json`.

        `temperature`; `problem`, why it is 1, or None; `fitted_on`, a split, with `num_images`; and by split `ece`,
        `loss` (in nats) and `brier`, `before` and `after`. On validation `after` is of the images that it was fitted
        on; `cross_fitted` is of each fifth of them with what was fitted on the others.
        """
        return {
            "method": "temperature",
            "temperature": self.temperature,
            "fitted_on": "validation",
            **(self._fitted or {}),
            **self._figures,
        }


def _figures(logits: Floats, labels: Ids) -> dict[str, float]:
    log_probabilities = log_softmax(logits.astype(np.float64))
    probabilities = np.exp(log_probabilities)
    return {
        "ece": expected_calibration_error(probabilities, labels),
        "loss": -float(log_probabilities[np.arange(len(labels)), labels].mean()),
        "brier": brier_score(probabilities, labels),
    }
