"""From a recipe to what training takes: splits, a model with a new head, its image processor."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict

from torchthaw.backbones.anatomy import uses_transformer_recipe
from torchthaw.backbones.configuration import TorchvisionConfig
from torchthaw.backbones.image_processing import TorchvisionImageProcessor
from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.backbones.weights import locate
from torchthaw.console import Reporter
from torchthaw.data.builtin import BUILTIN_PREFIX, load_builtin_dataset
from torchthaw.data.hub_datasets import loaded_revision
from torchthaw.data.images import BadImage, check_images
from torchthaw.data.loading import load_image_dataset
from torchthaw.data.splitting import split_dataset
from torchthaw.errors import DataError, ThawError
from torchthaw.evaluation.inference import best_device
from torchthaw.recipe import DataRecipe, Recipe
from torchthaw.stages.presets import fill_defaults
from torchthaw.training.arguments import ThawTrainingArguments
from torchthaw.training.completion import SGD_MOMENTUM

IMBALANCE_FOR_MACRO_F1 = 2.0


@dataclass(frozen=True)
class PreparedData:
    """Splits ready for training, and where they came from.

    Attributes:
        splits: Images by split.
        class_names: In the order of the logits.
        bad_images: What was left out.
        origins: For each split its `origin` (`given`, `cut off`, `the rest`), and the `share` that was asked for.
        revision: Commit of a data set on the Hub, as far as it is known.
    """

    splits: DatasetDict
    class_names: list[str]
    bad_images: list[BadImage]
    origins: dict[str, dict[str, Any]]
    revision: str | None = None


def check_model(recipe: Recipe) -> None:
    """Checks backbone, weights' name and stages against each other, before anything slow is done.

    Raises:
        ThawError: the backbone or its weights are unknown, an option does not fit, or a stage names no layer group.
    """
    with as_user_error(), torch.device("meta"):
        model = TorchvisionForImageClassification(
            TorchvisionConfig(
                architecture=recipe.backbone,
                image_size=recipe.image_size,
                dropout=recipe.dropout,
                stochastic_depth=recipe.stochastic_depth,
            )
        )
        if recipe.weights is not None:
            locate(recipe.backbone, recipe.weights)
    plan = fill_defaults(recipe.stage_plan(), transformer=uses_transformer_recipe(recipe.backbone))
    plan.check_groups(list(model.layer_groups()))


def prepare_data(recipe: DataRecipe, *, seed: int, reporter: Reporter) -> PreparedData:
    """Loads, checks and splits the images of a recipe.

    Raises:
        DataError: the data cannot be read or does not fit.
    """
    splits = load_data(recipe)
    revision = loaded_revision(splits)
    bad: list[BadImage] = []
    for name, images in splits.items():
        splits[name], found = check_images(images, on_bad=recipe.on_bad_image, progress=not reporter.quiet)
        bad.extend(found)
    if bad:
        reporter.say(f"Left out {len(bad)} unreadable images: {', '.join(image.path for image in bad[:5])} ...")
    given = set(splits)
    splits = split_dataset(splits, validation=recipe.validation, test=recipe.test, seed=seed)
    if "validation" not in splits:
        raise DataError("there are no validation images; write data: {validation: 0.15} to cut some off for training")
    origins = _origins(given, splits, {"validation": recipe.validation, "test": recipe.test})
    return PreparedData(splits, splits["train"].features["label"].names, bad, origins, revision)


def _origins(given: set[str], splits: Collection[str], shares: dict[str, float | int]) -> dict[str, dict[str, Any]]:
    origins: dict[str, dict[str, Any]] = {}
    for split in splits:
        if split not in given:
            origins[split] = {"origin": "cut off", "share": shares[split]}
        else:
            rest = split == "train" and len(given) < len(splits)
            origins[split] = {"origin": "the rest" if rest else "given", "share": None}
    return origins


def load_data(recipe: DataRecipe, *, class_names: Sequence[str] | None = None) -> DatasetDict:
    """Loads the splits that a recipe's data section names.

    Args:
        recipe: The section.
        class_names: Classes of a trained model, by whose order labels are numbered; None takes the data's.
    """
    if recipe.path is not None and recipe.path.startswith(BUILTIN_PREFIX):
        return load_builtin_dataset(recipe.path.removeprefix(BUILTIN_PREFIX))
    source = recipe.path or recipe.name
    assert source is not None
    return load_image_dataset(
        source,
        name=recipe.config,
        revision=recipe.revision,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
        class_names=class_names,
    )


def build_model(
    recipe: Recipe, class_names: list[str]
) -> tuple[TorchvisionForImageClassification, TorchvisionImageProcessor]:
    """Makes the model with a new head for the classes, and its image processor.

    Raises:
        ThawError: the backbone is unknown, an option does not fit it, or its weights cannot be had.
    """
    with as_user_error():
        model = TorchvisionForImageClassification.from_torchvision(
            recipe.backbone,
            weights=recipe.weights,
            id2label=class_names,
            image_size=recipe.image_size,
            dropout=recipe.dropout,
            stochastic_depth=recipe.stochastic_depth,
        )
        processor = TorchvisionImageProcessor.from_torchvision(
            recipe.backbone, weights=recipe.weights, image_size=recipe.image_size
        )
    return model, processor


def training_arguments(recipe: Recipe, *, metric: str, folder: Path) -> ThawTrainingArguments:
    """Returns the trainer's arguments for a recipe.

    Args:
        recipe: The recipe.
        metric: What chooses the best weights.
        folder: Where checkpoints and journal go.

    Raises:
        ThawError: values do not fit together.
    """
    with as_user_error():
        return ThawTrainingArguments(
            output_dir=str(folder),
            plan=recipe.stage_plan(),
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            augmentation=recipe.augmentation,
            per_device_train_batch_size=recipe.batch_size,
            per_device_eval_batch_size=recipe.batch_size,
            metric_for_best_model=metric,
            gate=recipe.gate,
            min_gain=recipe.min_gain,
            on_reject=recipe.on_reject,
            optim=recipe.optimizer,
            optim_args=f"momentum={SGD_MOMENTUM}" if recipe.optimizer == "sgd" else None,
            max_grad_norm=recipe.max_grad_norm,
            label_smoothing_factor=recipe.label_smoothing,
            report_to=list(recipe.report_to),
            dataloader_num_workers=recipe.num_workers,
            seed=recipe.seed,
            # Without being told, accelerate leaves several processes on CPUs to themselves.
            use_cpu=best_device().type == "cpu",
            disable_tqdm=True,
        )


@contextmanager
def as_user_error() -> Iterator[None]:
    """Turns plain ValueErrors of transformers, and of the modeling code saved with models, into ThawError."""
    try:
        yield
    except ThawError:
        raise
    except ValueError as error:
        raise ThawError(str(error)) from error


def selection_metric(recipe: Recipe, data: PreparedData) -> str:
    """Returns what chooses the best weights: macro F1 or accuracy."""
    if recipe.metric != "auto":
        return recipe.metric
    counts = np.bincount(data.splits["train"]["label"], minlength=len(data.class_names))
    return "macro_f1" if counts.max() >= IMBALANCE_FOR_MACRO_F1 * max(1, counts.min()) else "accuracy"
