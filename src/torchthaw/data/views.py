"""What a data loader draws from: images as tensors, each a pure function of (seed, stage, epoch, sample)."""

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset, Image
from torch import Tensor
from torch.nn import functional as F

from torchthaw.backbones.image_processing import TorchvisionImageProcessor
from torchthaw.data.augmentation import Augmentation
from torchthaw.data.finishing import Mixing, View, unfinished
from torchthaw.data.images import decode_image
from torchthaw.data.label_sets import class_label_of, class_names_of, has_label_sets, multi_hot
from torchthaw.data.transforms import ImageTransform, TrainTransform, view_transform
from torchthaw.errors import DataError


class KeptPictures(Protocol):
    """Prepared pictures by row, such as `caches.images.CachedPictures`."""

    def pixels(self, row: int) -> npt.NDArray[np.uint8] | None:
        """Returns a picture, (height, width, 3); None where it has to be decoded."""


class Batch(list[dict[str, Tensor]]):
    """Samples that are rows of one batch, which `collate` returns as it is; to others a list of samples.

    Attributes:
        stacked: The batch.
    """

    def __init__(self, stacked: dict[str, Tensor]) -> None:
        super().__init__({key: rows[i] for key, rows in stacked.items()} for i in range(len(stacked["labels"])))
        self.stacked = stacked


