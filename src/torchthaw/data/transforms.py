"""From a picture to the tensor that the network sees: augmented for training, the processor's own for evaluation.

Each transform has two steps. `prepared` is fixed and costly, and what it gives can be kept: the picture at the
resolution that training needs, or the crop that evaluation sees, in 8 bits. What follows is random or cheap.
"""

import math
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from torchthaw.backbones.image_processing import TorchvisionImageProcessor
from torchthaw.data.augmentation import Augmentation
from torchthaw.data.finishing import NOWHERE, Box, Normalisation, View

Pixels = npt.NDArray[np.uint8]

# Where fewer pixels would be saved, resampling a second time only blurs.
_WORTHWHILE = 0.8
_INTERPOLATION = {
    Image.Resampling.NEAREST: v2.InterpolationMode.NEAREST,
    Image.Resampling.BILINEAR: v2.InterpolationMode.BILINEAR,
    Image.Resampling.BICUBIC: v2.InterpolationMode.BICUBIC,
    Image.Resampling.LANCZOS: v2.InterpolationMode.LANCZOS,
    Image.Resampling.BOX: v2.InterpolationMode.BOX,
    Image.Resampling.HAMMING: v2.InterpolationMode.HAMMING,
}
_ON_TENSORS = (v2.InterpolationMode.BILINEAR, v2.InterpolationMode.BICUBIC)


class ImageTransform(Protocol):
    """From a picture to a tensor; picklable."""

    def working_size(self, width: int, height: int) -> tuple[int, int]:
        """Returns the width and height to which a picture is reduced first; its own where it is not."""

    def prepared_size(self, width: int, height: int) -> tuple[int, int] | None:
        """Returns the width and height of what `prepared` gives for a picture of a size, if it can be kept."""

    def prepared(self, picture: Image.Image) -> Any:
        """Takes the first step; the result depends on the picture and `key` alone."""

    @property
    def key(self) -> dict[str, Any]:
        """What the first step depends on, as JSON values."""

    def __call__(self, prepared: Any, out: Tensor | None = None) -> Tensor:
        """Takes the second step, with torch's random numbers; float, (3, height, width), into `out` where given."""


class TrainTransform:
    """The random transform of training images, in the order of torchvision's reference recipes.

    **The picture is first reduced to its working resolution**: so far that the smallest crop that `crop_scale` and
    `crop_ratio` allow still has the pixels that the network sees, so that no crop is enlarged which would not be
    enlarged from the whole picture. JPEGs are decoded at the smallest of 1/8, 1/4, 1/2 that is large enough; then, and
    for other formats, the picture is resized with the processor's interpolation, unless less than a fifth of its side
    would be saved. At 224 pixels and a crop of 35 % or more that is an area of 437 x 437 pixels. This is how training
    images are defined: what comes out is the same whether reduced pictures are kept or each is decoded again.

    Then come the random crop, resized to the processor's size with its interpolation; flips; RandAugment or
    TrivialAugment; changes of colour; the processor's scaling and normalisation; erasing. Mixup and cutmix need a
    second image and are not part of it (see `ImageView`). All randomness comes from torch's CPU generator.

    Args:
        processor: Processor of the model; gives size, interpolation, mean and standard deviation.
        augmentation: What to do.
    """

    def __init__(self, processor: TorchvisionImageProcessor, augmentation: Augmentation) -> None:
        self._size = [processor.crop_size["height"], processor.crop_size["width"]]
        self._interpolation = _INTERPOLATION[Image.Resampling(int(processor.resample))]
        self._scale, self._ratio = augmentation.crop_scale, augmentation.crop_ratio
        self._crop = v2.RandomResizedCrop(self._size, scale=augmentation.crop_scale, ratio=augmentation.crop_ratio)
        self._flips = [(-1, augmentation.horizontal_flip), (-2, augmentation.vertical_flip)]
        self.normalisation = Normalisation.of(processor)
        changes = _changes(augmentation)
        self.changes = v2.Compose(changes) if changes else None
        self.erasing = v2.RandomErasing(augmentation.random_erasing) if augmentation.random_erasing else None

    @property
    def key(self) -> dict[str, Any]:
        """What the working resolution and its pixels depend on."""
        return {
            "view": "train",
            "size": self._size,
            "smallest_crop": self._scale[0],
            "ratio": list(self._ratio),
            "interpolation": self._reducing.value,
        }

    def working_size(self, width: int, height: int) -> tuple[int, int]:
        """Returns the width and height of a picture at its working resolution."""
        narrowest, widest = self._ratio
        needed = max(self._size[0] ** 2 * widest, self._size[1] ** 2 / narrowest) / self._scale[0]
        shrink = math.sqrt(needed / (width * height))
        longest = max(widest, 1 / narrowest)
        if max(width, height) > longest * min(width, height):
            # Then the crop may be as high as a panorama, and no smaller.
            shrink = max(shrink, max(self._size) / min(width, height))
        if shrink > _WORTHWHILE:
            return width, height
        return math.ceil(width * shrink), math.ceil(height * shrink)

    def prepared_size(self, width: int, height: int) -> tuple[int, int] | None:
        """Returns the working size."""
        return self.working_size(width, height)

    def prepared(self, picture: Image.Image) -> Image.Image | Pixels:
        """Returns the picture, or its pixels (height, width, 3), at the working resolution."""
        width, height = self.working_size(*picture.size)
        if (width, height) == picture.size:
            return picture
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)
        reduced = F.resize(pixels, [height, width], interpolation=self._reducing, antialias=True)
        return reduced.permute(1, 2, 0).contiguous().numpy()

    def __call__(self, prepared: Image.Image | Pixels, out: Tensor | None = None) -> Tensor:
        """Returns a random view of a prepared picture."""
        return self.view(prepared).finished(self.normalisation, out)

    def view(self, prepared: Image.Image | Pixels) -> View:
        """Returns a random view before its last steps."""
        height, width = (prepared.height, prepared.width) if isinstance(prepared, Image.Image) else prepared.shape[:2]
        box = self._crop.make_params([torch.empty((3, height, width), device="meta")])
        top, left, bottom, right = box["top"], box["left"], box["top"] + box["height"], box["left"] + box["width"]
        if isinstance(prepared, Image.Image):
            cut = np.array(prepared.crop((left, top, right, bottom)))
        else:
            cut = prepared[top:bottom, left:right].copy()
        pixels = self._resized(cut)
        for axis, probability in self._flips:
            if probability and torch.rand(1) < probability:
                pixels = pixels.flip(axis)
        if self.changes is not None:
            pixels = _tensor_of(self.changes(_picture_of(pixels)))
        return View(pixels, self._erased(pixels))

    def _erased(self, pixels: Tensor) -> Box:
        if self.erasing is None or torch.rand(1) >= self.erasing.p:
            return NOWHERE
        box = self.erasing.make_params([pixels])
        # Without a value it found no place.
        return NOWHERE if box["v"] is None else (box["i"], box["j"], box["i"] + box["h"], box["j"] + box["w"])

    @property
    def _reducing(self) -> v2.InterpolationMode:
        return self._interpolation if self._interpolation in _ON_TENSORS else v2.InterpolationMode.BILINEAR

    def _resized(self, cut: Pixels) -> Tensor:
        """Resizes (height, width, 3); channels stay last in memory, which is fastest."""
        if self._interpolation in _ON_TENSORS:
            pixels = torch.from_numpy(cut).permute(2, 0, 1)
            return F.resize(pixels, self._size, interpolation=self._interpolation, antialias=True)
        return _tensor_of(F.resize(Image.fromarray(cut), self._size, interpolation=self._interpolation))


