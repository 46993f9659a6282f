"""Folds for choosing the penalty of a linear head (see `torchthaw.stages.linear_probe`), from labels and units alone.

Units are what is not to be taken apart: the images of a subject, or exact copies. A unit on both sides of a fold would
make the weakest penalty look best.
"""

import warnings
from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

Ints = npt.NDArray[np.int64]


def probe_folds(
    labels: npt.ArrayLike,
    *,
    units: Sequence[Hashable] | npt.NDArray | None = None,
    folds: int = 5,
    limit: int = 2000,
    seed: int = 0,
) -> Ints:
    """Deals whole units out to folds, the classes as even as these allow.

    Args:
        labels: (N,) class ids.
        units: Unit of each image, (N,); None for each image on its own.
        folds: How many; fewer where there are fewer units, or fewer images of every class.
        limit: Of more images than these, about as many are dealt out: of each class its share in random whole units,
            and at least one unit.
        seed: Decides, with the order of the images, which units are taken and where they go.

    Returns:
        Fold of each image, (N,), from 0 on; -1 for an image in no fold, as all are where no two folds can be made.
    """
    classes = np.asarray(labels, dtype=np.int64)
    numbers = np.arange(len(classes)) if units is None else _numbered(units)
    rows = np.arange(len(classes))
    if len(classes) > limit:
        rows = np.flatnonzero(_sample(classes, numbers, limit / len(classes), seed))
    found = np.full(len(classes), -1, dtype=np.int64)
    found[rows] = _deal(classes[rows], numbers[rows], folds, seed)
    return found


def joined_units(*columns: Sequence[Hashable | None] | npt.NDArray) -> Ints:
    """Joins images that have the same value in any column, and those that are joined to the same image.

    Args:
        columns: Of one value for each image, such as its subject and its content; None where that is not known, which
            joins nothing.

    Returns:
        Unit of each image, (N,), numbered from 0 in the order of their first images.
    """
    number = len(columns[0]) if columns else 0
    rows: list[int] = []
    nodes: list[int] = []
    # Images and values are the nodes of a graph; values of different columns are different nodes.
    seen: dict[tuple[int, Hashable], int] = {}
    for place, column in enumerate(columns):
        for row, value in zip(range(number), column, strict=True):
            if value is not None:
                rows.append(row)
                nodes.append(seen.setdefault((place, value), number + len(seen)))
    size = number + len(seen)
    graph = coo_array((np.ones(len(rows)), (rows, nodes)), shape=(size, size))
    _, components = connected_components(graph, directed=False)
    return _numbered(components[:number].tolist())


def _numbered(values: Sequence[Hashable] | npt.NDArray) -> Ints:
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(value, len(seen)) for value in values], dtype=np.int64)


def _sample(classes: Ints, units: Ints, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Says of each image whether its unit is in a random sample, stratified by the units' most frequent classes.

    Args:
        classes: (N,).
        units: (N,), numbered from 0 without gaps.
        share: Of the images of each class.
        seed: Of the random order in which units are taken.
    """
    sizes = np.bincount(units)
    main = _most_frequent(classes, units)
    order = np.random.default_rng(seed).permutation(len(sizes))
    taken = np.zeros(len(sizes), dtype=bool)
    for label in np.unique(main):
        queue = order[main[order] == label]
        ends = np.cumsum(sizes[queue])
        # A unit is taken if more than half of it is within the share.
        taken[queue] = ends - sizes[queue] / 2 <= share * ends[-1]
        taken[queue[0]] = True
    return taken[units]


def _most_frequent(classes: Ints, units: Ints) -> Ints:
    """Returns the class with the most images of each unit, (units,), of equal ones the first."""
    pairs, counts = np.unique(np.stack([units, classes]), axis=1, return_counts=True)
    order = np.lexsort((pairs[1], -counts, pairs[0]))
    _, first = np.unique(pairs[0][order], return_index=True)
    return pairs[1][order][first]


def _deal(classes: Ints, units: Ints, folds: int, seed: int) -> Ints:
    """Returns the fold of each image, (N,), or -1 for all where no two folds can be made."""
    none = np.full(len(classes), -1, dtype=np.int64)
    if not len(classes):
        return none
    number_of_units = len(np.unique(units))
    # scikit-learn refuses more folds than the largest class has images.
    possible = min(folds, number_of_units, int(np.unique(classes, return_counts=True)[1].max()))
    if possible < 2:
        return none
    single = number_of_units == len(units)
    splitter = (StratifiedKFold if single else StratifiedGroupKFold)(possible, shuffle=True, random_state=seed)
    found = none
    with warnings.catch_warnings():
        # A class with fewer images than folds is in some of them, which is all that can be done.
        warnings.filterwarnings("ignore", message="The least populated class")
        for fold, (_, held_out) in enumerate(splitter.split(classes, classes, None if single else units)):
            found[held_out] = fold
    return found
