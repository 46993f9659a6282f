"""Logits of a model on images: the one path by which saved models are evaluated and used."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from torchthaw.backbones.allocator import tensors_kept_in_memory
from torchthaw.data.views import collate


def best_device() -> torch.device:
    """Returns CUDA or MPS where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def predict_logits(
    model: nn.Module,
    view: Dataset[Any],
    *,
    batch_size: int = 32,
    num_workers: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Computes the logits of every image; see `predict_split`.

    Returns:
        Float32 array of shape (images, classes).
    """
    return predict_split(model, view, batch_size=batch_size, num_workers=num_workers, on_progress=on_progress)[0]


def predict_split(
    model: nn.Module,
    view: Dataset[Any],
    *,
    batch_size: int = 32,
    num_workers: int = 0,
    on_progress: Callable[[int], None] | None = None,
    collate_fn: Callable[[list[Any]], dict[str, Any]] = collate,
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the logits of every image of an evaluation view, in order.

    Args:
        model: A classification model; it is used where it is, in eval mode, and left in the mode it came in.
        view: Gives `pixel_values` and `labels`: images without augmentation.
        batch_size: Images at once.
        num_workers: Processes that decode images besides the main one.
        on_progress: Called with the number of images done after each batch.
        collate_fn: Makes a batch of samples.

    Returns:
        Float32 logits of shape (images, classes), and labels of shape (images,).
    """
    logits, labels = predict_looks(
        model,
        view,
        lambda pixels: [pixels],
        batch_size=batch_size,
        num_workers=num_workers,
        on_progress=on_progress,
        collate_fn=collate_fn,
    )
    return logits[0], labels


@torch.inference_mode()
def predict_looks(
    model: nn.Module,
    view: Dataset[Any],
    looks: Callable[[torch.Tensor], Iterable[torch.Tensor]],
    *,
    batch_size: int = 32,
    num_workers: int = 0,
    on_progress: Callable[[int], None] | None = None,
    collate_fn: Callable[[list[Any]], dict[str, Any]] = collate,
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the logits of every image as often as it is looked at; otherwise as `predict_split`.

    Args:
        model: See there, as for what is not named here.
        view: Gives `pixel_values` and `labels`.
        looks: From the `pixel_values` of a batch to batches for the model, one for each look.
        batch_size: Images at once, each look by itself.
        num_workers: See there.
        on_progress: See there.
        collate_fn: See there.

    Returns:
        Float32 logits of shape (looks, images, classes), and labels of shape (images,).
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    logits: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    done = 0
    with tensors_kept_in_memory() if device.type == "cpu" else nullcontext():
        for batch in DataLoader(view, batch_size=batch_size, num_workers=num_workers, collate_fn=collate_fn):
            pixels = batch["pixel_values"].to(device)
            logits.append(torch.stack([model(pixel_values=look).logits.float().cpu() for look in looks(pixels)]))
            labels.append(torch.as_tensor(batch["labels"]).cpu())
            done += len(labels[-1])
            if on_progress is not None:
                on_progress(done)
    model.train(was_training)
    return torch.cat(logits, dim=1).numpy(), torch.cat(labels).numpy()
