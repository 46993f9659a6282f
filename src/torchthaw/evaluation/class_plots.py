"""Plots of how well each class is recognised, and of the scores of right and wrong predictions."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from torchthaw.evaluation.arrays import Floats, Ids
from torchthaw.evaluation.drawing import BLUE, SKY, VERMILION, drawable, new_figure, save

PathLike = str | os.PathLike[str]

MOST_CLASSES = 100
SCORE_BINS = 20


def plot_class_scores(per_class: Mapping[str, Mapping[str, Any]], file: PathLike) -> None:
    """Draws F1 and number of images of each class, the worst class at the top and those without images at the end.

    Of more than 100 classes, the 100 worst are shown.

    Args:
        per_class: Class name -> `f1` and `support`, as `classification_metrics` gives it.
        file: Where to write the PNG.
    """
    ordered = sorted(per_class.items(), key=lambda item: (item[1]["support"] == 0, item[1]["f1"]))
    shown = ordered[:MOST_CLASSES]
    row = min(0.3, max(0.16, 6 / len(shown)))
    font = 10.0 if row > 0.2 else 7.0
    figure = new_figure(8, row * len(shown) + 1.4)
    scores, images = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
    places = np.arange(len(shown))
    f1 = [figures["f1"] for _, figures in shown]
    support = [figures["support"] for _, figures in shown]
    scores.barh(places, f1, 0.75, color=SKY)
    for place, value, count in zip(places, f1, support, strict=True):
        text = f"{value:.3f}" if count else "no images"
        scores.text(max(value, 0) + 0.01, place, text, va="center", fontsize=min(font, 9))
    images.barh(places, support, 0.75, color=BLUE)
    for place, count in zip(places, support, strict=True):
        images.text(count, place, f" {count:,}", va="center", fontsize=min(font, 9))
    scores.set_yticks(places, [drawable(name) for name, _ in shown], fontsize=font)
    title = "F1" if len(shown) == len(ordered) else f"F1 of the {len(shown)} worst of {len(ordered):,} classes"
    # Room for the figures beside the longest bars.
    scores.set(xlim=(0, 1.13), xticks=np.arange(0, 1.01, 0.2), ylim=(len(shown) - 0.4, -0.6), title=title)
    images.set(xlim=(0, 1.4 * max(1, *support)), title="images")
    images.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    for axes in (scores, images):
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    save(figure, file)


def plot_score_histogram(probabilities: Floats, labels: Ids, file: PathLike) -> None:
    """Draws how many predictions have which score, the right ones above the wrong ones.

    Args:
        probabilities: Shape (images, classes), rows sum to 1.
        labels: Class ids, shape (images,).
        file: Where to write the PNG.
    """
    score = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    figure = new_figure(6, 5)
    above, below = figure.subplots(2, 1, sharex=True)
    _draw_histogram(above, score[right], BLUE, "right")
    _draw_histogram(below, score[~right], VERMILION, "wrong")
    below.set(xlabel="score of the predicted class", xlim=(0, 1))
    save(figure, file)


def _draw_histogram(axes: Axes, scores: Floats, color: str, name: str) -> None:
    axes.hist(scores, bins=SCORE_BINS, range=(0, 1), color=color, edgecolor="white")
    median = f", median score {np.median(scores):.3f}" if len(scores) else ""
    axes.set_title(f"{len(scores):,} {name} prediction{'' if len(scores) == 1 else 's'}{median}", fontsize=10)
    axes.set_ylabel("images")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
