"""What the folds of a cross-validation say together."""

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import logit

from torchthaw.evaluation.files import replacing
from torchthaw.evaluation.measuring import measure_split
from torchthaw.evaluation.multilabel_measuring import measure_label_sets
from torchthaw.evaluation.predictions import read_predictions

FIGURES = ("accuracy", "macro_f1", "balanced_accuracy", "loss", "ece")
# Further ones where images may have several labels.
LABEL_SET_FIGURES = ("map", "micro_f1")
OUT_OF_FOLD = "out_of_fold"


def fold_figures(folds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns how validation figures are spread over the folds.

    Args:
        folds: What `classification_metrics` gives for each fold; at least two.

    Returns:
        For each of `FIGURES` (and `LABEL_SET_FIGURES`, if the folds have them) its `mean`, its `std` (sample standard
        deviation, with folds - 1 in the denominator) and its `values` by fold. The folds share training images, so
        `std / sqrt(folds)` is no standard error of the mean (Bengio and Grandvalet, 2004, J. Mach. Learn. Res. 5).
    """
    present = [name for name in (*FIGURES, *LABEL_SET_FIGURES) if name in folds[0]]
    values = {name: [float(fold[name]) for fold in folds] for name in present}
    return {
        name: {"mean": float(np.mean(found)), "std": float(np.std(found, ddof=1)), "values": found}
        for name, found in values.items()
    }


def pool_folds(
    folders: Sequence[Path],
    class_names: Sequence[str],
    output: Path,
    *,
    groups: Mapping[str, Hashable] | None = None,
    threshold: float = 0.5,
) -> dict[str, Any]:
    """Measures the validation images of all folds as one set, each by the model that was not trained on it.

    Args:
        folders: The runs of the folds, with `predictions/validation.jsonl`.
        class_names: In the order of the logits.
        output: Gets `predictions/out_of_fold.jsonl`, the lines of all folds, and the plots of these predictions.
        groups: Path of an image -> its group, where groups are known; the intervals are then over groups.
        threshold: Where images may have several labels: the probability from which on an image is given a class.

    Returns:
        What `classification_metrics` or `multilabel_metrics` gives. Its 95 % intervals take images (or groups) for
        independent of each other, and the models of the folds for one.
    """
    files = [folder / "predictions" / "validation.jsonl" for folder in folders]
    with replacing(output / "predictions" / f"{OUT_OF_FOLD}.jsonl") as temporary:
        temporary.write_bytes(b"".join(file.read_bytes() for file in files))
    rows = [row for file in files for row in read_predictions(file)]
    scores = np.array([[row["scores"][name] for name in class_names] for row in rows])
    groups_in_order = None if groups is None else [groups.get(row["path"]) for row in rows]
    if rows and isinstance(rows[0]["label"], list):
        labels = np.array([[name in row["label"] for name in class_names] for row in rows])
        # A score that was rounded to 0 or 1 is the one next to it.
        limits = np.finfo(np.float32).smallest_subnormal, 1 - np.finfo(np.float32).epsneg
        return measure_label_sets(
            OUT_OF_FOLD,
            logit(scores.clip(*limits)),
            labels,
            class_names,
            output,
            thresholds=[threshold] * len(class_names),
            groups=groups_in_order,
        )
    ids = {name: number for number, name in enumerate(class_names)}
    # Softmax gives the same for these as for the logits; a score that was rounded to 0 is the smallest above it.
    logits = np.log(np.maximum(scores, np.finfo(np.float32).smallest_subnormal))
    labels = np.array([ids[row["label"]] for row in rows])
    return measure_split(OUT_OF_FOLD, logits, labels, class_names, output, groups=groups_in_order)


def stage_votes(folds: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Returns for each stage in how many folds it was kept, and at which of its epochs it was best there.

    Args:
        folds: The stages of each fold, as `results.json` has them.

    Returns:
        For each stage, in order: `name`, `kept` (a flag by fold, false for a stage that was not reached), and
        `best_epochs` and `best_steps` by fold that kept it.
    """
    longest = max(folds, key=len)
    votes = []
    for name in (stage["name"] for stage in longest):
        found = [next((stage for stage in fold if stage["name"] == name), None) for fold in folds]
        keepers = [stage for stage in found if stage is not None and stage["accepted"]]
        votes.append(
            {
                "name": name,
                "kept": [stage is not None and stage["accepted"] for stage in found],
                "best_epochs": [_first_known(stage["best_epoch"], stage["epochs"]) for stage in keepers],
                "best_steps": [_first_known(stage["best_step"], stage["steps"]) for stage in keepers],
            }
        )
    return votes


def _first_known(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value
