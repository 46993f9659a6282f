"""Shares out single images: by class, or in the order of time."""

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np


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


def cut_by_class(labels: Sequence[int], keys: Sequence[Any], shares: dict[str, Fraction]) -> dict[str, list[int]]:
    """Chooses the rows of each split that is cut off, stratified by class.

    Args:
        labels: Class of each image.
        keys: What decides, within a class, which images go first.
        shares: Share of each split.
    """
    rows: dict[int, list[int]] = {}
    for row in sorted(range(len(labels)), key=keys.__getitem__):
        rows.setdefault(labels[row], []).append(row)
    cut: dict[str, list[int]] = {split: [] for split in shares}
    for split, sizes in allocate(dict(sorted(Counter(labels).items())), shares).items():
        for label, size in sizes.items():
            cut[split] += rows[label][:size]
            del rows[label][:size]
    return cut


def fold_by_class(labels: Sequence[int], keys: Sequence[Any], folds: int) -> list[list[int]]:
    """Deals the rows out to folds, class by class: sizes differ by at most one, in each class and in sum."""
    dealt = sorted(range(len(labels)), key=lambda row: (labels[row], keys[row]))
    return [dealt[fold::folds] for fold in range(folds)]


def cut_in_order(sizes: Sequence[int], targets: Sequence[int]) -> list[int]:
    """Cuts a sequence of units into consecutive, non-empty stretches.

    Args:
        sizes: Images of each unit; more units than cuts.
        targets: For each cut, how many images should be before it; rising.

    Returns:
        For each cut, how many units are before it: as near to the target as that can be, the earlier of two as near.
    """
    before = np.cumsum(sizes)
    cuts: list[int] = []
    for number, target in enumerate(targets):
        first = cuts[-1] + 1 if cuts else 1
        last = len(sizes) - (len(targets) - number)
        cuts.append(first + int(np.abs(before[first - 1 : last] - target).argmin()))
    return cuts
