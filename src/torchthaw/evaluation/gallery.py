"""The pictures of a report: the worst mistakes of a model, and near duplicates among its images."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.data.views import ImageView
from torchthaw.evaluation.files import ACTIVATION_MAPS, MISTAKES, NEAR_DUPLICATES
from torchthaw.evaluation.mistakes import Mistake, show_mistakes
from torchthaw.evaluation.near_copies import Pair, show_near_copies
from torchthaw.evaluation.picture_plots import plot_activation_maps, plot_mistakes, plot_near_copies


@dataclass(frozen=True)
class Gallery:
    """Pictures of one run.

    Attributes:
        split: Split that the mistakes are from; None where none was measured, or images may have several classes.
        wrong: How many images of it are wrong.
        mistakes: The worst of them, the surest first.
        near_copies: Near duplicates that the audit found, those across splits first.
    """

    split: str | None = None
    wrong: int = 0
    mistakes: tuple[Mistake, ...] = ()
    near_copies: tuple[Pair, ...] = ()


def make_gallery(
    model: TorchvisionForImageClassification,
    views: Mapping[str, Any],
    measured: Mapping[str, tuple[np.ndarray, np.ndarray]],
    audit: Mapping[str, Any] | None,
    folder: Path,
) -> Gallery:
    """Makes the pictures, and draws them into `plots/` below a folder.

    Mistakes are those on the validation images: who looks at mistakes on test images and then changes something has
    used these to choose. Without validation images they are those on the test images.

    Args:
        model: The classifier, where it is.
        views: Views by split; those that give tensors only have no pictures.
        measured: Logits, (images, classes), and class ids by split, as far as they were measured.
        audit: The content of `audit.json`; None without an audit.
        folder: Gets `plots/mistakes.png`, `plots/activation_maps.png` and `plots/near_duplicates.png`, those that
            there is something to draw for.
    """
    images = {split: view for split, view in views.items() if isinstance(view, ImageView)}
    one_class_each = [split for split, (_, labels) in measured.items() if labels.ndim == 1]
    split = next((split for split in ("validation", "test") if split in images and split in one_class_each), None)
    mistakes: list[Mistake] = []
    wrong = 0
    if split is not None:
        logits, labels = measured[split]
        wrong = int((logits.argmax(1) != labels).sum())
        mistakes = show_mistakes(model, images[split], logits, labels)
    pairs = show_near_copies(audit or {}, list(images.values()))
    plots = folder / "plots"
    plot_mistakes(mistakes, split or "", plots / MISTAKES)
    plot_activation_maps(mistakes, split or "", plots / ACTIVATION_MAPS)
    plot_near_copies(pairs, plots / NEAR_DUPLICATES)
    return Gallery(split, wrong, tuple(mistakes), tuple(pairs))