class EvaluationTransform:
    """The processor's own pixels, bit for bit.

    Args:
        processor: Processor of the model.
    """

    def __init__(self, processor: TorchvisionImageProcessor) -> None:
        # A copy, which nobody changes later.
        self._crop = processor.with_settings()
        self._normalise = Normalisation.of(processor)

    @property
    def key(self) -> dict[str, Any]:
        """What the crop and its pixels depend on."""
        names = ("do_resize", "size", "resample", "antialias", "do_center_crop", "crop_size")
        return {"view": "evaluation"} | {name: getattr(self._crop, name) for name in names}

    def working_size(self, width: int, height: int) -> tuple[int, int]:
        """Returns the size of the picture: it is not reduced."""
        return width, height

    def prepared_size(self, width: int, height: int) -> tuple[int, int] | None:
        """Returns the size of the crop; None without a crop, since sizes then differ in ways of the processor's own."""
        return (self._crop.crop_size["width"], self._crop.crop_size["height"]) if self._crop.do_center_crop else None

    def prepared(self, picture: Image.Image) -> Pixels:
        """Returns what the processor sees, (height, width, 3), before it scales and normalises."""
        # A copy, which can be written to.
        return np.array(self._crop.cropped(picture))

    def __call__(self, prepared: Pixels, out: Tensor | None = None) -> Tensor:
        """Scales and normalises as the processor does."""
        # Torch warns of arrays that cannot be written, as those of a cache.
        pixels = prepared if prepared.flags.writeable else prepared.copy()
        return self._normalise(torch.from_numpy(pixels).permute(2, 0, 1), out)


class ProcessorTransform:
    """The pixels of any image processor.

    Args:
        processor: Processor of the model.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    @property
    def key(self) -> dict[str, Any]:
        """Nothing is kept."""
        return {}

    def working_size(self, width: int, height: int) -> tuple[int, int]:
        """Returns the size of the picture: it is not reduced."""
        return width, height

    def prepared_size(self, width: int, height: int) -> tuple[int, int] | None:
        """Returns None: what such a processor does first is not known."""
        return None

    def prepared(self, picture: Image.Image) -> Image.Image:
        """Returns the picture."""
        return picture

    def __call__(self, prepared: Image.Image, out: Tensor | None = None) -> Tensor:
        """Returns the processor's pixels."""
        pixels: Tensor = self._processor(images=prepared, return_tensors="pt")["pixel_values"][0]
        return pixels if out is None else out.copy_(pixels)


def view_transform(processor: TorchvisionImageProcessor, augmentation: Augmentation | None) -> ImageTransform:
    """Returns the random transform of an augmentation, or without one that of evaluation."""
    if augmentation is not None:
        return TrainTransform(processor, augmentation)
    # A subclass may do anything.
    return (
        EvaluationTransform(processor)
        if type(processor) is TorchvisionImageProcessor
        else ProcessorTransform(processor)
    )


def _changes(augmentation: Augmentation) -> list[torch.nn.Module]:
    """Returns what is done to pictures of the final size, which is faster on Pillow's pictures than on tensors."""
    changes: list[torch.nn.Module] = []
    if augmentation.policy == "rand_augment":
        changes.append(v2.RandAugment(interpolation=v2.InterpolationMode.BILINEAR))
    elif augmentation.policy == "trivial_augment":
        changes.append(v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR))
    if augmentation.color_jitter:
        strength = augmentation.color_jitter
        changes.append(v2.ColorJitter(strength, strength, strength, strength / 4))
    return changes


def _picture_of(pixels: Tensor) -> Image.Image:
    rows = pixels.permute(1, 2, 0).contiguous().numpy()
    return Image.frombuffer("RGB", (rows.shape[1], rows.shape[0]), rows, "raw", "RGB", 0, 1)


def _tensor_of(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
