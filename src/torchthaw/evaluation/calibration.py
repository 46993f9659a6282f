"""How well confidence agrees with accuracy."""

import numpy as np

from torchthaw.evaluation.arrays import Floats, Ids


def reliability_bins(probabilities: Floats, labels: Ids, bins: int = 15) -> tuple[Ids, Floats, Floats]:
    """Groups images by the confidence of their prediction into bins of equal width, (i/bins, (i+1)/bins].

    Args:
        probabilities: Shape (images, classes), rows sum to 1.
        labels: Class ids, shape (images,).
        bins: Number of bins between 0 and 1.

    Returns:
        Three arrays of shape (bins,): number of images, their mean confidence and their accuracy (NaN in empty bins).
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    correct = probabilities.argmax(axis=1) == labels
    index = np.digitize(confidence, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(index, weights=confidence, minlength=bins) / count
        accuracy = np.bincount(index, weights=correct, minlength=bins) / count
    return count, mean_confidence, accuracy


def brier_score(probabilities: Floats, labels: Ids) -> float:
    """Mean over images of the squared distance between probabilities and the truth, 0 ... 2 (Brier, 1950).

    Args:
        probabilities: Shape (images, classes), rows sum to 1.
        labels: Class ids, shape (images,).
    """
    truth = np.eye(probabilities.shape[1])[labels]
    return float(((probabilities - truth) ** 2).sum(axis=1).mean())


def expected_calibration_error(probabilities: Floats, labels: Ids) -> float:
    """Mean gap between confidence and accuracy over 15 bins of equal width, weighted by images (Guo et al., 2017).

    Args:
        probabilities: Shape (images, classes), rows sum to 1.
        labels: Class ids, shape (images,).
    """
    count, confidence, accuracy = reliability_bins(probabilities, labels)
    filled = count > 0
    gaps = np.abs(accuracy[filled] - confidence[filled])
    return float((count[filled] * gaps).sum() / len(labels))
