"""The trainer's loss and the order of its images, against imbalance and with label smoothing.

The methods of `Trainer` that are overridden were read in transformers 5.23 and are tested with 5.10.1 too.
"""

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.data import Dataset, Sampler

from torchthaw.data.class_balance import count_weights
from torchthaw.data.class_sampler import ClassSampler
from torchthaw.data.views import ImageView
from torchthaw.errors import PlanError
from torchthaw.training.datasets import labels_of
from torchthaw.training.imbalance import Balance, ImbalanceSettings, settle
from torchthaw.training.losses import TrainingLoss, minimising
from torchthaw.training.reporting import ReportingTrainer


class BalancedTrainer(ReportingTrainer):
    """Trains with a loss and a sampler of its own where they are asked for; validates with plain cross entropy.

    Attributes:
        balance: What the run does about uneven classes.
        training_loss: What training minimises; None for the model's own loss.
    """

    balance: Balance
    training_loss: TrainingLoss | None = None
    _labels: npt.NDArray[np.int64] | None = None

    def _settle_balance(self) -> None:
        """Settles loss and sampling by the arguments and the training images.

        Raises:
            PlanError: they do not fit the data, or a `compute_loss_func` was passed too.
        """
        settings = ImbalanceSettings.of(self.args)
        several_labels = self.model.config.several_labels
        counted = bool(settings.by_counts()) or settings.imbalance == "auto"
        if self._train_data is None:
            settings = ImbalanceSettings()
        elif not several_labels:
            self._labels = labels_of(self._train_data, read=counted)
        self.balance = settle(
            settings, labels=self._labels, class_names=self.model.config.class_names, several_labels=several_labels
        )
        loss = make_training_loss(
            self.balance, self.args.label_smoothing_factor, several_labels=several_labels, device=self.args.device
        )
        # Trainer's own smoothing would be in the validation loss too, and knows no distributions over classes.
        self.label_smoother = None
        self.training_loss = None if loss.is_plain or self.compute_loss_func is not None else loss
        if self.compute_loss_func is not None and not _without_smoothing(loss).is_plain:
            raise PlanError(
                f"compute_loss_func was passed, but {', '.join(self.balance.settings.lines())} asks for another loss; "
                "keep one of them"
            )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        sampling = self.balance.settings.sampling
        if sampling is None:
            return super()._get_train_sampler(train_dataset)
        assert self._labels is not None
        return ClassSampler(
            self._labels,
            sampling,
            seed=cast(int, self.args.data_seed),
            stage=self._progress.stage_index,
            with_repeats=isinstance(self._train_data, ImageView),
        )

    def _probe_weighting(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        loss, sampling = self.training_loss, self.balance.settings.sampling
        if sampling is not None:
            counts = np.asarray(list((self.balance.counts or {}).values()))
            return torch.from_numpy(count_weights(counts, sampling)), None
        return (None, None) if loss is None else (loss.weights, loss.shift)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Gets the batches of an optimizer step, with what the sum of their losses is to be divided by."""
        batches, number = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.training_loss is None or any("labels" not in batch for batch in batches):
            return batches, number
        classes = self.model.config.num_labels
        weights = [self.training_loss.weight_of(batch["labels"], classes).to(device) for batch in batches]
        total = torch.stack(weights).sum() if weights else torch.zeros((), device=device)
        return batches, self.accelerator.gather(total).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Computes the loss of a batch: in train mode `training_loss`, in eval mode the model's own.

        Args:
            model: The model, maybe wrapped.
            inputs: Pixels and labels.
            return_outputs: Whether to return the model's output too.
            num_items_in_batch: Weight of all images of the optimizer step; None takes the batch by itself.
        """
        if self.training_loss is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        total, scale = None, 1.0
        if isinstance(num_items_in_batch, torch.Tensor):
            # Trainer takes the mean over processes and devices, and divides by the number of accumulated batches.
            parts = self.accelerator.num_processes * max(1, self.args.n_gpu)
            total, scale = num_items_in_batch, float(parts * self.current_gradient_accumulation_steps)
        with minimising(self.model, self.training_loss, total_weight=total, scale=scale):
            return super().compute_loss(model, inputs, return_outputs, None)

    def _measure(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**super()._measure(*args, **kwargs), "imbalance": self.balance.to_dict()}


def make_training_loss(
    balance: Balance, smoothing: float, *, several_labels: bool, device: torch.device
) -> TrainingLoss:
    """Returns what training minimises.

    Args:
        balance: What is done about uneven classes.
        smoothing: Share of each label spread over all classes.
        several_labels: Whether they may.
        device: Where the loss is computed.
    """
    settings = balance.settings
    weights = None if balance.weights is None else torch.tensor(list(balance.weights.values()), device=device)
    adjusted = settings.loss == "logit_adjusted"
    return TrainingLoss(
        weights=weights,
        gamma=settings.focal_gamma if settings.loss == "focal" else 0.0,
        shift=settings.logit_adjustment * torch.tensor(balance.log_priors(), device=device) if adjusted else None,
        smoothing=smoothing,
        several_labels=several_labels,
    )


def _without_smoothing(loss: TrainingLoss) -> TrainingLoss:
    return TrainingLoss(loss.weights, loss.gamma, loss.shift, several_labels=loss.several_labels)
