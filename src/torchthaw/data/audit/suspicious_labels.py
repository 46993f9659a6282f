"""Images that look like those of another class: help for who checks labels, not a verdict."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.neighbors import NearestNeighbors

_NEIGHBOURS = 10


@dataclass(frozen=True)
class SuspiciousLabel:
    """An image whose nearest neighbours have other labels.

    Attributes:
        row: Number of the image.
        label: Its class.
        suggested: The class of most of its neighbours.
        agreement: Share of the neighbours that have this class.
    """

    row: int
    label: str
    suggested: str
    agreement: float


def find_suspicious_labels(
    features: npt.NDArray, labels: Sequence[str], *, neighbours: int = _NEIGHBOURS
) -> list[SuspiciousLabel]:
    """Ranks the images none of whose neighbours in feature space has the same label.

    Args:
        features: Pooled features of a pretrained backbone, shape (images, features); compared by their cosine.
        labels: Class names.
        neighbours: How many are asked.

    Returns:
        The images, those first whose neighbours agree most on another class.
    """
    if len(labels) <= neighbours:
        return []
    exact = np.asarray(features, np.float32)
    exact = exact / np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), 1e-12)
    nearest = NearestNeighbors(n_neighbors=neighbours + 1, algorithm="brute").fit(exact)
    rows = nearest.kneighbors(exact, return_distance=False)
    classes, ids = np.unique(np.asarray(labels), return_inverse=True)
    found = []
    for row, around in enumerate(rows):
        # An image is its own neighbour, but a copy of it may come first.
        others = ids[around[around != row][:neighbours]]
        counts = np.bincount(others, minlength=len(classes))
        if counts[ids[row]] == 0:
            top = int(counts.argmax())
            found.append(SuspiciousLabel(row, str(labels[row]), str(classes[top]), float(counts[top] / len(others))))
    return sorted(found, key=lambda suspect: (-suspect.agreement, suspect.row))
