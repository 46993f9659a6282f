"""From a recipe's `forgetting` to images whose labels are outputs of the pretrained head."""

from pathlib import Path

from datasets import ClassLabel, Dataset

from torchthaw.backbones.categories import Categories, categories_of
from torchthaw.data.builtin import BUILTIN_PREFIX
from torchthaw.data.grouping import NO_GROUPS
from torchthaw.data.label_sets import class_names_of
from torchthaw.data.source_classes import match_classes
from torchthaw.data.sources import hub_name
from torchthaw.data_preparation import load_data
from torchthaw.errors import DataError, did_you_mean
from torchthaw.recipe import DataRecipe, Recipe
from torchthaw.training.forgetting import SourceTask
from torchthaw.training.forgetting_settings import ForgettingRecipe
from torchthaw.user_errors import as_user_error

_PREFERRED = ("validation", "test", "train")


def source_task(recipe: Recipe) -> SourceTask | None:
    """Loads the images of the source task and matches their classes; decodes and downloads no weights.

    Returns:
        None if the recipe does not ask for it.

    Raises:
        DataError: the images cannot be read, have no such split, several labels each, or a class that the weights do
            not know.
        WeightsError: the weights cannot be read, or have no classes.
    """
    asked = recipe.forgetting
    if asked is None or recipe.weights is None:
        return None
    with as_user_error():
        categories = categories_of(recipe.backbone, recipe.weights)
    section = DataRecipe(
        path=asked.data,
        config=asked.config,
        revision=asked.revision,
        image_column=asked.image_column,
        label_column=asked.label_column,
        group=NO_GROUPS,
    )
    splits = load_data(section, problem_type="single_label")
    split = asked.split or next(name for name in _PREFERRED if name in splits)
    if split not in splits:
        raise DataError(
            f"forgetting: {asked.data} has no split {split!r}.{did_you_mean(split, splits)} It has {', '.join(splits)}"
        )
    images = _renumbered(splits[split], asked, categories)
    # The folders above are of this machine only.
    is_folder = hub_name(asked.data) is None and not asked.data.startswith(BUILTIN_PREFIX)
    return SourceTask(images, recipe.weights, Path(asked.data).resolve().name if is_folder else asked.data, split)


def _renumbered(images: Dataset, asked: ForgettingRecipe, categories: Categories) -> Dataset:
    outputs = match_classes(
        class_names_of(images),
        categories.names,
        categories.number,
        given=asked.names,
        imagenet=categories.imagenet,
        what=asked.data,
        source=categories.description,
    )
    names = categories.names or tuple(map(str, range(categories.number)))
    labels = [outputs[label] for label in images.select_columns(["label"])[:]["label"]]
    return images.remove_columns("label").add_column("label", labels, feature=ClassLabel(names=list(names)))
