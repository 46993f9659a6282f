"""Everything that one evaluation of a split leaves: figures, predictions by image, plots."""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchthaw.evaluation.arrays import softmax
from torchthaw.evaluation.class_plots import plot_class_scores, plot_score_histogram
from torchthaw.evaluation.metrics import classification_metrics
from torchthaw.evaluation.plots import plot_confusion_matrix, plot_reliability
from torchthaw.evaluation.predictions import write_predictions


def measure_split(
    split: str,
    logits: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    folder: Path,
    *,
    paths: Sequence[str] | None = None,
    groups: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    """Computes the figures of a split, and writes its predictions and plots below a folder.

    Args:
        split: Name of the split, and of the files.
        logits: Shape (images, classes).
        labels: Class ids, shape (images,).
        class_names: In the order of the logits.
        folder: Gets `predictions/SPLIT.jsonl`, and in `plots` `confusion_SPLIT.png`, `reliability_SPLIT.png`,
            `classes_SPLIT.png` and `scores_SPLIT.png`.
        paths: Where the images are; without it there is no file of predictions.
        groups: The group of each image, where groups are known; the intervals are then over groups.

    Returns:
        What `classification_metrics` gives.
    """
    if paths is not None:
        write_predictions(folder / "predictions" / f"{split}.jsonl", paths, labels, logits, class_names)
    plots = folder / "plots"
    plot_confusion_matrix(labels, logits.argmax(1), class_names, plots / f"confusion_{split}.png")
    plot_reliability(softmax(logits), labels, plots / f"reliability_{split}.png")
    plot_score_histogram(softmax(logits), labels, plots / f"scores_{split}.png")
    figures = classification_metrics(logits, labels, class_names, groups=groups)
    plot_class_scores(figures["per_class"], plots / f"classes_{split}.png")
    return figures
