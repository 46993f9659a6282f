"""`torchthaw train --dry-run`: what a run would do, stage by stage and layer group by layer group, without doing it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from torchthaw.backbones.anatomy import uses_transformer_recipe
from torchthaw.backbones.configuration import TorchvisionConfig
from torchthaw.backbones.image_processing import TorchvisionImageProcessor
from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.console import Reporter
from torchthaw.cross_validation import make_folds, prepare_images
from torchthaw.data.class_balance import class_counts, label_bits
from torchthaw.data_preparation import PreparedData, selection_metric
from torchthaw.errors import WeightsError
from torchthaw.plan_rows import RunSettings, plan_rows
from torchthaw.preparation import check_model, training_arguments
from torchthaw.recipe import Recipe
from torchthaw.source_tasks import source_task
from torchthaw.stages import auto
from torchthaw.stages.plan import StagePlan
from torchthaw.stages.presets import stage_augmentation
from torchthaw.training.completion import check_data, complete_arguments, full_plan
from torchthaw.training.imbalance import ImbalanceSettings, settle
from torchthaw.training.probe_options import settle_solvers
from torchthaw.user_errors import as_user_error

_METRIC_NAMES = {"macro_f1": "macro F1", "micro_f1": "micro F1", "map": "mAP"}


def dry_run(recipe: Recipe, reporter: Reporter) -> dict[str, Any]:
    """Prints what `torchthaw train` would do; reads and checks the images, but no weights, and writes nothing.

    Returns:
        Plain JSON data: `stages` (see `plan_rows`), `num_images` by split, `total_steps`, the settings of the run, and
        `added_stage`, `name` and `steps` of the stage that the linear probe may add to them (None if it may not).
        Of a cross-validation, `stages` are those of its first fold, `total_steps` those of all folds, and
        `cross_validation` has the `folds`, `num_images` and `steps` of each, and `final_steps`, the most that a final
        model takes (None without one).

    Raises:
        ThawError: something that the recipe names does not exist or fit.
    """
    check_model(recipe)
    source_task(recipe)
    data = prepare_images(recipe, reporter, features=False)
    metric = selection_metric(recipe, data)
    settings = _settings(recipe, len(data.splits["train"]))
    with as_user_error():
        # The folder is only a name here: arguments write nothing.
        arguments = training_arguments(
            recipe, num_images=len(data.splits["train"]), metric=metric, folder=Path("stages")
        )
        check_data(arguments, data.splits["train"])
        folds = [data] if recipe.cv is None else make_folds(recipe, data, metric)
        model = _empty_model(recipe, data.class_names, settings.image_size)
        complete_arguments(arguments, model)
        balance = settle(
            ImbalanceSettings.of(arguments),
            labels=None if data.several_labels else data.splits["train"]["label"],
            class_names=data.class_names,
            several_labels=data.several_labels,
        )
        plan = settle_solvers(full_plan(arguments, model), model, arguments, data.splits["train"])
    plan = _with_augmentation(plan, arguments.asked_augmentation)
    sizes = {split: len(images) for split, images in data.splits.items()}
    fold_sizes = [{split: len(images) for split, images in fold.splits.items()} for fold in folds]
    planned = [
        plan_rows(model, plan, num_images=fold["train"], settings=_settings(recipe, fold["train"]), l2_sp=recipe.l2_sp)
        for fold in fold_sizes
    ]
    steps = [_steps(stages) for stages in planned]
    stages = planned[0]
    added = auto.may_add(
        plan.stages,
        auto.Extent(fold_sizes[0]["train"], stages[-1]["batch_size"], stages[-1]["steps"], _label_bits(folds[0])),
        validates=arguments.gate != "off",
        transformer=uses_transformer_recipe(recipe.backbone),
    )
    document: dict[str, Any] = {
        "backbone": recipe.backbone,
        "weights": recipe.weights,
        "plan": plan.name,
        **asdict(settings),
        "l2_sp": recipe.l2_sp,
        "metric": metric,
        "gate": {"gate": recipe.gate, "min_gain": recipe.min_gain, "on_reject": recipe.on_reject},
        "imbalance": balance.to_dict(),
        "num_images": sizes,
        "total_steps": sum(steps),
        "stages": stages,
        "added_stage": None if added is None else {"name": added.name, "steps": stages[-1]["steps"]},
    }
    if recipe.cv is not None:
        everything = plan_rows(model, plan, num_images=sizes["train"], settings=settings, l2_sp=recipe.l2_sp)
        document["cross_validation"] = {
            "folds": recipe.cv,
            "num_images": fold_sizes,
            "steps": steps,
            "final_steps": _steps(everything) if recipe.cv_final else None,
        }
    _print(document, plan, settings, reporter, balance.sentences(metric))
    return document


def _label_bits(data: PreparedData) -> float | None:
    if data.several_labels:
        return None
    return label_bits(class_counts(data.splits["train"]["label"], len(data.class_names)))


def _settings(recipe: Recipe, num_images: int) -> RunSettings:
    return RunSettings(recipe.optimizer, recipe.images_per_step(num_images), _image_size(recipe), recipe.max_grad_norm)


def _with_augmentation(plan: StagePlan, run: Any) -> StagePlan:
    """Writes into stages what they do to their images where neither they nor the run say it."""
    if run is not None:
        return plan
    stages = [dataclasses.replace(stage, augmentation=stage_augmentation(stage, None)) for stage in plan.stages]
    return StagePlan(tuple(stages), plan.name)


def _empty_model(recipe: Recipe, class_names: list[str], image_size: int) -> TorchvisionForImageClassification:
    config = TorchvisionConfig(
        architecture=recipe.backbone,
        image_size=image_size,
        dropout=recipe.dropout,
        stochastic_depth=recipe.stochastic_depth,
        id2label=class_names,
    )
    with torch.device("meta"):
        return TorchvisionForImageClassification(config)


def _image_size(recipe: Recipe) -> int:
    """Returns the recipe's image size, or that of the weights."""
    if recipe.image_size is not None:
        return recipe.image_size
    try:
        with as_user_error():
            processor = TorchvisionImageProcessor.from_torchvision(recipe.backbone, weights=recipe.weights)
    except OSError as error:
        raise WeightsError(
            f"the image size of the weights {recipe.weights} cannot be read: {str(error).splitlines()[0]} Write "
            "image_size: 224, or whatever they were saved with."
        ) from error
    return int(processor.crop_size["height"])


