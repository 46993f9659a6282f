"""Data that comes with a dependency, so that the quickstart needs no network."""

import io

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from sklearn.datasets import load_digits

from torchthaw.errors import DataError, did_you_mean

BUILTIN_PREFIX = "builtin:"


def load_builtin_dataset(name: str) -> DatasetDict:
    """Loads a data set by its name after `builtin:`.

    `digits` is scikit-learn's copy of the UCI handwritten digits: 1,797 grey images of 8 x 8 pixels in 10 classes.

    Raises:
        DataError: there is no such data set.
    """
    if name != "digits":
        raise DataError(
            f"unknown data {BUILTIN_PREFIX}{name}.{did_you_mean(name, ['digits'])} There is builtin:digits."
        )
    digits = load_digits()
    features = Features(
        image=Image(decode=False), label=ClassLabel(names=[str(digit) for digit in range(10)]), path=Value("string")
    )
    columns = {
        "image": [{"bytes": _png(pixels), "path": None} for pixels in digits.images],
        "label": digits.target.tolist(),
        "path": [f"digits/{row:04d}.png" for row in range(len(digits.images))],
    }
    return DatasetDict(train=Dataset.from_dict(columns, features=features))


def _png(pixels: np.ndarray) -> bytes:
    # The grey levels run from 0 to 16.
    buffer = io.BytesIO()
    PILImage.fromarray((pixels * (255 / 16)).round().astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()
