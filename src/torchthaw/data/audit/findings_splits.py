"""Findings about what is the same in two places: copies, groups and times across splits."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from itertools import pairwise
from typing import Any

from torchthaw.data.audit.copies import Copies
from torchthaw.data.audit.report import Finding
from torchthaw.data.audit.scan import ImageFacts

# In the order of the time when they are looked at.
_SPLITS = ("train", "validation", "test")
# Share of the images of a split whose copies elsewhere make its figures worthless.
_TOO_MANY = 0.01
_Items = list[dict[str, Any]]
FIX = "To leave the copies out: torchthaw audit DATA --fix clean.csv, then train with data: {splits: clean.csv}"


def exact_copies(images: Sequence[ImageFacts], splits: Sequence[str], copies: Copies) -> Iterator[Finding]:
    """The same pictures more than once."""
    across: _Items = []
    within: _Items = []
    contradictory: _Items = []
    same_file = {row: number for number, rows in enumerate(copies.same_file) for row in rows}
    for rows in copies.same_pixels:
        kind = "file" if len({same_file.get(row, -1 - row) for row in rows}) == 1 else "pixels"
        item = {"same": kind, "images": [_about(images[row], splits[row]) for row in rows]}
        if len({images[row].label for row in rows}) > 1:
            contradictory.append(item)
        (across if len({splits[row] for row in rows}) > 1 else within).append(item)
    if across:
        yield Finding(
            "exact duplicates across splits",
            "fail",
            len(across),
            f"{_pictures(len(across))} in more than one split, {_files(across)} images in all: the model is tested on "
            "what it was trained on",
            FIX,
            tuple(across),
        )
    if contradictory:
        yield Finding(
            "the same picture under different labels",
            "fail",
            len(contradictory),
            f"{_pictures(len(contradictory))} under different labels, {_files(contradictory)} images in all",
            f"Decide which label is right, and remove the others. {FIX} (it leaves all of them out)",
            tuple(contradictory),
        )
    if within:
        yield Finding(
            "exact duplicates within a split",
            "warn",
            len(within),
            f"{_pictures(len(within))} more than once in a split, {_files(within)} images in all: they count more than "
            "once",
            FIX,
            tuple(within),
        )


def near_copies(images: Sequence[ImageFacts], splits: Sequence[str], copies: Copies) -> Iterator[Finding]:
    """Pictures that are nearly the same."""
    across: _Items = []
    within: _Items = []
    contradictory: _Items = []
    for pair in copies.near:
        rows = (pair.first, pair.second)
        item = {
            "likeness": round(pair.likeness, 4),
            "detail": round(pair.detail, 4),
            "images": [_about(images[row], splits[row]) for row in rows],
        }
        if len({images[row].label for row in rows}) > 1:
            contradictory.append(item)
        (across if len({splits[row] for row in rows}) > 1 else within).append(item)
    if across:
        touched = _touched(across)
        sizes = {split: splits.count(split) for split in touched}
        shares = {split: len(paths) / sizes[split] for split, paths in touched.items() if split != "train"}
        worst = max(shares, key=lambda split: shares[split])
        yield Finding(
            "near duplicates across splits",
            "fail" if shares[worst] > _TOO_MANY else "warn",
            len(across),
            f"{len(across)} pairs of nearly the same picture are in different splits (resized, recompressed, cropped, "
            f"turned, or frames of one scene); in {worst} they are {shares[worst]:.1%} of the images",
            FIX,
            tuple(across),
        )
    if contradictory:
        yield Finding(
            "near duplicates under different labels",
            "warn",
            len(contradictory),
            f"{len(contradictory)} pairs of nearly the same picture have different labels",
            "Look at them: one of the labels is likely to be wrong.",
            tuple(contradictory),
        )
    if within:
        yield Finding(
            "near duplicates within a split",
            "pass",
            len(within),
            f"{len(within)} pairs of nearly the same picture are in one split; where torchthaw cuts splits, it keeps "
            "them together",
            None,
            tuple(within),
        )


def groups_across(images: Sequence[ImageFacts], splits: Sequence[str]) -> Iterator[Finding]:
    """Groups (patients, products, scenes) of which a model is tested on what it was trained on."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for image, split in zip(images, splits, strict=True):
        if image.group is not None:
            found[image.group][split].append(image.path)
    crossing = {group: by_split for group, by_split in found.items() if len(by_split) > 1}
    if not crossing:
        return
    held_out = sum(split != "train" for split in splits)
    known = sum(
        len(paths)
        for by_split in crossing.values()
        if "train" in by_split
        for split, paths in by_split.items()
        if split != "train"
    )
    yield Finding(
        "groups across splits",
        "fail",
        len(crossing),
        f"{len(crossing)} of {len(found)} groups are in more than one split; {known} of {held_out} images that are "
        "held out belong to a group that is trained on, so figures are better than on new groups",
        "Split by group: leave out split_by, or write data: {split_by: group}; with given splits, move each group into "
        "one: torchthaw audit DATA --fix clean.csv, then train with data: {splits: clean.csv}",
        tuple(
            {"group": group, "images": {split: len(paths) for split, paths in by_split.items()}}
            for group, by_split in sorted(crossing.items())
        ),
    )


def time_order(images: Sequence[ImageFacts], splits: Sequence[str]) -> Iterator[Finding]:
    """Images that are validated or tested on, though they are older than some that are trained on."""
    times: Mapping[str, list[tuple[float, str]]] = {
        split: [
            (image.time, image.path)
            for image, where in zip(images, splits, strict=True)
            if where == split and image.time is not None
        ]
        for split in _SPLITS
    }
    present = [split for split in _SPLITS if times[split]]
    for number, (before, after) in enumerate(pairwise(present)):
        last = max(moment for split in present[: number + 1] for moment, _ in times[split])
        early = sorted((moment, path) for moment, path in times[after] if moment < last)
        if early:
            yield Finding(
                f"time runs backwards from {before} to {after}",
                "fail",
                len(early),
                f"{len(early)} of {len(times[after])} images of {after} are older than the newest that comes before "
                f"({_date(last)}): the model is tested on the past, knowing the future",
                "Split by time: data: {split_by: time}; with given splits, make them so that each begins after the "
                "one before has ended",
                tuple({"path": path, "time": _date(moment)} for moment, path in early),
            )


def _about(image: ImageFacts, split: str) -> dict[str, Any]:
    return {"path": image.path, "split": split, "label": image.label}


def _touched(items: Sequence[Mapping[str, Any]]) -> dict[str, set[str]]:
    touched: dict[str, set[str]] = defaultdict(set)
    for item in items:
        for image in item["images"]:
            touched[image["split"]].add(image["path"])
    return touched


def _files(items: Sequence[Mapping[str, Any]]) -> int:
    return sum(len(item["images"]) for item in items)


def _pictures(number: int) -> str:
    return "1 picture is there" if number == 1 else f"{number} pictures are there"


def _date(moment: float) -> str:
    return datetime.fromtimestamp(moment, tz=timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
