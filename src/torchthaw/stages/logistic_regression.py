"""A multinomial logistic regression with a penalty, on few coordinates and to convergence."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

# Tried from strong to weak.
PENALTIES = tuple(10.0 ** (1 - step / 2) for step in range(13))

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# Largest entry of the gradient, in preconditioned coordinates, as a share of the objective at the start: of the head,
# of what is only judged, and of what is only a start for the next.
_TOLERANCE = 1e-8
JUDGED_TOLERANCE = 1e-5
_START_TOLERANCE = 1e-4
_MOST_ITERATIONS = 2000
# Variances below this share of the largest one are rounding errors of the Gram matrix.
_LEAST_VARIANCE = 1e-12
_LEAST_CURVATURE = 1e-3
_ROWS_AT_ONCE = 4096


def rotate(points: Floats) -> tuple[Floats, Floats]:
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


class LogisticRegression:
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
