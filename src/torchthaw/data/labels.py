"""Class names and class ids: decided on the training split, applied by name to the others."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import ClassLabel

from torchthaw.data.folders import listing
from torchthaw.errors import DataError, did_you_mean

logger = logging.getLogger(__name__)


def names_of(values: Sequence[Any], feature: Any, paths: Sequence[str], split: str) -> list[str | int]:
    """Returns labels as class names, or as whole numbers where they are that.

    Args:
        values: Labels as they are in the column.
        feature: Type of the column; ids of a `ClassLabel` become its names.
        paths: Path of each image, for messages.
        split: Name of the split, for messages.

    Raises:
        DataError: A label is missing or neither text nor a whole number.
    """
    is_id = isinstance(feature, ClassLabel)
    missing = [
        path for value, path in zip(values, paths, strict=True) if value is None or value == "" or (is_id and value < 0)
    ]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(values)} images in {split} have no label: {listing(missing)}. "
            "Label them or leave them out."
        )
    if is_id:
        return [feature.names[value] for value in values]
    names = [str(value) if isinstance(value, bool) else value for value in values]
    if not (all(isinstance(name, str) for name in names) or all(isinstance(name, int) for name in names)):
        row = next(
            row for row, name in enumerate(names) if type(name) is not type(names[0]) or not isinstance(name, str | int)
        )
        raise DataError(
            f"The label of {paths[row]!r} in {split} is {names[row]!r}; labels are text or whole numbers, or lists of "
            "them for all images. To estimate a number is regression, which torchthaw does not do."
        )
    return names


def class_list(labels: Mapping[str, Sequence[str | int]], declared: Sequence[str] | None) -> list[str]:
    """Decides the class names in the order of their ids.

    Args:
        labels: Labels of each split.
        declared: Names that the training split's `ClassLabel` states, in its order.

    Returns:
        `declared`, else the sorted distinct labels of the training split.

    Raises:
        DataError: There is no training split, or it has one class only.
    """
    if "train" not in labels:
        raise DataError(f"There is no training split among {listing(list(labels))}; the classes are decided on it.")
    present = sorted(set(labels["train"]))
    if len(present) < 2:
        raise DataError(
            f"The training split has one class only: {listing([str(name) for name in present])}. "
            "Add images of what it is to be told apart from."
        )
    if declared is None:
        return [str(name) for name in present]
    absent = [name for name in declared if name not in present]
    if absent:
        logger.warning("No training images for %d of %d classes: %s.", len(absent), len(declared), listing(absent))
    return list(declared)


def encode(labels: Sequence[str | int], class_names: Sequence[str], split: str) -> list[int]:
    """Returns class ids, found by name.

    Raises:
        DataError: A label is not among the class names.
    """
    ids = {name: number for number, name in enumerate(class_names)}
    unknown = sorted({str(label) for label in labels} - set(ids))
    if unknown:
        hints = "".join(did_you_mean(name, class_names) for name in unknown[:1])
        raise DataError(
            f"The {split} split has images of {listing(unknown)}, which the known classes lack: "
            f"{listing(list(class_names))}.{hints} Rename or remove them, or add images of them for training."
        )
    return [ids[str(label)] for label in labels]
