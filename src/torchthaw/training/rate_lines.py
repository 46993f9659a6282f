"""Rates as lines of a recipe: what to write for a stage whose rates are all multiplied by a factor."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from torchthaw.stages.plan import Stage
from torchthaw.stages.rates import Rate, parse_range, scale_rates

# What has no use for a rate, or chooses it.
_WITHOUT_RATES = ("solver", "by_probe")


def rounded(rate: float) -> float:
    """Returns a rate to two digits."""
    return float(f"{rate:.1e}")


def scaled_rate(stage: Stage, factor: float) -> Rate:
    """Returns the `learning_rate` of a stage with every rate multiplied by a factor, to two digits, in the same form.

    Args:
        stage: With its defaults filled in.
        factor: Of all rates.
    """
    scaled = scale_rates(stage.learning_rate, factor, stage.name)
    if isinstance(scaled, str):
        low, high = map(rounded, parse_range(scaled, stage.name))
        return f"{low:g}..{high:g}"
    if isinstance(scaled, Mapping):
        return {group: rounded(rate) for group, rate in scaled.items()}
    return None if scaled is None else rounded(scaled)


def stage_line(written: Stage, full: Stage, learning_rate: Rate) -> str:
    """Returns a stage with a learning rate as a line of a recipe's `stages`.

    Args:
        written: The stage as the plan has it.
        full: The same with its defaults filled in: a rate that is written down no longer brings the layer decay of the
            backbone's family with it.
        learning_rate: What to write.
    """
    entry: dict[str, Any] = {"name": written.name, "unfreeze": _plain(written.unfreeze)}
    for field in dataclasses.fields(Stage):
        value = getattr(written, field.name)
        if field.name not in (*entry, *_WITHOUT_RATES) and value != field.default:
            entry[field.name] = value
    entry["learning_rate"] = learning_rate
    if full.layer_decay is not None and not full.trains_head_alone:
        entry["layer_decay"] = full.layer_decay
    return "- " + yaml.safe_dump(
        entry, default_flow_style=True, sort_keys=False, allow_unicode=True, width=2**31 - 1
    ).rstrip("\n")


def _plain(unfreeze: str | int | Sequence[str]) -> Any:
    return list(unfreeze) if isinstance(unfreeze, tuple) else unfreeze
