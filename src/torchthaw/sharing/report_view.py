"""The figures, tables and pictures that the report's template shows; wording is the template's."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchthaw.evaluation.files import PICTURE_PLOTS
from torchthaw.evaluation.gallery import Gallery
from torchthaw.evaluation.mistakes import Mistake
from torchthaw.evaluation.near_copies import Pair
from torchthaw.sharing import card_view
from torchthaw.sharing.card_data import CardData
from torchthaw.sharing.card_numbers import NONE, count, figure, interval, p_value, short
from torchthaw.sharing.card_schema import StageResult
from torchthaw.sharing.report_images import Embedded, embed_picture

FIGURES = {
    "accuracy": "accuracy",
    "top5_accuracy": "accuracy among the five highest scores",
    "macro_f1": "macro F1",
    "weighted_f1": "F1 weighted by images",
    "balanced_accuracy": "balanced accuracy",
    "auroc": "area under the ROC curve",
    "map": "mean average precision",
    "loss": "log loss (nats)",
    "brier": "Brier score",
    "ece": "expected calibration error",
}
SPLITS = ("test", "validation")
# A table with more rows is folded up.
MOST_ROWS_OPEN = 25


@dataclass(frozen=True)
class Plot:
    """An image of the report with what it says to those who do not see it."""

    image: Embedded
    alt: str


def template_variables(
    data: CardData, document: Mapping[str, Any], plots: Mapping[str, Embedded], gallery: Gallery | None
) -> dict[str, Any]:
    """Returns what the template can name.

    Args:
        data: What the report is made of.
        document: `results.json` as it is.
        plots: Images by the name of their file.
        gallery: Pictures; None for those among the plots.
    """
    card = card_view.template_variables(data, {})
    measured = {split: document[split] for split in SPLITS if isinstance(document.get(split), dict)}
    split = next(iter(measured), None)
    shown = {name: image for name, image in plots.items() if gallery is None or name not in PICTURE_PLOTS}
    kept = {
        name: card[name]
        for name in (
            "title", "config", "results", "data_name", "start", "image_size", "trained_on", "version", "most_frequent",
            "folds", "splits", "counts", "dropped", "dropped_more", "audit_findings", "audit_more", "balancing",
            "command", "recipe", "environment", "uncertain", "cut_off", "moved", "forgetting",
        )
    }  # fmt: skip
    return {
        **kept,
        "class_names": data.config.class_names,
        "measured": measured,
        "split": split,
        "headline": _headline(document, measured, split),
        "metrics": _metrics(measured),
        "stages": _stages(data),
        "stage_metric": FIGURES.get(data.results.metric or "", data.results.metric or "metric"),
        "classes": {name: _classes(figures) for name, figures in measured.items()},
        "most_rows_open": MOST_ROWS_OPEN,
        "plots": {name: Plot(image, _describe(name)) for name, image in shown.items()},
        "further": [name for name in shown if not _has_place(name)],
        "gallery": gallery,
        "mistakes": [_mistake(mistake) for mistake in gallery.mistakes] if gallery else [],
        "pairs": [_pair(pair) for pair in gallery.near_copies] if gallery else [],
    }


def _headline(document: Mapping[str, Any], measured: Mapping[str, Any], split: str | None) -> dict[str, Any] | None:
    """Returns the figure that a reader looks for: the metric that chose the weights, on the best split there is."""
    if split is None:
        return None
    figures = measured[split]
    asked = document.get("metric")
    # A loss says little without another one to compare it with.
    candidates = ([] if asked in (None, "loss") else [asked]) + list(FIGURES)
    name = next((name for name in candidates if _is_number(figures.get(name))), None)
    if name is None:
        return None
    limits = figures.get(f"{name}_interval")
    return {
        "name": FIGURES.get(name, name.replace("_", " ")),
        "value": f"{figures[name]:.3f}",
        "interval": None if limits is None else f"{limits[0]:.3f} to {limits[1]:.3f}",
        "images": count(figures.get("num_images")),
    }


def _metrics(measured: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Returns all figures of the measured splits, those that have no name here under their own."""
    found = {
        key for figures in measured.values() for key, value in figures.items() if _is_number(value)
    } - {"num_images"}  # fmt: skip
    names = [name for name in FIGURES if name in found] + sorted(found - set(FIGURES))
    rows = []
    for name in names:
        row = [FIGURES.get(name, name.replace("_", " "))]
        for figures in measured.values():
            limits = figures.get(f"{name}_interval")
            row += [figure(figures.get(name)), NONE if limits is None else interval(limits)]
        rows.append(row)
    head = ["figure", *(part for split in measured for part in (split, "95 % interval"))]
    return {"head": head, "rows": rows} if rows else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _classes(figures: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns precision, recall, F1 and images of all classes, the worst first, those without images last."""
    per_class = figures.get("per_class") or {}
    ordered = sorted(per_class.items(), key=lambda item: (not item[1].get("support"), item[1].get("f1") or 0))
    rows = [
        [
            name,
            *(figure(of_class.get(key)) if of_class.get("support") else NONE for key in ("precision", "recall", "f1")),
            count(of_class.get("support")),
        ]
        for name, of_class in ordered
    ]
    return {"head": ["class", "precision", "recall", "F1", "images"], "rows": rows} if rows else None


def _stages(data: CardData) -> dict[str, Any] | None:
    rows = [_stage(stage) for stage in data.results.stages]
    metric = FIGURES.get(data.results.metric or "", data.results.metric or "metric")
    head = ["stage", "kept", f"validation {metric}", "difference", "p", "epochs", "seconds", "trained parameters"]
    return {"head": [*head, "peak learning rate"], "rows": rows} if rows else None


def _stage(stage: StageResult) -> list[str]:
    made = stage.comparison
    values, difference, p = figure(stage.best_metric), NONE, NONE
    if made is not None:
        values, p = f"{figure(made.before)} → {figure(made.after)}", p_value(made.p_value)
        limits = "" if made.interval is None else f" ({interval(made.interval)})"
        difference = NONE if made.difference is None else f"{made.difference + 0.0:+.4f}{limits}"
    kept = NONE if stage.accepted is None else "kept" if stage.accepted else "rolled back"
    seconds = NONE if stage.seconds is None else f"{stage.seconds:,.1f}"
    rates = [short(rate) for rate in sorted(stage.learning_rates.values())]
    rate = NONE if not rates else rates[0] if rates[0] == rates[-1] else f"{rates[0]} to {rates[-1]}"
    if stage.probe is not None:
        rate = "linear probe"
    trained = count(stage.trainable_parameters)
    return [stage.name, kept, values, difference, p, short(stage.epochs), seconds, trained, rate]


def _describe(name: str) -> str:
    return card_view.PLOT_NAMES.get(name, name.removesuffix(".png").replace("_", " ").capitalize())


def _has_place(name: str) -> bool:
    """Whether a plot stands in a section of its own."""
    kinds = ("confusion", "reliability", "classes", "scores")
    own = {f"{kind}_{split}.png" for kind in kinds for split in (*SPLITS, "out_of_fold")}
    return name in {"curves.png", "learning_rates.png", *PICTURE_PLOTS, *own}


def _mistake(mistake: Mistake) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "path": mistake.path,
        "label": mistake.label,
        "predicted": mistake.predicted,
        "score": f"{mistake.score:.3f}",
        "label_score": f"{mistake.label_score:.3f}",
        "image": embed_picture(mistake.picture),
        "maps": None,
    }
    if mistake.maps is not None:
        shown["maps"] = {
            "seen": embed_picture(mistake.maps.seen),
            "for_predicted": embed_picture(mistake.maps.for_predicted),
            "for_label": embed_picture(mistake.maps.for_label),
            "cells": "{} by {}".format(*mistake.maps.cells),
        }
    return shown


def _pair(pair: Pair) -> dict[str, Any]:
    return {
        "likeness": None if pair.likeness is None else f"{pair.likeness:.3f}",
        "copies": [
            {"path": copy.path, "split": copy.split, "label": copy.label, "image": embed_picture(copy.picture)}
            for copy in (pair.first, pair.second)
        ],
    }
