"""Evaluation views that see more of an image than its centre: five crops of the resized picture."""

from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import functional as F

from torchthaw.backbones.image_processing import TorchvisionImageProcessor
from torchthaw.data.images import decode_image
from torchthaw.data.views import ImageView


class FiveCropView(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The images of an evaluation view, each as five crops: the view's own, and those of the four corners.

    Pictures are resized as the processor does, and crops are as large as its own.

    Args:
        view: Without augmentation, and with a processor of which `why_no_crops` says nothing.
    """

    def __init__(self, view: ImageView) -> None:
        self._view = view
        self._size = [view.processor.crop_size[edge] for edge in ("height", "width")]
        self._whole = view.processor.with_settings(do_center_crop=False)
        names = view.dataset.column_names
        self._names = view.dataset["path"][:] if "path" in names else None

    def __len__(self) -> int:
        return len(self._view)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """Returns `pixel_values`, shape (5, 3, height, width), the centre first, and `labels` as the view gives them.

        Raises:
            DataError: the image cannot be decoded; the message names it.
        """
        name = None if self._names is None else self._names[row]
        picture = decode_image(self._view.value(row), name=name)
        pixels = self._whole(images=picture, return_tensors="pt")["pixel_values"][0]
        *corners, centre = F.five_crop(pixels, self._size)
        return {"pixel_values": torch.stack([centre, *corners]), "labels": self._view.label(row)}


def why_no_crops(processor: Any) -> str | None:
    """Says why corners cannot be cropped from what an image processor resizes; None if they can."""
    if type(processor) is not TorchvisionImageProcessor:
        return f"the image processor is a {type(processor).__name__}, of which it is not known how it crops"
    if not (processor.do_resize and processor.do_center_crop):
        return "the image processor does not both resize and crop"
    size, crop = processor.size, processor.crop_size
    edges = {edge: size.get("shortest_edge", size.get(edge, 0)) for edge in ("height", "width")}
    if any(edges[edge] < crop[edge] for edge in edges):
        return f"the image processor resizes to {size}, less than its crop of {crop}"
    return None
