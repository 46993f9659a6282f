"""The check that every image of a data set can be decoded, and what becomes of those that cannot."""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from datasets import Dataset
from rich.console import Console
from rich.progress import track

from torchthaw.data.images import UnusableImageError, decode_value
from torchthaw.data.label_sets import class_names_of, label_counts
from torchthaw.errors import DataError

_LISTED = 50
_CHUNK = 32


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be decoded.

    Attributes:
        path: Its `path` in the data set.
        reason: Why, in words: "is empty (0 bytes)", "is truncated or damaged (...)", ...
    """

    path: str
    reason: str


def check_images(
    dataset: Dataset,
    *,
    on_bad: Literal["fail", "drop"] = "fail",
    num_threads: int | None = None,
    progress: bool = True,
) -> tuple[Dataset, list[BadImage]]:
    """Decodes every image once and fails on, or leaves out, the ones that cannot be decoded.

    Args:
        dataset: A split with the columns `image`, `label` and `path`.
        on_bad: "fail" raises one error that lists the bad images; "drop" returns the data set without them.
        num_threads: Decoding threads; the number of CPU cores by default.
        progress: Show a progress bar on stderr.

    Returns:
        The data set (itself, where nothing is dropped) and the bad images in row order.

    Raises:
        DataError: An image is bad and `on_bad` is "fail", or dropping would leave a class without images.
    """
    if on_bad not in ("fail", "drop"):
        raise DataError(f"on_bad={on_bad!r} is unknown; write 'fail' or 'drop'.")
    bad = find_bad_images(dataset, num_threads=num_threads, progress=progress)
    return leave_out({"": dataset}, {"": bad}, on_bad=on_bad)[""], bad


def find_bad_images(dataset: Dataset, *, num_threads: int | None = None, progress: bool = True) -> list[BadImage]:
    """Decodes every image once, and returns those that cannot be decoded, in row order; arguments as above."""
    bad: list[BadImage] = []
    starts = range(0, len(dataset), _CHUNK)
    console = Console(stderr=True)
    with ThreadPoolExecutor(num_threads or os.cpu_count() or 1) as pool:
        checked = pool.map(lambda start: list(_check_rows(dataset, start)), starts)
        try:
            for found in track(
                checked, "Checking images", len(starts), console=console, transient=True, disable=not progress
            ):
                bad.extend(found)
        except BaseException:
            # Without this, an interrupt would wait until every image is decoded.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return bad


def leave_out(
    splits: Mapping[str, Dataset], bad: Mapping[str, list[BadImage]], *, on_bad: Literal["fail", "drop"]
) -> dict[str, Dataset]:
    """Fails on bad images, or returns the splits without them.

    Args:
        splits: With the columns `image`, `label` and `path`.
        bad: Their images that cannot be decoded.
        on_bad: As for `check_images`.

    Raises:
        DataError: There are some and `on_bad` is "fail", or dropping would leave a class of a split without images.
    """
    every = [image for found in bad.values() for image in found]
    if every and on_bad == "fail":
        raise DataError(_report(every, sum(len(dataset) for dataset in splits.values())))
    result = without(splits, bad)
    for split in splits:
        _refuse_emptied_classes(splits[split], result[split])
    return result


def without(splits: Mapping[str, Dataset], bad: Mapping[str, list[BadImage]]) -> dict[str, Dataset]:
    """Returns the splits without some images, even where a class then has none; a split that has none is the same."""
    result = dict(splits)
    for split, found in bad.items():
        if found:
            names = {image.path for image in found}
            paths = splits[split].select_columns(["path"])[:]["path"]
            result[split] = splits[split].select([row for row, path in enumerate(paths) if path not in names])
    return result


def _check_rows(dataset: Dataset, start: int) -> Iterator[BadImage]:
    rows = dataset[start : start + _CHUNK]
    for value, path in zip(rows["image"], rows["path"], strict=True):
        try:
            # All of the file is read at any scale, and what is damaged found; at an eighth that is fastest.
            decode_value(value, lambda _width, _height: (1, 1))
        except UnusableImageError as error:
            yield BadImage(path, str(error))


def _report(bad: list[BadImage], total: int) -> str:
    lines = [f"{len(bad)} of {total} images cannot be used:"]
    lines += [f"  {image.path!r}: {image.reason}" for image in bad[:_LISTED]]
    if len(bad) > _LISTED:
        lines.append(f"  ... and {len(bad) - _LISTED} more")
    lines.append("Mend or remove them, or leave them out by writing `data: {on_bad_image: drop}` in the recipe.")
    return "\n".join(lines)


def _refuse_emptied_classes(before: Dataset, after: Dataset) -> None:
    if after is before:
        return
    emptied = (label_counts(before) > 0) & (label_counts(after) == 0)
    if emptied.any():
        classes = ", ".join(repr(name) for name, gone in zip(class_names_of(before), emptied, strict=True) if gone)
        raise DataError(f"No image is left in {classes} after dropping those that cannot be decoded; mend the files.")
