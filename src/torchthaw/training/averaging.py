"""Stages that validate and hand on an average of their weights.

The methods of `Trainer` that are overridden here were read in transformers 5.23 and are tested with 5.10.1 too.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from torchthaw.stages.averages import WeightAverage, ema_decay, live_batch_norms
from torchthaw.training.average_options import average_of, averaged_epochs
from torchthaw.training.frozen_stages import FrozenPartTrainer
from torchthaw.training.random_states import random_states_kept

# As good as all images: from 1,000 to 10,000 are enough (Wu and Johnson, 2021, "Rethinking Batch in BatchNorm").
_IMAGES_FOR_STATISTICS = 2048


class AverageCallback(TrainerCallback):
    """Tells of what averages are made of.

    Args:
        after_step: Called after each optimizer step.
        after_epoch: Called at the end of each epoch, before its validation.
    """

    def __init__(self, after_step: Callable[[], None], after_epoch: Callable[[], None]) -> None:
        self._after_step, self._after_epoch = after_step, after_epoch

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Passes the event on."""
        self._after_step()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Passes the event on."""
        self._after_epoch()


class AveragingTrainer(FrozenPartTrainer):
    """Averages the weights of stages that ask for it; validation, checkpoints and the gate see the averages."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(AverageCallback(self._average_step, self._average_epoch))

    def _average_kind(self) -> str:
        """Returns which average of its weights the stage hands on."""
        assert self.stage is not None
        return average_of(self.args, self.stage)

    def _begin_average(self) -> None:
        """Begins the stage's average, or goes on with that of the checkpoint that the stage is resumed from."""
        progress = self._progress
        if self._average_kind() == "none":
            progress.average = None
            return
        if progress.average is None or not self._resumed:
            progress.average = WeightAverage(self._average_kind(), self.args.ema_decay)
        progress.average.begin(self.model, self._live_names)

    def _end_average(self) -> None:
        """Leaves the averages in the model, for what comes after the stage."""
        if self._progress.average is not None:
            self._progress.average.finish(self.model)

    def _average_step(self) -> None:
        average = self._progress.average
        # With fp16 the scaler skips steps whose gradients overflow.
        if average is not None and average.kind == "ema" and not self.accelerator.optimizer_step_was_skipped:
            average.update()

    def _average_epoch(self) -> None:
        average, progress = self._progress.average, self._progress
        if average is None or average.kind != "swa":
            return
        planned = self._planned_epochs[progress.stage_index]
        done = progress.epoch - progress.stage_start_epoch + 1
        if done <= planned - averaged_epochs(self.args, planned):
            return
        average.update()
        # Those of a single epoch's weights are known from training.
        if average.updates > 1 and live_batch_norms(self.model.train()):
            with random_states_kept():
                average.measure_statistics(self.model, self._passes_over_training_images())

    def _passes_over_training_images(self) -> Iterator[int]:
        """Runs training images through the model as this epoch shows them, the same in every process, a batch a time.

        Yields:
            The number of images of each batch.
        """
        data: Any = self.train_dataset
        # Drawn, since data is often sorted by class.
        rows = np.random.default_rng(self.args.seed).permutation(len(data))[:_IMAGES_FOR_STATISTICS]
        loader = DataLoader(
            data,
            batch_size=self.args.per_device_eval_batch_size,
            sampler=rows.tolist(),
            num_workers=self.workers_for(data),
            collate_fn=self.data_collator,
        )
        for batch in loader:
            self._forward(batch)
            yield len(batch["labels"])

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        average = self._progress.average
        if average is None or not (self.control.should_evaluate or self.control.should_save):
            return super()._maybe_log_save_evaluate(*args, **kwargs)
        # What is validated is what is snapshot and saved; a checkpoint keeps the replaced weights beside it.
        with average.in_model(self.model):
            return super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        average = self._progress.average
        # Entered here for checkpoints that come at other times, such as before a machine is taken away.
        with nullcontext() if average is None else average.in_model(self.model):
            super()._save_checkpoint(model, trial)

    def _describe_average(self) -> dict[str, Any] | None:
        """Returns what a record says of the stage's average."""
        average = self._progress.average
        if average is None:
            return None
        decay = {"decay": ema_decay(average.updates, average.decay)} if average.kind == "ema" else {}
        return {"kind": average.kind, "updates": average.updates, **decay}
