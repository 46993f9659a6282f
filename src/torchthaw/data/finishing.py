"""The last steps of a training view, which cost least for whole batches: scaling, normalising, erasing, mixing.

A loader that feeds a GPU leaves them to it: it then hands on 8 bits a value instead of 32. The result is the same, bit
for bit, since all that is random is drawn before, for each image.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from torchthaw.backbones.image_processing import TorchvisionImageProcessor
from torchthaw.data.augmentation import Augmentation

# Top, left, bottom, right; nothing lies within it.
Box = tuple[int, int, int, int]
NOWHERE: Box = (0, 0, 0, 0)

# What a batch that is not finished has beside `pixel_values` (uint8) and `labels`.
_ERASED, _PARTNERS, _PARTNERS_ERASED, _SHARES, _PASTED = "erased", "partners", "partners_erased", "shares", "pasted"


@dataclass(frozen=True)
class Normalisation:
    """Scales 8-bit pixels and normalises them with the processor's operations, so that every bit is the same."""

    divisor: float | None
    factor: float | None
    mean: Tensor | None
    std: Tensor | None

    @classmethod
    def of(cls, processor: TorchvisionImageProcessor) -> "Normalisation":
        """Returns that of a processor."""
        # The processor takes this factor for a division too, of which the last bit differs.
        divides = processor.do_rescale and processor.rescale_factor == 1 / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
        return cls(
            divisor=255.0 if divides else None,
            factor=processor.rescale_factor if processor.do_rescale and not divides else None,
            mean=mean if processor.do_normalize else None,
            std=std if processor.do_normalize else None,
        )

    def on(self, device: torch.device) -> "Normalisation":
        """Returns the same for pixels on a device."""
        if self.mean is None or self.std is None:
            return self
        return replace(self, mean=self.mean.to(device), std=self.std.to(device))

    def __call__(self, pixels: Tensor, out: Tensor | None = None) -> Tensor:
        """Returns float pixels of (..., 3, height, width)."""
        out = torch.empty(pixels.shape, device=pixels.device) if out is None else out
        out.copy_(pixels)
        if self.divisor is not None:
            out.div_(self.divisor)
        if self.factor is not None:
            out.mul_(self.factor)
        if self.mean is not None and self.std is not None:
            out.sub_(self.mean).div_(self.std)
        return out


@dataclass(frozen=True)
class View:
    """An augmented image before its last steps.

    Attributes:
        pixels: uint8, (3, height, width).
        erased: What random erasing blanks after normalisation.
    """

    pixels: Tensor
    erased: Box = NOWHERE

    def finished(self, normalisation: Normalisation, out: Tensor | None = None) -> Tensor:
        """Returns what the network sees, float, (3, height, width)."""
        result = normalisation(self.pixels, out)
        top, left, bottom, right = self.erased
        result[:, top:bottom, left:right] = 0
        return result


@dataclass(frozen=True)
class Mixing:
    """How an image is combined with its partner.

    Attributes:
        share: Share of the image itself, and of its label.
        pasted: Where cutmix pastes the partner; None for mixup, which blends.
    """

    share: float
    pasted: Box | None

    @classmethod
    def drawn(cls, augmentation: Augmentation, height: int, width: int, random: np.random.Generator) -> "Mixing":
        """Draws one of the kinds that an augmentation asks for."""
        by_cutting = augmentation.cutmix > 0 and (augmentation.mixup == 0 or random.random() < 0.5)
        alpha = augmentation.cutmix if by_cutting else augmentation.mixup
        share = float(random.beta(alpha, alpha))
        if not by_cutting:
            return cls(share, None)
        half = 0.5 * (1 - share) ** 0.5
        row, column = random.integers(height), random.integers(width)
        top, bottom = max(0, int(row - half * height)), min(height, int(row + half * height))
        left, right = max(0, int(column - half * width)), min(width, int(column + half * width))
        return cls(1 - (bottom - top) * (right - left) / (height * width), (top, left, bottom, right))

    def __call__(self, pixels: Tensor, partner: Tensor) -> Tensor:
        """Returns the combined image."""
        if self.pasted is None:
            return self.share * pixels + (1 - self.share) * partner
        top, left, bottom, right = self.pasted
        mixed = pixels.clone()
        mixed[:, top:bottom, left:right] = partner[:, top:bottom, left:right]
        return mixed


def unfinished(view: View, partner: View | None = None, mixing: Mixing | None = None) -> dict[str, Tensor]:
    """Returns a sample, without its label, that `finish` finishes."""
    sample = {"pixel_values": view.pixels, _ERASED: torch.tensor(view.erased)}
    if partner is None or mixing is None:
        return sample
    # A blend pastes nothing, and where a box is pasted the rest is the image's own.
    return {
        **sample,
        _PARTNERS: partner.pixels,
        _PARTNERS_ERASED: torch.tensor(partner.erased),
        _SHARES: torch.tensor([1.0, 0.0] if mixing.pasted else [mixing.share, 1 - mixing.share]),
        _PASTED: torch.tensor(mixing.pasted or NOWHERE),
    }


def is_unfinished(batch: Mapping[str, Tensor]) -> bool:
    """Whether a batch needs `finish`."""
    return _ERASED in batch


def finish(batch: Mapping[str, Tensor], normalisation: Normalisation) -> dict[str, Tensor]:
    """Takes the last steps for a batch of unfinished samples, on its device.

    Args:
        batch: What the samples of `unfinished` are collated to, with `labels`; images uint8, (N, 3, height, width).
        normalisation: That of their view, on the same device.

    Returns:
        `pixel_values`, float, (N, 3, height, width), and `labels`.
    """
    rest = dict(batch)
    pixels = _erase(normalisation(rest.pop("pixel_values")), rest.pop(_ERASED))
    if _PARTNERS in rest:
        partners = _erase(normalisation(rest.pop(_PARTNERS)), rest.pop(_PARTNERS_ERASED))
        own, others = rest.pop(_SHARES).T[:, :, None, None, None]
        blended = torch.where(others > 0, own * pixels + others * partners, pixels)
        pixels = torch.where(_within(rest.pop(_PASTED), pixels), partners, blended)
    return {"pixel_values": pixels, **rest}


def _erase(pixels: Tensor, boxes: Tensor) -> Tensor:
    return pixels.masked_fill_(_within(boxes, pixels), 0)


def _within(boxes: Tensor, pixels: Tensor) -> Tensor:
    """Returns which pixels of (N, 3, height, width) lie within a box for each image; (N, 1, height, width)."""
    top, left, bottom, right = boxes.T[:, :, None]
    rows, columns = (torch.arange(side, device=pixels.device) for side in pixels.shape[-2:])
    return (((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None])[:, None]
