"""Copies of pictures that are not the same file: resized, recompressed, brightened, grey, flipped, turned, cropped."""

from collections.abc import Callable, Container
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from torchthaw.data.audit.candidates import BandIndex
from torchthaw.data.audit.fingerprints import (
    CROPS,
    ORIENTATIONS,
    THUMBNAIL_SIDE,
    Floats,
    Variant,
    basis,
    coefficients,
    normalised,
    turned,
    window_basis,
    window_matrix,
)

# Measured on photographs (see tests/benchmarks/near_duplicates.py): copies reach 0.8 in their details and more, other
# pictures hardly 0.7, even the same sign of another hand before the same wall.
LEAST_DETAIL = 0.78
LEAST_LIKENESS = 0.97
_LEAST_CANDIDATE = 0.88
_LEAST_CANDIDATE_WHOLE = 0.93
_LEAST_AFTER_STEPS = (0.0, 0.92, 0.95)
# Below this, the pictures are fitted to each other: the copy may be a crop, or shifted by the resizing.
_FITS_AS_IT_IS = 0.9
# Grey levels (standard deviation) and pixels under which a picture has no details to be known by.
LEAST_CONTRAST = 3.0
LEAST_SIDE = 24
_DETAIL_SIZE = 2.0
_PAIRS_AT_ONCE = 2048
_STEPS = 5


@dataclass(frozen=True)
class NearDuplicate:
    """Two pictures of which one is a copy of the other.

    Attributes:
        first: Number of one picture.
        second: Number of the other one, larger.
        likeness: Correlation of their low frequencies, once they are fitted to each other.
        detail: Correlation of their details.
    """

    first: int
    second: int
    likeness: float
    detail: float


