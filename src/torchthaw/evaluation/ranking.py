"""How well scores put the right class, or the right images, first."""

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import roc_auc_score

from torchthaw.evaluation.arrays import Floats, Ids


def top_k_accuracy(logits: Floats, labels: Ids, k: int) -> float:
    """Share of images whose class is among the k highest logits; of equal ones, lower class ids come first.

    Args:
        logits: Shape (images, classes).
        labels: Class ids, shape (images,).
        k: At least 1; with all classes or more the share is 1.
    """
    own = logits[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(logits.shape[1]) < labels[:, None]
    rank = (logits > own).sum(axis=1) + ((logits == own) & earlier).sum(axis=1)
    return float((rank < k).mean())


def one_vs_rest_auroc(log_probabilities: Floats, labels: Ids) -> list[float | None]:
    """Area under the receiver operating characteristic of each class against the rest: how often one of its images
    scores above another image, a tie counting half (Fawcett, 2006, Pattern Recognition Letters 27).

    Args:
        log_probabilities: Shape (images, classes).
        labels: Class ids, shape (images,).

    Returns:
        For each class 0 ... 1; None for a class that has no images, or all.
    """
    scores = log_probabilities
    if scores.shape[1] == 2:
        # Of two classes each is the rest of the other, to the last digit.
        second = scores[:, 1] - scores[:, 0]
        scores = np.stack([-second, second], axis=1)
    supports = np.bincount(labels, minlength=scores.shape[1])
    return [
        float(roc_auc_score(labels == index, scores[:, index])) if 0 < support < len(labels) else None
        for index, support in enumerate(supports)
    ]


def mean_auroc(areas: Sequence[float | None]) -> float | None:
    """Mean over the classes that `one_vs_rest_auroc` gives an area for (with two classes, either's); None without."""
    known = [area for area in areas if area is not None]
    return float(np.mean(known)) if known else None
