"""Reads `metadata.csv` and `metadata.jsonl`: one row per image with its file name and label."""

import csv
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from torchthaw.data.columns import Columns, choose_label_column
from torchthaw.data.folders import Record, listing, relative
from torchthaw.data.label_set_reading import ones
from torchthaw.errors import DataError, did_you_mean

# "007" is a name: as a number it would lose its zeros.
_WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]*")
_DECIMAL_NUMBER = re.compile(r"[+-]?[0-9]+\.[0-9]*")


def read_metadata(file: Path, root: Path, wanted: Columns) -> list[Record]:
    """Reads a table of images in the layout of `datasets`' imagefolder.

    Args:
        file: CSV with a header, or JSON lines.
        root: What the paths of the records are relative to.
        wanted: The columns: images are file names, relative to the folder of the table, by default in "file_name";
            labels are found by name, or as the only other column.

    Raises:
        DataError: The table cannot be read, columns are missing, or files are missing, outside the folder or named
            twice (all are listed).
    """
    rows = read_csv(file) if file.suffix.lower() == ".csv" else _read_json_lines(file)
    if not rows:
        raise DataError(f"{str(file)!r} has no rows.")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    file_column = wanted.image or "file_name"
    if file_column not in columns:
        raise DataError(
            f"{str(file)!r} has no column {file_column!r}; its columns are {listing(columns)}. Call the column with "
            f"the file names 'file_name', or pass image_column.{did_you_mean(file_column, columns)}"
        )
    wanted.check(columns, repr(str(file)))
    left_out = {file_column, *wanted.apart.values()} - {wanted.label}
    candidates = [column for column in columns if column not in left_out]
    names = [row.get(file_column) for row in rows]
    _check_names(names, file)
    flags = wanted.flags(candidates, repr(str(file)))
    values: list[Any]
    if flags:
        values = [ones(row, flags, f"{str(file)!r}, row {number}") for number, row in enumerate(rows, start=1)]
    else:
        label = choose_label_column(candidates, eligible=candidates, given=wanted.label, where=repr(str(file)))
        values = [row.get(label) for row in rows]
        if file.suffix.lower() == ".csv" and not wanted.several:
            values = _as_numbers(values, f"column {label!r} of {str(file)!r}")
    paths = [os.path.normpath(file.parent / str(name)) for name in names]
    apart = [{name: _text(row.get(column)) for name, column in wanted.apart.items()} for row in rows]
    return [
        Record(path, relative(path, root), value, more) for path, value, more in zip(paths, values, apart, strict=True)
    ]


def read_csv(file: Path) -> list[dict[str, Any]]:
    """Reads the rows of a CSV with a header; empty cells are `None`.

    Raises:
        DataError: The file cannot be read, is no CSV in UTF-8, or has rows that are longer than the header.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"Cannot read {str(file)!r} as CSV in UTF-8: {error}.") from error
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise DataError(
                f"Row {number} of {str(file)!r} has more cells than the header; quote cells that contain a comma."
            )
    return [{column: cell or None for column, cell in row.items()} for row in rows]


def _read_json_lines(file: Path) -> list[dict[str, Any]]:
    rows = []
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, Mapping):
                        raise DataError(f"Line {number} of {str(file)!r} is not a JSON object.")
                    rows.append(dict(row))
    except json.JSONDecodeError as error:
        raise DataError(f"Line {number} of {str(file)!r} is not JSON: {error}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read {str(file)!r}: {error}.") from error
    return rows


def _check_names(names: list[Any], file: Path) -> None:
    nameless = [str(row) for row, name in enumerate(names, start=1) if not isinstance(name, str) or not name]
    if nameless:
        raise DataError(f"{str(file)!r} names no file in row {', '.join(nameless[:20])}.")
    outside = [name for name in names if _leaves_folder(name)]
    if outside:
        raise DataError(
            f"{str(file)!r} names files outside its folder, which are not read: {listing(outside)}. "
            "Write paths relative to the folder, without '..'."
        )
    missing = [name for name in names if not (file.parent / name).is_file()]
    if missing:
        raise DataError(f"{str(file)!r} names {len(missing)} files that do not exist: {listing(missing)}.")
    twice = [name for name, count in Counter(map(os.path.normpath, names)).items() if count > 1]
    if twice:
        raise DataError(f"{str(file)!r} names files more than once: {listing(twice)}. Keep one row per image.")


def _text(value: Any) -> str | None:
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return None if missing else str(value)


def _leaves_folder(name: str) -> bool:
    return bool(PureWindowsPath(name).anchor) or Path(os.path.normpath(name)).parts[:1] == ("..",)


def _as_numbers(labels: list[Any], where: str) -> list[Any]:
    """CSV knows text only: reads labels as whole numbers if all of them are, so that 10 comes after 9."""
    given = [label for label in labels if label]
    if all(_WHOLE_NUMBER.fullmatch(label) for label in given):
        return [int(label) if label else None for label in labels]
    if all(_WHOLE_NUMBER.fullmatch(label) or _DECIMAL_NUMBER.fullmatch(label) for label in given):
        raise DataError(
            f"The labels in {where} are decimal numbers, such as {given[0]!r}. Labels are text or whole numbers: write "
            "class names, or numbers without a point. To estimate a number is regression, which torchthaw does not do."
        )
    return labels
