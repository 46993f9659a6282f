"""Reads sets of classes from whatever says them: lists, texts, columns of 0 and 1."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import ClassLabel, Dataset, Value

from torchthaw.data.folders import listing
from torchthaw.data.label_sets import class_label_of, inner_type, is_label_set
from torchthaw.errors import DataError

logger = logging.getLogger(__name__)

PROBLEM_TYPES = ("auto", "single_label", "multi_label")
SEPARATOR = "|"
_WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]*")
_FLAGS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}


def refuse_label_sets(feature: Any, where: str) -> None:
    """Refuses several labels per image, for streams.

    Raises:
        DataError: The column holds lists.
    """
    if is_label_set(feature):
        raise DataError(
            f"The labels of {where} are lists, and several labels per image are not supported for streams; load the "
            "data set without streaming."
        )


def set_problem(feature: Any) -> str | None:
    """Says why a column of lists cannot be labels; None if it can."""
    inner = inner_type(feature)
    if isinstance(inner, ClassLabel):
        return None
    kind = inner.dtype if isinstance(inner, Value) else ""
    if kind in ("string", "large_string", "string_view", "bool") or "int" in kind or "float" in kind:
        return None
    return f"holds lists that are no labels ({feature}); lists of class names, of class ids, or of 0 and 1 are"


def ones(values: Mapping[str, Any], labels: Sequence[str], where: str) -> list[str]:
    """Returns the names of the columns of a row that hold a 1.

    Args:
        values: The row.
        labels: Names of the columns.
        where: What messages call the row.

    Raises:
        DataError: A column holds something else than 0 and 1.
    """
    found = []
    for name in labels:
        flag = _FLAGS.get(str(values.get(name)).lower())
        if flag is None:
            raise DataError(
                f"The column {name!r} of {where} holds {values.get(name)!r}; columns that are named in labels hold 1 "
                "for images of that class and 0 for others."
            )
        if flag:
            found.append(name)
    return found


def read_label_sets(
    splits: Mapping[str, Dataset], *, names: Sequence[str] | None = None, separator: str | None = None
) -> tuple[dict[str, list[list[str | int]]], list[str] | None]:
    """Reads the column `label` of all splits as sets of classes.

    Lists hold class names or ids, or one 0 or 1 for each class: the latter where all lists have the same length of at
    least 2 and hold nothing else. Text is taken apart at the separator; an empty one stands for no class.

    Args:
        splits: With the columns `label` and `path`.
        names: Names of the classes in the order of the flags, where lists are flags.
        separator: What stands between class names in a text.

    Returns:
        The classes of each image by split, and the class names that the data states in the order of their ids, if it
        does.

    Raises:
        DataError: An image has no list, or the lists are no labels.
    """
    features = {split: rows.features["label"] for split, rows in splits.items()}
    values = {split: rows.select_columns(["label"])[:]["label"] for split, rows in splits.items()}
    texts = {split for split, feature in features.items() if not is_label_set(feature)}
    for split in texts:
        values[split] = [_taken_apart(text, separator or SEPARATOR) for text in values[split]]
    for split, found in values.items():
        _refuse_missing(found, splits[split], split)
    if texts and not any(len(labels) > 1 for found in values.values() for labels in found):
        logger.warning(
            "No image has more than one label; what stands between labels is taken to be %r (data: {label_separator}).",
            separator or SEPARATOR,
        )
    declared = _declared(features, values)
    every = [labels for found in values.values() for labels in found]
    if declared is None and _are_flags(every):
        declared = list(names or map(str, range(len(every[0]))))
        if len(declared) != len(every[0]):
            raise DataError(
                f"The labels are lists of {len(every[0])} flags, and labels names {len(declared)} classes: "
                f"{listing(declared)}. Name one class for each flag."
            )
        values = {split: [_flagged(row, declared) for row in found] for split, found in values.items()}
    sets = {split: [list(dict.fromkeys(labels)) for labels in found] for split, found in values.items()}
    _check_kinds(sets)
    return _with_numbers(sets) if texts else sets, declared


def _taken_apart(text: Any, separator: str) -> list[str]:
    return [part.strip() for part in str(text or "").split(separator) if part.strip()]


def _refuse_missing(found: Sequence[Any], rows: Dataset, split: str) -> None:
    lacking = [row for row, labels in enumerate(found) if labels is None or any(_is_missing(part) for part in labels)]
    if lacking:
        paths = rows.select_columns(["path"])[:]["path"]
        raise DataError(
            f"{len(lacking)} of {len(found)} images in {split} have no list of labels, or one with gaps: "
            f"{listing([paths[row] for row in lacking])}. Write an empty list for an image of none of the classes."
        )


def _is_missing(label: Any) -> bool:
    return label is None or label == ""


def _declared(features: Mapping[str, Any], values: dict[str, list[Any]]) -> list[str] | None:
    """Puts names in the place of a `ClassLabel`'s ids; returns those of the training split in order."""
    for split, feature in features.items():
        stated = class_label_of(feature)
        if stated is not None:
            if any(number < 0 for labels in values[split] for number in labels):
                raise DataError(f"Images in {split} have the class id -1, which stands for no label; leave it out.")
            values[split] = [[stated.names[number] for number in labels] for labels in values[split]]
    train = class_label_of(features.get("train"))
    return None if train is None else list(train.names)


def _are_flags(every: Sequence[Sequence[Any]]) -> bool:
    lengths = {len(labels) for labels in every}
    return len(lengths) == 1 and min(lengths) > 1 and all(_is_flag(flag) for labels in every for flag in labels)


def _flagged(flags: Sequence[Any], names: Sequence[str]) -> list[str]:
    return [name for name, flag in zip(names, flags, strict=True) if flag]


def _is_flag(value: Any) -> bool:
    return not isinstance(value, str) and value in (0, 1)


def _check_kinds(sets: Mapping[str, Sequence[Sequence[Any]]]) -> None:
    """Refuses what is neither names nor ids."""
    parts = [part for found in sets.values() for labels in found for part in labels]
    wrong = next((part for part in parts if isinstance(part, bool) or not isinstance(part, str | int)), None)
    mixed = len({isinstance(part, str) for part in parts}) > 1
    if wrong is not None or mixed:
        example = parts[0] if wrong is None else wrong
        raise DataError(
            f"Lists of labels hold {example!r}{' beside other kinds of values' if mixed else ''}; they hold class "
            "names, class ids (whole numbers), or, all of the same length, one 0 or 1 for each class. A number to be "
            "estimated is no class: that is regression, which torchthaw does not do."
        )


def _with_numbers(sets: dict[str, list[list[str | int]]]) -> dict[str, list[list[str | int]]]:
    """Reads labels that were text as whole numbers if all of them are, so that 10 comes after 9."""
    parts = [part for found in sets.values() for labels in found for part in labels]
    if not parts or not all(_WHOLE_NUMBER.fullmatch(str(part)) for part in parts):
        return sets
    return {split: [[int(part) for part in labels] for labels in found] for split, found in sets.items()}
