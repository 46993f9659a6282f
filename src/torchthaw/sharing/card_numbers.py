"""How a card writes numbers: always by the same rule, so that they can be compared with `results.json`."""

import math

NONE = "-"


def figure(value: float | None) -> str:
    """Writes a metric with four decimals; a dash for what was not measured or is not finite."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.4f}"


def interval(limits: tuple[float, float] | None) -> str:
    """Writes an interval with four decimals."""
    return NONE if limits is None else f"{figure(limits[0])} to {figure(limits[1])}"


def count(number: int | None) -> str:
    """Writes a number of things, with commas between thousands."""
    return NONE if number is None else f"{number:,}"


def short(number: float | None) -> str:
    """Writes a number with three digits."""
    return NONE if number is None else f"{number:.3g}"


def p_value(value: float | None) -> str:
    """Writes a p-value with two digits."""
    if value is None:
        return NONE
    return "< 0.001" if value < 0.001 else f"{value:.2g}"
