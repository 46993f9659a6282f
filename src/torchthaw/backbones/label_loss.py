"""The loss of a classifier, for the kinds of labels that there are."""

from typing import Any

import torch
from torch.nn import functional as F

from .configuration import TorchvisionConfig


def classification_loss(
    labels: torch.Tensor, pooled_logits: torch.Tensor, config: TorchvisionConfig, **_kwargs: Any
) -> torch.Tensor:
    """Returns the mean cross entropy, or for several labels per image the mean binary cross entropy.

    Args:
        labels: (batch,) class ids, or (batch, num_labels) probabilities (or 0 and 1 for several labels per image).
        pooled_logits: (batch, num_labels).
        config: Its `problem_type` says whether an image may have several labels.

    Raises:
        ValueError: If the labels have neither shape.
    """
    labels = labels.to(pooled_logits.device)
    if labels.shape == pooled_logits.shape and config.problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(pooled_logits, labels.to(pooled_logits.dtype))
    if labels.is_floating_point() and (labels.ndim == 1 or labels.shape[1:] == (1,)):
        # Cross entropy of a single class would be 0, whatever the labels are.
        raise ValueError(
            f"Labels of shape {tuple(labels.shape)} and type {labels.dtype} are one number per image to be estimated, "
            "which is regression, and this is a classifier. Pass class ids, integers of shape (batch,); for numbers, "
            "classes of them, such as ranges."
        )
    if labels.shape == pooled_logits.shape and labels.is_floating_point():
        return F.cross_entropy(pooled_logits, labels.to(pooled_logits.dtype))
    if labels.shape == pooled_logits.shape[:1] and not labels.is_floating_point():
        return F.cross_entropy(pooled_logits, labels.long())
    raise ValueError(
        f"Labels of shape {tuple(labels.shape)} and type {labels.dtype} do not fit logits of shape "
        f"{tuple(pooled_logits.shape)}. Pass class ids of shape (batch,), or floats of shape (batch, num_labels): a "
        "distribution over the classes, or 0 and 1 with problem_type='multi_label_classification'."
    )
