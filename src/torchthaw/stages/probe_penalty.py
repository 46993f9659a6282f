"""The penalty of a linear head, by cross-validation."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax
from sklearn.metrics import f1_score

from torchthaw.stages.logistic_regression import JUDGED_TOLERANCE, PENALTIES, Floats, Ints, LogisticRegression

# Held-out losses that differ by a smaller share are equal, as far as they are solved for.
_LEAST_GAIN = 1e-5


@dataclass(frozen=True)
class Choice:
    """The penalty chosen by cross-validation, and figures as in `ProbeFit`."""

    penalty: float
    losses: dict[float, float]
    macro_f1: float
    accuracy: float


def choose_penalty(
    points: Floats, variances: Floats, labels: Ints, folds: Ints, weights: Floats, shifts: Floats
) -> Choice | None:
    """Chooses the penalty by images that are each in a fold.

    Args:
        points: Coordinates on the axes, (N, r).
        variances: Their mean squares, (r,).
        labels: (N,) class ids.
        folds: (N,).
        weights: Of each class, (K,).
        shifts: Of the logits of each class, (K,).

    Returns:
        The choice; None where no held-out image has a weight and is of a class that its fold trains on.
    """
    paths: dict[int, list[Floats]] = {
        number: [] for number in np.unique(folds) if weights[labels[folds != number]].any()
    }
    losses: dict[float, float] = {}
    errors: dict[float, float] = {}
    guesses: dict[float, Ints] = {}
    for penalty in PENALTIES:
        by_image, of_image = np.zeros(len(labels)), np.zeros(len(labels))
        # Where a fold has nothing to train on, images are given no class.
        guesses[penalty] = np.full(len(labels), -1)
        for number, path in paths.items():
            held_out = folds == number
            # Made anew for each penalty: those of all folds at once would be several copies of the points.
            problem = LogisticRegression(points[~held_out], variances, labels[~held_out], weights, shifts)
            path.append(problem.solve(path, penalty, JUDGED_TOLERANCE))
            logits = points[held_out] @ path[-1][:, :-1].T + path[-1][:, -1]
            guesses[penalty][held_out] = problem.present[logits.argmax(axis=1)]
            is_known = np.isin(labels[held_out], problem.present)
            known = np.flatnonzero(held_out)[is_known]
            own = labels[known]
            log_p = log_softmax(logits[is_known] + problem.shifts.T, axis=1)
            by_image[known] = -log_p[np.arange(len(own)), np.searchsorted(problem.present, own)]
            of_image[known] = weights[own]
        total = of_image.sum()
        if not total > 0:
            return None
        losses[penalty] = float(of_image @ by_image / total)
        errors[penalty] = float(np.linalg.norm(of_image * (by_image - losses[penalty])) / total)
        if _rose_twice(list(losses.values())):
            break
    best = min(losses, key=losses.__getitem__)
    limit = losses[best] * (1 + _LEAST_GAIN) + errors[best]
    penalty = next(tried for tried, loss in losses.items() if loss <= limit)
    found = guesses[penalty]
    return Choice(
        penalty,
        losses,
        macro_f1=float(f1_score(labels, found, labels=np.unique(labels), average="macro", zero_division=0)),
        accuracy=float((found == labels).mean()),
    )


def _rose_twice(losses: Sequence[float]) -> bool:
    return len(losses) > 2 and losses[-3] < losses[-2] < losses[-1]
