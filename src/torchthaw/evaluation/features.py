"""Features of images: what a backbone hands to its final layer."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from torchthaw.backbones.folding import put_on_fast_form
from torchthaw.backbones.modeling import TorchvisionModel
from torchthaw.evaluation.inference import predict_logits


def pooled_features(
    model: TorchvisionModel,
    view: Dataset[Any],
    *,
    batch_size: int = 32,
    num_workers: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Computes the pooled features of every image of an evaluation view, in order.

    Args:
        model: A model without a head; it is used where it is.
        view: Images without augmentation.
        batch_size: Images at once.
        num_workers: Processes that decode images besides the main one.
        on_progress: Called with the number of images done after each batch.

    Returns:
        Float32 array of shape (images, features).
    """
    form = put_on_fast_form(model)
    try:
        return predict_logits(
            _Pooled(model), view, batch_size=batch_size, num_workers=num_workers, on_progress=on_progress
        )
    finally:
        form.remove()


class _Pooled(nn.Module):
    """Gives features where a classifier gives logits."""

    def __init__(self, model: TorchvisionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(pixel_values=pixel_values).pooler_output.flatten(1))
