"""The gate between stages: whether a stage is kept, by the model's metric after it and before it."""

import math
from dataclasses import dataclass
from typing import Any, cast

from torchthaw.errors import PlanError, did_you_mean
from torchthaw.training.comparison import ONE_STANDARD_ERROR, ROUNDING, Comparison, figure

GATES = ("best", "significant", "off")


@dataclass(frozen=True)
class Decision:
    """Whether a stage is kept.

    Attributes:
        accepted: Whether the run goes on from the stage's weights.
        reason: One sentence with the figures.
        comparison: What it was decided on; None if nothing was validated before.
    """

    accepted: bool
    reason: str
    comparison: Comparison | None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON data."""
        comparison = None if self.comparison is None else self.comparison.to_dict()
        return {"accepted": self.accepted, "reason": self.reason, "comparison": comparison}


def decide(
    gate: str,
    comparison: Comparison | None,
    *,
    min_gain: float = 0.0,
    greater_is_better: bool = True,
    alpha: float = 0.05,
    from_new_head: bool = False,
    tolerant: bool = False,
) -> Decision:
    """Decides whether a stage is kept.

    Args:
        gate: "off" keeps every stage; "best" one with a better metric, a tie not being better; "significant" one with
            a better metric whose p-value is below `alpha` as well.
        comparison: The stage's metric against that before it; None if nothing was validated before, so that there is
            nothing to lose.
        min_gain: Least gain for "best" and "significant".
        greater_is_better: Whether the metric is to rise.
        alpha: Level of the test of "significant".
        from_new_head: Whether the head was untrained before the stage and was trained in it. Such a stage is kept if
            only its metric is finite: with few validation images an untrained head may be right by chance, and to go
            back to it helps nobody.
        tolerant: Whether "best", without a least gain, keeps a stage that is no worse by more than one standard error
            too (the one standard error rule: Breiman et al., 1984): one that is known to be better more often than not,
            of which few validation images could tell only by chance.

    Raises:
        PlanError: the gate is unknown.
    """
    if gate not in GATES:
        raise PlanError(f"unknown gate {gate!r}.{did_you_mean(gate, GATES)} There are {', '.join(GATES)}.")
    if comparison is None:
        return Decision(True, "there was no validation before the stage to compare with: kept", None)
    accepted, verdict = _verdict(gate, comparison, min_gain, greater_is_better, alpha)
    if tolerant and not accepted and gate == "best" and not min_gain and _is_within_one_standard_error(comparison):
        accepted, verdict = True, "no worse by more than one standard error, kept"
    if not accepted and from_new_head and math.isfinite(comparison.after):
        accepted = True
        verdict = f"{verdict.removesuffix(', not kept')}, but kept, since the head was untrained before it"
    return Decision(accepted, f"{_figures(comparison)}: {verdict}", comparison)


def _verdict(
    gate: str, comparison: Comparison, min_gain: float, greater_is_better: bool, alpha: float
) -> tuple[bool, str]:
    if gate == "off":
        return True, "kept, as every stage is with the gate off"
    if not math.isfinite(comparison.after):
        return False, "not finite, not kept"
    if not math.isfinite(comparison.before):
        return True, "finite again, kept"
    gain = comparison.difference if greater_is_better else -comparison.difference
    if gain < -ROUNDING:
        return False, "worse, not kept"
    if gain <= ROUNDING:
        return False, "no better, not kept"
    if gain < min_gain - ROUNDING:
        return False, f"better, but by less than the least gain of {min_gain:g}, not kept"
    if gate == "significant" and comparison.p_value is None:
        return False, "better, but whether beyond chance cannot be tested, not kept"
    if gate == "significant" and comparison.p_value is not None and comparison.p_value >= alpha:
        return False, f"better, but not beyond chance (p is not below {alpha:g}), not kept"
    return True, "better, kept"


def _is_within_one_standard_error(comparison: Comparison) -> bool:
    known = math.isfinite(comparison.after) and comparison.p_value is not None
    return known and cast(float, comparison.p_value) >= ONE_STANDARD_ERROR


def _figures(comparison: Comparison) -> str:
    values = f"validation {comparison.metric} {figure(comparison.before)} -> {figure(comparison.after)}"
    if comparison.interval is None or comparison.p_value is None:
        return f"{values} ({figure(comparison.difference, '+')}, {comparison.method})"
    low, high = comparison.interval
    p_value = "p < 0.001" if comparison.p_value < 0.001 else f"p = {comparison.p_value:.2g}"
    return f"{values} ({figure(comparison.difference, '+')}, 95 % interval {figure(low)} to {figure(high)}, {p_value})"
