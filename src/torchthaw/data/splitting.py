"""Cuts missing splits off the training images: stratified, the same for the same content and seed."""

import hashlib
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

from datasets import Dataset, DatasetDict

from torchthaw.errors import DataError

_SPLITS = ("train", "validation", "test")
_CHUNK = 256


def split_dataset(
    dataset: DatasetDict, *, validation: float | int = 0.15, test: float | int = 0.0, seed: int = 0
) -> DatasetDict:
    """Cuts a validation and a test split off the training split where they are missing.

    Every class gives its share to within one image, and the totals are exact to rounding (largest remainders), except
    that every class keeps at least one image for training. Which images go depends on their content and the seed, not
    on their names or order. Splits that are given stay as they are.

    Args:
        dataset: Splits with the columns `image`, `label` and `path`, as `load_image_dataset` returns them.
        validation: Share of the training images as a float below 1, or their number as an int; 0 for none.
        test: The same for the test split.
        seed: Another seed, another choice.

    Returns:
        The splits `train`, `validation`, `test` as far as given or asked for; rows keep their order.

    Raises:
        DataError: There is no training split, a share is out of range, or a class has fewer images than there are
            splits to fill.
    """
    if "train" not in dataset:
        raise DataError(f"There is no training split to cut from; the data set has {sorted(dataset)}.")
    train = dataset["train"]
    asked = {"test": _share("test", test, len(train)), "validation": _share("validation", validation, len(train))}
    missing = {split: share for split, share in asked.items() if split not in dataset and share > 0}
    if sum(missing.values()) >= 1:
        raise DataError(
            f"validation={validation!r} and test={test!r} together leave none of the {len(train)} training images; "
            "write smaller shares."
        )
    if not missing:
        return DatasetDict({split: dataset[split] for split in _SPLITS if split in dataset})
    labels: list[int] = train.select_columns(["label"])[:]["label"]
    counts = dict(sorted(Counter(labels).items()))
    _refuse_small_classes(counts, train.features["label"].names, list(missing))

    rows = _rows_of_classes(train, labels, seed)
    cut: dict[str, list[int]] = {split: [] for split in missing}
    for split, sizes in allocate(counts, missing).items():
        for label, size in sizes.items():
            cut[split] += rows[label][:size]
            del rows[label][:size]
    result = {"train": train.select(sorted(row for left in rows.values() for row in left))}
    result |= {split: train.select(sorted(chosen)) for split, chosen in cut.items()}
    return DatasetDict(
        {split: result.get(split, dataset.get(split)) for split in _SPLITS if split in {*result, *dataset}}
    )


def allocate(counts: dict[int, int], shares: dict[str, Fraction]) -> dict[str, dict[int, int]]:
    """Decides how many images of each class every split gets.

    Args:
        counts: Images of each class.
        shares: Share of each split that is cut off; together below 1.

    Returns:
        Size by split and class: the class's quota rounded down or up; in sum the split's quota rounded to the nearest,
        or less where more would take a class's last image.
    """
    floors = {
        split: {label: math.floor(share * count) for label, count in counts.items()} for split, share in shares.items()
    }
    free = {label: count - 1 - sum(floors[split][label] for split in shares) for label, count in counts.items()}
    for split, share in shares.items():
        sizes = floors[split]
        left = round(share * sum(counts.values())) - sum(sizes.values())
        by_remainder = sorted(counts, key=lambda label: (sizes[label] - share * counts[label], label))
        for label in [label for label in by_remainder if free[label] > 0 and share * counts[label] > sizes[label]][
            :left
        ]:
            sizes[label] += 1
            free[label] -= 1
    return floors


def _share(name: str, value: float | int, num_images: int) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise DataError(f"{name}={value!r} does not work; write a share such as 0.15, or a number of images.")
    # Exact in the decimals as they were written: 0.29 of 100 images are 29.
    share = Fraction(value, max(num_images, 1)) if isinstance(value, int) else Fraction(repr(float(value)))
    if share >= 1:
        raise DataError(
            f"{name}={value!r} leaves none of the {num_images} training images; "
            "write a share below 1, such as 0.15, or a smaller number of images."
        )
    return share


def _refuse_small_classes(counts: dict[int, int], names: list[str], cut: list[str]) -> None:
    needed = 1 + len(cut)
    small = [f"{names[label]!r} has {count}" for label, count in counts.items() if count < needed]
    if small:
        splits = ", ".join(split for split in _SPLITS if split == "train" or split in cut)
        raise DataError(
            f"Too few images to split into {splits}: {'; '.join(small)}; every class needs at least {needed}. "
            "Add images, leave the class out, or cut fewer splits (validation=0 or test=0)."
        )


def _rows_of_classes(train: Dataset, labels: list[int], seed: int) -> dict[int, list[int]]:
    """Rows of each class in an order that depends on the content of the images and the seed."""
    starts = range(0, len(train), _CHUNK)
    with ThreadPoolExecutor() as pool:
        keys = [key for part in pool.map(lambda start: _order_keys(train, start, seed), starts) for key in part]
    rows: dict[int, list[int]] = {}
    for row in sorted(range(len(train)), key=keys.__getitem__):
        rows.setdefault(labels[row], []).append(row)
    return rows


def _order_keys(train: Dataset, start: int, seed: int) -> list[tuple[bytes, str]]:
    rows = train[start : start + _CHUNK]
    salt = str(seed).encode()
    keys = []
    for image, path in zip(rows["image"], rows["path"], strict=True):
        try:
            content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        except OSError as error:
            raise DataError(f"Cannot read image {path!r}: {error.strerror or error}.") from error
        keys.append((hashlib.blake2b(hashlib.blake2b(content).digest() + salt).digest(), path))
    return keys
