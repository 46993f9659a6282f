"""What copies of a picture share: its low spatial frequencies, also after a flip, a turn or a crop."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.fft import dct

THUMBNAIL_SIDE = 64
_FREQUENCIES = 8
# The mean of the picture is left out, so that brightness does not count.
NUM_COEFFICIENTS = _FREQUENCIES**2 - 1
_CROP_SCALE = 0.9
_AT_ONCE = 4096

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Variant:
    """A way in which one picture may have been made from another.

    Attributes:
        transpose: Whether rows and columns are exchanged (before flipping).
        flip_rows: Whether it is upside down.
        flip_columns: Whether left and right are exchanged.
        window: Top, left, height and width of the part that is left, as shares of the picture.
    """

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False
    window: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)

    @property
    def crops(self) -> bool:
        """Whether a part of the picture is cut off."""
        return self.window != (0.0, 0.0, 1.0, 1.0)


ORIENTATIONS = tuple(
    Variant(transpose, rows, columns)
    for transpose in (False, True)
    for rows in (False, True)
    for columns in (False, True)
)
_PLACES = (0.0, 0.5, 1.0)
CROPS = (
    *(
        Variant(window=((1 - _CROP_SCALE) * top, (1 - _CROP_SCALE) * left, _CROP_SCALE, _CROP_SCALE))
        for top in _PLACES
        for left in _PLACES
    ),
    Variant(window=(0.025, 0.025, 0.95, 0.95)),
)


def thumbnail(picture: Image.Image) -> npt.NDArray[np.uint8]:
    """Returns a picture in grey at 64 x 64 pixels, whatever its shape.

    Args:
        picture: In RGB.
    """
    side = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    return np.asarray(picture.convert("L").resize(side, Image.Resampling.BOX, reducing_gap=2.0), dtype=np.uint8)


def coefficients(thumbnails: npt.NDArray, variant: Variant | None = None) -> Floats:
    """Returns the low frequencies of pictures, which are what perceptual hashes are made of (Zauner, 2010: pHash).

    Args:
        thumbnails: Shape (images, 64, 64).
        variant: How the pictures are changed before.

    Returns:
        Cosine transform without its constant, scaled to length 1 (0 for a uniform picture), shape (images, 63).
    """
    variant = variant or Variant()
    top, left, height, width = variant.window
    rows, columns = (
        window_basis(np.array([start], np.float32), np.array([size], np.float32), THUMBNAIL_SIDE)[0]
        for start, size in ((top, height), (left, width))
    )
    result = np.empty((len(thumbnails), NUM_COEFFICIENTS), np.float32)
    for start in range(0, len(thumbnails), _AT_ONCE):
        blocks = rows @ thumbnails[start : start + _AT_ONCE].astype(np.float32) @ columns.T
        result[start : start + _AT_ONCE] = normalised(oriented(blocks, variant))
    return result


def normalised(blocks: Floats) -> Floats:
    """Drops the constant of blocks of frequencies, and scales the rest to length 1."""
    flat = blocks.reshape(-1, _FREQUENCIES**2)[:, 1:]
    return (flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-3)).astype(np.float32)


def oriented(blocks: Floats, variant: Variant) -> Floats:
    """Turns and flips pictures that are given by their frequencies, shape (images, 8, 8)."""
    signs = (-1.0) ** np.arange(_FREQUENCIES, dtype=np.float32)
    if variant.transpose:
        blocks = blocks.transpose(0, 2, 1)
    if variant.flip_rows:
        blocks = blocks * signs[None, :, None]
    if variant.flip_columns:
        blocks = blocks * signs[None, None, :]
    return blocks


def window_basis(starts: Floats, sizes: Floats, side: int) -> Floats:
    """Returns the matrices that take a part of some samples to its low frequencies, shape (parts, 8, samples)."""
    return basis(side) @ window_matrix(starts, sizes, side)


def window_matrix(starts: Floats, sizes: Floats, side: int = THUMBNAIL_SIDE) -> Floats:
    """Returns matrices that stretch a part of some samples over as many samples, by linear interpolation.

    Args:
        starts: Where each part starts, as a share of the whole.
        sizes: How long it is.
        side: The number of samples.

    Returns:
        Shape (parts, side, side).
    """
    places = (starts[:, None] + sizes[:, None] * ((np.arange(side, dtype=np.float32) + 0.5) / side)) * side - 0.5
    distances = np.abs(np.arange(side, dtype=np.float32) - np.clip(places, 0, side - 1)[:, :, None])
    return np.maximum(0, 1 - distances).astype(np.float32)


def turned(thumbnails: npt.NDArray, variant: Variant) -> npt.NDArray:
    """Turns and flips thumbnails, shape (images, 64, 64)."""
    if variant.transpose:
        thumbnails = thumbnails.transpose(0, 2, 1)
    if variant.flip_rows:
        thumbnails = thumbnails[:, ::-1]
    if variant.flip_columns:
        thumbnails = thumbnails[:, :, ::-1]
    return thumbnails


@cache
def basis(side: int) -> Floats:
    """Returns the matrix of a cosine transform of `side` samples to their low frequencies, shape (8, side)."""
    return dct(np.eye(side), norm="ortho", axis=0)[:_FREQUENCIES].astype(np.float32)
