"""What a learning-rate range test shows: from the losses at rising rates to a suggestion, or to why there is none.

The range test is that of Smith ("Cyclical Learning Rates for Training Neural Networks", WACV 2017): the rate rises
from step to step, and the loss stays, falls, and in the end diverges. Here it rises exponentially, as in fastai.

How a suggestion is read off:

- The loss is smoothed over the logarithm of the rate by a Gaussian of a quarter of a decade (or two steps, if those
  are more), which unlike a running mean does not shift the curve towards higher rates. What exceeds the level of
  divergence is clipped to it, so that single steps beyond it do not blur what comes before.
- Noise is the standard deviation of the single losses around the smoothed ones, left of the minimum. A fall from the
  level of the first steps to the minimum of less than five standard errors of that is none, and nothing is suggested.
- The suggestion is the rate at which the smoothed loss falls fastest per decade, left of the minimum, and at most a
  third of the rate of the minimum.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter1d

from torchthaw.training.rate_lines import rounded

Floats = npt.NDArray[np.float64]

FEWEST_STEPS = 20
# Decades of the rate.
SMOOTHED_OVER = 0.25
# Of the suggestion, below the minimum.
LEAST_DISTANCE = 3.0
# Standard errors that a fall must have.
SIGNIFICANT = 5.0
# Losses that divergence is told by.
_LAST = 5


@dataclass(frozen=True)
class RangeTest:
    """The range test of one stage. All rates are the highest of the stage's layer groups, usually the head's.

    Attributes:
        stage: Name of the stage.
        rates: Rate of each step, rising.
        losses: Training loss of each step, after the steps at lower rates; infinite where it was not finite.
        smoothed: The same smoothed, up to where it diverged.
        plan_rate: The plan's own rate.
        family_rate: What stages of this kind take by default for the backbone's family, before layer decay.
        suggestion: Suggested rate, to two digits; None where the curve shows none.
        minimum: Rate at which the smoothed loss is lowest; None without a fall.
        sentence: What the curve shows, in words.
        learning_rate: What to write as the stage's `learning_rate`: all rates of the plan in proportion; None without
            a suggestion.
        recipe: The stage with it, as a line of a recipe's `stages`; None without a suggestion.
    """

    stage: str
    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    plan_rate: float
    family_rate: float
    suggestion: float | None
    minimum: float | None
    sentence: str
    learning_rate: Any = None
    recipe: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON data, in which losses that are not finite are None."""
        document = asdict(self)
        document["losses"] = [loss if math.isfinite(loss) else None for loss in self.losses]
        return document


@dataclass(frozen=True)
class Reading:
    """What a curve shows; see `RangeTest`."""

    smoothed: Floats
    suggestion: float | None
    minimum: float | None
    sentence: str


def rate_at(step: int, steps: int, lowest: float, highest: float) -> float:
    """Returns the rate of a step, from `lowest` at step 0 to `highest` at the last, evenly on a logarithmic scale."""
    return float(lowest * (highest / lowest) ** (step / max(1, steps - 1)))


def divergence_level(losses: Floats, planned_steps: int) -> float:
    """Returns the loss above which a test is over: twice that of the first tenth of the steps, and three deviations.

    Args:
        losses: At least those of the first tenth of the steps, and of five.
        planned_steps: Steps of the whole test.
    """
    first = losses[: first_steps(planned_steps)]
    return float(2 * first.mean() + 3 * first.std(ddof=1))


def has_diverged(losses: Floats, planned_steps: int) -> bool:
    """Whether the median of the last five losses is above the level of divergence, or a loss is not finite."""
    if not np.isfinite(losses).all():
        return True
    if len(losses) < first_steps(planned_steps) + _LAST:
        return False
    return float(np.median(losses[-_LAST:])) > divergence_level(losses, planned_steps)


def first_steps(planned_steps: int) -> int:
    """Returns how many steps the level of the loss at the start is taken from."""
    return max(_LAST, planned_steps // 10)


def read_curve(rates: Floats, losses: Floats, planned_steps: int, failure: str | None = None) -> Reading:
    """Reads a suggestion off a curve, or says why there is none.

    Args:
        rates: Shape (steps,), rising in equal ratios.
        losses: Shape (steps,): training loss measured after the steps at lower rates.
        planned_steps: Steps of the whole test, had it not ended early.
        failure: What was said of a loss or gradient that was not finite.
    """
    finite = np.isfinite(losses)
    usable = len(losses) if finite.all() else int(np.argmin(finite))
    first = first_steps(planned_steps)
    if usable < first + _LAST:
        why = failure or "the loss became too large"
        return Reading(
            losses[:usable], None, None,
            f"the loss broke down within {usable + 1} steps, at rates up to {rates[usable - 1]:.1e}: {why}. Nothing is "
            "suggested; begin the test at a lower rate, and if it breaks down there too, it is not the rate",
        )  # fmt: skip
    level = divergence_level(losses, planned_steps)
    decades = np.log10(rates[:usable])
    width = max(2.0, SMOOTHED_OVER / (decades[1] - decades[0]))
    clipped = np.minimum(losses[:usable], level)
    smoothed = gaussian_filter1d(clipped, width, mode="nearest")
    lowest = int(np.argmin(smoothed))
    start = float(losses[:first].mean())
    error = _noise(clipped, smoothed, max(lowest, first)) * math.sqrt(1 / (2 * math.sqrt(math.pi) * width) + 1 / first)
    fall = start - float(smoothed[lowest])
    end = _end(rates, smoothed, start + SIGNIFICANT * error, lowest, diverged=has_diverged(losses, planned_steps))
    if fall < SIGNIFICANT * error or lowest < first:
        return Reading(
            smoothed, None, None,
            f"the loss ({start:.3g} at first) nowhere falls by more than its own noise, {end}: nothing is suggested. "
            "Either there is little left to learn in this stage, or the test is too short: more steps, or larger "
            f"batches{'' if failure is None else f'. It ended since {failure}'}",
        )  # fmt: skip
    slope = np.gradient(smoothed, decades)[: lowest + 1]
    steepest = int(np.argmin(slope))
    if steepest <= width:
        # The smoothing flattens the curve at its ends.
        return Reading(
            smoothed, None, float(rates[lowest]),
            f"the loss falls fastest at the lowest rates of the test, from {rates[0]:.1e} on: nothing is suggested; "
            "begin lower",
        )  # fmt: skip
    suggestion = rounded(min(rates[steepest], rates[lowest] / LEAST_DISTANCE))
    return Reading(
        smoothed, suggestion, float(rates[lowest]),
        f"the loss falls from {start:.3g} to {smoothed[lowest]:.3g}, fastest at {rates[steepest]:.1e}, is lowest at "
        f"{rates[lowest]:.1e}, {end}",
    )  # fmt: skip


def _end(rates: Floats, smoothed: Floats, level: float, lowest: int, *, diverged: bool) -> str:
    """Says what follows the minimum."""
    above = [index for index in np.flatnonzero(smoothed > level) if index > lowest]
    rises = f"rises from {rates[above[0]]:.1e} on, " if above else ""
    return (
        f"{rises}and diverges at {rates[-1]:.1e}" if diverged else f"{rises}and does not diverge up to {rates[-1]:.1e}"
    )


def _noise(losses: Floats, smoothed: Floats, number: int) -> float:
    return float((losses - smoothed)[:number].std(ddof=1))
