"""Loads images and labels from wherever they are into one shape."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, IterableDatasetDict, Value

from torchthaw.data.columns import Columns
from torchthaw.data.folders import listing
from torchthaw.data.grouping import clean_groups, group_column, groups_of
from torchthaw.data.hub_datasets import load_hub_dataset
from torchthaw.data.labels import class_list, encode, names_of
from torchthaw.data.sources import hub_name, named_splits, read_source
from torchthaw.data.streamed_splits import as_streams
from torchthaw.data.times import clean_times, exif_times, time_column
from torchthaw.errors import DataError


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

    Returns:
        A `DatasetDict` of the splits `train`, `validation` and `test`, as far as there are, each with the columns
        `image` (`Image(decode=False)`), `label` (`ClassLabel`, the same names in every split) and `path` (relative to
        the source, or `<split>/<row>` where the images have no file names); and, where they are known, `group` (text)
        and `time` (seconds since 1970, UTC, where no time zone is stated; NaN where unknown). With `streaming`, an
        `IterableDatasetDict` with the columns `image`, `label` as it is in the source, and `path` if it has one.

    Raises:
        DataError: The source, its columns, labels, groups or times cannot be used; the message says what to change.
    """
    if streaming:
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
    wanted = Columns(image_column, label_column, group_column(group), time_column(time))
    splits = read_source(source, wanted, name=name, revision=revision)
    empty = [split for split, dataset in splits.items() if len(dataset) == 0]
    if empty:
        raise DataError(f"No images in {listing(empty)} of {_describe(source)}.")
    features = {split: dataset.features["label"] for split, dataset in splits.items()}
    labels = {
        split: names_of(dataset.select_columns(["label"])[:]["label"], features[split], _column(dataset, "path"), split)
        for split, dataset in splits.items()
    }
    if class_names is None:
        train = features.get("train")
        names = class_list(labels, train.names if isinstance(train, ClassLabel) else None)
    else:
        names = [str(class_name) for class_name in class_names]
        if len(set(names)) < len(names):
            raise DataError(f"class_names names a class twice: {listing(names)}.")
    splits = _with_groups(splits, group, source)
    splits = _with_times(splits, time)
    return DatasetDict(
        {split: _with_labels(dataset, encode(labels[split], names, split), names) for split, dataset in splits.items()}
    )


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


def _with_labels(dataset: Dataset, ids: list[int], names: list[str]) -> Dataset:
    labelled = dataset.remove_columns("label").add_column("label", ids, feature=ClassLabel(names=names))
    known = [column for column in ("group", "time") if column in dataset.column_names]
    return labelled.select_columns(["image", "label", "path", *known])


def _column(dataset: Dataset, column: str) -> list[Any]:
    return dataset.select_columns([column])[:][column]


def _describe(source: object) -> str:
    return repr(os.fspath(source)) if isinstance(source, str | os.PathLike) else "the data set"
