"""The figures and names that the card's template shows; wording is the template's."""

from collections.abc import Mapping
from typing import Any

import yaml

from torchthaw.sharing import card_figures
from torchthaw.sharing.card_data import CardData
from torchthaw.sharing.card_figures import MAX_ROWS, METRIC_NAMES, Table, signed_difference, table
from torchthaw.sharing.card_metadata import card_title, data_name, start_of_training
from torchthaw.sharing.card_numbers import NONE, count, figure, p_value, short
from torchthaw.sharing.card_schema import (
    Imbalance,
    Results,
    SplitFigures,
    StageResult,
)
from torchthaw.sharing.card_start import forgotten, moved
from torchthaw.sharing.markdown import one_line, shell_command
from torchthaw.sharing.markdown import without_absolute_paths as portable

MAX_PATHS = 10
SPLITS = ("train", "validation", "test")

PLOT_NAMES = {
    "curves.png": "Loss and validation metrics over epochs, with the stages",
    "learning_rates.png": "Learning rate of each layer group over steps",
    "confusion_validation.png": "Confusion matrix of the validation images",
    "confusion_test.png": "Confusion matrix of the test images",
    "reliability_validation.png": "Accuracy against confidence on the validation images",
    "reliability_test.png": "Accuracy against confidence on the test images",
    "classes_validation.png": "F1 and number of the validation images by class",
    "classes_test.png": "F1 and number of the test images by class",
    "scores_validation.png": "Scores of right and wrong predictions on the validation images",
    "scores_test.png": "Scores of right and wrong predictions on the test images",
    "confusion_out_of_fold.png": "Confusion matrix of the validation images of all folds",
    "reliability_out_of_fold.png": "Accuracy against confidence on the validation images of all folds",
    "average_precision_validation.png": "Average precision of each class on the validation images",
    "average_precision_test.png": "Average precision of each class on the test images",
    "average_precision_out_of_fold.png": "Average precision of each class on the validation images of all folds",
    "classes_out_of_fold.png": "F1 and number of the validation images of all folds by class",
    "scores_out_of_fold.png": "Scores of right and wrong predictions on the validation images of all folds",
}