def find_near_duplicates(
    thumbnails: npt.NDArray[np.uint8],
    *,
    crops: bool = True,
    orientations: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[NearDuplicate]:
    """Finds copies of pictures among each other.

    Low frequencies give candidates, by hashing, in near-linear time: of each picture as it is, flipped and turned, and
    of ten crops. Candidates are fitted to each other (the part of one that the other shows, by least squares), and are
    copies if what is left besides the low frequencies, the details, agrees as well. That tells a copy from a
    picture that is merely alike: another photograph of the same thing, or of the same scene a moment later, unless
    nothing has moved.

    Args:
        thumbnails: See `thumbnail`, shape (pictures, 64, 64).
        crops: Whether crops are looked for; what is cut off is 10 % of a side or so.
        orientations: Whether flips and turns by 90 degrees are looked for.
        progress: Is told how much is done, of how much.

    Returns:
        The pairs, in order; of many that all look the same, each one appears in some.
    """
    if len(thumbnails) < 2:
        return []
    copies = ORIENTATIONS if orientations else ORIENTATIONS[:1]
    parts = CROPS if crops else ()
    index = BandIndex(coefficients(thumbnails))
    total, done = len(thumbnails) * (len(copies) + len(parts)), 0

    def candidates(variant: Variant) -> _Pairs:
        nonlocal done
        query, picture, similarity = index.matches(coefficients(thumbnails, variant), least_similarity=_LEAST_CANDIDATE)
        kept = query < picture if not variant.crops else query != picture
        done += len(thumbnails)
        if progress is not None:
            progress(done, total)
        windows = np.tile(np.array(variant.window, np.float32), (int(kept.sum()), 1))
        return _Pairs(query[kept], picture[kept], similarity[kept], windows)

    found: dict[tuple[int, int], NearDuplicate] = {}
    for variant in copies:
        _confirm(thumbnails, candidates(variant).without(found), variant, found)
    if parts:
        # A crop resembles several of those tried; the nearest one is where fitting starts.
        pairs = _Pairs.joined([candidates(variant) for variant in parts]).most_similar()
        _confirm(thumbnails, pairs.without(found), None, found)
    return [found[key] for key in sorted(found)]


@dataclass(frozen=True)
class _Pairs:
    """Candidates: numbers of the picture that is changed and of the other one, cosine, and the part that is shown."""

    sources: npt.NDArray[np.int64]
    copies: npt.NDArray[np.int64]
    similarity: Floats
    windows: Floats

    @classmethod
    def joined(cls, several: list["_Pairs"]) -> "_Pairs":
        names = ("sources", "copies", "similarity", "windows")
        return cls(*(np.concatenate([getattr(pairs, name) for pairs in several]) for name in names))

    def __getitem__(self, rows: npt.NDArray) -> "_Pairs":
        return _Pairs(self.sources[rows], self.copies[rows], self.similarity[rows], self.windows[rows])

    def most_similar(self) -> "_Pairs":
        """Keeps of each pair the row with the largest similarity."""
        order = np.lexsort((-self.similarity, self.copies, self.sources))
        source, copy = self.sources[order], self.copies[order]
        first = np.ones(len(order), bool)
        first[1:] = (source[1:] != source[:-1]) | (copy[1:] != copy[:-1])
        return self[order[first]]

    def without(self, found: Container[tuple[int, int]]) -> "_Pairs":
        pairs = zip(self.sources.tolist(), self.copies.tolist(), strict=True)
        return self[np.array([(min(pair), max(pair)) not in found for pair in pairs], dtype=bool)]


def details(pictures: npt.NDArray) -> Floats:
    """Returns what is left of pictures without their low frequencies, with mean 0 and length 1.

    Args:
        pictures: Shape (pictures, 64, 64).
    """
    exact = pictures.astype(np.float32)
    rest = exact - gaussian_filter(exact, (0, _DETAIL_SIZE, _DETAIL_SIZE))
    flat = rest.reshape(-1, THUMBNAIL_SIDE**2)
    flat -= flat.mean(axis=1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-3)


def _confirm(
    thumbnails: npt.NDArray[np.uint8],
    pairs: _Pairs,
    orientation: Variant | None,
    found: dict[tuple[int, int], NearDuplicate],
) -> None:
    """Adds those candidates that are copies to `found`; without an orientation, they are parts of each other."""
    for start in range(0, len(pairs.sources), _PAIRS_AT_ONCE):
        block = pairs[np.arange(start, min(start + _PAIRS_AT_ONCE, len(pairs.sources)))]
        changed, wanted = thumbnails[block.sources], thumbnails[block.copies]
        if orientation is not None:
            changed = turned(changed, orientation)
        likeness, detail = _compare(changed, wanted, block.windows, whole=orientation is not None)
        for hit in np.flatnonzero((likeness >= LEAST_LIKENESS) & (detail >= LEAST_DETAIL)):
            source, copy = int(block.sources[hit]), int(block.copies[hit])
            key = (min(source, copy), max(source, copy))
            if key not in found or found[key].detail < detail[hit]:
                found[key] = NearDuplicate(*key, float(likeness[hit]), float(detail[hit]))


def _compare(changed: npt.NDArray, wanted: npt.NDArray, windows: Floats, *, whole: bool) -> tuple[Floats, Floats]:
    """Returns likeness and correlation of details of pairs of thumbnails, fitted to each other where it is needed."""
    target_details = details(wanted)
    likeness = np.zeros(len(changed), np.float32)
    detail = np.zeros(len(changed), np.float32)
    if whole:
        likeness = np.einsum("ik,ik->i", coefficients(changed), coefficients(wanted))
        detail = np.einsum("ik,ik->i", details(changed), target_details)
    rest = np.flatnonzero(detail < _FITS_AS_IT_IS)
    fitted, rest, windows = _fit(changed, wanted, rest, windows[rest])
    rows, columns = window_matrix(windows[:, 0], windows[:, 2]), window_matrix(windows[:, 1], windows[:, 3])
    parts = rows @ changed[rest].astype(np.float32) @ columns.transpose(0, 2, 1)
    agreement = np.einsum("ik,ik->i", details(parts), target_details[rest])
    better = agreement > detail[rest]
    likeness[rest[better]], detail[rest[better]] = fitted[better], agreement[better]
    return likeness, detail


def _fit(
    changed: npt.NDArray, wanted: npt.NDArray, rest: npt.NDArray, windows: Floats
) -> tuple[Floats, npt.NDArray, Floats]:
    """Fits windows of some pairs, at half the size; returns the likeness, which are left, and their windows."""
    pictures, targets = _halved(changed[rest]), normalised(_frequencies(_halved(wanted[rest])))
    likeness = np.zeros(len(rest), np.float32)
    for step in range(_STEPS + 1):
        moved, likeness = _closer(pictures, targets, windows)
        # Those that stay unlike are no copies; the last round only measures.
        kept = likeness >= _LEAST_AFTER_STEPS[min(step, len(_LEAST_AFTER_STEPS) - 1)]
        windows = (windows if step == _STEPS else moved)[kept]
        pictures, targets, rest, likeness = pictures[kept], targets[kept], rest[kept], likeness[kept]
    return likeness, rest, windows


def _closer(pictures: Floats, targets: Floats, windows: Floats) -> tuple[Floats, Floats]:
    """Returns windows moved by one step of Gauss and Newton towards the targets, and the likeness before it."""
    width, side = np.float32(0.01), pictures.shape[-1]
    nothing = np.zeros(2, np.float32)
    # Rows of a window move in two ways, as a whole and in length, and so do its columns.
    moves = np.array([[width, 0], [-width, 0], [0, width], [0, -width]], np.float32)
    rows, columns = (
        [window_basis(windows[:, axis] + start, windows[:, axis + 2] + size, side) for start, size in (nothing, *moves)]
        for axis in (0, 1)
    )
    now = normalised(rows[0] @ pictures @ columns[0].transpose(0, 2, 1))
    right = pictures @ columns[0].transpose(0, 2, 1)
    left = rows[0] @ pictures
    shown = [[normalised(matrix @ right) for matrix in rows[1:]]]
    shown.append([normalised(left @ matrix.transpose(0, 2, 1)) for matrix in columns[1:]])
    slopes = np.stack(
        [(shown[axis][2 * kind] - shown[axis][2 * kind + 1]) / (2 * width) for kind in (0, 1) for axis in (0, 1)],
        axis=2,
    )
    curvature = np.einsum("nik,nil->nkl", slopes, slopes) + 1e-3 * np.eye(4, dtype=np.float32)
    slope = np.einsum("nik,ni->nk", slopes, targets - now)
    moved = windows + np.clip(np.linalg.solve(curvature, slope[..., None])[..., 0], -0.04, 0.04)
    moved[:, 2:] = np.clip(moved[:, 2:], 0.6, 1.1)
    return moved, np.einsum("ik,ik->i", now, targets)


def _halved(pictures: npt.NDArray) -> Floats:
    half = pictures.shape[-1] // 2
    return pictures.reshape(-1, half, 2, half, 2).mean(axis=(2, 4), dtype=np.float32)


def _frequencies(pictures: Floats) -> Floats:
    matrix = basis(pictures.shape[-1])
    return matrix @ pictures @ matrix.T
