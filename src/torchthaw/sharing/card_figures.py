"""Tables of measured figures, as the card's template shows them."""

from typing import Any

from torchthaw.sharing.card_numbers import NONE, count, figure, interval
from torchthaw.sharing.card_schema import Calibration, ClassFigures, CrossValidation, Results, SplitFigures

MAX_ROWS = 30
_WIDE_INTERVAL = 0.05

METRIC_NAMES = {
    "map": "mAP",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "balanced_accuracy": "balanced accuracy",
    "loss": "log loss",
    "ece": "expected calibration error",
    "hamming_loss": "Hamming loss",
}

Table = dict[str, Any]


def table(head: list[str], rows: list[list[str]], **extra: Any) -> Table | None:
    """Returns what the template shows as a table; None without rows."""
    return {"head": head, "rows": rows, **extra} if rows else None


def signed_difference(value: float | None, limits: tuple[float, float] | None) -> str:
    """Returns a difference with its sign, and its interval if there is one."""
    if value is None:
        return NONE
    shown = f"{value + 0.0:+.4f}"
    return shown if limits is None else f"{shown} ({interval(limits)})"


def headline_table(measured: dict[str, SplitFigures]) -> Table | None:
    """Shows the first figures of each split with their intervals."""
    several = any(figures.map is not None for figures in measured.values())
    rows = [
        [
            split,
            count(figures.num_images),
            figure(figures.map if several else figures.accuracy),
            interval(figures.map_interval if several else figures.accuracy_interval),
            figure(figures.macro_f1),
            interval(figures.macro_f1_interval),
        ]
        for split, figures in measured.items()
    ]
    first = METRIC_NAMES["map" if several else "accuracy"]
    return table(["split", "images", first, "95 % interval", "macro F1", "95 % interval"], rows)


def metric_table(measured: dict[str, SplitFigures]) -> Table | None:
    """Shows all figures, a column for each split."""
    rows = [
        [name, *(figure(getattr(figures, key)) for figures in measured.values())]
        for key, name in METRIC_NAMES.items()
        if any(getattr(figures, key) is not None for figures in measured.values())
    ]
    return table(["metric", *measured], rows)


def calibration_table(calibration: Calibration) -> Table | None:
    """Shows each figure of calibration by split; nothing where it changed nothing."""
    rows = [
        [split, name, figure(made.before), figure(made.after), figure(made.cross_fitted)]
        for key, name in {**METRIC_NAMES, "brier": "Brier score"}.items()
        for split, made in getattr(calibration, key, {}).items()
        if calibration.problem is None
    ]
    return table(["split", "metric", "before", "after", "cross-fitted"], rows)


def augmented_table(results: Results) -> Table | None:
    """Shows the figures of each split without and with test-time augmentation."""
    augmented = results.tta
    if augmented is None:
        return None
    pairs = {"validation": (results.validation, augmented.validation), "test": (results.test, augmented.test)}
    rows = []
    for split, (plain, mean) in pairs.items():
        for key, name in METRIC_NAMES.items():
            if plain is None or mean is None or getattr(plain, key) is None or getattr(mean, key) is None:
                continue
            made = augmented.differences.get(key) if split == "validation" else None
            difference = NONE if made is None else signed_difference(made.difference, made.interval)
            rows.append([split, name, figure(getattr(plain, key)), figure(getattr(mean, key)), difference])
    return table(["split", "metric", "without", "with", "difference"], rows)


def fold_table(crossed: CrossValidation) -> Table | None:
    """Shows each figure over the folds, and over their validation images together."""
    rows = [
        [
            METRIC_NAMES.get(key, key),
            f"{figure(spread.mean)} ± {figure(spread.std)}",
            f"{figure(min(spread.values))} to {figure(max(spread.values))}",
            figure(getattr(crossed.pooled, key, None)),
        ]
        for key, spread in crossed.figures.items()
        if spread.values
    ]
    return table(["metric", "mean ± standard deviation", "lowest to highest", "all folds together"], rows)


def most_frequent(figures: SplitFigures) -> str | None:
    """Returns the accuracy of always giving the most frequent label."""
    supports = [of_class.support for of_class in figures.per_class.values()]
    return figure(max(supports) / sum(supports)) if sum(supports) else None


def is_uncertain(figures: SplitFigures) -> bool:
    """Whether the interval of the accuracy is wide enough to be said among the limits."""
    limits = figures.accuracy_interval
    return limits is not None and limits[1] - limits[0] > _WIDE_INTERVAL


def class_table(per_class: dict[str, ClassFigures]) -> Table | None:
    """Shows the figures of each class, the worst first; of many classes `more` are left out."""
    # Classes without images have no figures to be worst by.
    ordered = sorted(per_class.items(), key=lambda item: (item[1].support == 0, item[1].f1))
    columns = {"average precision": "average_precision", "precision": "precision", "recall": "recall", "F1": "f1"}
    if all(of_class.average_precision is None for of_class in per_class.values()):
        del columns["average precision"]
    rows = [
        [name, *(figure(getattr(of_class, key)) if of_class.support else NONE for key in columns.values()),
         count(of_class.support)]
        for name, of_class in ordered[:MAX_ROWS]
    ]  # fmt: skip
    return table(["class", *columns, "images"], rows, more=max(0, len(ordered) - MAX_ROWS))
