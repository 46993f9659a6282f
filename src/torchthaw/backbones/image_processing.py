"""Image processor with the evaluation transform of torchvision's weights."""

import importlib
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.models import WeightsEnum, get_model_weights
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import load_image

from .anatomy import check_image_size, closest, family_of

_RESCALE_FACTOR = 1 / 255

# The position in this list is PIL's number of the interpolation.
_RESAMPLE = [
    InterpolationMode.NEAREST,
    InterpolationMode.LANCZOS,
    InterpolationMode.BILINEAR,
    InterpolationMode.BICUBIC,
    InterpolationMode.BOX,
    InterpolationMode.HAMMING,
]


class TorchvisionImageProcessor(BaseImageProcessor):
    """Turns images into `pixel_values`: resize, centre crop, rescale to [0, 1], normalise, each of which can be off.

    For a PIL image the result equals torchvision's `weights.transforms()(image)` bit for bit. Images may be PIL
    images of any mode (see `to_rgb`), paths, numpy arrays or tensors, one or a list or a batch. 8-bit arrays give what
    the same PIL image gives; arrays of floats must be in [0, 1] and are resized as floats.

    Args:
        do_resize: Whether to resize.
        size: `{"shortest_edge": pixels}` keeps the aspect ratio; `{"height": pixels, "width": pixels}` does not.
        resample: PIL's number of the interpolation: 2 is bilinear, 3 bicubic.
        antialias: Whether to smooth arrays of floats when they shrink, as PIL always does with images.
        do_center_crop: Whether to crop, or where an image is smaller, to pad with black.
        crop_size: `{"height": pixels, "width": pixels}`.
        do_rescale: Whether to multiply pixels of 8 bits by `rescale_factor`.
        rescale_factor: 1/255 gives values in [0, 1].
        do_normalize: Whether to subtract `image_mean` and divide by `image_std`.
        image_mean: One value per channel, on the scale after rescaling.
        image_std: One value per channel, on the scale after rescaling.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012
    # Makes `save_pretrained` copy this file, and those that it imports, beside the settings.
    _auto_class = "AutoImageProcessor"
    _settings = (
        "do_resize",
        "size",
        "resample",
        "antialias",
        "do_center_crop",
        "crop_size",
        "do_rescale",
        "rescale_factor",
        "do_normalize",
        "image_mean",
        "image_std",
    )

    def __init__(
        self,
        do_resize: bool = True,
        size: dict[str, int] | int | None = None,
        resample: int = 2,
        antialias: bool = True,
        do_center_crop: bool = True,
        crop_size: dict[str, int] | int | None = None,
        do_rescale: bool = True,
        rescale_factor: float = _RESCALE_FACTOR,
        do_normalize: bool = True,
        image_mean: tuple[float, ...] | list[float] = (0.485, 0.456, 0.406),
        image_std: tuple[float, ...] | list[float] = (0.229, 0.224, 0.225),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.do_resize = do_resize
        self.size = _size(256 if size is None else size, "shortest_edge")
        self.resample = int(resample)
        self.antialias = antialias
        self.do_center_crop = do_center_crop
        self.crop_size = _size(224 if crop_size is None else crop_size, "height", "width")
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    @classmethod
    def from_torchvision(
        cls,
        architecture: str,
        weights: str | PathLike[str] | WeightsEnum | None = "DEFAULT",
        *,
        image_size: int | None = None,
    ) -> "TorchvisionImageProcessor":
        """Makes the processor that belongs to pretrained weights.

        Args:
            architecture: torchvision's name of the network, such as `resnet50`.
            weights: As for the model. With a file or None it is that of `IMAGENET1K_V1`, or where the architecture
                has no such weights, of `DEFAULT`; with a saved model it is the one saved there.
            image_size: Side of the images in pixels after the crop, if it shall differ; the size before the crop
                changes in proportion.

        Raises:
            ValueError: If the architecture or the weights are unknown, or the network cannot take that size.
        """
        family_of(architecture)
        if image_size is not None:
            check_image_size(architecture, image_size)
        processor = cls._of_weights(architecture, weights)
        return processor if image_size is None else processor.resized(image_size)

    @classmethod
    def _of_weights(
        cls, architecture: str, weights: str | PathLike[str] | WeightsEnum | None
    ) -> "TorchvisionImageProcessor":
        source: Any = None
        if weights is not None:
            # Imported by name: a copy of this file beside a saved model has no such neighbour, and does not need it.
            source = importlib.import_module("torchthaw.backbones.weights").locate(architecture, weights)
        if source is None or (isinstance(source, Path) and not source.is_dir()):
            members = get_model_weights(architecture)
            source = members.__members__.get("IMAGENET1K_V1", members.DEFAULT)
        if not isinstance(source, WeightsEnum):
            return cls.from_pretrained(source)
        preset = source.transforms()
        return cls(
            size={"shortest_edge": preset.resize_size[0]},
            crop_size=preset.crop_size[0],
            resample=_RESAMPLE.index(preset.interpolation),
            antialias=preset.antialias,
            image_mean=preset.mean,
            image_std=preset.std,
        )

    def resized(self, image_size: int) -> "TorchvisionImageProcessor":
        """Returns a processor that crops to `image_size` pixels and resizes before that in proportion."""
        scale = image_size / self.crop_size["height"]
        size = {key: round(pixels * scale) for key, pixels in self.size.items()}
        return self.with_settings(size=size, crop_size=image_size)

    def preprocess(
        self, images: Any, return_tensors: str | None = None, input_data_format: str | None = None, **overrides: Any
    ) -> BatchFeature:
        """Preprocesses images.

        Args:
            images: One image, or a (nested) list or a batch of images.
            return_tensors: `pt` or `np` gives one array of shape (batch, 3, height, width); None a list of tensors.
            input_data_format: `channels_first` or `channels_last`, for arrays of which the shape does not tell; the
                default then is `channels_first` for tensors and `channels_last` for numpy arrays.
            **overrides: Settings of the processor for this call.

        Raises:
            ValueError: If a setting is unknown, or something is no image.
        """
        unknown = next((name for name in overrides if name not in self._settings), None)
        if unknown is not None:
            raise ValueError(f"The image processor has no setting {unknown!r}.{closest(unknown, self._settings)}")
        given = {name: value for name, value in overrides.items() if value is not None}
        processor = self.with_settings(**given) if given else self
        tensors = [processor._process(image, input_data_format) for image in _flatten(images)]
        if not tensors:
            raise ValueError("There are no images to preprocess: the list is empty.")
        if return_tensors is None:
            return BatchFeature({"pixel_values": tensors})
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            raise ValueError(
                f"Images of the sizes {sorted(shapes)} cannot be one batch. Turn do_center_crop on, or pass one image "
                "at a time."
            )
        return BatchFeature({"pixel_values": torch.stack(tensors)}, tensor_type=return_tensors)

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings; once saved, also where their code is."""
        settings = super().to_dict()
        if "auto_map" in settings:
            # By backend: from a plain name, `pipeline` would derive a video processor and ask whether to run its code.
            settings["auto_map"] = {"AutoImageProcessor": {"torchvision": "image_processing.TorchvisionImageProcessor"}}
        return settings

    def with_settings(self, **changes: Any) -> "TorchvisionImageProcessor":
        """Returns a processor with some settings changed."""
        return type(self)(**({name: getattr(self, name) for name in self._settings} | changes))

    def cropped(self, image: Any) -> Any:
        """Resizes and crops an image as the settings say, before it is scaled and normalised.

        Args:
            image: A PIL image as `to_rgb` gives it, or a tensor of floats, (3, height, width).

        Returns:
            The same kind of image.
        """
        if self.do_resize:
            size = self.size
            edges = [size["shortest_edge"]] if "shortest_edge" in size else [size["height"], size["width"]]
            image = F.resize(image, edges, interpolation=_RESAMPLE[self.resample], antialias=self.antialias)
        if self.do_center_crop:
            image = F.center_crop(image, [self.crop_size["height"], self.crop_size["width"]])
        return image

    def _process(self, image: Any, input_data_format: str | None) -> Tensor:
        image = self.cropped(_to_pil_or_floats(image, input_data_format, in_unit_range=self.do_rescale))
        if isinstance(image, Image.Image):
            image = self._rescale(F.pil_to_tensor(image))
        return F.normalize(image, mean=self.image_mean, std=self.image_std) if self.do_normalize else image

    def _rescale(self, pixels: Tensor) -> Tensor:
        if not self.do_rescale:
            return pixels.float()
        # Dividing by 255, as torchvision does, differs from multiplying by 1/255 in the last bit.
        if self.rescale_factor == _RESCALE_FACTOR:
            return F.convert_image_dtype(pixels, torch.float)
        return pixels.float() * self.rescale_factor


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts a PIL image of any mode to an upright 8-bit RGB image.

    The EXIF orientation is applied, and of an animated image the first frame is taken. Images of 8 bits become what
    `PIL.ImageOps.exif_transpose(image).convert("RGB")` gives, as in transformers' `load_image`: gray is repeated,
    palettes are looked up, CMYK is converted, alpha is dropped. PIL would clip deeper images at 255; here they are
    scaled to 8 bits instead:

    - 16 bits (`I;16`, and `I` with values above 255): divided by 257 and rounded;
    - `I` with values from 0 to 255: as they are;
    - `F` with values from 0 to 1: times 255, rounded;
    - `F` and `I` with other values: the smallest becomes 0 and the largest 255. Values that are not finite become 0.

    Args:
        image: The image; an animated one is left at its first frame.

    Returns:
        A new image of mode RGB, or the same one if nothing has to change.
    """
    if getattr(image, "is_animated", False):
        image.seek(0)
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    return image.convert("RGB") if image.mode != "RGB" else image


def _to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Scales a gray image of whole numbers or floats, as `to_rgb` says."""
    if pixels.dtype == np.uint16:
        return np.rint(pixels / 257).astype(np.uint8)
    values = np.nan_to_num(pixels.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = values.min(), values.max()
    whole = np.issubdtype(pixels.dtype, np.integer)
    if low >= 0 and high <= (255 if whole else 1):
        scaled = values if whole else values * 255
    elif whole and low >= 0 and high <= 65535:
        scaled = values / 257
    else:
        scaled = (values - low) / max(high - low, np.finfo(np.float64).tiny) * 255
    return np.rint(scaled).astype(np.uint8)


def _to_pil_or_floats(image: Any, input_data_format: str | None, in_unit_range: bool) -> Image.Image | Tensor:
    """Returns an RGB image, or for an array of floats a tensor of shape (3, height, width)."""
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, str | PathLike):
        return to_rgb(_open(image))
    if not isinstance(image, np.ndarray | Tensor):
        raise ValueError(
            f"Not an image: {type(image).__name__}. Pass PIL images, paths, numpy arrays or tensors of pixels."
        )
    first = isinstance(image, Tensor)
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) and image.dtype != torch.bfloat16 else image
    pixels = _channels_last(np.asarray(array.float() if isinstance(array, Tensor) else array), first, input_data_format)
    if np.issubdtype(pixels.dtype, np.floating):
        if in_unit_range and not (pixels.min() >= 0 and pixels.max() <= 1):
            raise ValueError(
                f"Arrays of floats must be in [0, 1], and this one is in [{pixels.min():g}, {pixels.max():g}]. Divide "
                "by the largest possible value, or pass 8-bit whole numbers (uint8)."
            )
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32))
    return Image.fromarray(_whole_numbers_to_8_bits(pixels))


