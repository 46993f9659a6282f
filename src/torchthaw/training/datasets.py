"""What the trainer draws from: data sets of images as views, anything else as it is."""

import hashlib
from collections.abc import Sized
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from datasets import Dataset as ImageDataset
from datasets import Image as ImageFeature
from datasets import IterableDataset as ImageIterable

from torchthaw.backbones.image_processing import TorchvisionImageProcessor
from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.data.augmentation import make_augmentation
from torchthaw.data.label_sets import class_label_of, is_label_set
from torchthaw.data.loading import load_image_dataset
from torchthaw.data.streams import ImageStream
from torchthaw.data.views import ImageView
from torchthaw.errors import PlanError
from torchthaw.stages.plan import Stage
from torchthaw.stages.presets import stage_augmentation
from torchthaw.training.arguments import ThawTrainingArguments


def as_view(
    dataset: Any,
    model: TorchvisionForImageClassification,
    processor: Any,
    args: ThawTrainingArguments,
    *,
    train: bool,
) -> Any:
    """Wraps a data set of images in a view; leaves anything that gives tensors already as it is.

    Raises:
        PlanError: there are images but no image processor.
        DataError: the labels do not fit the model's classes.
    """
    if not isinstance(dataset, ImageDataset | ImageIterable):
        return dataset
    if not isinstance((dataset.features or {}).get("image"), ImageFeature):
        return dataset
    if processor is None:
        raise PlanError(
            "the data set has an image column but there is no image processor to prepare it; pass "
            "processing_class=TorchvisionImageProcessor.from_torchvision(...)"
        )
    names = model.config.class_names
    augmentation = make_augmentation(args.augmentation or "none") if train else None
    processor = cast(TorchvisionImageProcessor, processor)
    seed = cast(int, args.data_seed)
    if isinstance(dataset, ImageIterable):
        if model.config.several_labels:
            raise PlanError(
                "several labels per image are not supported for streams; load the data set without streaming"
            )
        return ImageStream(dataset, processor, augmentation, class_names=names, seed=seed)
    several = model.config.several_labels
    known = class_label_of(dataset.features.get("label"))
    ready = "path" in dataset.column_names and known is not None and known.names == names
    if ready and is_label_set(dataset.features["label"]) == several:
        return ImageView(dataset, processor, augmentation, seed=seed)
    # Labels are numbered by the model's classes, whatever order the data set has.
    problem_type = "multi_label" if several else "single_label"
    images = load_image_dataset(dataset, class_names=names, problem_type=problem_type)["train"]
    return ImageView(images, processor, augmentation, seed=seed)


def stage_view(dataset: Any, index: int, stage: Stage, args: ThawTrainingArguments) -> Any:
    """Returns the training images of a stage: with its own views, and its augmentation and image size if it has some.

    Raises:
        PlanError: the stage asks for them, but the data set gives tensors.
    """
    if not isinstance(dataset, ImageView | ImageStream):
        for key in ("augmentation", "image_size", "views"):
            if getattr(stage, key) is not None:
                raise PlanError(
                    f"stage {stage.name!r} has its own {key}, but the training data set gives tensors; pass a data "
                    "set of images (load_image_dataset), or leave it out"
                )
        return dataset
    chosen = stage_augmentation(stage, args.asked_augmentation)
    augmentation = dataset.augmentation if chosen is None else make_augmentation(chosen)
    if isinstance(dataset, ImageView):
        return dataset.for_stage(index, augmentation=augmentation, image_size=stage.image_size, views=stage.views)
    if stage.views is not None:
        raise PlanError(
            f"stage {stage.name!r} has views: {stage.views}, but a stream is not kept, so that each pass has views of "
            "its own; leave it out, or load the data set without streaming"
        )
    return dataset.for_stage(index, augmentation=augmentation, image_size=stage.image_size)


def set_epoch(loader: Any, epoch: int) -> None:
    """Tells the epoch to all that a data loader draws from: its samplers, however they are wrapped, and its data set.

    accelerate's loaders tell only some of them: not the data set where batches are shared out over processes or the
    first ones are skipped, and not the sampler where both is the case.
    """
    found: list[Any] = []
    parts = [loader]
    while parts:
        part = parts.pop()
        if part is None or any(part is other for other in found):
            continue
        found.append(part)
        if part is not loader and callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)
        parts.extend(getattr(part, name, None) for name in ("batch_sampler", "sampler", "dataset", "base_dataloader"))


def length_of(dataset: Any) -> int | None:
    """Returns the number of images; None for streams."""
    return len(dataset) if isinstance(dataset, Sized) else None


def labels_of(dataset: Any, *, read: bool) -> npt.NDArray[np.int64] | None:
    """Returns the class id of each image.

    Args:
        dataset: A view of images, or a data set of samples.
        read: Whether to go through all samples where there is no column of labels.

    Returns:
        Shape (N,); None for a stream, or where the labels could only be had by reading and were not to be read.

    Raises:
        PlanError: samples have no `labels`, or others than class ids.
    """
    if isinstance(dataset, ImageView):
        return np.asarray(dataset.dataset["label"], dtype=np.int64)
    length = length_of(dataset)
    if length is None or not read:
        return None
    labels = [np.asarray(dataset[row].get("labels")) for row in range(length)]
    wrong = next((label for label in labels if label.ndim > 0 or label.dtype.kind not in "iu"), None)
    if wrong is not None:
        raise PlanError(
            f"the numbers of training images by class are needed, but the samples of the training data have labels "
            f"such as {wrong.tolist()!r}; pass samples whose `labels` is a class id, or class_weights with a weight "
            "for each class name"
        )
    return np.asarray(labels, dtype=np.int64)


def fingerprint_of(dataset: Any) -> str | None:
    """Returns a digest of the names and labels of the images in their order; None for what has no such columns."""
    if not isinstance(dataset, ImageView):
        return None
    rows, state = dataset.dataset, hashlib.blake2b(digest_size=16)
    paths = rows["path"] if "path" in rows.column_names else [""] * len(rows)
    for path, label in zip(paths, rows["label"], strict=True):
        # The folder may have moved since.
        name = str(path).replace("\\", "/").rsplit("/", 1)[-1]
        state.update(f"{name}\0{label}\0".encode())
    return state.hexdigest()
