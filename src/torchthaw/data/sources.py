"""Reads images and labels, as they are, from folders, tables, the Hub and `datasets`' own types."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Image, List, Value, load_dataset

from torchthaw.data.columns import Columns, choose_image_column, find_columns
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
from torchthaw.data.label_set_reading import ones
from torchthaw.data.labels import names_of
from torchthaw.data.metadata import read_metadata
from torchthaw.errors import DataError, did_you_mean

logger = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_TABLES = (".csv", ".jsonl", ".parquet")


def read_source(
    source: Any, wanted: Columns, *, name: str | None = None, revision: str | None = None
) -> dict[str, Dataset]:
    """Reads splits with the columns `image`, `label` as it is in the source, and `path`.

    Args:
        source: What `load_image_dataset` takes.
        wanted: The columns that the user named. Those for `group` and `time` are kept under these names.
        name: Configuration of a Hub data set.
        revision: Branch, tag or commit of a Hub data set.

    Raises:
        DataError: The source or its columns cannot be used.
    """
    if isinstance(source, Dataset):
        return _from_tables({"train": source}, "the data set", wanted)
    if isinstance(source, DatasetDict):
        return _from_tables(named_splits(source, "the data set"), "the data set", wanted)
    if not isinstance(source, str | os.PathLike):
        raise DataError(
            f"A data source of type {type(source).__name__} is not supported; pass a folder, a table, the name of a "
            "Hub data set, a Dataset or a DatasetDict (for a streamed one, `Dataset.from_list(list(streamed))`)."
        )
    path = Path(source).expanduser().absolute()
    if path.is_dir():
        tables = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
        return _from_parquet(tables, path, wanted) if tables else _from_folder(path, wanted)
    if path.is_file():
        return _from_file(path, wanted)
    text = os.fspath(source)
    if hub_name(source) is not None:
        found = load_hub_dataset(text, name, revision)
        return _from_tables(named_splits(found, repr(text)), repr(text), wanted)
    siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    raise DataError(
        f"There is no file or folder {text!r}.{did_you_mean(path.name, siblings)} "
        "For a data set on the Hub, write its full name, user/name."
    )


def hub_name(source: Any) -> str | None:
    """Returns the name of a data set on the Hub; None for what is a path or no name at all."""
    if not isinstance(source, str) or not _HUB_NAME.fullmatch(source):
        return None
    path = Path(source).expanduser().absolute()
    return None if path.exists() or path.parent.is_dir() else source


def _from_folder(root: Path, wanted: Columns) -> dict[str, Dataset]:
    table = metadata_file(root)
    if table:
        return _from_metadata(table, wanted)
    records = {}
    for split, folder in (split_folders(root) or {"train": root}).items():
        table = metadata_file(folder)
        if table:
            records[split] = read_metadata(table, root, wanted)
        elif wanted.several or wanted.labels:
            raise DataError(
                f"{str(folder)!r} has class folders, which give each image one label. For several, put the images "
                "into one folder with a metadata.csv of the columns file_name and labels, as in 1.jpg,cat|dog; or "
                "leave out problem_type, labels and label_separator."
            )
        elif wanted.image or wanted.label:
            raise DataError(
                f"{str(folder)!r} has class folders and no columns; leave out image_column and label_column."
            )
        elif wanted.apart:
            wanted.refuse(f"{str(folder)!r} has class folders and no columns")
        else:
            records[split] = read_class_folders(folder, root)
    return _from_records(records, wanted)


def _from_metadata(table: Path, wanted: Columns) -> dict[str, Dataset]:
    """Reads one table; folders named like splits in all its paths, a training split among them, are splits."""
    records = read_metadata(table, table.parent, wanted)
    by_split: dict[str | None, list[Record]] = {}
    for record in records:
        by_split.setdefault(split_of(record.path.split("/")[0]), []).append(record)
    if "train" in by_split and None not in by_split:
        return _from_records({split: found for split, found in by_split.items() if split}, wanted)
    return _from_records({"train": records}, wanted)


def _from_file(path: Path, wanted: Columns) -> dict[str, Dataset]:
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _from_parquet([path], path.parent, wanted)
    if kind in _TABLES:
        return _from_metadata(path, wanted)
    raise DataError(f"{str(path)!r} is a file; pass a folder of images, or a table ({', '.join(_TABLES)}).")


def _from_parquet(tables: list[Path], root: Path, wanted: Columns) -> dict[str, Dataset]:
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
    return _from_tables(dict(splits), repr(str(root)), wanted)


def named_splits(found: Mapping[Any, Dataset], where: str) -> dict[str, Dataset]:
    """Gives splits their usual names, in order; the ones with other names are left out with a warning.

    Args:
        found: Data by the name of the split.
        where: What messages call the data set.

    Raises:
        DataError: No name is that of a split, or two are of the same.
    """
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


def _from_records(records: Mapping[str, Sequence[Record]], wanted: Columns) -> dict[str, Dataset]:
    splits = {}
    in_lists = any(isinstance(record.label, list) for found in records.values() for record in found)
    for split in (split for split in SPLITS if split in records):
        found = records[split]
        labels: list[Any] = [record.label for record in found]
        if in_lists:
            kind: Any = _list_type(found, split)
        elif wanted.several:
            labels, kind = [None if label is None else str(label) for label in labels], Value("string")
        else:
            labels = names_of(labels, None, [record.path for record in found], split)
            kind = Value("int64" if labels and isinstance(labels[0], int) else "string")
        splits[split] = Dataset.from_dict(
            {
                "image": [{"bytes": None, "path": record.file} for record in found],
                "label": labels,
                "path": [record.path for record in found],
            },
            features=Features(image=Image(decode=False), label=kind, path=Value("string")),
        )
        for name in found[0].more if found else ():
            values = [record.more[name] for record in found]
            splits[split] = splits[split].add_column(name, values, feature=Value("string"))
    return splits


def _list_type(records: Sequence[Record], split: str) -> List:
    """Returns the type of a column of lists.

    Raises:
        DataError: An image has something else than a list of names, or of numbers.
    """
    wrong = next((record for record in records if not isinstance(record.label, list)), None)
    if wrong is not None:
        raise DataError(
            f"The label of {wrong.path!r} in {split} is {wrong.label!r}, and other images have lists; write a list for "
            "every image, an empty one for an image of none of the classes."
        )
    parts = [part for record in records for part in record.label if part is not None]
    if all(isinstance(part, str) for part in parts):
        return List(Value("string"))
    odd = next((part for part in parts if not isinstance(part, int | float)), None)
    if odd is not None:
        raise DataError(
            f"Lists of labels in {split} hold {odd!r} beside other kinds of values; write class names, class ids, or "
            "one 0 or 1 for each class."
        )
    return List(Value("float64" if any(isinstance(part, float) for part in parts) else "int64"))


def _from_tables(tables: Mapping[str, Dataset], where: str, wanted: Columns) -> dict[str, Dataset]:
    splits = {}
    for split, table in tables.items():
        place = f"{where} ({split})"
        wanted.check(list(table.features), place)
        bare = table.with_format(None)
        flags = wanted.flags(list(table.features), place)
        if flags:
            image, label = choose_image_column(table.features, wanted.image, place), "label"
            rows = bare.select_columns(list(flags))
            sets = [ones(row, flags, f"{place}, row {number}") for number, row in enumerate(rows)]
            bare = bare.remove_columns([label] if label in bare.column_names else [])
            bare = bare.add_column(label, sets, feature=List(Value("string")))
        else:
            image, label = find_columns(
                table.features,
                image_column=wanted.image,
                label_column=wanted.label,
                where=place,
                apart=wanted.apart.values(),
                several=wanted.several,
            )
        paths = bare.select_columns(["path"]) if "path" in table.features else None
        kept = bare.select_columns([image, label]).rename_columns(_renamed(image, label))
        kept = kept.cast_column("image", Image(decode=False))
        apart = {name: bare.select_columns([column]) for name, column in wanted.apart.items()}
        splits[split] = kept, paths[:]["path"] if paths else None, apart
    paths_of = _unique_paths({split: given or _file_names(kept) for split, (kept, given, _) in splits.items()})
    found = {}
    for split, (kept, _, apart) in splits.items():
        found[split] = kept.add_column("path", paths_of[split], feature=Value("string"))
        for name, rows in apart.items():
            column = wanted.apart[name]
            found[split] = found[split].add_column(name, rows[:][column], feature=rows.features[column])
    return found


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


def _root_cause(error: BaseException) -> str:
    """The first error of a chain says what is wrong; `datasets` wraps it in a general one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
