"""Test-time augmentation: the mean of what a model says of several views of an image.

Probabilities are averaged, as Krizhevsky, Sutskever and Hinton ("ImageNet Classification with Deep Convolutional Neural
Networks", NeurIPS 2012, section 4.1) average the softmax over ten crops: the centre, the four corners, and the mirror
images of these five. Where an image may have several labels, it is the sigmoid of each class. Nothing of it is in a
saved model, whose own scores are those of the centre alone.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.special import logsumexp

from torchthaw.data.five_crops import FiveCropView, why_no_crops
from torchthaw.data.views import ImageView, collate
from torchthaw.errors import PlanError, did_you_mean
from torchthaw.evaluation.arrays import Floats, log_softmax
from torchthaw.evaluation.inference import predict_looks

# The number of views of each image.
VIEWS = {"none": 1, "flip": 2, "five_crop": 5, "ten_crop": 10}
_CROPS = ("five_crop", "ten_crop")


def check_test_time_augmentation(method: str, view: Any) -> None:
    """Checks that images can be seen as a method asks for.

    Args:
        method: A key of `VIEWS`.
        view: Images to be evaluated; None where there are none.

    Raises:
        PlanError: the method is unknown, or crops are asked for of what gives tensors, or of an image processor that
            leaves nothing to crop.
    """
    if method not in VIEWS:
        raise PlanError(f"unknown tta {method!r}.{did_you_mean(method, VIEWS)} There are {', '.join(VIEWS)}.")
    if method not in _CROPS or view is None:
        return
    problem = "the images come as tensors of their final size"
    if isinstance(view, ImageView):
        problem = why_no_crops(view.processor) or ""
    if problem:
        raise PlanError(f"tta is {method!r}, but {problem}; write tta='flip', or 'none'")


def predict_augmented(
    model: torch.nn.Module,
    view: Any,
    method: str,
    *,
    batch_size: int = 32,
    num_workers: int = 0,
    on_progress: Callable[[int], None] | None = None,
    collate_fn: Callable[[list[Any]], dict[str, Any]] = collate,
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the logits of each view of every image; images are decoded once.

    Args:
        model: A classification model, in the mode and place in which it is left.
        view: Images without augmentation.
        method: `none`, the processor's own pixels alone; `flip`, these and their mirror image; `five_crop`; `ten_crop`,
            five crops and their mirror images.
        batch_size: Images at once.
        num_workers: Processes that decode images besides the main one.
        on_progress: Called with the number of images done after each batch.
        collate_fn: Makes a batch of samples; crops are always stacked.

    Returns:
        Float32 logits of shape (views, images, classes), and labels of shape (images,). The first view is the
        processor's own, and its logits are those without test-time augmentation, to the last bit.

    Raises:
        PlanError: as `check_test_time_augmentation`.
    """
    check_test_time_augmentation(method, view)
    crops, flips = method in _CROPS, method in ("flip", "ten_crop")

    def looks(pixels: torch.Tensor) -> list[torch.Tensor]:
        cut = [part.contiguous() for part in pixels.unbind(1)] if crops else [pixels]
        return [*cut, *(part.flip(-1) for part in cut)] if flips else cut

    return predict_looks(
        model,
        FiveCropView(view) if crops else view,
        looks,
        batch_size=batch_size,
        num_workers=num_workers,
        on_progress=on_progress,
        collate_fn=collate if crops else collate_fn,
    )


def mean_prediction(logits: Floats, *, several_labels: bool) -> Floats:
    """Returns logits whose probabilities are the mean of those of all views.

    Args:
        logits: Shape (views, images, classes).
        several_labels: Whether probabilities are the sigmoid of each logit, rather than the softmax of them.

    Returns:
        Float32 logits, shape (images, classes): where images have one label, logarithms of probabilities.
    """
    if len(logits) == 1:
        return logits[0]
    exact = logits.astype(np.float64)
    if not several_labels:
        return (logsumexp(log_softmax(exact), axis=0) - np.log(len(exact))).astype(np.float32)
    # The logarithm of the mean of sigmoids over that of what they leave to 1.
    yes, no = (logsumexp(-np.logaddexp(0, -sign * exact), axis=0) for sign in (1, -1))
    return (yes - no).astype(np.float32)
