"""Loads images and labels from wherever they are into one shape."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDatasetDict, Value, load_dataset

from torchthaw.data.columns import find_columns
from torchthaw.data.folders import (
    SPLITS,
    Record,
    listing,
    metadata_file,
    read_class_folders,
    relative,
    split_folders,
    split_of,
)
from torchthaw.data.hub_datasets import load_hub_dataset
from torchthaw.data.labels import class_list, encode, names_of
from torchthaw.data.metadata import read_metadata
from torchthaw.data.streamed_splits import as_streams
from torchthaw.errors import DataError, did_you_mean

logger = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_TABLES = (".csv", ".jsonl", ".parquet")


def load_image_dataset(
    source: str | os.PathLike[str] | Dataset | DatasetDict,
    *,
    name: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: Sequence[str] | None = None,
    streaming: bool = False,
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

    Returns:
        A `DatasetDict` of the splits `train`, `validation` and `test`, as far as there are, each with the columns
        `image` (`Image(decode=False)`), `label` (`ClassLabel`, the same names in every split) and `path` (relative to
        the source, or `<split>/<row>` where the images have no file names). With `streaming`, an `IterableDatasetDict`
        with the columns `image`, `label` as it is in the source, and `path` if it has one.

    Raises:
        DataError: The source, its columns, or its labels cannot be used; the message says what to change.
    """
    if streaming:
        where = _hub_name(source)
        if where is None:
            raise DataError(
                f"streaming is for data sets on the Hub (user/name), and {_describe(source)} is none; leave it out: "
                "images of folders and tables are read from the disk when they are needed"
            )
        streams = _named_splits(load_hub_dataset(where, name, revision, streaming=True), repr(where))
        return as_streams(
            streams, repr(where), image_column=image_column, label_column=label_column, class_names=class_names
        )
    splits = _read(source, name=name, revision=revision, image_column=image_column, label_column=label_column)
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
    return DatasetDict(
        {split: _with_labels(dataset, encode(labels[split], names, split), names) for split, dataset in splits.items()}
    )


def _read(source: Any, **options: str | None) -> dict[str, Dataset]:
    """Reads splits with the columns `image`, `label` as it is in the source, and `path`."""
    columns = {key: options[key] for key in ("image_column", "label_column")}
    if isinstance(source, Dataset):
        return _from_tables({"train": source}, "the data set", **columns)
    if isinstance(source, DatasetDict):
        return _from_tables(_named_splits(source, "the data set"), "the data set", **columns)
    if not isinstance(source, str | os.PathLike):
        raise DataError(
            f"A data source of type {type(source).__name__} is not supported; pass a folder, a table, the name of a "
            "Hub data set, a Dataset or a DatasetDict (for a streamed one, `Dataset.from_list(list(streamed))`)."
        )
    path = Path(source).expanduser().absolute()
    if path.is_dir():
        tables = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
        return _from_parquet(tables, path, **columns) if tables else _from_folder(path, **columns)
    if path.is_file():
        return _from_file(path, **columns)
    text = os.fspath(source)
    if _hub_name(source) is not None:
        found = load_hub_dataset(text, options["name"], options["revision"])
        return _from_tables(_named_splits(found, repr(text)), repr(text), **columns)
    siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    raise DataError(
        f"There is no file or folder {text!r}.{did_you_mean(path.name, siblings)} "
        "For a data set on the Hub, write its full name, user/name."
    )


def _hub_name(source: Any) -> str | None:
    """Returns the name of a data set on the Hub; None for what is a path or no name at all."""
    if not isinstance(source, str) or not _HUB_NAME.fullmatch(source):
        return None
    path = Path(source).expanduser().absolute()
    return None if path.exists() or path.parent.is_dir() else source


def _from_folder(root: Path, *, image_column: str | None, label_column: str | None) -> dict[str, Dataset]:
    table = metadata_file(root)
    if table:
        return _from_metadata(table, image_column=image_column, label_column=label_column)
    records = {}
    for split, folder in (split_folders(root) or {"train": root}).items():
        table = metadata_file(folder)
        if table:
            records[split] = read_metadata(table, root, file_column=image_column, label_column=label_column)
        elif image_column or label_column:
            raise DataError(
                f"{str(folder)!r} has class folders and no columns; leave out image_column and label_column."
            )
        else:
            records[split] = read_class_folders(folder, root)
    return _from_records(records)


def _from_metadata(table: Path, *, image_column: str | None, label_column: str | None) -> dict[str, Dataset]:
    """Reads one table; folders named like splits in all its paths, a training split among them, are splits."""
    records = read_metadata(table, table.parent, file_column=image_column, label_column=label_column)
    by_split: dict[str | None, list[Record]] = {}
    for record in records:
        by_split.setdefault(split_of(record.path.split("/")[0]), []).append(record)
    if "train" in by_split and None not in by_split:
        return _from_records({split: found for split, found in by_split.items() if split})
    return _from_records({"train": records})


def _from_file(path: Path, *, image_column: str | None, label_column: str | None) -> dict[str, Dataset]:
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _from_parquet([path], path.parent, image_column=image_column, label_column=label_column)
    if kind in _TABLES:
        return _from_metadata(path, image_column=image_column, label_column=label_column)
    raise DataError(f"{str(path)!r} is a file; pass a folder of images, or a table ({', '.join(_TABLES)}).")


