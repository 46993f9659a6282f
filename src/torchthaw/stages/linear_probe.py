"""The best linear head on cached features: a multinomial logistic regression, its penalty chosen by cross-validation.

Kumar et al. ("Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", ICLR 2022) fit a
linear head before they fine-tune the backbone: from a random head, the first steps would spoil the features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.metrics import f1_score

from torchthaw.errors import TrainingError

# Tried from strong to weak.
PENALTIES = tuple(10.0 ** (1 - step / 2) for step in range(13))
DEFAULT_PENALTY = 1.0

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# Largest entry of the gradient, in preconditioned coordinates, as a share of the objective at the start: of the head,
# of what is only judged, and of what is only a start for the next.
_TOLERANCE = 1e-8
_JUDGED_TOLERANCE = 1e-5
_START_TOLERANCE = 1e-4
# Held-out losses that differ by a smaller share are equal, as far as they are solved for.
_LEAST_GAIN = 1e-5
_MOST_ITERATIONS = 2000
# Variances below this share of the largest one are rounding errors of the Gram matrix.
_LEAST_VARIANCE = 1e-12
_LEAST_CURVATURE = 1e-3
# Features that are all the same, too, differ from their mean by about this share of it.
_ROUNDING = 1e-10
_ROWS_AT_ONCE = 4096


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
        _, variances = _rotate(part)
        chosen = _cross_validate(part[:, : len(variances)], variances, ids[rows], numbers[rows], weights, shifts)
        del part
    directions, variances = _rotate(points)
    points = points[:, : len(variances)]
    if len(rows) == len(points):
        chosen = _cross_validate(points, variances, ids, numbers, weights, shifts)
    penalty = DEFAULT_PENALTY if chosen is None else chosen.penalty
    problem = _Problem(points, variances, ids, weights, shifts)
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


def _rotate(points: Floats) -> tuple[Floats, Floats]:
    """Replaces points, (N, d), by their coordinates on their r principal axes, in the first r columns.

    A rotation changes neither the loss nor the penalty; here there are min(N, d) coordinates at most, and how much the
    loss curves along each is known beforehand.

    Returns:
        The axes, (d, r), and the mean square of the coordinates on each, (r,).
    """
    number, dimension = points.shape
    if number <= dimension:
        squares, vectors = np.linalg.eigh(points @ points.T)
        kept = squares > _LEAST_VARIANCE * squares[-1]
        squares = squares[kept]
        axes = points.T @ (vectors[:, kept] / np.sqrt(squares))
    else:
        squares, axes = np.linalg.eigh(points.T @ points)
        kept = squares > _LEAST_VARIANCE * squares[-1]
        squares, axes = squares[kept], axes[:, kept]
    # In place and by blocks: of many images there is memory for one copy.
    for start in range(0, number, _ROWS_AT_ONCE):
        block = points[start : start + _ROWS_AT_ONCE]
        block[:, : axes.shape[1]] = block @ axes
    return axes, squares / number


class _Problem:
    """The objective over images, for the classes that are among them.

    A solution is an array (present classes, r + 1) of weights along the axes and, last, the bias.
    """

    def __init__(self, points: Floats, variances: Floats, labels: Ints, weights: Floats, shifts: Floats) -> None:
        """Takes the images to fit.

        Args:
            points: Coordinates on the axes, (N, r).
            variances: About their mean squares, (r,).
            labels: (N,) class ids.
            weights: Of each class, (K,).
            shifts: Of the logits of each class, (K,).
        """
        self.present = np.flatnonzero(np.bincount(labels, weights[labels], minlength=len(weights)) > 0)
        self.points, self.variances = points, variances
        self.targets = np.searchsorted(self.present, labels).clip(max=len(self.present) - 1)
        self.weights = weights[labels] / weights[labels].sum()
        self.shifts = shifts[self.present, None]

    def loss(self, solution: Floats) -> float:
        """Returns the weighted mean of cross entropy, without the penalty."""
        return self._loss_and_probabilities(solution)[0]

    def solve_from_scratch(self, penalty: float) -> Floats:
        """Minimises the objective by way of stronger penalties."""
        path: list[Floats] = []
        for stronger in [tried for tried in PENALTIES if tried > penalty]:
            path.append(self.solve(path, stronger, _START_TOLERANCE))
        return self.solve(path, penalty, _TOLERANCE)

    def solve(self, path: Sequence[Floats], penalty: float, tolerance: float) -> Floats:
        """Minimises the objective by L-BFGS.

        Args:
            path: Solutions for stronger penalties, in even steps of their logarithm; the last two are extrapolated.
            penalty: Half of what the squares of the weights cost.
            tolerance: Largest entry of the gradient in preconditioned coordinates, as a share of the objective.
        """
        start = self._start(path)
        loss, probabilities = self._loss_and_probabilities(start)
        curvatures, basis = self._curvatures(probabilities)
        scales = 1 / np.sqrt(np.hstack([curvatures * self.variances + penalty, curvatures]))

        def objective(coordinates: Floats) -> tuple[float, Floats]:
            solution = basis @ (coordinates.reshape(scales.shape) * scales)
            value, gradient = self._objective(solution, penalty)
            return value, (basis.T @ gradient * scales).ravel()

        found = minimize(
            objective,
            (basis.T @ start / scales).ravel(),
            jac=True,
            method="L-BFGS-B",
            options={
                "gtol": tolerance * (loss + penalty / 2 * np.square(start[:, :-1]).sum()),
                "ftol": 0,
                "maxiter": _MOST_ITERATIONS,
                "maxfun": 2 * _MOST_ITERATIONS,
            },
        )
        solution = basis @ (found.x.reshape(scales.shape) * scales)
        # Softmax does not see what all classes share, and the penalty is least where they share nothing.
        return solution - solution.mean(axis=0)

    def _start(self, path: Sequence[Floats]) -> Floats:
        if not path:
            return np.zeros((len(self.present), len(self.variances) + 1))
        return path[0] if len(path) == 1 else 2 * path[-1] - path[-2]

    def _objective(self, solution: Floats, penalty: float) -> tuple[float, Floats]:
        loss, residuals = self._loss_and_probabilities(solution)
        residuals[self.targets, np.arange(len(self.targets))] -= 1
        residuals *= self.weights
        weights = solution[:, :-1]
        gradient = np.empty_like(solution)
        gradient[:, :-1] = residuals @ self.points + penalty * weights
        gradient[:, -1] = residuals.sum(axis=1)
        return loss + penalty / 2 * np.square(weights).sum(), gradient

    def _loss_and_probabilities(self, solution: Floats) -> tuple[float, Floats]:
        """Returns the weighted mean of cross entropy, and the probabilities, (classes, N)."""
        # Classes first: of few classes the product is about twice as fast.
        logits = solution[:, :-1] @ self.points.T
        logits += solution[:, -1:] + self.shifts
        logits -= logits.max(axis=0)
        own = logits[self.targets, np.arange(len(self.targets))]
        probabilities = np.exp(logits, out=logits)
        sums = probabilities.sum(axis=0)
        probabilities /= sums
        return float(self.weights @ (np.log(sums) - own)), probabilities

    def _curvatures(self, probabilities: Floats) -> tuple[Floats, Floats]:
        """Returns how much the loss curves along directions of the logits, (classes, 1), and these, as columns.

        The Hessian of the loss is about the Kronecker product of that of the logits, as a mean over images, and the
        covariance of the features; with the directions and the principal axes it is about diagonal.
        """
        hessian = -(probabilities * self.weights) @ probabilities.T
        hessian[np.diag_indices(len(hessian))] += probabilities @ self.weights
        curvatures, basis = np.linalg.eigh(hessian)
        # It has none along the sum of all classes, and little where the loss is near 0.
        least = max(_LEAST_CURVATURE * curvatures[-1], np.finfo(np.float64).eps)
        return np.maximum(curvatures, least)[:, None], basis


def _with_absent_classes(solution: Floats, present: Ints, num_classes: int, images: int) -> Floats:
    """Returns a solution for all classes, (K, r + 1).

    The logits of the present classes have a mean of 0, so a logit of log(present / (images + 1)) is below the largest,
    and a probability of at most 1 / (images + 1).
    """
    head = np.zeros((num_classes, solution.shape[1]))
    head[:, -1] = np.log(len(present) / (images + 1))
    head[present] = solution
    return head


@dataclass(frozen=True)
class _Choice:
    """The penalty chosen by cross-validation, and figures as in `ProbeFit`."""

    penalty: float
    losses: dict[float, float]
    macro_f1: float
    accuracy: float


def _usable_folds(folds: npt.ArrayLike | torch.Tensor | None, number: int) -> Ints:
    """Returns the fold of each image, (N,), all -1 where there are not two."""
    none = np.full(number, -1)
    if folds is None:
        return none
    numbers = np.asarray(folds.cpu() if isinstance(folds, torch.Tensor) else folds).astype(np.int64)
    return numbers if len(np.unique(numbers[numbers >= 0])) > 1 else none


def _cross_validate(
    points: Floats, variances: Floats, labels: Ints, folds: Ints, weights: Floats, shifts: Floats
) -> _Choice | None:
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
            problem = _Problem(points[~held_out], variances, labels[~held_out], weights, shifts)
            path.append(problem.solve(path, penalty, _JUDGED_TOLERANCE))
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
    return _Choice(
        penalty,
        losses,
        macro_f1=float(f1_score(labels, found, labels=np.unique(labels), average="macro", zero_division=0)),
        accuracy=float((found == labels).mean()),
    )


def _rose_twice(losses: Sequence[float]) -> bool:
    return len(losses) > 2 and losses[-3] < losses[-2] < losses[-1]
