"""The best linear head on cached features: a multinomial logistic regression, its penalty chosen by cross-validation.

Kumar et al. ("Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", ICLR 2022) fit a
linear head before they fine-tune the backbone: from a random head, the first steps would spoil the features.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from torchthaw.errors import TrainingError
from torchthaw.stages.logistic_regression import Floats, Ints, LogisticRegression, rotate
from torchthaw.stages.probe_penalty import choose_penalty

DEFAULT_PENALTY = 1.0

# Features that are all the same, too, differ from their mean by about this share of it.
_ROUNDING = 1e-10


@dataclass(frozen=True)
class ProbeFit:
    """A fitted linear head.

    Attributes:
        weight: (K, d), float32, for features as they were passed.
        bias: (K,), float32.
        penalty: The one chosen.
        loss: Mean training loss at the solution, without the penalty.
        penalties: Held-out log loss of each penalty tried, from strong to weak; empty without folds.
        macro_f1: Of the held-out images of all folds together, at the chosen penalty, as a mean over the classes that
            occur among their labels; None without folds.
        accuracy: Of the same; None without folds.
        images_held_out: How many images these figures are of.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    penalty: float
    loss: float
    penalties: dict[float, float]
    macro_f1: float | None
    accuracy: float | None
    images_held_out: int


def fit_linear_probe(
    features: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    *,
    folds: npt.ArrayLike | torch.Tensor | None = None,
    class_weights: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
) -> ProbeFit:
    """Fits a linear head by minimising an objective, in float64 and to convergence.

    It is

        mean over images of cross_entropy(z @ W.T + b + shift, label) + penalty / 2 * sum(W ** 2)

    where `z` are the features minus their mean, over the root mean square of all that remains: one number, so that the
    penalty means the same for every backbone. That is scikit-learn's `LogisticRegression(C=1 / (penalty * N))` on `z`
    for three classes or more, and its solution does not depend on the order of the classes or on random numbers.

    The penalty is the strongest of `PENALTIES` whose held-out loss, over the images of all folds, is within one
    standard error of the least one (the one standard error rule: Breiman et al., Classification and Regression Trees,
    1984; Friedman, Hastie and Tibshirani, 2010, for logistic regression). It tells held-out images about as well as the
    best one, and is less sure of the training images, so that fine-tuning has something left to learn from them. Weaker
    penalties are not tried once the loss has risen twice in a row. Without two folds it is `DEFAULT_PENALTY`.

    A class that has no images, or no weight, is not part of the fit. It gets weights of 0 and a bias with which it is
    nowhere the most likely class. Held-out images of a class that a fold does not train on count as mistakes, but not
    in the held-out loss, where every penalty would fail on them.

    Args:
        features: (N, d), of any floating type and on any device.
        labels: (N,) class ids.
        num_classes: K.
        folds: Fold of each image, (N,); images with -1 are left out of the cross-validation, and are part of the fit
            that follows.
        class_weights: (K,), as in `torch.nn.functional.cross_entropy`: the mean is over the sum of weights.
        shift: Added to the logits in the fit and in the held-out loss, (K,), and not part of the head: see
            `torchthaw.training.losses.TrainingLoss`. Macro F1 and accuracy are measured without it.

    Returns:
        The head, on the CPU, and how well it does on held-out images.

    Raises:
        TrainingError: Features are not finite, or no image has a weight.
    """
    points = features.detach().to("cpu", torch.float64, copy=True).numpy()
    ids = labels.detach().cpu().numpy().astype(np.int64)
    weights = np.ones(num_classes) if class_weights is None else _array(class_weights)
    shifts = np.zeros(num_classes) if shift is None else _array(shift)
    _check(features, points, weights[ids])
    mean, scale = _standardise(points)
    numbers = _usable_folds(folds, len(points))
    chosen = None
    rows = np.flatnonzero(numbers >= 0)
    if len(rows) and len(rows) < len(points):
        part = points[rows]
        part -= part.mean(axis=0)
        _, variances = rotate(part)
        chosen = choose_penalty(part[:, : len(variances)], variances, ids[rows], numbers[rows], weights, shifts)
        del part
    directions, variances = rotate(points)
    points = points[:, : len(variances)]
    if len(rows) == len(points):
        chosen = choose_penalty(points, variances, ids, numbers, weights, shifts)
    penalty = DEFAULT_PENALTY if chosen is None else chosen.penalty
    problem = LogisticRegression(points, variances, ids, weights, shifts)
    solution = problem.solve_from_scratch(penalty)
    head = _with_absent_classes(solution, problem.present, num_classes, len(points))
    weight = head[:, :-1] @ directions.T / scale
    return ProbeFit(
        weight=torch.from_numpy(weight).float(),
        bias=torch.from_numpy(head[:, -1] - weight @ mean).float(),
        penalty=penalty,
        loss=problem.loss(solution),
        penalties={} if chosen is None else chosen.losses,
        macro_f1=None if chosen is None else chosen.macro_f1,
        accuracy=None if chosen is None else chosen.accuracy,
        images_held_out=0 if chosen is None else len(rows),
    )


def _array(values: torch.Tensor) -> Floats:
    return values.detach().to("cpu", torch.float64).numpy()


def _check(features: torch.Tensor, points: Floats, weights: Floats) -> None:
    if not weights.sum() > 0:
        raise TrainingError(
            f"A linear head cannot be fitted to {len(weights)} images whose class weights sum to {weights.sum():g}. "
            "Pass images, and give at least one of their classes a weight above 0."
        )
    # A sum is finite only if all that is added is; a mask of all entries would need memory.
    if not np.isfinite(points.sum()):
        bad = int((~torch.isfinite(features).all(dim=1)).sum())
        raise TrainingError(
            f"The features of {bad} of {len(points)} images are not finite, so no linear head can be fitted to them. "
            "The backbone overflows, most often in float16, or its weights are damaged. Compute the features in "
            "float32 or bfloat16, and if that does not help, load other weights."
        )


def _standardise(points: Floats) -> tuple[Floats, float]:
    """Centers and scales features in place; returns their mean, (d,), and scale."""
    mean = points.mean(axis=0)
    points -= mean
    size = np.sqrt(points.size)
    scale = float(np.linalg.norm(points) / size)
    if scale <= _ROUNDING * np.linalg.norm(mean) * np.sqrt(len(points)) / size:
        points[:] = 0
        return mean, 1.0
    points /= scale
    return mean, scale


def _with_absent_classes(solution: Floats, present: Ints, num_classes: int, images: int) -> Floats:
    """Returns a solution for all classes, (K, r + 1).

    The logits of the present classes have a mean of 0, so a logit of log(present / (images + 1)) is below the largest,
    and a probability of at most 1 / (images + 1).
    """
    head = np.zeros((num_classes, solution.shape[1]))
    head[:, -1] = np.log(len(present) / (images + 1))
    head[present] = solution
    return head


def _usable_folds(folds: npt.ArrayLike | torch.Tensor | None, number: int) -> Ints:
    """Returns the fold of each image, (N,), all -1 where there are not two."""
    none = np.full(number, -1)
    if folds is None:
        return none
    numbers = np.asarray(folds.cpu() if isinstance(folds, torch.Tensor) else folds).astype(np.int64)
    return numbers if len(np.unique(numbers[numbers >= 0])) > 1 else none
