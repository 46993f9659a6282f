"""Which images of a data set are the same: by their bytes, by their pixels, or nearly."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from torchthaw.data.audit.near_duplicates import LEAST_CONTRAST, LEAST_SIDE, NearDuplicate, find_near_duplicates
from torchthaw.data.audit.scan import Scan


@dataclass(frozen=True)
class Copies:
    """Copies among the images of a scan, by their numbers in it.

    Attributes:
        same_file: Images whose files are the same, byte for byte.
        same_pixels: Images whose decoded pixels are the same; those with the same file are among them.
        near: Pairs that are nearly the same; of images with the same pixels, the first one stands for all.
        not_compared: Number of images that are too small or too uniform to be recognised when they are changed.
        clusters: Images that belong together by any of these, each image in one cluster at most.
    """

    same_file: list[list[int]]
    same_pixels: list[list[int]]
    near: list[NearDuplicate]
    not_compared: int
    clusters: list[list[int]]


def find_copies(scan: Scan, *, near: bool = True, progress: Callable[[int, int], None] | None = None) -> Copies:
    """Finds copies among all images, whatever their split.

    Args:
        scan: The images.
        near: Whether to look for near duplicates too; see `find_near_duplicates`.
        progress: Is told how much of that is done, of how much.
    """
    same_file = _alike([image.file_digest for image in scan.images])
    same_pixels = _alike([image.pixel_digest for image in scan.images])
    further = {row for rows in same_pixels for row in rows[1:]}
    first = [row for row in range(len(scan.images)) if row not in further]
    usable = np.array([row for row in first if _has_details(scan, row)], dtype=np.int64)
    found = find_near_duplicates(scan.thumbnails[usable], progress=progress) if near else []
    pairs = [
        NearDuplicate(int(usable[pair.first]), int(usable[pair.second]), pair.likeness, pair.detail) for pair in found
    ]
    return Copies(
        same_file, same_pixels, pairs, len(first) - len(usable), _clusters(len(scan.images), same_pixels, pairs)
    )


def _alike(keys: Sequence[Hashable]) -> list[list[int]]:
    rows: dict[Hashable, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        rows[key].append(row)
    return [found for found in rows.values() if len(found) > 1]


def _has_details(scan: Scan, row: int) -> bool:
    image = scan.images[row]
    return image.contrast >= LEAST_CONTRAST and min(image.width, image.height) >= LEAST_SIDE


def _clusters(number: int, alike: Iterable[Sequence[int]], pairs: Iterable[NearDuplicate]) -> list[list[int]]:
    links = [(rows[0], row) for rows in alike for row in rows[1:]] + [(pair.first, pair.second) for pair in pairs]
    if not links:
        return []
    first, second = np.array(links).T
    graph = coo_array((np.ones(len(links)), (first, second)), shape=(number, number))
    _, component = connected_components(graph, directed=False)
    return _alike(component.tolist())
