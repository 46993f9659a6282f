"""From a picture to the tensor that the network sees: augmented for training, the processor's own for evaluation."""

from collections.abc import Callable
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from torchthaw.backbones.image_processing import TorchvisionImageProcessor, to_rgb
from torchthaw.data.augmentation import Augmentation

ImageTransform = Callable[[Image.Image], Tensor]

_INTERPOLATION = {
    Image.Resampling.NEAREST: v2.InterpolationMode.NEAREST,
    Image.Resampling.BILINEAR: v2.InterpolationMode.BILINEAR,
    Image.Resampling.BICUBIC: v2.InterpolationMode.BICUBIC,
    Image.Resampling.LANCZOS: v2.InterpolationMode.LANCZOS,
    Image.Resampling.BOX: v2.InterpolationMode.BOX,
    Image.Resampling.HAMMING: v2.InterpolationMode.HAMMING,
}


def train_transform(processor: TorchvisionImageProcessor, augmentation: Augmentation) -> ImageTransform:
    """Builds the random transform of training images, in the order of torchvision's reference recipes.

    Size, interpolation, mean and standard deviation are the processor's. Mixup and cutmix need a second image and are
    not part of it (see `ImageView`). All randomness comes from torch's CPU generator.

    Args:
        processor: Processor of the model.
        augmentation: What to do.

    Returns:
        A picklable callable: picture -> float tensor of shape (3, height, width).
    """
    interpolation = _INTERPOLATION[Image.Resampling(int(processor.resample))]
    steps: list[torch.nn.Module] = [
        v2.Lambda(to_rgb),
        v2.RandomResizedCrop(
            (processor.crop_size["height"], processor.crop_size["width"]),
            scale=augmentation.crop_scale,
            ratio=augmentation.crop_ratio,
            interpolation=interpolation,
            antialias=True,
        ),
    ]
    if augmentation.horizontal_flip:
        steps.append(v2.RandomHorizontalFlip(augmentation.horizontal_flip))
    if augmentation.vertical_flip:
        steps.append(v2.RandomVerticalFlip(augmentation.vertical_flip))
    if augmentation.policy == "rand_augment":
        steps.append(v2.RandAugment(interpolation=v2.InterpolationMode.BILINEAR))
    elif augmentation.policy == "trivial_augment":
        steps.append(v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR))
    if augmentation.color_jitter:
        strength = augmentation.color_jitter
        steps.append(v2.ColorJitter(strength, strength, strength, strength / 4))
    steps += [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(processor.image_mean), list(processor.image_std)),
        v2.ToPureTensor(),
    ]
    if augmentation.random_erasing:
        steps.append(v2.RandomErasing(augmentation.random_erasing))
    return v2.Compose(steps)


def eval_transform(processor: TorchvisionImageProcessor) -> ImageTransform:
    """Returns the processor as a picklable callable: picture -> tensor (3, height, width) of its own pixels."""
    return partial(_processed, processor)


def _processed(processor: TorchvisionImageProcessor, picture: Image.Image) -> Tensor:
    return processor(images=picture, return_tensors="pt")["pixel_values"][0]
