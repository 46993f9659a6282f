"""Learning rates of layer groups: from what a stage says to one peak rate for each group that trains."""

import fnmatch
import math
from collections.abc import Mapping, Sequence

from torchthaw.errors import PlanError, did_you_mean

HEAD = "head"
BACKBONE = "backbone"
Rate = float | Mapping[str, float] | str | None
_RANGE = ".."


def is_finite_number(value: object) -> bool:
    """Whether a value is an int or float, neither infinite nor NaN, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_rates(learning_rate: Rate, layer_decay: float | None, stage: str) -> None:
    """Checks what a stage says about its rates, as far as that is possible without a backbone.

    Args:
        learning_rate: The stage's, in any of its forms.
        layer_decay: The stage's.
        stage: Name of the stage, for messages.

    Raises:
        PlanError: a rate is no positive number, a range is malformed, or `layer_decay` contradicts it.
    """
    if isinstance(learning_rate, str):
        parse_range(learning_rate, stage)
    elif learning_rate is not None:
        rates = learning_rate if isinstance(learning_rate, Mapping) else {"": learning_rate}
        if not rates:
            raise PlanError(f"stage {stage!r}: learning_rate is an empty mapping; write, for example, {{head: 1e-3}}")
        for key, rate in rates.items():
            if not (is_finite_number(rate) and rate > 0):
                where = f" of {key!r}" if key else ""
                raise PlanError(
                    f"stage {stage!r}: the learning rate{where} is {rate!r}, so nothing would be learned; "
                    "write a positive number such as 1e-3, or leave the group out of unfreeze"
                )
    if layer_decay is None:
        return
    if isinstance(learning_rate, Mapping | str):
        form = "a range of rates" if isinstance(learning_rate, str) else "a rate per group"
        raise PlanError(
            f"stage {stage!r} gives both layer_decay and {form}; write one rate with layer_decay, or only the rates"
        )
    if not (is_finite_number(layer_decay) and 0 < layer_decay <= 1):
        raise PlanError(f"stage {stage!r}: layer_decay is {layer_decay!r}; write a factor in (0, 1]")


def parse_range(text: str, stage: str) -> tuple[float, float]:
    """Reads `low..high`.

    Raises:
        PlanError: the text is no such range, or a bound is not positive, or low is above high.
    """
    try:
        low, high = (float(part) for part in text.split(_RANGE, 1))
    except ValueError:
        raise PlanError(
            f"stage {stage!r}: learning_rate is the text {text!r}; write a number such as 1e-3 (without quotes), or a "
            "range such as 1e-5..1e-3, from the first group that trains to the head"
        ) from None
    if not (math.isfinite(high) and 0 < low <= high):
        raise PlanError(
            f"stage {stage!r}: learning_rate is {text!r}; write positive numbers, the lower one first, such as "
            "1e-5..1e-3"
        )
    return low, high


def resolve_rates(
    learning_rate: Rate, layer_decay: float | None, *, live: Sequence[str], groups: Sequence[str], stage: str
) -> dict[str, float]:
    """Returns the peak learning rate of each live group.

    Args:
        learning_rate: The stage's; not None.
        layer_decay: The stage's; None stands for 1.
        live: The groups that train, input to output.
        groups: All groups, input to output.
        stage: Name of the stage, for messages.

    Raises:
        PlanError: a key of `learning_rate` matches no group, or a live group gets no rate.
    """
    assert learning_rate is not None, "a plan's defaults are filled in before it runs"
    if isinstance(learning_rate, str):
        return _spread(*parse_range(learning_rate, stage), live)
    if not isinstance(learning_rate, Mapping):
        decay = 1.0 if layer_decay is None else layer_decay
        return {group: learning_rate * decay ** (len(groups) - 1 - groups.index(group)) for group in live}
    for key in learning_rate:
        if key != BACKBONE and not fnmatch.filter(groups, key):
            raise PlanError(
                f"stage {stage!r}: learning_rate names {key!r}, which matches no layer group."
                f"{did_you_mean(key, (*groups, BACKBONE))} There are {BACKBONE}, {', '.join(groups)}."
            )
    return {group: _rate_from_mapping(group, learning_rate, stage) for group in live}


def scale_rates(learning_rate: Rate, factor: float, stage: str) -> Rate:
    """Returns what `learning_rate` says with every rate multiplied by `factor`; None stays None."""
    if learning_rate is None:
        return None
    if isinstance(learning_rate, str):
        low, high = parse_range(learning_rate, stage)
        return f"{low * factor!r}{_RANGE}{high * factor!r}"
    if isinstance(learning_rate, Mapping):
        return {key: rate * factor for key, rate in learning_rate.items()}
    return learning_rate * factor


def _spread(low: float, high: float, live: Sequence[str]) -> dict[str, float]:
    """Spaces rates evenly on a logarithmic scale, as fastai's `slice(low, high)` does."""
    last = len(live) - 1
    if last == 0:
        return {live[0]: high}
    return {group: low ** (1 - index / last) * high ** (index / last) for index, group in enumerate(live)}


def _rate_from_mapping(group: str, rates: Mapping[str, float], stage: str) -> float:
    if group in rates:
        return rates[group]
    for key, rate in rates.items():
        if fnmatch.fnmatchcase(group, key):
            return rate
    if group != HEAD and BACKBONE in rates:
        return rates[BACKBONE]
    raise PlanError(f"stage {stage!r} trains {group!r} but learning_rate has no rate for it; add {group}: 1e-4")
