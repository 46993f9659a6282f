"""What must stay together when images are split: nothing, groups, or images of the same time."""

import math
from collections.abc import Mapping, Sized
from typing import Any, Literal, get_args

import numpy as np
from datasets import Dataset

from torchthaw.data.folders import listing
from torchthaw.data.label_sets import has_label_sets
from torchthaw.data.split_checks import column, times_of
from torchthaw.errors import DataError, did_you_mean

Unit = Literal["image", "group", "time"]
SplitBy = Literal["auto", "image", "group", "time"]

_HOW = {"group": "a column, a CSV, or a pattern over the paths", "time": "a column, or exif"}


def split_unit(dataset: Mapping[str, Any], by: str = "auto") -> Unit:
    """Returns what a data set is split by: `image`, `group` or `time`.

    Args:
        dataset: Splits, a training split among them.
        by: One of these, or `auto`: by group where groups are known, else by time where times are, else by image.

    Raises:
        DataError: `by` is unknown, there is no training split, it is a stream, or it lacks the column to split by.
    """
    known = get_args(SplitBy)
    if by not in known:
        raise DataError(f"by={by!r} is unknown; write one of {', '.join(known)}.{did_you_mean(by, known)}")
    if "train" not in dataset:
        raise DataError(f"There is no training split to cut from; the data set has {sorted(dataset)}.")
    if not isinstance(dataset["train"], Dataset):
        raise DataError(
            "A streamed data set cannot be split, as its images are not known before they are read. Load it without "
            "streaming, or take the splits that it has."
        )
    columns = dataset["train"].column_names
    units: tuple[Unit, ...] = ("group", "time")
    for unit in units:
        if by == unit and unit not in columns:
            raise DataError(
                f"by={by!r} needs to know the {unit} of each image, and the data set has no column {unit!r}. Pass "
                f"{unit}=... to load_image_dataset, in a recipe data: {{{unit}: ...}}: {_HOW[unit]}."
            )
        if by in (unit, "auto") and unit in columns:
            return unit
    return "image"


def describe_split(
    dataset: Mapping[str, Any], *, by: str = "auto", seed: int = 0, together: Sized = ()
) -> tuple[Unit, str]:
    """Says how `split_dataset` cuts a data set: by what (`image`, `group` or `time`), and the method in words.

    Raises:
        DataError: As for `split_unit`.
    """
    unit = split_unit(dataset, by)
    stratified = "stratified by class"
    if has_label_sets(dataset["train"]):
        stratified = "the shares of all labels as even as whole images allow"
    if unit == "image" and len(together):
        sets = "1 set" if len(together) == 1 else f"{len(together)} sets"
        kept = f"copies of the same picture kept together ({sets})"
        return unit, f"{stratified}, {kept}, chosen by the images' content and seed {seed}"
    if unit == "image":
        return unit, f"{stratified}, chosen by the images' content and seed {seed}"
    if unit == "group":
        how = "whole groups, the classes as even as these allow"
        return unit, f"{how}, chosen by the images' content and seed {seed}"
    if "group" in dataset["train"].column_names:
        return unit, "whole groups in the order of their first image's time, the latest for testing"
    return unit, "in the order of time, the latest for testing"


def known_groups(images: Dataset) -> list[str]:
    """Returns the group of each image.

    Raises:
        DataError: Images have none.
    """
    groups: list[str | None] = column(images, "group")
    without = [path for path, group in zip(column(images, "path"), groups, strict=True) if group is None]
    if without:
        raise DataError(
            f"{len(without)} of {len(groups)} images have no group: {listing(without)}. Give them one (an image that "
            "belongs to no other is a group of its own), leave them out, or split by image: by='image', in a recipe "
            "data: {split_by: image}."
        )
    return [str(group) for group in groups]


def units_in_time(images: Dataset) -> list[list[int]]:
    """Returns the rows that stay together, in the order of time: those of a moment, or of the groups that begin then.

    Raises:
        DataError: Images have no time, or no group where the data set has groups.
    """
    times = times_of(images)
    without = [path for path, time in zip(column(images, "path"), times, strict=True) if not math.isfinite(time)]
    if without:
        raise DataError(
            f"{len(without)} of {len(times)} images have no time, so they cannot be split by it: {listing(without)}. "
            "Give them one in a column of a table (time: COLUMN), leave them out, or split by image: by='image', in a "
            "recipe data: {split_by: image}."
        )
    if "group" in images.column_names:
        _, groups = np.unique(np.array(known_groups(images)), return_inverse=True)
        first = np.full(groups.max() + 1, np.inf)
        np.minimum.at(first, groups, times)
        times = first[groups]
    order = np.argsort(times, kind="stable")
    starts = np.flatnonzero(np.diff(times[order])) + 1
    return [unit.tolist() for unit in np.split(order, starts)]


def unit_in_time(images: Dataset) -> str:
    """Returns what messages call the rows that `units_in_time` keeps together."""
    return "groups that begin at different times" if "group" in images.column_names else "different times"
