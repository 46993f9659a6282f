"""Lists of splits: a CSV file that says of every image which split it belongs to, or that it is left out."""

import csv
import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from datasets import DatasetDict, concatenate_datasets

from torchthaw.data.folders import SPLITS, listing
from torchthaw.errors import DataError, did_you_mean

DROP = "drop"


@dataclass(frozen=True)
class SplitRow:
    """A line of such a list.

    Attributes:
        path: The image, relative to the data's folder.
        split: `train`, `validation`, `test`, or `drop` for an image that is left out.
        label: Its class, for those who read the list.
        reason: Why it is left out or was moved, for the same.
    """

    path: str
    split: str
    label: str = ""
    reason: str = ""


def write_split_list(file: str | os.PathLike[str], rows: Sequence[SplitRow]) -> None:
    """Writes a list.

    Raises:
        DataError: The file exists already: nothing is overwritten.
    """
    target = Path(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        lines = target.open("x", encoding="utf-8", newline="")
    except FileExistsError:
        raise DataError(f"{str(target)!r} exists, and nothing is overwritten; write another name.") from None
    with lines:
        table = csv.writer(lines, lineterminator="\n")
        table.writerow(field.name for field in fields(SplitRow))
        table.writerows(astuple(row) for row in rows)


def apply_split_list(dataset: DatasetDict, file: str | os.PathLike[str]) -> DatasetDict:
    """Puts every image into the split that a list names, and leaves out those that it drops.

    Args:
        dataset: Splits with the columns `image`, `label` and `path`.
        file: A CSV file with the columns `path` and `split`, such as `torchthaw audit DATA --fix FILE` writes.

    Raises:
        DataError: The list cannot be read, names a split that there is not, or does not name every image once.
    """
    wanted = _read(Path(file))
    every = concatenate_datasets([dataset[split] for split in dataset])
    paths: list[str] = every.select_columns(["path"])[:]["path"]
    present = set(paths)
    missing = [path for path in paths if path not in wanted]
    unknown = [path for path in wanted if path not in present]
    if missing or unknown:
        raise DataError(
            f"The list {str(file)!r} does not fit the data:"
            + (f" it lacks {len(missing)} images: {listing(missing)}." if missing else "")
            + (f" It names {len(unknown)} that are not there: {listing(unknown)}." if unknown else "")
            + " Write it anew with `torchthaw audit DATA --fix FILE`, or add and remove lines."
        )
    result = DatasetDict(
        {
            split: every.select(rows)
            for split in SPLITS
            if (rows := [row for row, path in enumerate(paths) if wanted[path] == split])
        }
    )
    if "train" not in result:
        raise DataError(f"The list {str(file)!r} leaves no image for training; write train in the column split.")
    return result


def _read(file: Path) -> dict[str, str]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(csv.DictReader(lines, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"Cannot read the list of splits {str(file)!r}: {error}.") from error
    columns = list(rows[0]) if rows else []
    if not {"path", "split"} <= set(columns):
        raise DataError(
            f"The list of splits {str(file)!r} has the columns {listing(list(map(str, columns)))}; it needs path and "
            "split."
        )
    wanted: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        if row["split"] not in (*SPLITS, DROP):
            raise DataError(
                f"Line {number} of {str(file)!r} names the split {row['split']!r}."
                f"{did_you_mean(row['split'], (*SPLITS, DROP))} There are {', '.join(SPLITS)} and {DROP}."
            )
        if row["path"] in wanted:
            raise DataError(f"Line {number} of {str(file)!r} names {row['path']!r} again; keep one line per image.")
        wanted[row["path"]] = row["split"]
    return wanted
