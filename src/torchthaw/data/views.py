"""What a data loader draws from: images as tensors, each a pure function of (seed, stage, epoch, sample)."""

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Image
from PIL import Image as PILImage
from torch import Tensor
from torch.nn import functional as F

from torchthaw.backbones.image_processing import TorchvisionImageProcessor
from torchthaw.data.augmentation import Augmentation
from torchthaw.data.images import decode_image
from torchthaw.data.transforms import ImageTransform, eval_transform, train_transform
from torchthaw.errors import DataError


class ImageView(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A split of images as tensors, for training or for evaluation.

    How sample `i` looks depends on (seed, stage, epoch, i) alone, not on the number of workers or processes, the order
    of reading, or a restart. A sampler that draws images several times an epoch can ask for `(i, repeat)`: another
    repeat looks different, and repeat 0 as `i` does. With mixup or cutmix every sample decodes a second image, its
    partner, so that loading costs twice as much; the partner is drawn from the whole split and looks as it does in its
    own sample.

    Args:
        dataset: A split with the columns `image`, `label` (`ClassLabel`) and, for messages, `path`.
        processor: Processor of the model; gives size, interpolation, mean and standard deviation.
        augmentation: Random changes for training; `None` for the processor's own pixels.
        seed: Seed of the run.
        stage: Number of the stage; another stage sees other views.

    Raises:
        DataError: There are no such columns.
    """

    def __init__(
        self,
        dataset: Dataset,
        processor: TorchvisionImageProcessor,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        stage: int = 0,
    ) -> None:
        if "image" not in dataset.features or not isinstance(dataset.features.get("label"), ClassLabel):
            raise DataError(
                f"A view needs the columns 'image' and 'label' (ClassLabel); there are {dict(dataset.features)}. "
                "Pass the data set through load_image_dataset(dataset) first."
            )
        self.dataset = dataset.with_format(None).cast_column("image", Image(decode=False))
        self.processor = processor
        self.augmentation = augmentation
        self.seed = seed
        self.stage = stage
        # Shared memory, so that workers that outlive an epoch see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._transform = view_transform(processor, augmentation)

    def for_stage(
        self, stage: int, *, augmentation: Augmentation | Literal["same"] | None = "same", image_size: int | None = None
    ) -> "ImageView":
        """Returns a view of the same images for another stage, which starts at epoch 0.

        Args:
            stage: Number of the stage.
            augmentation: Random changes of that stage, `None` for none; those of this view by default.
            image_size: Side of the square images in pixels; the processor's size by default. Images that are not
                augmented are resized in proportion before the crop.
        """
        chosen = self.augmentation if augmentation == "same" else augmentation
        processor = self.processor if image_size is None else self.processor.resized(image_size)
        return ImageView(self.dataset, processor, chosen, self.seed, stage)

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of their ids."""
        return list(self.dataset.features["label"].names)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def set_epoch(self, epoch: int) -> None:
        """Moves on to the views of an epoch; accelerate's data loader calls it before each."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Tensor]:
        """Returns one sample.

        Args:
            index: Row, from 0 on; negative ones count from the end. Or row and repeat.

        Returns:
            `pixel_values`, float of shape (3, height, width), and `labels`: an integer, or with mixup or cutmix a float
            vector of length `num_classes` that sums to one.

        Raises:
            DataError: The image cannot be decoded; the message names it.
            IndexError: There is no such row.
        """
        index, repeat = index if isinstance(index, tuple) else (index, 0)
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of a data set with {len(self)} images")
        index = int(index) % len(self)
        pixels, label = self._view(index, repeat)
        if self.augmentation is None or not self.augmentation.mixes:
            return {"pixel_values": pixels, "labels": torch.tensor(label)}
        random = np.random.default_rng(self._seed_of(index, repeat, "mix"))
        partner_pixels, partner_label = self._view(int(random.integers(len(self))), 0)
        pixels, share = _mix(pixels, partner_pixels, self.augmentation, random)
        one_hot = F.one_hot(torch.tensor([label, partner_label]), self.num_classes).float()
        return {"pixel_values": pixels, "labels": share * one_hot[0] + (1 - share) * one_hot[1]}

    def _view(self, index: int, repeat: int) -> tuple[Tensor, int]:
        row = self.dataset[index]
        picture = decode_image(row["image"], name=row.get("path"))
        return transformed(picture, self._transform, self._seed_of(index, repeat, "view")), row["label"]

    def _seed_of(self, index: int, repeat: int, purpose: str) -> int:
        return hashed_seed(purpose, self.seed, self.stage, int(self._epoch), index, *([repeat] if repeat else []))


def view_transform(processor: TorchvisionImageProcessor, augmentation: Augmentation | None) -> ImageTransform:
    """Returns the random transform of an augmentation, or without one that of evaluation."""
    return train_transform(processor, augmentation) if augmentation else eval_transform(processor)


def transformed(picture: PILImage.Image, transform: ImageTransform, seed: int) -> Tensor:
    """Returns the tensor of a picture, with a random transform that depends on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed the accelerators too, and with them dropout.
        torch.default_generator.manual_seed(seed)
        return transform(picture)


def hashed_seed(*parts: str | int) -> int:
    """Returns a seed of 63 bits that depends on the parts alone, also in another process."""
    key = " ".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


def collate(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stacks samples to a batch: `pixel_values` of shape (N, 3, height, width), `labels` (N) or (N, classes)."""
    return {key: torch.stack([example[key] for example in examples]) for key in ("pixel_values", "labels")}


def _mix(
    pixels: Tensor, partner: Tensor, augmentation: Augmentation, random: np.random.Generator
) -> tuple[Tensor, float]:
    """Combines two images; returns the result and the share of the first one in it."""
    by_cutting = augmentation.cutmix > 0 and (augmentation.mixup == 0 or random.random() < 0.5)
    alpha = augmentation.cutmix if by_cutting else augmentation.mixup
    share = float(random.beta(alpha, alpha))
    if not by_cutting:
        return share * pixels + (1 - share) * partner, share
    height, width = pixels.shape[-2:]
    half = 0.5 * (1 - share) ** 0.5
    row, column = random.integers(height), random.integers(width)
    top, bottom = max(0, int(row - half * height)), min(height, int(row + half * height))
    left, right = max(0, int(column - half * width)), min(width, int(column + half * width))
    mixed = pixels.clone()
    mixed[:, top:bottom, left:right] = partner[:, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)