def _print(
    document: Mapping[str, Any], plan: StagePlan, settings: RunSettings, reporter: Reporter, on_imbalance: list[str]
) -> None:
    stages = document["stages"]
    clipping = f"gradients clipped to {settings.max_grad_norm:g}" if settings.max_grad_norm else "no clipping"
    reporter.say(
        f"plan {plan.name} for {document['backbone']}: {settings.optimizer}, {clipping}, "
        f"batches of {settings.batch_size}, images of {settings.image_size} pixels"
    )
    # What every stage takes from the run stands above; columns show only where stages differ from it.
    own = {key: getattr(settings, key, None) for key in (*asdict(settings), "augmentation", "views", "patience")}
    extra = [key for key, run in own.items() if any(stage[key] != run for stage in stages)]
    reporter.table(
        "stages",
        ("stage", "epochs", "steps", "warmup steps", "schedule", *(key.replace("_", " ") for key in extra)),
        [
            [
                stage["name"],
                "linear probe" if stage["solver"] == "probe" else f"{stage['epochs']:g}",
                *(stage[key] for key in ("steps", "warmup_steps", "schedule")),
                *("-" if stage[key] is None else stage[key] for key in extra),
            ]
            for stage in stages
        ],
    )
    for stage in stages:
        reporter.table(
            f"{stage['name']}: {stage['trainable_parameters']:,} of {stage['parameters']:,} parameters train",
            ("layer group", "parameters", "train", "learning rate", "weight decay", "not decayed", "BatchNorm"),
            [_cells(group) for group in stage["groups"]],
        )
    last = _fold_lines(document) if "cross_validation" in document else [_total_line(document)]
    pulled = []
    if document["l2_sp"] is not None:
        pulled = [
            f"L2-SP {document['l2_sp']:g}: in place of weight decay, the backbone's weights are pulled towards those "
            "that training begins with."
        ]
    by_probe = [stage["name"] for stage in stages if stage["by_probe"]]
    if by_probe and any(stage["solver"] == "probe" for stage in stages):
        reporter.say(
            f"The linear probe chooses the rates of {', '.join(by_probe)}, and what BatchNorm does; shown is what "
            "stands without one."
        )
    if document["added_stage"] is not None:
        reporter.say(auto.sentence_on_added(**document["added_stage"]))
    for line in (_frozen_line(plan), *pulled, _gate_line(document), *on_imbalance, *last):
        reporter.say(line)


