"""Plots of a run as PNG files."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from torchthaw.evaluation.arrays import Floats, Ids
from torchthaw.evaluation.calibration import expected_calibration_error, reliability_bins
from torchthaw.evaluation.drawing import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    Borders,
    Stages,
    drawable,
    figure_with_stages,
    legend_beside,
    line_look,
    name_stages,
    new_figure,
    save,
    say_nothing_logged,
    shade_stages,
)

EMPTY = "#D9D9D9"
METRICS = {
    "eval_map": ("mAP", ORANGE, "-"),
    "eval_accuracy": ("accuracy", GREEN, "-"),
    "eval_macro_f1": ("macro F1", PURPLE, "--"),
    "eval_balanced_accuracy": ("balanced accuracy", BLACK, ":"),
}

PathLike = str | os.PathLike[str]
Log = Sequence[Mapping[str, Any]]


def plot_curves(log_history: Log, stage_borders: Stages, file: PathLike) -> None:
    """Draws training loss, validation loss and validation metrics over epochs, with the stages behind them.

    Args:
        log_history: The `log_history` of transformers' `TrainerState`.
        stage_borders: One mapping per stage: `name`, `start_epoch`, `end_epoch` and `accepted` (False for a stage
            that was rolled back; True or None otherwise).
        file: Where to write the PNG.
    """
    figure = figure_with_stages(9, 7, stage_borders)
    losses, metrics = figure.subplots(2, 1, sharex=True)
    _draw_series(losses, log_history, "loss", ("training loss", BLUE, "-"))
    _draw_series(losses, log_history, "eval_loss", ("validation loss", VERMILION, "--"), marker="o")
    for key, look in METRICS.items():
        _draw_series(metrics, log_history, key, look, marker="o")
    losses.set_ylabel("loss")
    metrics.set(xlabel="epoch", ylabel="validation metric")
    borders = [(float(stage["start_epoch"]), float(stage["end_epoch"])) for stage in stage_borders]
    for axes in (losses, metrics):
        axes.grid(alpha=0.3)
        shade_stages(axes, borders, stage_borders)
        handles, names = axes.get_legend_handles_labels()
        if handles:
            legend_beside(axes, handles, names)
        else:
            say_nothing_logged(axes)
    name_stages(figure, losses, borders, stage_borders)
    save(figure, file)


def plot_learning_rates(log_history: Log, stage_borders: Stages, file: PathLike) -> None:
    """Draws the learning rate of every parameter group over steps, on a log scale.

    Args:
        log_history: The `log_history` of transformers' `TrainerState`, with `learning_rate/<group>` keys; without
            any, the plain `learning_rate` is drawn. Rates of 0, and groups that a log line does not name, leave gaps.
        stage_borders: As for `plot_curves`.
        file: Where to write the PNG.
    """
    keys = _learning_rate_keys(log_history)
    lines = [line for line in log_history if any(key in line for key in keys)]
    figure = figure_with_stages(9, 5, stage_borders, lines=len(keys))
    axes = figure.subplots()
    axes.set(xlabel="step", ylabel="learning rate")
    rates = np.array([[line.get(key, math.nan) for key in keys] for line in lines], dtype=float)
    rates[~(rates > 0)] = math.nan
    if np.isfinite(rates).any():
        borders = _borders_in_steps(log_history, stage_borders)
        shade_stages(axes, borders, stage_borders)
        _draw_rates(axes, [line["step"] for line in lines], rates, keys)
        name_stages(figure, axes, borders, stage_borders)
    else:
        say_nothing_logged(axes)
    save(figure, file)


def plot_confusion_matrix(labels: Ids, predicted: Ids, class_names: Sequence[str], file: PathLike) -> None:
    """Draws which classes are taken for which: colour is the share of the true class, figures are images.

    Figures are left out above 15 classes, and above 100 classes not every name is shown.

    Args:
        labels: Class ids, shape (images,).
        predicted: Class ids, shape (images,).
        class_names: One name per class.
        file: Where to write the PNG.
    """
    size = len(class_names)
    counts = np.bincount(np.asarray(labels) * size + np.asarray(predicted), minlength=size**2).reshape(size, size)
    support = counts.sum(axis=1, keepdims=True)
    shares = np.where(support > 0, counts / np.maximum(support, 1), np.nan)
    side = min(max(0.5 * size, 3.0), 13.0)
    figure = new_figure(side + 3.2, side + 2.2)
    axes = figure.subplots()
    colors = matplotlib.colormaps["Blues"].with_extremes(bad=EMPTY)
    image = axes.imshow(shares, cmap=colors, vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    shown = range(0, size, math.ceil(size / 100))
    names = [drawable(class_names[index]) for index in shown]
    font = min(10.0, max(5.0, 0.7 * 72 * side / len(shown)))
    axes.set_xticks(shown, names, rotation=90, fontsize=font)
    axes.set_yticks(shown, names, fontsize=font)
    axes.set(xlabel="predicted", ylabel="true" if support.all() else "true (grey: no images)")
    if size <= 15:
        font = min(11.0, 72 * side / size / len(str(counts.max())))
        for row, column in np.ndindex(size, size):
            color = "white" if shares[row, column] > 0.55 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize=font)
    save(figure, file)


def plot_reliability(probabilities: Floats, labels: Ids, file: PathLike) -> None:
    """Draws accuracy against confidence in 15 bins, and how many images each bin holds (Guo et al., 2017).

    Args:
        probabilities: Shape (images, classes), rows sum to 1.
        labels: Class ids, shape (images,).
        file: Where to write the PNG.
    """
    count, confidence, accuracy = reliability_bins(probabilities, labels)
    width = 1 / len(count)
    centres = (np.arange(len(count)) + 0.5) * width
    figure = new_figure(6, 7)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.bar(centres, np.nan_to_num(accuracy), width, color=SKY, edgecolor="white", label="accuracy of the bin")
    upper.plot([0, 1], [0, 1], color=BLACK, linestyle="--", linewidth=1, label="accuracy = confidence")
    upper.plot(confidence, accuracy, "o", color=VERMILION, clip_on=False, label="bin at its mean confidence")
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    lower.bar(centres, count, width, color=BLUE, edgecolor="white")
    lower.set(xlabel="confidence of the prediction", ylabel="images")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    error = expected_calibration_error(probabilities, labels)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, title=f"expected calibration error {error:.3f}")
    save(figure, file)


def _draw_series(axes: Axes, log_history: Log, key: str, look: tuple[str, str, str], *, marker: str = "") -> None:
    label, color, style = look
    points = [(line["epoch"], line[key]) for line in log_history if key in line and "epoch" in line]
    if points:
        alone = "o" if len(points) == 1 else marker
        axes.plot(*zip(*points, strict=True), color=color, linestyle=style, marker=alone, label=label)


def _learning_rate_keys(log_history: Log) -> list[str]:
    # The fullest line first: it has the groups in their order, a stage that trains the head alone has not.
    by_groups = [[key for key in line if key.startswith("learning_rate/")] for line in log_history]
    in_order = dict.fromkeys(key for keys in sorted(by_groups, key=len, reverse=True) for key in keys)
    return list(in_order) or ["learning_rate"]


def _draw_rates(axes: Axes, steps: Sequence[int], rates: Floats, keys: Sequence[str]) -> None:
    handles = []
    for index in range(len(keys)):
        color, style = line_look(index, len(keys))
        # Thinner lines on top, so that groups with equal rates can all be seen.
        width = 1 + 2 * (len(keys) - 1 - index) / len(keys)
        marker = "." if len(steps) <= 40 else ""
        handles += axes.plot(steps, rates[:, index], color=color, linestyle=style, linewidth=width, marker=marker)
    low, high = float(np.nanmin(rates)) / 2, float(np.nanmax(rates)) * 2
    few_decades = high / low < 1000
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    axes.grid(alpha=0.3)
    legend_beside(axes, handles, [key.partition("/")[2] or "all parameters" for key in keys])


def _borders_in_steps(log_history: Log, stages: Stages) -> Borders:
    known = {(line["epoch"], line["step"]) for line in log_history if "epoch" in line and "step" in line}
    epochs, steps = zip((0, 0), *sorted(known), strict=True)
    return [
        (float(np.interp(stage["start_epoch"], epochs, steps)), float(np.interp(stage["end_epoch"], epochs, steps)))
        for stage in stages
    ]
