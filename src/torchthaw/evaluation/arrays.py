"""Checks and small functions on arrays of logits and class ids, shared by metrics and predictions."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from torchthaw.errors import DataError

Floats = npt.NDArray[np.floating]
Ids = npt.NDArray[np.int64]


class NonFiniteLogitsError(DataError):
    """Logits are NaN or infinite: the model has broken down."""


def as_logits(logits: npt.ArrayLike) -> Floats:
    """Returns logits as a float array of shape (images, classes).

    Raises:
        DataError: The array is not two-dimensional, is empty, or holds NaN or infinite values.
    """
    array = np.asarray(logits)
    if array.ndim != 2 or array.shape[1] == 0 or array.dtype.kind not in "fiu":
        raise DataError(
            f"Logits have the shape {array.shape} and type {array.dtype}, "
            "but one row per image with one number per class is needed: pass an array of shape (images, classes)."
        )
    if len(array) == 0:
        raise DataError(f"Logits have the shape {array.shape}: there are no images to evaluate. Pass at least one.")
    if array.dtype.kind != "f":
        array = array.astype(np.float64)
    broken = int((~np.isfinite(array)).any(axis=1).sum())
    if broken:
        raise NonFiniteLogitsError(
            f"The logits of {broken} of {len(array)} images are not finite (NaN or infinite), so no metric of them "
            "means anything. Use a lower learning rate, clip gradients, or train in bf16 or fp32 instead of fp16."
        )
    return array


def as_class_ids(labels: npt.ArrayLike, num_images: int, num_classes: int) -> Ids:
    """Returns labels as an integer array of shape (images,).

    Raises:
        DataError: The labels are not one integer in 0 ... `num_classes` - 1 per image.
    """
    array = np.asarray(labels)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"Labels have the shape {array.shape} and type {array.dtype}, but one integer class id per image is "
            "needed: pass an integer array of shape (images,)."
        )
    if len(array) != num_images:
        raise DataError(f"There are {len(array)} labels for {num_images} images. Pass one label per image.")
    outside = array[(array < 0) | (array >= num_classes)]
    if len(outside):
        raise DataError(
            f"The label {int(outside[0])} (one of {len(outside)} such) names no class: there are {num_classes} "
            f"classes, so labels go from 0 to {num_classes - 1}. Map the split's labels to the model's classes by name."
        )
    return array.astype(np.int64)


def as_class_names(class_names: Sequence[str], num_classes: int) -> list[str]:
    """Returns the names as a list.

    Raises:
        DataError: The names are not one per class, or two classes share a name.
    """
    names = [str(name) for name in class_names]
    if len(names) != num_classes:
        raise DataError(
            f"There are {len(names)} class names for {num_classes} columns of logits. "
            "Pass one name per class, in the order of the model's id2label."
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"The class name {twice[0]!r} stands for more than one class. Give each class its own name.")
    return names


def log_softmax(logits: Floats) -> Floats:
    """Log-softmax over the last axis, in the precision of the input."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def softmax(logits: Floats) -> Floats:
    """Softmax over the last axis, in the precision of the input."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Floats = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return result