def _whole_numbers_to_8_bits(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    if pixels.dtype == np.uint16:
        return np.rint(pixels / 257).astype(np.uint8)
    if not np.issubdtype(pixels.dtype, np.integer) or pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(
            f"Cannot read an array of {pixels.dtype} from {pixels.min()} to {pixels.max()} as an image. Pass uint8, "
            "uint16, whole numbers from 0 to 255, or floats in [0, 1]."
        )
    return pixels.astype(np.uint8)


def _channels_last(pixels: np.ndarray, first_by_default: bool, input_data_format: str | None) -> np.ndarray:
    """Returns pixels of shape (height, width, 3)."""
    if input_data_format not in (None, "channels_first", "channels_last"):
        raise ValueError(f"input_data_format is 'channels_first' or 'channels_last', not {input_data_format!r}.")
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    elif pixels.ndim == 3:
        counts = (1, 3, 4)
        first, last = pixels.shape[0] in counts, pixels.shape[2] in counts
        is_first = first_by_default if first == last else first
        if input_data_format is not None:
            is_first = input_data_format == "channels_first"
        pixels = pixels.transpose(1, 2, 0) if is_first else pixels
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or 0 in pixels.shape:
        raise ValueError(
            f"Cannot read an array of shape {pixels.shape} as an image. Pass (height, width), (height, width, "
            "channels) or (channels, height, width) with 1, 3 or 4 channels."
        )
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[..., :3]


def _open(path: str | PathLike[str]) -> Image.Image:
    if not Path(path).is_file():
        return load_image(str(path))
    with Image.open(path) as image:
        image.load()
        return image


def _flatten(images: Any) -> list[Any]:
    if isinstance(images, list | tuple):
        return [image for item in images for image in _flatten(item)]
    if isinstance(images, np.ndarray | Tensor) and images.ndim == 4:
        return list(images)
    return [images]


def _size(size: dict[str, int] | int, *keys: str) -> dict[str, int]:
    """Returns a size as a dictionary; a number stands for each of the keys."""
    if isinstance(size, int):
        return dict.fromkeys(keys, size)
    size = {key: int(value) for key, value in dict(size).items() if value is not None}
    if set(size) not in ({"shortest_edge"}, {"height", "width"}):
        raise ValueError(f"A size has the key 'shortest_edge' or the keys 'height' and 'width', not {sorted(size)}.")
    return size


__all__ = ["TorchvisionImageProcessor", "to_rgb"]
