"""Finds the image column and the label column of a table."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from datasets import ClassLabel, Features, Image, Value

from torchthaw.data.label_set_reading import set_problem
from torchthaw.data.label_sets import is_label_set
from torchthaw.errors import DataError, did_you_mean

_LABEL_NAMES = ("label", "labels", "class", "category", "target", "fine_label")
# Names of files, kept beside the image; never a label unless the user says so.
_FILE_NAMES = ("path", "file_name")
_OTHERWISE = {
    "group": "a CSV with the columns path and group, or a regular expression with one pair of parentheses",
    "time": "exif",
}


@dataclass(frozen=True)
class Columns:
    """Columns that the user named; `None` for what is to be found, or not wanted.

    Attributes:
        image: Images, or names of image files.
        label: Labels.
        group: Groups.
        time: Times.
        labels: Columns that hold 0 or 1, one for each class; or names of the classes where the label column holds lists
            of 0 and 1.
        several: Whether images have several labels; None to find it out.
        known: Classes of a model, whose names may be those of columns that hold 0 or 1.
    """

    image: str | None = None
    label: str | None = None
    group: str | None = None
    time: str | None = None
    labels: tuple[str, ...] = ()
    several: bool | None = None
    known: tuple[str, ...] = ()

    @property
    def apart(self) -> dict[str, str]:
        """Returns those besides image and label by what they are for."""
        return {name: column for name, column in (("group", self.group), ("time", self.time)) if column is not None}

    def flags(self, columns: Collection[str], where: str) -> tuple[str, ...]:
        """Returns the columns that hold 0 or 1 for a class each; none where one column holds the labels.

        Raises:
            DataError: `labels` names a column that does not exist.
        """
        if self.label is not None:
            return ()
        if not self.labels:
            return self.known if self.several and self.known and set(self.known) <= set(columns) else ()
        missing = next((name for name in self.labels if name not in columns), None)
        if missing is not None:
            raise DataError(
                f"labels names {missing!r}, and {where} has no such column; its columns are: "
                f"{', '.join(map(repr, columns))}.{did_you_mean(missing, columns)} To name the classes of a column of "
                "lists of 0 and 1, pass label_column, too."
            )
        return self.labels

    def check(self, columns: Collection[str], where: str) -> None:
        """Checks that the columns besides image and label are there.

        Raises:
            DataError: One is missing.
        """
        if any(column not in columns for column in self.apart.values()):
            self.refuse(f"{where} has the columns {', '.join(map(repr, columns))}", columns)

    def refuse(self, found: str, columns: Collection[str] = ()) -> NoReturn:
        """Says that a column besides image and label is missing, and what else `group` and `time` can be.

        Raises:
            DataError: Always.
        """
        name, column = next((name, column) for name, column in self.apart.items() if column not in columns)
        raise DataError(
            f"{name}={column!r} names no column: {found}.{did_you_mean(column, columns)} {name} is a column, or "
            f"{_OTHERWISE[name]}."
        )


def find_columns(
    features: Features,
    *,
    image_column: str | None,
    label_column: str | None,
    where: str,
    apart: Collection[str] = (),
    several: bool | None = None,
) -> tuple[str, str]:
    """Finds the image and label columns of a table, or checks those that the user named.

    Args:
        features: Columns and types.
        image_column: The user's choice, if any.
        label_column: The user's choice, if any.
        where: What messages call the table.
        apart: Columns that are for something else, and are labels only if the user says so.
        several: Whether images have several labels; None where either will do.

    Returns:
        Name of the image column, name of the label column.

    Raises:
        DataError: A column is missing, of a type that cannot work, or more than one could be meant.
    """
    image = choose_image_column(features, image_column, where)
    others = [column for column in features if column != image and (column not in apart or column == label_column)]
    eligible = [column for column in others if column not in _FILE_NAMES and _type_problem(features[column]) is None]
    lists = [column for column in eligible if is_label_set(features[column])]
    # Beside a column with one label per image, lists are more likely to be boxes or scores.
    plain = [column for column in eligible if column not in lists]
    eligible = (lists or plain) if several else (plain or lists)
    label = choose_label_column(others, eligible=eligible, given=label_column, where=where)
    problem = _type_problem(features[label])
    if problem:
        raise DataError(f"The label column {label!r} of {where} {problem}.")
    return image, label


def choose_label_column(columns: Sequence[str], *, eligible: Collection[str], given: str | None, where: str) -> str:
    """Chooses the label column: the user's, else one with a usual name, else the only one that could be it.

    Args:
        columns: All columns besides the image.
        eligible: Those whose type would do.
        given: The user's choice, if any.
        where: What messages call the table.

    Raises:
        DataError: The user's choice is missing, or none or several columns could be meant.
    """
    listed = ", ".join(map(repr, columns)) or "none"
    if given is not None:
        if not isinstance(given, str):
            raise DataError(f"label_column={given!r} does not work: one column of labels, given by name, is needed.")
        if given not in columns:
            raise DataError(
                f"{where} has no column {given!r} for labels; its other columns are: {listed}."
                f"{did_you_mean(given, columns)}"
            )
        return given
    usual = next((name for name in _LABEL_NAMES if name in columns), None)
    if usual:
        return usual
    if len(eligible) == 1:
        return next(iter(eligible))
    if not eligible:
        raise DataError(
            f"{where} has no column of labels (text, whole numbers or ClassLabel); its other columns are: {listed}."
        )
    raise DataError(
        f"{where} has several columns that could be the label: {', '.join(map(repr, eligible))}. Pass "
        f"label_column={next(iter(eligible))!r} or another; for one column of 0 and 1 for each class, pass labels with "
        "their names."
    )


def choose_image_column(features: Features, given: str | None, where: str) -> str:
    """Chooses the image column: the user's, else the only one that holds images.

    Raises:
        DataError: There is none, or several could be meant.
    """
    listed = ", ".join(map(repr, features))
    if given is not None:
        if given not in features:
            raise DataError(
                f"{where} has no column {given!r} for images; its columns are: {listed}.{did_you_mean(given, features)}"
            )
        if not _holds_images(features[given]):
            raise DataError(f"The column {given!r} of {where} has no images; its type is {features[given]}.")
        return given
    found = [column for column, feature in features.items() if _holds_images(feature)]
    if not found:
        raise DataError(
            f"{where} has no column of images; its columns are: {listed}. Cast one first: "
            "`dataset.cast_column(NAME, datasets.Image())`."
        )
    if len(found) > 1:
        raise DataError(
            f"{where} has several columns of images: {', '.join(map(repr, found))}. "
            f"Pass image_column={found[0]!r} or another."
        )
    return found[0]


def _holds_images(feature: Any) -> bool:
    if isinstance(feature, Mapping):
        return {"bytes", "path"} <= set(feature)
    return isinstance(feature, Image) or (isinstance(feature, Value) and "binary" in feature.dtype)


def _type_problem(feature: Any) -> str | None:
    """Says why a column cannot be the label; `None` if it can."""
    if isinstance(feature, ClassLabel):
        return None
    if is_label_set(feature):
        return set_problem(feature)
    if not isinstance(feature, Value):
        return f"holds no labels but {feature}"
    if feature.dtype in ("string", "large_string", "string_view", "bool") or "int" in feature.dtype:
        return None
    if feature.dtype == "null":
        return "is empty: no image has a label"
    return (
        f"has the type {feature.dtype}; labels are text or whole numbers, or lists of them. If the numbers are "
        "classes, convert them: `dataset.cast_column(NAME, datasets.Value('int64'))`. To estimate a number is "
        "regression, which torchthaw does not do"
    )
