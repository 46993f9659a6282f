"""What is refused or said when splits and folds do not come out as one would wish."""

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from datasets import Dataset

from torchthaw.data.folders import SPLITS, listing
from torchthaw.data.label_sets import class_names_of, label_counts
from torchthaw.errors import DataError

logger = logging.getLogger(__name__)

_DIVIDES = {"group": "whole groups do not divide more finely", "time": "images of one time stay together"}


def share_of(name: str, value: float | int, num_images: int) -> Fraction:
    """Returns a share of the training images as it was written: 0.29 of 100 images are 29.

    Args:
        name: The split, for messages.
        value: Share as a float, or number of images as an int.
        num_images: Number of training images.

    Raises:
        DataError: The value is neither, negative, or leaves no training images.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise DataError(f"{name}={value!r} does not work; write a share such as 0.15, or a number of images.")
    share = Fraction(value, max(num_images, 1)) if isinstance(value, int) else Fraction(repr(float(value)))
    if share >= 1:
        raise DataError(
            f"{name}={value!r} leaves none of the {num_images} training images; "
            "write a share below 1, such as 0.15, or a smaller number of images."
        )
    return share


def refuse_few(found: int, needed: int, what: str, units: str) -> None:
    """Refuses to make more splits or folds than there is something to put into.

    Raises:
        DataError: `found` is less than `needed`.
    """
    if found < needed:
        raise DataError(
            f"There are {found} {units} for {needed} {what}, and none may be empty. Make fewer, add images, or split "
            "by something finer (by='image', in a recipe data: {split_by: image})."
        )


def refuse_empty(cut: Mapping[str, Sequence[int]], shares: Mapping[str, Fraction], num_images: int) -> None:
    """Refuses splits without images.

    Raises:
        DataError: A split that was asked for is empty.
    """
    empty = [split for split in SPLITS if split in cut and not cut[split]]
    if empty:
        asked = " and ".join(f"{split} ({float(shares[split]):.3g} of {num_images} images)" for split in empty)
        raise DataError(
            f"Too few images to split: {asked} would be empty, as every class keeps an image for training. "
            "Add images, ask for a larger share, or cut fewer splits (validation=0 or test=0)."
        )


def warn_of_shares(cut: Mapping[str, Dataset], shares: Mapping[str, Fraction], num_images: int, unit: str) -> None:
    """Warns of splits whose size is out by more than a fifth of what was asked, and by more than an image."""
    for split in (split for split in SPLITS if split in shares):
        asked = float(shares[split]) * num_images
        if abs(len(cut[split]) - asked) > max(1, asked / 5) and unit in _DIVIDES:
            logger.warning(
                "The %s split has %d of %d images (%.3g), and %.3g was asked for: %s.",
                split,
                len(cut[split]),
                num_images,
                len(cut[split]) / num_images,
                float(shares[split]),
                _DIVIDES[unit],
            )


def warn_of_missing_classes(train: Dataset, splits: Mapping[str, Dataset], unit: str) -> None:
    """Warns of classes of the images that were split which a split lacks."""
    lacking = [(split, lacking_classes(train, splits[split])) for split in SPLITS if split in splits]
    if any(names for _, names in lacking):
        where = "; ".join(f"{split} has none of {listing(names)}" for split, names in lacking if names)
        logger.warning("Split by %s, not every class is in every split: %s.", unit, where)


def warn_of_folds_without_classes(images: Dataset, folds: Sequence[Mapping[str, Dataset]], unit: str) -> None:
    """Warns of classes which the training or the validation images of folds lack."""
    parts = []
    for split in ("train", "validation"):
        folds_of: dict[str, list[str]] = {}
        for number, fold in enumerate(folds, start=1):
            for name in lacking_classes(images, fold[split]):
                folds_of.setdefault(name, []).append(str(number))
        parts += [f"no {split} images of {name!r} in {', '.join(numbers)}" for name, numbers in folds_of.items()]
    if parts:
        more = f" and {len(parts) - 20} more" if len(parts) > 20 else ""
        logger.warning("Folds by %s that lack a class: %s%s.", unit, "; ".join(parts[:20]), more)


def warn_of_time_running_backwards(splits: Mapping[str, Dataset]) -> None:
    """Warns of splits that have images from before the end of the previous split."""
    known = [split for split in SPLITS if split in splits and "time" in splits[split].column_names]
    for earlier, later in itertools.pairwise(known):
        before, after = (times_of(splits[split]) for split in (earlier, later))
        if not np.isnan(before).all() and not np.isnan(after).all() and np.nanmax(before) >= np.nanmin(after):
            count = int((before >= np.nanmin(after)).sum())
            logger.warning(
                "%d of the %d images of %s are not older than the first image of %s: groups stay whole, and splits "
                "that were given stay as they are.",
                count,
                len(before),
                earlier,
                later,
            )


def lacking_classes(images: Dataset, part: Dataset) -> list[str]:
    """Returns the names of the classes of images of which a part has none."""
    lacking = (label_counts(images) > 0) & (label_counts(part) == 0)
    return [name for name, lacks in zip(class_names_of(images), lacking, strict=True) if lacks]


def times_of(images: Dataset) -> np.ndarray:
    """Returns the time of each image in seconds since 1970 (UTC), NaN where it is unknown."""
    return np.array(column(images, "time"), dtype=float)


def column(images: Dataset, name: str) -> list[Any]:
    """Returns a column without reading the others."""
    return images.select_columns([name])[:][name]
