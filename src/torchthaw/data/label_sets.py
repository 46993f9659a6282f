"""Images with several labels: sets of classes, kept as lists of class ids in the column `label`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import ClassLabel, Dataset, LargeList, List

# What shows a set of classes on one line.
_NONE, _BETWEEN = "(none)", " + "


def is_label_set(feature: Any) -> bool:
    """Whether a column of this type holds several values per image."""
    return isinstance(feature, List | LargeList | list)


def class_label_of(feature: Any) -> ClassLabel | None:
    """Returns the classes of a column, whether it holds one of them per image or several; None if it states none."""
    inner = inner_type(feature) if is_label_set(feature) else feature
    return inner if isinstance(inner, ClassLabel) else None


def class_names_of(dataset: Dataset) -> list[str]:
    """Returns the class names of a split as `load_image_dataset` gives it, in the order of their ids."""
    declared = class_label_of(dataset.features["label"])
    return [] if declared is None else list(declared.names)


def has_label_sets(dataset: Any) -> bool:
    """Whether the images of a split may have several labels each."""
    return is_label_set(dict(dataset.features or {}).get("label"))


def multi_hot(sets: Sequence[Sequence[int]], num_classes: int) -> npt.NDArray[np.float32]:
    """Returns a 1 for each class that an image has and 0 for the others, shape (images, classes)."""
    table = np.zeros((len(sets), num_classes), dtype=np.float32)
    for row, classes in enumerate(sets):
        table[row, list(classes)] = 1
    return table


def label_counts(dataset: Dataset) -> npt.NDArray[np.int64]:
    """Returns the number of images of each class, shape (classes,); one of several classes counts in each."""
    labels = dataset.select_columns(["label"])[:]["label"]
    ids = [number for label in labels for number in label] if has_label_sets(dataset) else labels
    return np.bincount(np.asarray(ids, dtype=np.int64), minlength=len(class_names_of(dataset)))


def shown(label: int | Sequence[int], names: Sequence[str]) -> str:
    """Writes the label of an image on one line: its class, or all its classes."""
    if isinstance(label, int):
        return names[label]
    return _BETWEEN.join(names[number] for number in sorted(label)) or _NONE


def describe(sets: Sequence[Sequence[Any]], num_classes: int) -> str:
    """Says in words how many labels images have."""
    sizes = np.array([len(labels) for labels in sets])
    without = int((sizes == 0).sum())
    more = f", {without} without any" if without else ""
    return f"several labels per image: {num_classes} classes, on average {sizes.mean():.2f} labels{more}"


def inner_type(feature: Any) -> Any:
    """Returns the type of the values in a list."""
    return feature[0] if isinstance(feature, list) else feature.feature