def template_variables(data: CardData, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the template can name.

    Args:
        data: What the card is made of.
        metadata: The card's front matter, in which a person may have stated a license.
    """
    results = data.results
    measured = results.measured
    reporting = "test" if "test" in measured else "validation" if measured else None
    return {
        "title": card_title(data),
        "options": data.options,
        "license": _license(metadata),
        "config": data.config,
        "results": results,
        "class_names": data.config.class_names,
        "trained_on": results.num_images.get("train"),
        "version": results.versions.get("torchthaw"),
        "data_name": data_name(results),
        "start": start_of_training(data),
        "image_size": results.model.image_size or data.config.image_size,
        "has_code": data.config.auto_map is not None,
        "where": data.options.repository or "MODEL",
        "measured": measured,
        "reporting": reporting,
        "headline": card_figures.headline_table(measured),
        "metrics": card_figures.metric_table(measured),
        "calibration": card_figures.calibration_table(results.calibration) if results.calibration else None,
        "augmented": card_figures.augmented_table(results),
        "folds": card_figures.fold_table(results.cross_validation) if results.cross_validation else None,
        "most_frequent": card_figures.most_frequent(measured[reporting])
        if reporting and not data.config.several_labels
        else None,
        "uncertain": {split: figures for split, figures in measured.items() if card_figures.is_uncertain(figures)},
        "splits": _splits(results),
        "cut_off": any(split.origin == "cut off" for split in results.data.splits.values()),
        "counts": _counts(data),
        "smallest": _smallest(results),
        "without_images": _without_images(measured),
        "dropped": results.dropped_images[:MAX_PATHS] if "dropped_images" in results.model_fields_set else None,
        "dropped_more": max(0, len(results.dropped_images) - MAX_PATHS),
        "audit_findings": results.audit.findings[:MAX_ROWS] if results.audit else (),
        "audit_more": max(0, len(results.audit.findings) - MAX_ROWS) if results.audit else 0,
        "stages": _stages(results),
        "stage_metric": METRIC_NAMES.get(results.metric or "", results.metric or "metric"),
        "policies": {stage.batch_norm for stage in results.stages},
        "frozen": _frozen(results),
        "balancing": _balancing(results.imbalance) if results.imbalance else None,
        "moved": moved(results.distance_from_start),
        "forgetting": forgotten(results.forgetting),
        "classes": card_figures.class_table(measured[reporting].per_class) if reporting else None,
        "plots": {name: PLOT_NAMES.get(name, _plain_name(name)) for name in _in_order(data.plots)},
        "weights_checked": data.weights_checked,
        "command": shell_command(results.command) if results.command else None,
        "recipe": _recipe_yaml(data.recipe),
        "environment": _environment(results),
    }


def _license(metadata: Mapping[str, Any]) -> dict[str, str | None]:
    keys = {"id": "license", "name": "license_name", "link": "license_link"}
    said = {key: metadata.get(name) for key, name in keys.items()}
    return {key: value if isinstance(value, str) else None for key, value in said.items()}


# Data


def _splits(results: Results) -> Table | None:
    rows = []
    for split in SPLITS:
        origin = results.data.splits.get(split)
        number = results.num_images.get(split)
        if number is None and origin is not None and origin.counts:
            number = sum(origin.counts.values())
        if number is None and split in results.measured:
            number = results.measured[split].num_images
        if number is None and origin is None:
            continue
        how = NONE if origin is None or origin.origin is None else origin.origin
        asked = origin.share if origin is not None else None
        if asked is not None:
            how += f" ({asked:g} of the images)" if asked < 1 else f" ({asked:g} images)"
        rows.append([split, count(number), how])
    head = ["split", "images", "how it came about"]
    if all(how == NONE for *_, how in rows):
        head, rows = head[:2], [row[:2] for row in rows]
    return table(head, rows)


def _class_counts(results: Results, split: str) -> dict[str, int]:
    """Images of each class: as recorded, or else as evaluated."""
    origin = results.data.splits.get(split)
    if origin is not None and origin.counts:
        return origin.counts
    figures = results.measured.get(split)
    return {} if figures is None else {name: of_class.support for name, of_class in figures.per_class.items()}


def _counts(data: CardData) -> Table | None:
    by_split = {split: _class_counts(data.results, split) for split in SPLITS}
    known = {split: counts for split, counts in by_split.items() if counts}
    if not known:
        return None
    names = data.config.class_names
    first = next(iter(known.values()))
    if len(names) > MAX_ROWS:
        names = sorted(names, key=lambda name: -first.get(name, 0))
    rows = [[name, *(count(counts.get(name, 0)) for counts in known.values())] for name in names[:MAX_ROWS]]
    rest = [first.get(name, 0) for name in names[MAX_ROWS:]]
    more = {"more": len(rest), "fewest": min(rest, default=0), "most": max(rest, default=0), "split": next(iter(known))}
    return table(["class", *known], rows, **more)


def _smallest(results: Results) -> dict[str, Any] | None:
    counts = _class_counts(results, "train")
    if not counts:
        return None
    name = min(counts, key=lambda key: counts[key])
    return {"name": name, "images": counts[name]}


def _without_images(measured: dict[str, SplitFigures]) -> dict[str, list[str]]:
    """Names of the classes without images, by split, for splits that have such classes."""
    found = {
        split: [name for name, of_class in figures.per_class.items() if of_class.support == 0]
        for split, figures in measured.items()
    }
    return {split: names for split, names in found.items() if names}


# Training


def _stages(results: Results) -> Table | None:
    metric = METRIC_NAMES.get(results.metric or "", results.metric or "metric")
    head = ["stage", "trained, with peak learning rate", "epochs", "BatchNorm", f"validation {metric}", "difference"]
    return table([*head, "p", "kept"], [_stage_row(stage) for stage in results.stages])


def _stage_row(stage: StageResult) -> list[str]:
    made = stage.comparison
    if made is None:
        values, difference, p = figure(stage.best_metric), NONE, NONE
    else:
        values = f"{figure(made.before)} → {figure(made.after)}"
        difference, p = signed_difference(made.difference, made.interval), p_value(made.p_value)
    kept = NONE if stage.accepted is None else "yes" if stage.accepted else "no, rolled back"
    return [stage.name, _rates(stage), short(stage.epochs), stage.batch_norm or NONE, values, difference, p, kept]


def _rates(stage: StageResult) -> str:
    if stage.probe is not None:
        return f"{', '.join(stage.learning_rates)}: linear probe"
    rates = [f"{group} {short(rate)}" for group, rate in stage.learning_rates.items()]
    if len(rates) > 8:
        return f"{rates[0]} ... {rates[-1]} ({len(rates)} groups)"
    return ", ".join(rates) or NONE


def _balancing(imbalance: Imbalance) -> str | None:
    """Says in words what was done against uneven classes; None if nothing was."""
    done = []
    if imbalance.class_weights is not None:
        kind = "of the author's choice" if imbalance.class_weights == "given" else f"({imbalance.class_weights})"
        done.append(f"class weights {kind}")
    if imbalance.sampling is not None:
        done.append(f"drawing images by class ({imbalance.sampling})")
    if imbalance.loss == "logit_adjusted":
        done.append(f"a logit adjusted loss (tau {imbalance.logit_adjustment or 1:g})")
    return " and ".join(done) or None


def _frozen(results: Results) -> dict[str, list[str]] | None:
    """Names of the stages by whether what was frozen stayed as it was; None if no stage was checked."""
    checked = [stage for stage in results.stages if stage.frozen_unchanged is not None]
    if not checked:
        return None
    return {"moved": [stage.name for stage in checked if not stage.frozen_unchanged]}


# Files and surroundings


def _in_order(names: tuple[str, ...]) -> list[str]:
    return [name for name in PLOT_NAMES if name in names] + [name for name in names if name not in PLOT_NAMES]


def _plain_name(name: str) -> str:
    return name.removesuffix(".png").replace("_", " ").capitalize()


def _recipe_yaml(recipe: dict[str, Any] | None) -> str | None:
    if recipe is None:
        return None
    return yaml.safe_dump(portable(recipe), sort_keys=False, allow_unicode=True, width=1_000_000)


def _environment(results: Results) -> Table | None:
    hardware, rows = results.hardware, []
    if hardware is not None:
        cores = None if hardware.cores is None else f"{hardware.cores} cores"
        parts = [one_line(part) for part in (hardware.device, cores, hardware.platform) if part]
        rows.append(["hardware", ", ".join(parts)] if parts else [])
    if results.seconds_total is not None:
        rows.append(["time", f"{results.seconds_total:,.1f} seconds in all"])
    if results.peak_memory_mb is not None:
        rows.append(["peak memory", f"{results.peak_memory_mb:,.1f} MiB"])
    if results.emissions_kg is not None:
        rows.append(["emissions", f"{1000 * results.emissions_kg:.6g} g CO2eq ({one_line(results.emissions_source)})"])
    rows += [[name, version] for name, version in results.versions.items()]
    return table(["what", "value"], [row for row in rows if row])
