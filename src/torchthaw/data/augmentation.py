"""What may be done to training images, as plain values: no torch here, so that recipes are read quickly."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any, Literal, get_args

from torchthaw.errors import ThawError, did_you_mean

Policy = Literal["none", "rand_augment", "trivial_augment"]


@dataclass(frozen=True)
class Augmentation:
    """Random changes to training images.

    Attributes:
        crop_scale: Area of the random crop as a share of the image, lowest and highest, in (0, 1]. The usual (0.08, 1)
            is made for training from scratch; fine-tuning sees few epochs, so the default keeps more of the object.
        crop_ratio: Width / height of the crop, lowest and highest.
        horizontal_flip: Probability of a left-right flip.
        vertical_flip: Probability of an upside-down flip.
        policy: "rand_augment" (arXiv 1909.13719), "trivial_augment" (wide, arXiv 2103.10158) or "none".
        color_jitter: Strength of changes in brightness, contrast and saturation, 0 to 1; hue changes a quarter of it.
        random_erasing: Probability that a random rectangle is blanked (arXiv 1708.04896).
        mixup: Alpha of the Beta distribution by which two images are blended (arXiv 1710.09412); 0 is off.
        cutmix: Alpha for pasting a rectangle of one image into another (arXiv 1905.04899); 0 is off. With `mixup` too,
            each sample gets one of them by a fair coin.

    Raises:
        ThawError: A value is out of range.
    """

    crop_scale: tuple[float, float] = (0.35, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.0
    policy: Policy = "none"
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "crop_scale", _interval("crop_scale", self.crop_scale, highest=1.0))
        object.__setattr__(self, "crop_ratio", _interval("crop_ratio", self.crop_ratio, highest=math.inf))
        for field in ("horizontal_flip", "vertical_flip", "color_jitter", "random_erasing"):
            _number(field, getattr(self, field), highest=1.0)
        for field in ("mixup", "cutmix"):
            _number(field, getattr(self, field), highest=math.inf)
        if self.policy not in get_args(Policy):
            choices = ", ".join(get_args(Policy))
            hint = did_you_mean(self.policy, get_args(Policy))
            raise ThawError(f"augmentation policy={self.policy!r} is unknown; write one of {choices}.{hint}")

    @property
    def mixes(self) -> bool:
        """Whether two images, and so their labels, are combined."""
        return self.mixup > 0 or self.cutmix > 0

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values; `make_augmentation` reads them back."""
        return asdict(self)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(field: str, value: object, *, highest: float) -> None:
    if not (_is_number(value) and 0 <= value <= highest):  # type: ignore[operator]
        limits = f"from 0 to {highest:g}" if math.isfinite(highest) else "of at least 0"
        raise ThawError(f"augmentation {field}={value!r} does not work; write a number {limits}.")


def _interval(field: str, value: object, *, highest: float) -> tuple[float, float]:
    if isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value)):
        low, high = float(value[0]), float(value[1])
        if 0 < low <= high <= highest:
            return low, high
    limits = f"0 < low <= high <= {highest:g}" if math.isfinite(highest) else "0 < low <= high"
    raise ThawError(f"augmentation {field}={value!r} does not work; write two numbers [low, high] with {limits}.")


# `strong` takes the parts of torchvision's reference recipes (references/classification and "How to Train
# State-Of-The-Art Models Using TorchVision's Latest Primitives", 2021: TrivialAugment, random erasing, mixup 0.2 and
# cutmix 1.0 over 600 epochs), with more erasing and a weaker cutmix, as fine-tuning lasts only some epochs.
AUGMENTATIONS: Mapping[str, Augmentation | None] = MappingProxyType(
    {
        "none": None,
        "light": Augmentation(),
        "medium": Augmentation(policy="trivial_augment", random_erasing=0.1),
        "strong": Augmentation(policy="trivial_augment", random_erasing=0.25, mixup=0.2, cutmix=0.2),
    }
)
"""Augmentations by name; "none" is `None`, the evaluation view."""


def make_augmentation(value: Mapping[str, Any] | str | Augmentation) -> Augmentation | None:
    """Returns the augmentation that a preset's name or a mapping of fields stands for; None stands for no change.

    Raises:
        ThawError: The name or a field is unknown, or a value is out of range.
    """
    if isinstance(value, Augmentation):
        return value
    if isinstance(value, str):
        if value not in AUGMENTATIONS:
            raise ThawError(
                f"unknown augmentation {value!r}.{did_you_mean(value, AUGMENTATIONS)} "
                f"There are {', '.join(AUGMENTATIONS)}, or write its fields."
            )
        return AUGMENTATIONS[value]
    known = [field.name for field in fields(Augmentation)]
    for key in value:
        if key not in known:
            raise ThawError(f"augmentation has the unknown key {key!r}.{did_you_mean(key, known)}")
    return Augmentation(**value)
