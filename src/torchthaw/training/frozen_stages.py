"""Stages that compute their frozen part once, or at least fast, instead of as a part of every step.

The methods of `Trainer` that are overridden here were read in transformers 5.23 and are tested with 5.10.1 too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from torchthaw.backbones.borders import find_border
from torchthaw.backbones.folding import FastForm, put_on_fast_form
from torchthaw.data.caches.images import with_cached_images
from torchthaw.data.caches.store import ArrayStore
from torchthaw.data.finishing import Normalisation, finish, is_unfinished
from torchthaw.data.views import ImageView, collate
from torchthaw.data.workers import suggest_workers
from torchthaw.training.frozen_part import BORDER_VALUES, BorderRows, FrozenPart, border_rows
from torchthaw.training.precisions import DEFAULT_SIDE, PrecisionTrainer, fixed_views, name_of, side_of

# The rest is left for features.
_SHARE_OF_PICTURES = 0.5
# Batches of the frozen part, in those of validation, on a GPU and at most on a CPU, where memory is that of training.
_LARGER, _LARGER_ON_CPU = 4, 2


class FrozenPartTrainer(PrecisionTrainer):
    """Splits each stage's model at the border of its frozen part, and puts the whole on its fast form."""

    _form: FastForm | None = None
    _part: FrozenPart | None = None
    _validated_part: FrozenPart | None = None
    _operations_per_value: int | None = None
    _store: ArrayStore | None = None
    _normalisation: Normalisation | None = None
    # Is told the split, how many of its images the frozen part is computed for, and of how many.
    on_frozen_progress: Callable[[str, int, int], None] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # By a view's identity; the view itself keeps that from being given to another.
        self._rows: dict[int, tuple[ImageView, BorderRows | None]] = {}
        self._pictures: dict[int, tuple[ImageView, ImageView]] = {}
        super().__init__(*args, **kwargs)

    # At a stage's start and end

    def _speed_up(self, *, trains: bool = True) -> None:
        """Begins to use what the stage keeps frozen; call it when the model is frozen, in training mode.

        Args:
            trains: Whether there are steps to come, and not only validations.
        """
        assert self.stage is not None
        if self.args.torch_compile or self.args.n_gpu > 1:
            # Compiled models and DataParallel's replicas are made of the modules' own code.
            return
        self._form = put_on_fast_form(self.model)
        self._find_part()
        border = None if self._part is None else self._part.border
        self._choose_live_dtype(border, self.stage, 0 if self._form is None else self._form.folded)
        if not trains:
            return
        rows = self._rows_of(self.train_dataset, "train")
        self.train_dataset = self._with_pictures(self.train_dataset) if rows is None else rows
        if self._finishes_batches() and isinstance(self.train_dataset, ImageView) and self.data_collator is collate:
            self.train_dataset = self.train_dataset.left_unfinished()
            # Moved once: a copy in each step would wait for the device.
            normalisation = getattr(self.train_dataset.transform, "normalisation", None)
            self._normalisation = None if normalisation is None else normalisation.on(self.args.device)

    def _find_part(self) -> None:
        assert self.stage is not None
        border = find_border(self.model, self._frozen.live, self._probe(2))
        if border is None:
            return
        dtype = self._choose_frozen_dtype(border, self.stage)
        self._part = FrozenPart(border, dtype, dict(self._progress.fingerprints))
        # Rounded values are good enough to train on, but what is validated is the model that will be saved.
        mixed = self.args.bf16 or self.args.fp16
        self._validated_part = self._part if mixed else replace(self._part, dtype=next(self.model.parameters()).dtype)
        # On resume, what was cached before the interruption may not be needed any more.
        cached = self._progress.frozen_part.get("cached", [])
        self._progress.frozen_part = {"border": border.path, "dtype": name_of(dtype), "cached": cached}

    def _slow_down(self) -> None:
        """Ends it, so that the model is what it was."""
        self._part = self._validated_part = self._live_dtype = None
        self._rows, self._pictures = {}, {}
        if self._form is not None:
            self._form.remove()
            self._form = None

    def _cache(self) -> ArrayStore | None:
        if self._store is None and self.args.cache_gb > 0:
            self._store = ArrayStore(budget_gb=self.args.cache_gb)
        return self._store

    # Values at the border in place of images

    def _rows_of(self, dataset: Any, split: str) -> BorderRows | None:
        """Returns what the frozen part gives for all images of a view that shows them alike each epoch."""
        part = self._part if split == "train" else self._validated_part
        if part is None or not isinstance(dataset, ImageView) or self.data_collator is not collate:
            return None
        views = fixed_views(dataset)
        if views is None:
            return None
        if id(dataset) not in self._rows:
            images = self._with_pictures(dataset)
            tell, total = self.on_frozen_progress, views * len(images)
            rows = border_rows(
                part, images, views=views, store=self._cache(),
                batch_size=self._at_once(images), num_workers=self.workers_for(images),
                on_progress=None if tell is None else lambda done: tell(split, done, total),
            )  # fmt: skip
            self._rows[id(dataset)] = (dataset, rows)
            cached = self._progress.frozen_part["cached"]
            if rows is not None and split not in cached:
                cached.append(split)
        return self._rows[id(dataset)][1]

    def _at_once(self, images: ImageView) -> int:
        """Returns how many images go through the frozen part together: more than in a step, without a graph to keep.

        A CPU gains by that only where images are small, and calling its kernels takes as long as running them.
        """
        if self.args.device.type == "cuda":
            larger = _LARGER
        else:
            larger = min(max(1, int((DEFAULT_SIDE / side_of(images)) ** 2)), _LARGER_ON_CPU)
        return larger * self.args.per_device_eval_batch_size

    def _with_pictures(self, dataset: Any) -> Any:
        """Returns a view with its decoded pictures kept for later epochs and stages; anything else as it is."""
        if not isinstance(dataset, ImageView) or self._cache() is None:
            return dataset
        if id(dataset) not in self._pictures:
            kept = with_cached_images(dataset, self._cache(), share=_SHARE_OF_PICTURES)
            self._pictures[id(dataset)] = (dataset, kept)
        return self._pictures[id(dataset)][1]

    # Loaders

    def workers_for(self, dataset: Any) -> int:
        """Returns the number of processes that load a data set beside this one."""
        if isinstance(dataset, BorderRows):
            return 0
        given = self.args.dataloader_num_workers
        return suggest_workers(dataset, self.args.device) if given is None else given

    def get_train_dataloader(self) -> DataLoader:
        """Makes the loader of the stage's training data; between stages, where lengths are counted, without workers."""
        with self._workers(self.train_dataset if self.stage is not None else None):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """Makes the loader of a validation set; within a stage it gives what the frozen part makes of the images."""
        chosen: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(chosen, str):
            chosen = cast(dict[str, Any], self.eval_dataset)[chosen]
        rows = self._rows_of(chosen, "validation")
        if rows is not None:
            chosen = rows
        elif self.stage is not None:
            chosen = self._with_pictures(chosen)
        with self._workers(chosen):
            return super().get_eval_dataloader(chosen)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """Makes the loader of images to predict."""
        with self._workers(test_dataset):
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _workers(self, dataset: Any) -> Iterator[None]:
        """Lets the number of workers for a data set stand in the arguments, and what goes with none."""
        names = ("dataloader_num_workers", "dataloader_persistent_workers", "dataloader_prefetch_factor")
        before = {name: getattr(self.args, name) for name in names}
        number = self.workers_for(dataset)
        try:
            self.args.dataloader_num_workers = number
            if number == 0:
                self.args.dataloader_persistent_workers, self.args.dataloader_prefetch_factor = False, None
            yield
        finally:
            for name, value in before.items():
                setattr(self.args, name, value)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._part is None:
            return super().training_step(model, inputs, *args, **kwargs)
        inputs = self._at_border(inputs, self._part)
        with self._part.border.resumed():
            return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        part = self._validated_part
        if part is None or ("pixel_values" not in inputs and BORDER_VALUES not in inputs):
            return super().prediction_step(model, inputs, *args, **kwargs)
        inputs = self._at_border(inputs, part)
        with part.border.resumed():
            return super().prediction_step(model, inputs, *args, **kwargs)

    def _finishes_batches(self) -> bool:
        """Whether the last steps of augmentation are the device's work, which is worth its transfer on a GPU."""
        return self.args.device.type == "cuda"

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if self._normalisation is None or not is_unfinished(inputs):
            return inputs
        return finish(inputs, self._normalisation)

    def _at_border(self, inputs: dict[str, Any], part: FrozenPart) -> dict[str, Any]:
        """Returns a batch in which values at the border stand as `pixel_values`."""
        inputs = self._prepare_inputs(dict(inputs))
        values = inputs.pop(BORDER_VALUES, None)
        if values is None:
            values = part(inputs["pixel_values"])
        return {**inputs, "pixel_values": values}

    def _forward(self, batch: dict[str, Any]) -> None:
        """Runs a batch of training images, or of their values at the border, through the model."""
        inputs = self._prepare_inputs(batch) if self._part is None else self._at_border(batch, self._part)
        with nullcontext() if self._part is None else self._part.border.resumed():
            self.model(pixel_values=inputs["pixel_values"])

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Returns the floating point operations of a batch, as `Trainer` guesses them; 0 for values at a border."""
        if BORDER_VALUES in inputs:
            return 0
        if self.model.main_input_name not in inputs:
            return super().floating_point_ops(inputs)
        values = inputs[self.model.main_input_name].numel()
        if self._operations_per_value is None:
            # In proportion; to count the parameters in every step would cost several ms.
            self._operations_per_value = super().floating_point_ops(inputs) // values
        return self._operations_per_value * values