def _from_parquet(tables: list[Path], root: Path, **columns: str | None) -> dict[str, Dataset]:
    files: dict[str | None, list[str]] = {}
    for table in tables:
        files.setdefault(split_of(re.split(r"[-_.]", table.name)[0]), []).append(str(table))
    unnamed = files.pop(None, [])
    if unnamed and files:
        raise DataError(
            f"{str(root)!r} has parquet files named by split and others: "
            f"{listing([Path(file).name for file in unnamed])}. Start all names with train, validation or test."
        )
    found = {split: files[split] for split in SPLITS if split in files} or {"train": unnamed}
    try:
        splits = load_dataset("parquet", data_files=found)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"Cannot read the parquet files of {str(root)!r}: {_root_cause(error)}") from error
    return _from_tables(dict(splits), repr(str(root)), **columns)


def _named_splits(found: Mapping[Any, Dataset], where: str) -> dict[str, Dataset]:
    """Gives splits their usual names, in order; the ones with other names are left out with a warning."""
    keys: dict[str, str] = {}
    for key in map(str, found):
        split = split_of(key)
        if split in keys:
            raise DataError(f"{where} has two splits for {split}: {listing([keys[split], key])}; pass one of them.")
        if split:
            keys[split] = key
    others = [str(key) for key in found if str(key) not in keys.values()]
    if not keys:
        raise DataError(
            f"{where} has no split named train, validation or test but {listing(others)}. "
            f"Pass `DatasetDict({{'train': ...}})`."
        )
    if others:
        logger.warning("Left out of %s, as they are not train, validation or test: %s.", where, listing(others))
    return {split: found[keys[split]] for split in SPLITS if split in keys}


def _from_records(records: Mapping[str, Sequence[Record]]) -> dict[str, Dataset]:
    splits = {}
    for split in (split for split in SPLITS if split in records):
        found = records[split]
        labels = names_of([record.label for record in found], None, [record.path for record in found], split)
        number = bool(labels) and isinstance(labels[0], int)
        splits[split] = Dataset.from_dict(
            {
                "image": [{"bytes": None, "path": record.file} for record in found],
                "label": labels,
                "path": [record.path for record in found],
            },
            features=Features(
                image=Image(decode=False), label=Value("int64" if number else "string"), path=Value("string")
            ),
        )
    return splits


def _from_tables(
    tables: Mapping[str, Dataset], where: str, *, image_column: str | None, label_column: str | None
) -> dict[str, Dataset]:
    splits = {}
    for split, table in tables.items():
        image, label = find_columns(
            table.features, image_column=image_column, label_column=label_column, where=f"{where} ({split})"
        )
        paths = table.with_format(None).select_columns(["path"]) if "path" in table.features else None
        kept = table.with_format(None).select_columns([image, label]).rename_columns(_renamed(image, label))
        kept = kept.cast_column("image", Image(decode=False))
        splits[split] = kept, paths[:]["path"] if paths else None
    paths_of = _unique_paths({split: given or _file_names(kept) for split, (kept, given) in splits.items()})
    return {
        split: kept.add_column("path", paths_of[split], feature=Value("string")) for split, (kept, _) in splits.items()
    }


def _renamed(image: str, label: str) -> dict[str, str]:
    return {old: new for old, new in ((image, "image"), (label, "label")) if old != new}


def _file_names(dataset: Dataset) -> list[str | None]:
    """File names of an image column, without reading the images."""
    batches = dataset.select_columns(["image"]).with_format("arrow").iter(1000)
    return [path for batch in batches for path in batch.flatten()["image.path"].to_pylist()]


def _unique_paths(found: Mapping[str, Sequence[Any]]) -> dict[str, list[str]]:
    """File names relative to their common folder if every image has its own, else `<split>/<row>`."""
    every = [path for paths in found.values() for path in paths]
    if all(isinstance(path, str) and path for path in every) and len(set(every)) == len(every):
        absolute = [os.path.isabs(path) for path in every]  # noqa: PTH117 (millions of files)
        if not any(absolute):
            return {split: list(paths) for split, paths in found.items()}
        if all(absolute):
            root = Path(os.path.commonpath([str(Path(path).parent) for path in every]))
            return {split: [relative(path, root) for path in paths] for split, paths in found.items()}
    return {split: [f"{split}/{row}" for row in range(len(paths))] for split, paths in found.items()}


def _with_labels(dataset: Dataset, ids: list[int], names: list[str]) -> Dataset:
    labelled = dataset.remove_columns("label").add_column("label", ids, feature=ClassLabel(names=names))
    return labelled.select_columns(["image", "label", "path"])


def _column(dataset: Dataset, column: str) -> list[Any]:
    return dataset.select_columns([column])[:][column]


def _describe(source: object) -> str:
    return repr(os.fspath(source)) if isinstance(source, str | os.PathLike) else "the data set"


def _root_cause(error: BaseException) -> str:
    """The first error of a chain says what is wrong; `datasets` wraps it in a general one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
