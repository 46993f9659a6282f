"""The group of each image (patient, product, scene ...): from a column, a CSV, or a pattern over paths."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchthaw.data.folders import GROUPS_FILE, listing
from torchthaw.data.metadata import read_csv
from torchthaw.errors import DataError, did_you_mean

NO_GROUPS = "none"
_LISTED = 50


def group_column(group: str | None) -> str | None:
    """Returns the name of the column that is meant by `group`, or `None` where a CSV, a pattern or nothing is."""
    if group is None or group == NO_GROUPS or "(" in group or group.lower().endswith(".csv"):
        return None
    return group


def groups_of(group: str | None, paths: Sequence[str], root: Path | None) -> list[str] | None:
    """Finds the group of each image by a CSV or a pattern.

    Args:
        group: Path of a CSV with the columns `path` and `group` (in the data's folder, or as it is), or a regular
            expression with one capture group over the paths; `None` takes the data's own `groups.csv` if there is one.
        paths: Path of each image within the data.
        root: The data's folder, if it has one.

    Returns:
        The groups, or `None` if there are none.

    Raises:
        DataError: The CSV or the pattern cannot be used, or has no group for some images.
    """
    if group is None:
        own = root / GROUPS_FILE if root is not None else None
        if own is None or not own.is_file():
            return None
        try:
            return _from_csv(own, paths)
        except DataError as error:
            raise DataError(f"{error} To leave {GROUPS_FILE} aside, write group='none'.") from error
    if group == NO_GROUPS:
        return None
    return _from_pattern(group, paths) if "(" in group else _from_csv(_find_csv(group, root), paths)


def clean_groups(values: Sequence[Any], paths: Sequence[str], where: str) -> list[str]:
    """Returns the values of a column as groups.

    Raises:
        DataError: Images have none, or values are neither text nor numbers.
    """
    odd = [
        path
        for value, path in zip(values, paths, strict=True)
        if value is not None and not isinstance(value, str | int | float)
    ]
    if odd:
        example = next(value for value in values if value is not None and not isinstance(value, str | int | float))
        raise DataError(
            f"The groups in {where} are of type {type(example).__name__}; a group is a text or a number, one per image."
        )
    texts = [
        "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value) for value in values
    ]
    without = [path for text, path in zip(texts, paths, strict=True) if not text]
    if without:
        raise DataError(
            f"{len(without)} of {len(paths)} images have no group in {where}: {listing(without, _LISTED)}. Give every "
            "image one (an image that belongs to no other is a group of its own)."
        )
    return texts


def _find_csv(group: str, root: Path | None) -> Path:
    candidates = [*([root / group] if root is not None else []), Path(group).expanduser()]
    for file in candidates:
        if file.is_file():
            return file
    folders = {file.parent for file in candidates if file.parent.is_dir()}
    nearby = sorted({sibling.name for folder in folders for sibling in folder.glob("*.csv")})
    raise DataError(
        f"There is no file {group!r} with groups, neither in the data's folder nor from here."
        f"{did_you_mean(Path(group).name, nearby)} group is the name of a column, a CSV with the columns path and "
        "group, or a regular expression with one pair of parentheses."
    )


def _from_csv(file: Path, paths: Sequence[str]) -> list[str]:
    rows = read_csv(file)
    columns = list(rows[0]) if rows else []
    for needed in ("path", "group"):
        if needed not in columns:
            raise DataError(
                f"{str(file)!r} has no column {needed!r}; its columns are: {listing(columns) or 'none'}."
                f"{did_you_mean(needed, columns)} Write one row per image: its path within the data, and its group."
            )
    groups: dict[str, str] = {}
    contradictions = []
    for row in rows:
        path, group = _clean_path(row["path"] or ""), row["group"]
        if group is not None and groups.setdefault(path, group) != group:
            contradictions.append(path)
    if contradictions:
        raise DataError(f"{str(file)!r} names more than one group for: {listing(contradictions, _LISTED)}. Keep one.")
    without = [path for path in paths if path not in groups]
    if without:
        given = next((path for path in groups if path), "")
        raise DataError(
            f"{str(file)!r} has no group for {len(without)} of {len(paths)} images: {listing(without, _LISTED)}. Write "
            f"paths as they are within the data; in the file they are like {given!r}.{did_you_mean(without[0], groups)}"
        )
    return [groups[path] for path in paths]


def _clean_path(path: str) -> str:
    """Paths as spreadsheets on Windows, `find` and people write them."""
    return path.replace("\\", "/").removeprefix("./")


def _from_pattern(pattern: str, paths: Sequence[str]) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise DataError(f"group={pattern!r} is no valid regular expression: {error}.") from error
    if compiled.groups != 1:
        raise DataError(
            f"group={pattern!r} has {compiled.groups} capture groups; put parentheses around the one part of the path "
            "that tells groups apart, as in '(patient[0-9]+)_', and write others as (?:...)."
        )
    found = [match.group(1) if (match := compiled.search(path)) else None for path in paths]
    without = [path for path, group in zip(paths, found, strict=True) if not group]
    if without:
        raise DataError(
            f"group={pattern!r} finds no group in {len(without)} of {len(paths)} paths: {listing(without, _LISTED)}. "
            "Change the pattern so that it fits every path, or write a CSV with the columns path and group."
        )
    return [group for group in found if group]