def _cells(group: Mapping[str, Any]) -> list[str]:
    def shown(key: str, form: str) -> str:
        return "-" if group[key] is None else format(group[key], form)

    trains = group["trainable_parameters"] > 0
    return [
        group["group"],
        shown("parameters", ","),
        shown("trainable_parameters", ","),
        shown("learning_rate", ".2e"),
        shown("weight_decay", "g"),
        shown("not_decayed_parameters", ",") if trains else "-",
        shown("batch_norm", ""),
    ]


def _frozen_line(plan: StagePlan) -> str:
    line = (
        "Frozen groups are in eval mode as a whole: BatchNorm statistics, dropout and stochastic depth are those of "
        "inference"
    )
    active = [stage.name for stage in plan.stages if stage.frozen_dropout]
    return f"{line}, except for dropout and stochastic depth in {', '.join(active)}." if active else f"{line}."


def _gate_line(document: Mapping[str, Any]) -> str:
    gate, min_gain, on_reject = (document["gate"][key] for key in ("gate", "min_gain", "on_reject"))
    if gate == "off":
        return "The gate is off: every stage is kept."
    metric = _METRIC_NAMES.get(document["metric"], document["metric"])
    beyond = " beyond noise" if gate == "significant" else ""
    least = f" and by at least {min_gain:g}" if min_gain else ""
    then = "goes on with the next one from the best weights so far" if on_reject == "continue" else "ends"
    return (
        f"The gate keeps a stage if validation {metric} is better{beyond} than before it{least}; otherwise the stage "
        f"is rolled back, and the run {then}."
    )


def _total_line(document: Mapping[str, Any]) -> str:
    sizes = ", ".join(f"{count} {split}" for split, count in document["num_images"].items())
    return f"In all {document['total_steps']} steps on one process; images: {sizes}. Nothing was trained or written."


def _fold_lines(document: Mapping[str, Any]) -> list[str]:
    crossed = document["cross_validation"]
    trained, validated = (_span([sizes[split] for sizes in crossed["num_images"]]) for split in ("train", "validation"))
    lines = [
        f"Cross-validation: {crossed['folds']} folds of {document['num_images']['train']} images, each trained on "
        f"{trained} and validated on {validated} of them; the stages above are those of the first."
    ]
    if crossed["final_steps"] is not None:
        lines.append(
            f"Then a final model is trained on all of them, in at most {crossed['final_steps']} further steps."
        )
    if "test" in document["num_images"]:
        number = document["num_images"]["test"]
        read = "read once, by the final model" if crossed["final_steps"] is not None else "not read: cv_final is false"
        lines.append(f"The {number} test images are in no fold, and are {read}.")
    lines.append(
        f"In all {document['total_steps']} steps on one process for the folds. Nothing was trained or written."
    )
    return lines


def _span(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _steps(stages: list[dict[str, Any]]) -> int:
    return sum(stage["steps"] for stage in stages)
