"""Everything that one evaluation of a split leaves where images may have several labels."""

import json
import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from torchthaw.errors import DataError
from torchthaw.evaluation.arrays import as_class_names, as_logits
from torchthaw.evaluation.drawing import BLUE, SKY, drawable, new_figure, save
from torchthaw.evaluation.files import replacing
from torchthaw.evaluation.multilabel import as_label_table, multilabel_metrics
from torchthaw.evaluation.multilabel_figures import THRESHOLD, decide

# Bars of more classes than this cannot be named.
_MOST_BARS = 60


def measure_label_sets(
    split: str,
    logits: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    folder: Path,
    *,
    thresholds: Sequence[float] | None = None,
    paths: Sequence[str] | None = None,
    groups: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    """Computes the figures of a split, and writes its predictions and a plot below a folder.

    Args:
        split: Name of the split, and of the files.
        logits: Shape (images, classes).
        labels: A 0 or 1 for each image and class.
        class_names: In the order of the logits.
        folder: Gets `predictions/SPLIT.jsonl` and `plots/average_precision_SPLIT.png`.
        thresholds: For each class the probability from which on an image is given it; None for 0.5.
        paths: Where the images are; without it there is no file of predictions.
        groups: The group of each image, where groups are known; the intervals are then over groups.

    Returns:
        What `multilabel_metrics` gives.
    """
    figures = multilabel_metrics(logits, labels, class_names, thresholds=thresholds, groups=groups)
    if paths is not None:
        file = folder / "predictions" / f"{split}.jsonl"
        write_label_sets(file, paths, labels, logits, class_names, thresholds=thresholds)
    plot_average_precision(figures["per_class"], folder / "plots" / f"average_precision_{split}.png")
    return figures


def write_label_sets(
    file: str | os.PathLike[str],
    paths: Sequence[str | os.PathLike[str]],
    labels: npt.ArrayLike,
    logits: npt.ArrayLike,
    class_names: Sequence[str],
    *,
    thresholds: Sequence[float] | None = None,
) -> None:
    """Writes one line per image: `path`, `label` and `predicted` (lists of class names), and `scores`.

    Scores are the sigmoid of the logits in float32, as `pipeline("image-classification")` computes them. Otherwise the
    file is as `write_predictions` has it.

    Raises:
        DataError: Logits that are not finite, or arrays, paths and names that do not fit each other.
    """
    checked = as_logits(logits).astype(np.float32)
    truth = as_label_table(labels, *checked.shape)
    names = np.array(as_class_names(class_names, checked.shape[1]), dtype=object)
    if len(paths) != len(checked):
        raise DataError(f"There are {len(paths)} paths for {len(checked)} images. Pass one path per image.")
    given = decide(checked, THRESHOLD if thresholds is None else thresholds)
    with replacing(file) as temporary, temporary.open("w", encoding="ascii", newline="\n") as lines:
        for path, label, predicted, scores in zip(paths, truth, given, expit(checked).tolist(), strict=True):
            line = {
                "path": os.fspath(path),
                "label": names[label].tolist(),
                "predicted": names[predicted].tolist(),
                "scores": dict(zip(names, scores, strict=True)),
            }
            lines.write(json.dumps(line) + "\n")


def plot_average_precision(per_class: dict[str, dict[str, Any]], file: str | os.PathLike[str]) -> None:
    """Draws the average precision of each class, best first, with the number of its images.

    Above 60 classes the bars have no names.

    Args:
        per_class: As `multilabel_metrics` gives it; classes without images are left out.
        file: Where to write the PNG.
    """
    known = {name: row for name, row in per_class.items() if row["average_precision"] is not None}
    ordered = sorted(known, key=lambda name: -known[name]["average_precision"])
    values = [known[name]["average_precision"] for name in ordered]
    shown = len(ordered) <= _MOST_BARS
    figure = new_figure(8, 1.2 + (0.25 * len(ordered) if shown else 6))
    axes = figure.subplots()
    places = np.arange(len(ordered))
    axes.barh(places, values, color=SKY if shown else BLUE)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="average precision", ylabel="" if shown else f"{len(ordered)} classes")
    if shown:
        axes.set_yticks(places, [f"{drawable(name)} ({known[name]['support']})" for name in ordered])
    else:
        axes.set_yticks([])
    axes.grid(axis="x", alpha=0.3)
    axes.set_title("average precision by class (images of it)", fontsize=10)
    save(figure, file)
