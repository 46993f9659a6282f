"""Cuts missing splits off the training images, by image, by group or by time; the same for the same content and seed.

What is cut never depends on the names or the order of the files.
"""

import itertools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from datasets import Dataset, DatasetDict, Value, concatenate_datasets

from torchthaw.data import split_checks
from torchthaw.data.allocation import cut_by_class, cut_in_order, fold_by_class
from torchthaw.data.contents import content_digests, group_keys, image_keys
from torchthaw.data.folders import SPLITS
from torchthaw.data.group_allocation import assign_groups
from torchthaw.data.label_sets import has_label_sets
from torchthaw.data.split_checks import column
from torchthaw.data.split_units import SplitBy, describe_split, known_groups, split_unit, unit_in_time, units_in_time
from torchthaw.errors import DataError

__all__ = ["SplitBy", "describe_split", "fold_dataset", "split_dataset", "split_unit"]


def split_dataset(
    dataset: DatasetDict,
    *,
    validation: float | int = 0.15,
    test: float | int = 0.0,
    seed: int = 0,
    by: SplitBy = "auto",
    together: Sequence[Sequence[str]] = (),
) -> DatasetDict:
    """Cuts a validation and a test split off the training split where they are missing.

    - By image: every class gives its share to within one image, and the totals are exact to rounding (largest
      remainders), except that every class keeps at least one image for training.
      Where images have several labels, the shares of all images and of each class are met as well as whole images
      allow (the aim of iterative stratification, Sechidis et al., "On the Stratification of Multi-Label Data", 2011,
      reached by the search that places groups).
    - By group: no group (patient, product, scene ...) is in two splits. The shares of all images and of each class are
      met as well as the groups allow; every class is in training if that is possible.
    - By time: training images come before validation images, and these before test images; images of the same time stay
      together. Where groups are known too, a group counts as a whole from its first image on, so that no group is in
      two splits; its later images may then be younger than the first ones of the next split.

    Which images go depends on their content, their groups and times, and the seed (which times do not leave a choice
    for), not on their names or order. Splits that are given stay as they are. A warning names the classes that a split
    lacks, and a share that came out otherwise than asked.

    Args:
        dataset: Splits with the columns `image`, `label` and `path`, and `group` and `time` where they are known, as
            `load_image_dataset` returns them.
        validation: Share of the training images as a float below 1, or their number as an int; 0 for none.
        test: The same for the test split.
        seed: Another seed, another choice.
        by: `image`, `group`, `time`, or `auto`: by group where groups are known, else by time where times are, else by
            image.
        together: Sets of images, by their paths, that are not to be taken apart where they are split by image: copies
            of one picture, as the audit finds them (`AuditReport.copies`). Shares are then met as by group.

    Returns:
        The splits `train`, `validation`, `test` as far as given or asked for; rows keep their order.

    Raises:
        DataError: There is no training split, a share is out of range, the column to split by is missing or has gaps,
            or a split would be empty.
    """
    unit = split_unit(dataset, by)
    train = dataset["train"]
    asked = {
        "test": split_checks.share_of("test", test, len(train)),
        "validation": split_checks.share_of("validation", validation, len(train)),
    }
    missing = {split: share for split, share in asked.items() if split not in dataset and share > 0}
    if sum(missing.values()) >= 1:
        raise DataError(
            f"validation={validation!r} and test={test!r} together leave none of the {len(train)} training images; "
            "write smaller shares."
        )
    if not missing:
        return DatasetDict({split: dataset[split] for split in SPLITS if split in dataset})
    if unit == "image" and together:
        cut = _cut_by_group(_grouped(train, together), missing, seed)
    else:
        cut = {"image": _cut_by_image, "group": _cut_by_group, "time": _cut_by_time}[unit](train, missing, seed)
    split_checks.refuse_empty(cut, missing, len(train))
    taken = {row for rows in cut.values() for row in rows}
    result = {"train": train.select([row for row in range(len(train)) if row not in taken])}
    result |= {split: train.select(sorted(rows)) for split, rows in cut.items()}
    split_checks.warn_of_shares(result, missing, len(train), unit)
    split_checks.warn_of_missing_classes(train, result, unit)
    splits = {**dataset, **result}
    if unit == "time":
        split_checks.warn_of_time_running_backwards(splits)
    return DatasetDict({split: splits[split] for split in SPLITS if split in splits})