class ImageView(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A split of images as tensors, for training or for evaluation.

    How sample `i` looks depends on (seed, stage, epoch, i) alone, not on the number of workers or processes, the order
    of reading, or a restart. A sampler that draws images several times an epoch can ask for `(i, repeat)`: another
    repeat looks different, and repeat 0 as `i` does. With mixup or cutmix every sample needs a second image, its
    partner, so that loading costs twice as much; the partner is drawn from the whole split and looks as it does in its
    own sample. What is random, and at which resolution, is in `TrainTransform`.

    Args:
        dataset: A split with the columns `image`, `label` (`ClassLabel`, or lists of them) and, for messages, `path`.
        processor: Processor of the model; gives size, interpolation, mean and standard deviation.
        augmentation: Random changes for training; `None` for the processor's own pixels.
        seed: Seed of the run.
        stage: Number of the stage; another stage sees other views.
        views: How many views of each image the epochs go through in turn; `None` for another one in each epoch.

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
        views: int | None = None,
    ) -> None:
        if "image" not in dataset.features or class_label_of(dataset.features.get("label")) is None:
            raise DataError(
                f"A view needs the columns 'image' and 'label' (ClassLabel); there are {dict(dataset.features)}. "
                "Pass the data set through load_image_dataset(dataset) first."
            )
        self.dataset = dataset.with_format(None).cast_column("image", Image(decode=False))
        self.processor = processor
        self.augmentation = augmentation
        self.seed = seed
        self.stage = stage
        self.views = views
        # Shared memory, so that workers that outlive an epoch see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.transform: ImageTransform = view_transform(processor, augmentation)
        self.kept: KeptPictures | None = None
        self._finishes = True
        self._labels = self._read_labels()
        self._names = self.dataset["path"][:] if "path" in self.dataset.column_names else None
        self._files = _files_of(self.dataset)
        self._images = self.dataset.select_columns(["image"])

    def for_stage(
        self,
        stage: int,
        *,
        augmentation: Augmentation | Literal["same"] | None = "same",
        image_size: int | None = None,
        views: int | None = None,
    ) -> "ImageView":
        """Returns a view of the same images for another stage, which starts at epoch 0.

        Args:
            stage: Number of the stage.
            augmentation: Random changes of that stage, `None` for none; those of this view by default.
            image_size: Side of the square images in pixels; the processor's size by default. Images that are not
                augmented are resized in proportion before the crop.
            views: How many views of each image its epochs go through in turn; `None` for another one in each.
        """
        chosen = self.augmentation if augmentation == "same" else augmentation
        processor = self.processor if image_size is None else self.processor.resized(image_size)
        view = ImageView(self.dataset, processor, chosen, self.seed, stage, views)
        if view.transform.key == self.transform.key:
            view.kept = self.kept
        return view

    def left_unfinished(self) -> "ImageView":
        """Returns this view with its last steps left to `finish`, which takes them for a batch on its device.

        Samples then have `pixel_values` in uint8 and what else `finish` needs. Without augmentation there is nothing to
        gain, and this view is returned.
        """
        if not isinstance(self.transform, TrainTransform):
            return self
        view = copy.copy(self)
        view._finishes = False
        return view

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of their ids."""
        return class_names_of(self.dataset)

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
            vector of length `num_classes` that sums to one. Where images have several labels: a float vector with 1 for
            each, or with mixup or cutmix the mean of two such, weighted by the shares of the images.

        Raises:
            DataError: The image cannot be decoded; the message names it.
            IndexError: There is no such row.
        """
        row, repeat = self._row_and_repeat(index)
        if not self._finishes:
            return self._unfinished(row, repeat)
        pixels = self._view(row, repeat)
        if not self._mixes:
            return {"pixel_values": pixels, "labels": torch.tensor(self._labels[row])}
        pixels, labels = self._mixed(pixels, row, repeat)
        return {"pixel_values": pixels, "labels": labels}

    def __getitems__(self, indices: Sequence[int | tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Returns the samples of a batch, as `__getitem__` does; where they have the same size, as one `Batch`."""
        first = self[indices[0]]
        if not self._finishes:
            samples = [first, *(self[index] for index in indices[1:])]
            return Batch({key: torch.stack([sample[key] for sample in samples]) for key in first})
        if self.augmentation is None and not getattr(self.processor, "do_center_crop", False):
            return [first, *(self[index] for index in indices[1:])]
        stacked = {key: torch.empty((len(indices), *value.shape), dtype=value.dtype) for key, value in first.items()}
        for number, index in enumerate(indices):
            out, labels = stacked["pixel_values"][number], stacked["labels"][number]
            row, repeat = self._row_and_repeat(index)
            if number == 0:
                out.copy_(first["pixel_values"])
                labels.copy_(first["labels"])
            elif self._mixes:
                mixed, mixed_labels = self._mixed(self._view(row, repeat), row, repeat)
                out.copy_(mixed)
                labels.copy_(mixed_labels)
            else:
                self._view(row, repeat, out)
                labels.copy_(torch.tensor(self._labels[row]))
        return Batch(stacked)

    def value(self, row: int) -> Any:
        """Returns the image of a row as it is in the data set: a path, or a dictionary of bytes and path."""
        return self._images[row]["image"] if self._files is None else self._files[row]

    def label(self, row: int) -> Tensor:
        """Returns the label of a row, or where images may have several a 0 or 1 for each class; nothing is decoded."""
        return torch.tensor(self._labels[row])

    @property
    def _mixes(self) -> bool:
        return self.augmentation is not None and self.augmentation.mixes

    def _row_and_repeat(self, index: int | tuple[int, int]) -> tuple[int, int]:
        row, repeat = index if isinstance(index, tuple) else (index, 0)
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of a data set with {len(self)} images")
        return int(row) % len(self), repeat

    def _unfinished(self, row: int, repeat: int) -> dict[str, Tensor]:
        view = self._drawn(row, repeat)
        if not self._mixes:
            return {**unfinished(view), "labels": torch.tensor(self._labels[row])}
        partner, mixing = self._partner(row, repeat, *view.pixels.shape[-2:])
        labels = self._mixed_labels(row, partner, mixing)
        return {**unfinished(view, self._drawn(partner, 0), mixing), "labels": labels}

    def _mixed(self, pixels: Tensor, row: int, repeat: int) -> tuple[Tensor, Tensor]:
        partner, mixing = self._partner(row, repeat, *pixels.shape[-2:])
        return mixing(pixels, self._view(partner, 0)), self._mixed_labels(row, partner, mixing)

    def _partner(self, row: int, repeat: int, height: int, width: int) -> tuple[int, Mixing]:
        """Returns the row of an image's partner, and how they are combined."""
        assert self.augmentation is not None
        random = np.random.default_rng(self._seed_of(row, repeat, "mix"))
        return int(random.integers(len(self))), Mixing.drawn(self.augmentation, height, width, random)

    def _mixed_labels(self, row: int, partner: int, mixing: Mixing) -> Tensor:
        both = torch.from_numpy(self._labels[[row, partner]])
        vectors = both if both.is_floating_point() else F.one_hot(both, self.num_classes).float()
        return mixing.share * vectors[0] + (1 - mixing.share) * vectors[1]

    def _read_labels(self) -> npt.NDArray[Any]:
        labels = self.dataset["label"][:]
        if has_label_sets(self.dataset):
            return multi_hot(labels, self.num_classes)
        return np.asarray(labels, dtype=np.int64)

    def _view(self, row: int, repeat: int, out: Tensor | None = None) -> Tensor:
        with seeded(self._seed_of(row, repeat, "view")):
            return self.transform(self._prepared(row), out)

    def _drawn(self, row: int, repeat: int) -> View:
        assert isinstance(self.transform, TrainTransform)
        with seeded(self._seed_of(row, repeat, "view")):
            return self.transform.view(self._prepared(row))

    def _prepared(self, row: int) -> Any:
        prepared: Any = None if self.kept is None else self.kept.pixels(row)
        if prepared is not None:
            return prepared
        name = None if self._names is None else self._names[row]
        return self.transform.prepared(
            decode_image(self.value(row), name=name, working_size=self.transform.working_size)
        )

    def _seed_of(self, index: int, repeat: int, purpose: str) -> int:
        if self.views is not None:
            return hashed_seed(purpose, self.seed, self.stage, (int(self._epoch) + repeat) % self.views, index)
        return hashed_seed(purpose, self.seed, self.stage, int(self._epoch), index, *([repeat] if repeat else []))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Lets torch's random numbers on the CPU depend on a seed alone while this lasts, and be as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed the accelerators too, and with them dropout.
        torch.default_generator.manual_seed(seed)
        yield


def hashed_seed(*parts: str | int) -> int:
    """Returns a seed of 63 bits that depends on the parts alone, also in another process."""
    key = " ".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


def collate(examples: Sequence[dict[str, Tensor]] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stacks samples to a batch: `pixel_values` of shape (N, 3, height, width), `labels` (N) or (N, classes)."""
    if isinstance(examples, Mapping):
        return dict(examples)
    if isinstance(examples, Batch):
        return examples.stacked
    return {key: torch.stack([example[key] for example in examples]) for key in ("pixel_values", "labels")}


def _files_of(dataset: Dataset) -> list[str] | None:
    """Returns the path of each image, read once; None where the data set holds bytes of some."""
    if any(chunk.field("bytes").null_count < len(chunk) for chunk in dataset.data.column("image").chunks):
        return None
    images = dataset.select_columns(["image"]).with_format("arrow")[:]["image"].to_pylist()
    return None if None in images else [image["path"] for image in images]
