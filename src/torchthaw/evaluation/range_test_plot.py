"""The plot of a learning-rate range test."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from torchthaw.evaluation.drawing import BLACK, BLUE, SKY, VERMILION, drawable, legend_beside, new_figure, save


def plot_range_test(test: Mapping[str, Any], file: str | os.PathLike[str]) -> None:
    """Draws loss against learning rate on a logarithmic axis, with the suggestion and the plan's own rate.

    Args:
        test: `stage`, `rates`, `losses` (None where they were not finite), `smoothed` (may be shorter), `plan_rate`,
            and `suggestion` (or None).
        file: Where to write the PNG.
    """
    rates = np.array(test["rates"], dtype=float)
    losses = np.array([np.nan if loss is None else loss for loss in test["losses"]], dtype=float)
    smoothed = np.array(test["smoothed"], dtype=float)
    figure = new_figure(9, 5)
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.plot(rates, losses, "o", color=SKY, markersize=4, label="loss of a step")
    axes.plot(rates[: len(smoothed)], smoothed, color=BLUE, linewidth=2, label="smoothed")
    axes.axvline(test["plan_rate"], color=BLACK, linestyle="--", label=f"the plan's rate: {test['plan_rate']:.1e}")
    if test["suggestion"] is not None:
        axes.axvline(test["suggestion"], color=VERMILION, label=f"suggested: {test['suggestion']:.1e}")
    _set_limits(axes, losses, smoothed)
    axes.set(xlabel="highest learning rate of the layer groups", ylabel="training loss")
    axes.set_title(drawable(test["stage"]))
    axes.xaxis.set_major_locator(LogLocator(numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.0e}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    handles, names = axes.get_legend_handles_labels()
    legend_beside(axes, handles, names)
    save(figure, file)


def _set_limits(axes: Axes, losses: np.ndarray, smoothed: np.ndarray) -> None:
    """Leaves out what diverged far beyond the part of the curve that can be read."""
    if not len(smoothed):
        return
    low = min(float(np.nanmin(losses)), float(smoothed.min()))
    high = float(smoothed.max())
    margin = 0.05 * (high - low) or 0.05
    axes.set_ylim(low - margin, high + margin)