def fold_dataset(
    dataset: DatasetDict,
    *,
    folds: int = 5,
    seed: int = 0,
    by: SplitBy = "auto",
    together: Sequence[Sequence[str]] = (),
) -> list[DatasetDict]:
    """Makes folds for cross-validation.

    They are made of the training images, and of the validation images too where these are given; a given test split
    stays out of them and is the same in every fold.

    - By image: each image is a validation image of one fold; the numbers of images differ by at most one between the
      folds, in each class and in sum.
    - By group: likewise, but groups stay whole; numbers and classes are as even as the groups allow.
    - By time: the window expands, as in scikit-learn's `TimeSeriesSplit`. The images are cut in order of time into
      `folds + 1` about equal stretches; the validation images of a fold are one of them, its training images all
      before it. So the first stretch is never validated on, and folds do not use what comes after. Groups, where known,
      stay whole as in `split_dataset`.

    Args:
        dataset: As for `split_dataset`.
        folds: How many, at least 2.
        seed: Another seed, other folds; by time there is no choice.
        by: As for `split_dataset`.
        together: As for `split_dataset`.

    Returns:
        For each fold the splits `train` and `validation`, and `test` if it is given; rows keep their order.

    Raises:
        DataError: There is no training split, `folds` is below 2 or more than there are images, groups or times, or
            the column to split by is missing or has gaps.
    """
    unit = split_unit(dataset, by)
    if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
        raise DataError(f"folds={folds!r} does not work; write a whole number of at least 2, such as 5.")
    parts = [dataset[split] for split in ("train", "validation") if split in dataset]
    images = concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    if unit == "image" and together:
        rows_of_folds = _folds_by_group(_grouped(images, together), folds, seed)
    else:
        make = {"image": _folds_by_image, "group": _folds_by_group, "time": _folds_by_time}[unit]
        rows_of_folds = make(images, folds, seed)
    given = {"test": dataset["test"]} if "test" in dataset else {}
    made = [
        DatasetDict(train=images.select(sorted(train)), validation=images.select(sorted(validation)), **given)
        for train, validation in rows_of_folds
    ]
    split_checks.warn_of_folds_without_classes(images, made, unit)
    return made


def _cut_by_image(train: Dataset, shares: dict[str, Fraction], seed: int) -> dict[str, list[int]]:
    if has_label_sets(train):
        return _cut_by_group(_grouped(train, ()), shares, seed)
    return cut_by_class(column(train, "label"), _image_keys(train, seed), shares)


def _cut_by_group(train: Dataset, shares: dict[str, Fraction], seed: int) -> dict[str, list[int]]:
    parts = ["train", *shares]
    wanted = [float(1 - sum(shares.values())), *map(float, shares.values())]
    rows = _rows_of_parts(train, wanted, seed, first_needs_all=True, what=f"splits ({', '.join(parts)})")
    return dict(zip(shares, rows[1:], strict=True))


def _cut_by_time(train: Dataset, shares: dict[str, Fraction], _seed: int) -> dict[str, list[int]]:
    units = units_in_time(train)
    splits = [split for split in SPLITS if split in shares]
    split_checks.refuse_few(len(units), len(splits) + 1, f"splits (train, {', '.join(splits)})", unit_in_time(train))
    sizes = {split: round(share * len(train)) for split, share in shares.items()}
    targets = [len(train) - sum(sizes[later] for later in splits[number:]) for number in range(len(splits))]
    borders = [*cut_in_order([len(unit) for unit in units], targets), len(units)]
    return {
        split: [row for unit in units[borders[number] : borders[number + 1]] for row in unit]
        for number, split in enumerate(splits)
    }


def _folds_by_image(images: Dataset, folds: int, seed: int) -> list[tuple[list[int], list[int]]]:
    split_checks.refuse_few(len(images), folds, "folds", "images")
    if has_label_sets(images):
        return _folds_by_group(_grouped(images, ()), folds, seed)
    return _against_the_rest(fold_by_class(column(images, "label"), _image_keys(images, seed), folds))


def _folds_by_group(images: Dataset, folds: int, seed: int) -> list[tuple[list[int], list[int]]]:
    return _against_the_rest(_rows_of_parts(images, [1 / folds] * folds, seed, first_needs_all=False, what="folds"))


def _folds_by_time(images: Dataset, folds: int, _seed: int) -> list[tuple[list[int], list[int]]]:
    units = units_in_time(images)
    split_checks.refuse_few(
        len(units), folds + 1, f"stretches of time, one more than folds={folds}", unit_in_time(images)
    )
    size = len(images) // (folds + 1)
    targets = [len(images) - (folds - number) * size for number in range(folds)]
    borders = [*cut_in_order([len(unit) for unit in units], targets), len(units)]
    return [
        ([row for unit in units[:start] for row in unit], [row for unit in units[start:end] for row in unit])
        for start, end in itertools.pairwise(borders)
    ]


def _against_the_rest(parts: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    return [
        ([row for other, rows in enumerate(parts) if other != number for row in rows], part)
        for number, part in enumerate(parts)
    ]


def _rows_of_parts(
    images: Dataset, shares: list[float], seed: int, *, first_needs_all: bool, what: str
) -> list[list[int]]:
    groups = known_groups(images)
    split_checks.refuse_few(len(set(groups)), len(shares), what, "groups")
    keys = group_keys(content_digests(images), groups, seed)
    numbers = {group: number for number, group in enumerate(sorted(keys, key=keys.__getitem__))}
    numbered = np.array([numbers[group] for group in groups])
    parts = assign_groups(numbered, column(images, "label"), shares, first_needs_all=first_needs_all)[numbered]
    return [np.flatnonzero(parts == part).tolist() for part in range(len(shares))]


def _grouped(images: Dataset, together: Sequence[Sequence[str]]) -> Dataset:
    """Makes each set of images a group, and every other image one of its own."""
    sets = {path: f"with {paths[0]}" for paths in together for path in paths}
    groups = [sets.get(path, path) for path in column(images, "path")]
    return images.add_column("group", groups, feature=Value("string"))


def _image_keys(images: Dataset, seed: int) -> list[tuple[bytes, str]]:
    return image_keys(content_digests(images), column(images, "path"), seed)
