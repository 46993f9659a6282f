"""The worst mistakes of a model as pictures: what the image is, what it was taken for, and what that was read off."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image

from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.data.images import decode_image
from torchthaw.data.views import ImageView
from torchthaw.evaluation.activation_maps import activation_maps
from torchthaw.evaluation.arrays import softmax

MOST_MISTAKES = 12
MOST_WITH_MAPS = 6
PICTURE_SIDE = 224
# Fewer cells than this show nothing of a place.
_LEAST_CELLS = 4
_MAP_SHARE = 0.55


@dataclass(frozen=True)
class ActivationMaps:
    """What speaks for two classes in an image.

    Attributes:
        seen: The image as the network got it.
        for_predicted: The same with the map of the class that was predicted over it: yellow speaks for it most.
        for_label: The same for the class that it is.
        cells: Rows and columns of the maps before they were enlarged.
    """

    seen: Image.Image
    for_predicted: Image.Image
    for_label: Image.Image
    cells: tuple[int, int]


@dataclass(frozen=True)
class Mistake:
    """An image that was taken for another class.

    Attributes:
        path: Where it is; None if that is not known.
        label: The class that it is.
        predicted: The class that it was taken for.
        score: Probability of that class.
        label_score: Probability of the class that it is.
        picture: The image, `PICTURE_SIDE` pixels wide and high at most.
        maps: Activation maps; None for most mistakes, and where the feature map has too few cells.
    """

    path: str | None
    label: str
    predicted: str
    score: float
    label_score: float
    picture: Image.Image
    maps: ActivationMaps | None = None


def worst_mistakes(logits: np.ndarray, labels: np.ndarray, limit: int = MOST_MISTAKES) -> list[int]:
    """Returns the rows of wrong predictions, those with the highest score first, at most `limit`."""
    scores = softmax(logits.astype(np.float64))
    wrong = np.flatnonzero(logits.argmax(1) != labels)
    order = np.argsort(-scores.max(1)[wrong], kind="stable")
    return [int(row) for row in wrong[order[:limit]]]


def show_mistakes(
    model: TorchvisionForImageClassification, view: ImageView, logits: np.ndarray, labels: np.ndarray
) -> list[Mistake]:
    """Makes pictures of the worst mistakes, with activation maps of the first ones.

    Args:
        model: The classifier, where it is.
        view: The images, without augmentation.
        logits: What it gave for them, shape (images, classes).
        labels: Class ids, shape (images,).
    """
    rows = worst_mistakes(logits, labels)
    if not rows:
        return []
    names = model.config.class_names
    predicted = logits.argmax(1)
    scores = softmax(logits.astype(np.float64))
    paths = view.dataset["path"] if "path" in view.dataset.column_names else None
    with_maps = rows[:MOST_WITH_MAPS]
    maps = _maps(model, view, with_maps, predicted[with_maps], labels[with_maps])
    return [
        Mistake(
            path=None if paths is None else paths[row],
            label=names[labels[row]],
            predicted=names[predicted[row]],
            score=float(scores[row, predicted[row]]),
            label_score=float(scores[row, labels[row]]),
            picture=thumbnail(view.value(row)),
            maps=maps[number] if number < len(maps) else None,
        )
        for number, row in enumerate(rows)
    ]


def thumbnail(value: Any) -> Image.Image:
    """Returns an image of a data set, not wider or higher than `PICTURE_SIDE` pixels.

    Raises:
        DataError: it cannot be decoded.
    """
    picture = decode_image(value)
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return picture


def overlaid(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """Lays a map over a picture, enlarged to its size: dark blue for 0, yellow for the map's highest value."""
    scaled = heat / heat.max() if heat.max() > 0 else heat
    large = Image.fromarray(scaled.astype(np.float32)).resize(picture.size, Image.Resampling.BILINEAR)
    colors = matplotlib.colormaps["viridis"](np.asarray(large).clip(0, 1))[..., :3]
    # The picture in grey, so that all colour is the map's.
    grey = np.asarray(picture.convert("L"), dtype=np.float64)[..., None] / 255
    return Image.fromarray(np.uint8(255 * (_MAP_SHARE * colors + (1 - _MAP_SHARE) * grey)))


def _maps(
    model: TorchvisionForImageClassification,
    view: ImageView,
    rows: Sequence[int],
    predicted: np.ndarray,
    labels: np.ndarray,
) -> list[ActivationMaps]:
    pixels = torch.stack([view[row]["pixel_values"] for row in rows])
    pair = torch.cat([pixels, pixels])
    maps = activation_maps(model, pair, torch.from_numpy(np.concatenate([predicted, labels])))
    if maps[0].size < _LEAST_CELLS:
        return []
    seen = [_picture(image, view.processor) for image in pixels]
    return [
        ActivationMaps(
            seen=picture,
            for_predicted=overlaid(picture, maps[number]),
            for_label=overlaid(picture, maps[len(rows) + number]),
            cells=(maps.shape[1], maps.shape[2]),
        )
        for number, picture in enumerate(seen)
    ]


def _picture(pixel_values: torch.Tensor, processor: Any) -> Image.Image:
    """Undoes the normalisation of an image, and makes it as large as other pictures."""
    pixels = pixel_values.numpy().transpose(1, 2, 0)
    if processor.do_normalize:
        pixels = pixels * np.array(processor.image_std) + np.array(processor.image_mean)
    picture = Image.fromarray(np.uint8(255 * pixels.clip(0, 1)))
    scale = PICTURE_SIDE / max(picture.size)
    return picture.resize((round(scale * picture.width), round(scale * picture.height)), Image.Resampling.BILINEAR)
