"""Loads images and labels from wherever they are into one shape."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, IterableDatasetDict, List, Value

from torchthaw.data.columns import Columns
from torchthaw.data.folders import listing
from torchthaw.data.grouping import clean_groups, group_column, groups_of
from torchthaw.data.hub_datasets import load_hub_dataset
from torchthaw.data.label_set_reading import PROBLEM_TYPES, read_label_sets
from torchthaw.data.label_sets import is_label_set
from torchthaw.data.labels import class_list, encode, names_of
from torchthaw.data.sources import hub_name, named_splits, read_source
from torchthaw.data.streamed_splits import as_streams
from torchthaw.data.times import clean_times, exif_times, time_column
from torchthaw.errors import DataError, did_you_mean


def load_image_dataset(
    source: str | os.PathLike[str] | Dataset | DatasetDict,
    *,
    name: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: Sequence[str] | None = None,
    streaming: bool = False,
    group: str | None = None,
    time: str | None = None,
    problem_type: str = "auto",
    labels: Sequence[str] | None = None,
    label_separator: str | None = None,
) -> DatasetDict | IterableDatasetDict:
    """Loads labelled images.

    Args:
        source: One of
            - a folder with one folder per class, or with `train`, `validation` (`val`, `valid`, `dev`) and `test`
              folders of them;
            - a folder, or folders of splits, with `metadata.csv` or `metadata.jsonl` (`file_name` and a label column);
            - a `.csv`, `.jsonl` or `.parquet` file, or a folder of parquet files named by split (`train-0.parquet`);
            - the name of a data set on the Hub, `user/name`;
            - a `datasets.Dataset` (taken as the training split) or `DatasetDict`.
        name: Configuration of a Hub data set.
        revision: Branch, tag or commit of a Hub data set.
        image_column: Column with the images; found by its type by default. In a CSV or JSON lines table, the column
            with the file names ("file_name").
        label_column: Column with the labels; by default `label`, `labels`, `class`, `category`, `target` or
            `fine_label`, else the only one with text or whole numbers.
        class_names: Classes in the order of their ids, as a saved model has them; by default those of the training
            split: the names that its `ClassLabel` states, or the sorted distinct labels.
        streaming: Whether to read a Hub data set while it is used, and download nothing before. Its rows are seen only
            then, so labels that are no `ClassLabel` need `class_names` where a model does not give them.
        group: What images have in common that are not independent of each other, such as patient, product or scene:
            - the name of a column;
            - a CSV with the columns `path` and `group`, by its path in the data's folder or from here; paths are those
              of the images in the data's folder;
            - a regular expression with one capture group over these paths, `"(patient[0-9]+)_"`;
            - by default the file `groups.csv` of the data's folder, where there is one; "none" leaves it aside.
        time: When an image was taken: a column with ISO dates or seconds, or "exif" for DateTimeOriginal, else
            DateTime, of the files.
        problem_type: `single_label` for one class per image, `multi_label` for any number of them, or `auto`:
            `multi_label` where the label column holds lists, or one of the next two is given. Lists hold class names,
            class ids, or a 0 or 1 for each class (then all have the same length).
        labels: Columns that hold 0 or 1, one for each class, in the order of the class ids; together with
            `label_column`, names of the classes where it holds lists of 0 and 1.
        label_separator: What stands between the classes where the label column is text, as in "cat|dog"; "|" for
            `multi_label`. Empty text stands for none of the classes.

    Returns:
        A `DatasetDict` of the splits `train`, `validation` and `test`, as far as there are, each with the columns
        `image` (`Image(decode=False)`), `label` (`ClassLabel`, the same names in every split) and `path` (relative to
        the source, or `<split>/<row>` where the images have no file names); and, where they are known, `group` (text)
        and `time` (seconds since 1970, UTC, where no time zone is stated; NaN where unknown). Where images have several
        labels, `label` is a list of class ids (`List(ClassLabel)`). With `streaming`, an
        `IterableDatasetDict` with the columns `image`, `label` as it is in the source, and `path` if it has one.

    Raises:
        DataError: The source, its columns, labels, groups or times cannot be used; the message says what to change.
    """
    several = _asked(problem_type, labels, label_separator)
    if streaming:
        if several:
            raise DataError(
                "several labels per image are not supported for streams; load the data set without streaming"
            )
        if group is not None or time is not None:
            raise DataError(
                "group and time are for splitting and checking, and a stream is neither split nor checked, as its "
                "images are not known before they are read; load the data set without streaming, or leave them out"
            )
        where = hub_name(source)
        if where is None:
            raise DataError(
                f"streaming is for data sets on the Hub (user/name), and {_describe(source)} is none; leave it out: "
                "images of folders and tables are read from the disk when they are needed"
            )
        streams = named_splits(load_hub_dataset(where, name, revision, streaming=True), repr(where))
        return as_streams(
            streams, repr(where), image_column=image_column, label_column=label_column, class_names=class_names
        )
    wanted = Columns(
        image_column,
        label_column,
        group_column(group),
        time_column(time),
        labels=tuple(labels or ()),
        several=several,
        known=tuple(map(str, class_names or ())),
    )
    splits = read_source(source, wanted, name=name, revision=revision)
    empty = [split for split, dataset in splits.items() if len(dataset) == 0]
    if empty:
        raise DataError(f"No images in {listing(empty)} of {_describe(source)}.")
    features = {split: dataset.features["label"] for split, dataset in splits.items()}
    several = _settled(several, features, problem_type)
    found: dict[str, list[Any]]
    if several:
        found, declared = read_label_sets(splits, names=labels, separator=label_separator)
        declared = list(wanted.flags(labels or (), "labels")) or declared
    else:
        found = {
            split: names_of(rows.select_columns(["label"])[:]["label"], features[split], _column(rows, "path"), split)
            for split, rows in splits.items()
        }
        train = features.get("train")
        declared = train.names if isinstance(train, ClassLabel) else None
    if class_names is None:
        flat: dict[str, list[Any]] = {split: _flat(part) if several else part for split, part in found.items()}
        names = class_list(flat, declared)
    else:
        names = [str(class_name) for class_name in class_names]
        if len(set(names)) < len(names):
            raise DataError(f"class_names names a class twice: {listing(names)}.")
    splits = _with_groups(splits, group, source)
    splits = _with_times(splits, time)
    return DatasetDict(
        {
            split: _with_labels(rows, _encoded(found[split], names, split, several=several), names, several=several)
            for split, rows in splits.items()
        }
    )


def _asked(problem_type: str, labels: Sequence[str] | None, separator: str | None) -> bool | None:
    """Says whether several labels per image were asked for; None where the data decides."""
    if problem_type not in PROBLEM_TYPES:
        regression = " To estimate a number is regression, which torchthaw does not do: it classifies images."
        raise DataError(
            f"problem_type={problem_type!r} does not work; write one of {', '.join(PROBLEM_TYPES)}."
            f"{regression if problem_type == 'regression' else did_you_mean(problem_type, PROBLEM_TYPES)}"
        )
    given = " and ".join(key for key, value in (("labels", labels), ("label_separator", separator)) if value)
    if labels is not None and len(labels) == 1:
        raise DataError(
            f"labels names one class, {labels[0]!r}; whether an image is of it or not is one label per image: write "
            f"label_column={labels[0]!r} instead."
        )
    if problem_type == "single_label":
        if given:
            raise DataError(
                f"problem_type is 'single_label', and {given} {'are' if ' ' in given else 'is'} for several labels per "
                "image; write problem_type='multi_label', or leave one of them out."
            )
        return False
    return True if problem_type == "multi_label" or given else None


def _settled(several: bool | None, features: Mapping[str, Any], problem_type: str) -> bool:
    """Compares what was asked for with the type of the label column.

    Raises:
        DataError: There are lists and one label was asked for, or the other way round.
    """
    in_lists = [is_label_set(feature) for feature in features.values()]
    if several is False and any(in_lists):
        raise DataError(
            "The label column holds lists, so that an image may have several labels, but one label per image was asked "
            "for (problem_type 'single_label', or a model for that); write problem_type='multi_label', and for a model "
            "from_torchvision(..., problem_type='multi_label_classification')."
        )
    texts = [isinstance(feature, Value) and "string" in feature.dtype for feature in features.values()]
    if several and not all(a or b for a, b in zip(in_lists, texts, strict=True)):
        raise DataError(
            f"problem_type is {problem_type!r}, but the label column holds one class per image "
            f"({next(iter(features.values()))}). Several are a list, a text such as 'cat|dog', or columns of 0 and 1, "
            "named in labels; for one class per image, leave problem_type out."
        )
    return any(in_lists) if several is None else several


def _flat(sets: Sequence[Sequence[Any]]) -> list[Any]:
    return [label for labels in sets for label in labels]


def _encoded(labels: Sequence[Any], names: Sequence[str], split: str, *, several: bool) -> list[Any]:
    """Returns class ids by name: one for each image, or a sorted list for each."""
    if not several:
        return encode(labels, names, split)
    ids = iter(encode(_flat(labels), names, split))
    return [sorted(next(ids) for _ in found) for found in labels]


def _with_groups(splits: dict[str, Dataset], group: str | None, source: Any) -> dict[str, Dataset]:
    """Adds the column `group`, or makes text of it, where groups are known."""
    paths = _of_all(splits, "path")
    if group_column(group) is not None:
        groups: list[str] | None = clean_groups(_of_all(splits, "group"), paths, f"column {group!r}")
    else:
        groups = groups_of(group, paths, _folder_of(source))
    return splits if groups is None else _with_column(splits, "group", groups, "string")


def _folder_of(source: Any) -> Path | None:
    """Returns the folder that a folder or table of images is or lies in."""
    if not isinstance(source, str | os.PathLike) or hub_name(source) is not None:
        return None
    path = Path(source).expanduser()
    return path if path.is_dir() else path.parent


def _with_times(splits: dict[str, Dataset], time: str | None) -> dict[str, Dataset]:
    """Adds the column `time`, or makes seconds of it, where it is asked for."""
    if time is None:
        return splits
    paths = _of_all(splits, "path")
    if time_column(time) is not None:
        return _with_column(splits, "time", clean_times(_of_all(splits, "time"), paths, f"column {time!r}"), "float64")
    times = [moment for dataset in splits.values() for moment in exif_times(dataset)]
    return _with_column(splits, "time", clean_times(times, paths, "the EXIF data of the files"), "float64")


def _of_all(splits: Mapping[str, Dataset], column: str) -> list[Any]:
    """Returns a column of all splits, one after the other; names for the ids of a `ClassLabel`."""
    values: list[Any] = []
    for dataset in splits.values():
        feature, found = dataset.features[column], _column(dataset, column)
        if isinstance(feature, ClassLabel):
            found = [None if number is None or number < 0 else feature.names[number] for number in found]
        values += found
    return values


def _with_column(splits: Mapping[str, Dataset], name: str, values: Sequence[Any], kind: str) -> dict[str, Dataset]:
    """Puts values for all splits, one after the other, into a column."""
    result, start = {}, 0
    for split, dataset in splits.items():
        part = list(values[start : start + len(dataset)])
        start += len(dataset)
        bare = dataset.remove_columns(name) if name in dataset.column_names else dataset
        result[split] = bare.add_column(name, part, feature=Value(kind))
    return result


def _with_labels(dataset: Dataset, ids: list[Any], names: list[str], *, several: bool) -> Dataset:
    classes = ClassLabel(names=names)
    feature = List(classes) if several else classes
    labelled = dataset.remove_columns("label").add_column("label", ids, feature=feature)
    known = [column for column in ("group", "time") if column in dataset.column_names]
    return labelled.select_columns(["image", "label", "path", *known])


def _column(dataset: Dataset, column: str) -> list[Any]:
    return dataset.select_columns([column])[:][column]


def _describe(source: object) -> str:
    return repr(os.fspath(source)) if isinstance(source, str | os.PathLike) else "the data set"
