"""Images that are read one after the other and never held as a whole: views of a streamed data set."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from datasets import ClassLabel, Image, IterableDataset
from datasets.utils.file_utils import xopen
from torch import Tensor

from torchthaw.backbones.image_processing import TorchvisionImageProcessor
from torchthaw.data.augmentation import Augmentation
from torchthaw.data.columns import find_columns
from torchthaw.data.folders import listing
from torchthaw.data.images import decode_image
from torchthaw.data.label_set_reading import refuse_label_sets
from torchthaw.data.transforms import ImageTransform, view_transform
from torchthaw.data.views import hashed_seed, seeded
from torchthaw.errors import DataError, did_you_mean


class ImageStream(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """A streamed data set of images (`load_dataset(..., streaming=True)`) as tensors; `ImageView` without a length.

    How a sample looks depends on (seed, stage, epoch, image, how often the image came before in the epoch) alone, not
    on the order of the stream or the number of workers or processes. What tells images apart is the column `path`,
    where there is one, else their bytes. For this, an augmented stream keeps about 100 bytes per image and epoch.

    Several workers of a data loader share the shards of the data set, so that each sample comes once an epoch; workers
    beyond the number of shards stay idle. Several processes each read all of it, or the first one reads for all, as
    accelerate does by default.

    Args:
        dataset: A streamed data set with an image and a label column and known features.
        processor: Processor of the model; gives size, interpolation, mean and standard deviation.
        augmentation: Random changes for training; `None` for the processor's own pixels.
        class_names: Classes in the order of their ids, as the model has them; by default those of the `ClassLabel`.
        image_column: Column with the images; found by its type by default.
        label_column: Column with the labels; found by its name or type by default.
        seed: Seed of the run.
        stage: Number of the stage; another stage sees other views.

    Raises:
        DataError: The columns cannot be used, there are no class names, or the augmentation is mixup or cutmix.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        processor: TorchvisionImageProcessor,
        augmentation: Augmentation | None = None,
        *,
        class_names: Sequence[str] | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        seed: int = 0,
        stage: int = 0,
    ) -> None:
        if dataset.features is None:
            raise DataError(
                "The streamed data set does not say what its columns are, as after map(); say it with "
                "`dataset.cast(datasets.Features(image=datasets.Image(), label=datasets.Value('string')))`."
            )
        if augmentation is not None and augmentation.mixes:
            raise DataError(
                "Mixup and cutmix need a second image, drawn from all images, and a stream gives one after the other. "
                "Set both to 0, take the augmentation 'medium', or load the data set without streaming."
            )
        self._image, self._label = find_columns(
            dataset.features, image_column=image_column, label_column=label_column, where="the streamed data set"
        )
        self._feature = dataset.features[self._label]
        refuse_label_sets(self._feature, "the streamed data set")
        names = self._feature.names if class_names is None and isinstance(self._feature, ClassLabel) else class_names
        if names is None:
            raise DataError(
                f"The labels in column {self._label!r} are {self._feature.dtype}, and the classes are not known before "
                "the stream has been read; pass class_names, in the order of the model's outputs."
            )
        self.class_names = [str(name) for name in names]
        self._ids = {name: number for number, name in enumerate(self.class_names)}
        if len(self._ids) < len(self.class_names):
            raise DataError(f"class_names names a class twice: {listing(self.class_names)}.")
        self._path = "path" if "path" in set(dataset.features) - {self._image, self._label} else None
        columns = [column for column in (self._image, self._label, self._path) if column]
        kept = dataset.with_format(None).select_columns(columns)
        self.dataset = kept.cast_column(self._image, Image(decode=False))
        self.processor = processor
        self.augmentation = augmentation
        self.seed = seed
        self.stage = stage
        # Shared memory, so that workers that outlive an epoch see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._transform: ImageTransform = view_transform(processor, augmentation)

    def for_stage(
        self, stage: int, *, augmentation: Augmentation | Literal["same"] | None = "same", image_size: int | None = None
    ) -> "ImageStream":
        """Returns the same stream for another stage, as `ImageView.for_stage` does.

        Raises:
            DataError: The augmentation is mixup or cutmix.
        """
        return ImageStream(
            self.dataset,
            self.processor if image_size is None else self.processor.resized(image_size),
            self.augmentation if augmentation == "same" else augmentation,
            class_names=self.class_names,
            image_column=self._image,
            label_column=self._label,
            seed=self.seed,
            stage=stage,
        )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def set_epoch(self, epoch: int) -> None:
        """Moves on to the order and the views of an epoch; accelerate's data loader calls it before each."""
        self._epoch.fill_(epoch)
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yields `pixel_values`, float of shape (3, height, width), and `labels`, an integer.

        Raises:
            DataError: An image cannot be read or decoded, or has an unknown label; the message names it.
        """
        seen: Counter[int] = Counter()
        for number, row in enumerate(self.dataset):
            path = row[self._path] if self._path else None
            name = str(path or (row[self._image] or {}).get("path") or _place(number))
            image = _in_memory(row[self._image], name)
            sample = 0
            if self.augmentation is not None:
                sample = _digest(str(path).encode() if path else image or b"")
                seen[sample] += 1
            seed = hashed_seed("view", self.seed, self.stage, int(self._epoch), sample, seen[sample])
            picture = decode_image(image, name=name, working_size=self._transform.working_size)
            with seeded(seed):
                pixels = self._transform(self._transform.prepared(picture))
            yield {"pixel_values": pixels, "labels": torch.tensor(self._id_of(row[self._label], name))}

    def _id_of(self, label: Any, name: str) -> int:
        if isinstance(self._feature, ClassLabel) and label is not None:
            label = self._feature.names[label] if label >= 0 else None
        if label is None or label == "":
            raise DataError(f"Image {name!r} of the stream has no label; leave it out: `dataset.filter(...)`.")
        class_name = str(label)
        if class_name not in self._ids:
            raise DataError(
                f"Image {name!r} of the stream has the label {class_name!r}, which the known classes lack: "
                f"{listing(self.class_names)}.{did_you_mean(class_name, self.class_names)}"
            )
        return self._ids[class_name]


def _place(number: int) -> str:
    """Says where an image without a name is in the stream, as this worker reads it."""
    worker = torch.utils.data.get_worker_info()
    return f"number {number}" + (f" of worker {worker.id}" if worker is not None else "")


def _in_memory(value: Mapping[str, Any] | None, name: str) -> bytes | None:
    """Returns an image's bytes, read from its path (which may be an address, or within an archive) if need be."""
    if value is None or value.get("bytes") is not None or not value.get("path"):
        return None if value is None else value.get("bytes")
    try:
        with xopen(str(value["path"]), "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot use image {name!r}: it cannot be read ({error}).") from error


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
