"""Figures of an evaluation as tables on stdout."""

import sys
from collections.abc import Mapping
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from torchthaw.console import printable
from torchthaw.training.augmented_figures import difference_line

_WIDTH_OF_FILES = 200
_INTERVALS = {"map": "map_interval", "accuracy": "accuracy_interval", "macro_f1": "macro_f1_interval"}
_NAMES = {
    "map": "mAP",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "balanced_accuracy": "balanced accuracy",
    "micro_f1": "micro F1",
    "weighted_f1": "weighted F1",
    "hamming_loss": "Hamming loss",
    "top5_accuracy": "top-5 accuracy",
    "auroc": "AUROC",
    "loss": "log loss (nats)",
    "ece": "expected calibration error",
    "brier": "Brier score",
}
# A wider matrix, or one that tears words apart, is not readable; then the most frequent confusions are listed.
_WIDEST_MATRIX = 12
_CONFUSIONS = 20


def show_figures(figures: Mapping[str, Any], *, per_class: bool = False, confusion: bool = False) -> None:
    """Prints figures on stdout.

    Args:
        figures: What `evaluate_saved` gives.
        per_class: Whether to show those of each class.
        confusion: Whether to show which classes are taken for which.
    """
    # In a file there is no edge to wrap at.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_OF_FILES)
    calibrated = f", scores calibrated by temperature {figures['temperature']:.4g}" if "temperature" in figures else ""
    console.print(f"{_safe(figures['split'])}, {figures['num_images']} images{calibrated}")
    table = _table("metric", "value", "95 % interval")
    for key, name in _NAMES.items():
        if key not in figures:
            continue
        value = figures[key]
        if key == "accuracy" and "map" in figures:
            name = "all labels right"
        low, high = figures.get(_INTERVALS.get(key, ""), (None, None))
        interval = "" if low is None else f"{low:.4f} to {high:.4f}"
        table.add_row(name, "-" if value is None else f"{value:.4f}", interval)
    console.print(table)
    console.print(f"Intervals: {figures['interval_method']}.")
    if "tta" in figures:
        for metric in figures["tta"]["differences"]:
            console.print(f"Without and with test-time augmentation: {difference_line(figures['tta'], metric)}.")
    if "map" in figures:
        console.print(_label_sets(figures["per_class"]))
    elif per_class:
        table = _table("class", "precision", "recall", "F1", "images")
        for name, of in figures["per_class"].items():
            shown = [f"{of[key]:.4f}" if of["support"] else "-" for key in ("precision", "recall", "f1")]
            table.add_row(_safe(name), *shown, str(of["support"]))
        console.print(table)
    if confusion:
        console.print(_confusion(figures, console.width))
    if "test_reads" in figures:
        console.print(f"These are the test images of the run; they have been measured {figures['test_reads']} times.")


def _confusion(figures: Mapping[str, Any], width: int) -> Table | str:
    names = list(figures["per_class"])
    matrix = figures.get("confusion_matrix")
    if "map" in figures:
        return "There is no confusion matrix where images may have several labels."
    if matrix is None:
        return f"There are {len(names)} classes, too many for a confusion matrix."
    words = [max((cell_len(word) for word in _safe(name).split()), default=1) for name in names]
    # Each column has a border and a space on either side; the first one holds every name, too.
    if len(names) <= _WIDEST_MATRIX and sum(words) + max(words) + 3 * len(names) + 4 <= width:
        table = _table("true class \\ predicted", *map(_safe, names))
        for name, row in zip(names, matrix, strict=True):
            table.add_row(_safe(name), *map(str, row))
        return table
    pairs = [
        (number, true, predicted)
        for true, row in zip(names, matrix, strict=True)
        for predicted, number in zip(names, row, strict=True)
        if number and predicted != true
    ]
    table = _table("class", "taken for", "images")
    for number, true, predicted in sorted(pairs, key=lambda pair: -pair[0])[:_CONFUSIONS]:
        table.add_row(_safe(true), _safe(predicted), str(number))
    return table


def _label_sets(per_class: Mapping[str, Any]) -> Table:
    """Shows each class where images may have several labels."""
    table = _table("class", "average precision", "precision", "recall", "F1", "threshold", "images")
    for name, of in per_class.items():
        keys = ("average_precision", "precision", "recall", "f1")
        shown = [f"{of[key]:.4f}" if of["support"] else "-" for key in keys]
        table.add_row(_safe(name), *shown, f"{of['threshold']:.4f}", str(of["support"]))
    return table


def _table(*columns: str) -> Table:
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    return table


def _safe(text: str) -> str:
    return escape(printable(text))
