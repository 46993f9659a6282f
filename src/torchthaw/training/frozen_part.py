"""The frozen part of a stage, computed the fastest way that gives the same features, and kept where its views recur."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from torchthaw.backbones.borders import Border
from torchthaw.data.caches.digests import image_digests
from torchthaw.data.caches.store import ArrayStore
from torchthaw.data.views import ImageView, collate
from torchthaw.training import processes

# Stands where a batch has values at the border in place of images.
BORDER_VALUES = "border_values"


@dataclass(frozen=True)
class FrozenPart:
    """The frozen part of a model.

    Attributes:
        border: Where it ends.
        dtype: What it is computed in: the model's own type, or a smaller one under autocast.
        weights: What identifies its weights: a digest of each frozen tensor.
    """

    border: Border
    dtype: torch.dtype
    weights: Mapping[str, str]

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Computes values at the border, (N, *shape), of images on the model's device; without a graph."""
        smaller = self.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(pixel_values.device.type, self.dtype) if smaller else nullcontext():
            return self.border.prefix(pixel_values)


class BorderRows(Dataset[dict[str, torch.Tensor]]):
    """Values at a border instead of images: what a head or the last blocks train on, epoch by epoch.

    A sampler that draws an image several times an epoch asks for `(row, repeat)`; another repeat is another of its
    views, where there are several.

    Args:
        values: Of shape (views, images, ...), one view for each epoch in turn; bfloat16 as the bits of int16.
        labels: Of shape (views, images) or (views, images, classes).
        dtype: Type of the values.
    """

    def __init__(self, values: npt.NDArray[Any], labels: npt.NDArray[Any], dtype: torch.dtype) -> None:
        self._values, self._labels, self._dtype = values, labels, dtype
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Moves on to the views of an epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return int(self._values.shape[1])

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, torch.Tensor]:
        return {key: rows[0] for key, rows in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int | tuple[int, int]]) -> dict[str, torch.Tensor]:
        """Returns a batch, which `collate` leaves as it is."""
        pairs = [index if isinstance(index, tuple) else (index, 0) for index in indices]
        rows = [int(row) for row, _ in pairs]
        views = [(self._epoch + repeat) % len(self._values) for _, repeat in pairs]
        values = torch.from_numpy(self._values[views, rows])
        return {
            BORDER_VALUES: values.view(self._dtype) if self._dtype == torch.bfloat16 else values,
            "labels": torch.from_numpy(self._labels[views, rows]),
        }


def border_rows(
    part: FrozenPart,
    view: ImageView,
    *,
    views: int,
    store: ArrayStore | None,
    batch_size: int,
    num_workers: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> BorderRows | None:
    """Runs the frozen part over all images, or reads what it gave before for the same images, views and weights.

    Several processes share the images out, and each gets all values.

    Args:
        part: The frozen part, on its device.
        view: The images, with their transform.
        views: How many views of each image there are; without augmentation 1.
        store: Where values are kept, and how many may be.
        batch_size: Images at once.
        num_workers: Processes that decode images besides the main one.
        on_progress: Called with the number of images done.

    Returns:
        The values; None if they do not fit into the store, or cannot be written.
    """
    if store is None:
        return None
    first = view[0]
    device = next(part.border.model.parameters()).device
    sample = part(first["pixel_values"][None].to(device))
    labels = first["labels"]
    shape, kind = tuple(sample.shape[1:]), sample.dtype
    stored = np.dtype(np.int16) if kind == torch.bfloat16 else sample.cpu().numpy().dtype
    arrays = {
        "values": ((views, len(view), *shape), stored.str),
        "labels": ((views, len(view), *labels.shape), labels.numpy().dtype.str),
    }
    rank, world = processes.place()

    def fill(target: Mapping[str, npt.NDArray[Any]]) -> None:
        done = 0
        for number in range(views):
            view.set_epoch(number)
            rows = list(range(rank, len(view), world))
            # Its own generator: the run's random numbers must not depend on what was in the cache.
            loader = DataLoader(
                view, batch_size=batch_size, sampler=rows, num_workers=num_workers, collate_fn=collate,
                generator=torch.Generator(),
            )  # fmt: skip
            at = 0
            for batch in loader:
                values = part(batch["pixel_values"].to(device)).cpu().contiguous()
                chosen = rows[at : at + len(values)]
                target["values"][number, chosen] = (
                    values.view(torch.int16) if kind == torch.bfloat16 else values
                ).numpy()
                target["labels"][number, chosen] = batch["labels"].numpy()
                at, done = at + len(values), done + len(values)
                if on_progress is not None:
                    on_progress(done)

    if world > 1:
        return _of_all_processes(arrays, fill, store.budget_bytes, rank, world, kind)
    kept = store.open_or_make(_key(part, view, views, kind, batch_size), arrays, fill)
    return None if kept is None else BorderRows(kept["values"], kept["labels"], kind)


def _of_all_processes(
    arrays: Mapping[str, tuple[tuple[int, ...], str]],
    fill: Callable[[Mapping[str, npt.NDArray[Any]]], None],
    budget: int,
    rank: int,
    world: int,
    kind: torch.dtype,
) -> BorderRows | None:
    """Computes each process's share and exchanges them; in memory, since processes may have no disk in common."""
    size = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in arrays.values())
    if size > budget:
        return None
    own = {name: np.zeros(shape, dtype) for name, (shape, dtype) in arrays.items()}
    fill(own)
    shares = processes.gather({name: array[:, rank::world] for name, array in own.items()})
    for other, share in enumerate(shares):
        for name, array in own.items():
            array[:, other::world] = share[name]
    return BorderRows(own["values"], own["labels"], kind)


def _key(part: FrozenPart, view: ImageView, views: int, kind: torch.dtype, batch_size: int) -> dict[str, Any]:
    """Returns all that the values depend on."""
    random = None
    if view.augmentation is not None:
        random = {**view.augmentation.to_dict(), "seed": view.seed, "stage": view.stage, "views": views}
    model = part.border.model
    return {
        "kind": "border",
        "images": _digest("\n".join(image_digests(view.dataset))),
        "labels": _digest(str(view.dataset["label"][:])),
        # Where the code of a saved processor lies changes nothing.
        "processor": {name: value for name, value in view.processor.to_dict().items() if name != "auto_map"},
        "augmentation": random,
        "architecture": model.config.architecture,
        "transform_input": model.config.transform_input,
        "border": part.border.path,
        "weights": digest_of_weights(part.weights),
        "computed_in": str(part.dtype),
        "dtype": str(kind),
        "device": next(model.parameters()).device.type,
        # Sums are taken in another order with other sizes.
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
    }


def digest_of_weights(fingerprints: Mapping[str, str]) -> str:
    """Returns a digest of frozen tensors, by the digest of each."""
    return _digest(json.dumps(dict(fingerprints), sort_keys=True))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
