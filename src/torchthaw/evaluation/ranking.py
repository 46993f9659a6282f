"""How well scores put the right class, or the right images, first."""

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


def auroc(log_probabilities: Floats, labels: Ids) -> float | None:
    """Area under the receiver operating characteristic: how often an image of a class scores above another image.

    For two classes that of the second one; for more the mean over the classes that occur, each against the rest
    (Fawcett, 2006, Pattern Recognition Letters 27).

    Args:
        log_probabilities: Shape (images, classes).
        labels: Class ids, shape (images,).

    Returns:
        0 ... 1; None where all images are of one class.
    """
    classes = np.unique(labels)
    if len(classes) < 2:
        return None
    if log_probabilities.shape[1] == 2:
        return float(roc_auc_score(labels == 1, log_probabilities[:, 1] - log_probabilities[:, 0]))
    return float(np.mean([roc_auc_score(labels == index, log_probabilities[:, index]) for index in classes]))
