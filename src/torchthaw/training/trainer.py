"""`ThawTrainer`: the Hugging Face Trainer, run once per stage of a plan, as one run.

A stage is one pass of `Trainer._inner_training_loop` over a range of epochs, with the model frozen for it, a fresh
optimizer, a fresh schedule and a fresh wrap for distributed training. The private methods that are overridden were
read in transformers 5.23 and are tested with 5.10.1 too.
"""

import time
from collections.abc import Sized
from typing import Any, cast

import torch
from datasets import Dataset as ImageDataset
from datasets import Image as ImageFeature
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, get_scheduler
from transformers.trainer_utils import TrainOutput

from torchthaw.backbones.image_processing import TorchvisionImageProcessor
from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.data.augmentation import make_augmentation
from torchthaw.data.loading import load_image_dataset
from torchthaw.data.views import ImageView, collate
from torchthaw.errors import PlanError, TrainingError
from torchthaw.evaluation.metrics import compute_metrics as classification_compute_metrics
from torchthaw.stages.freezing import Frozen, freeze_for_stage, resolve_batch_norm
from torchthaw.stages.param_groups import param_groups
from torchthaw.stages.plan import BatchNormPolicy, Stage, StagePlan
from torchthaw.stages.proof import check_unchanged, frozen_fingerprints
from torchthaw.training.arguments import ThawTrainingArguments
from torchthaw.training.callbacks import fire_train_begin_once
from torchthaw.training.completion import check_batch_size, complete_arguments, full_plan
from torchthaw.training.records import StageRecord


class ThawTrainer(Trainer):
    """Trains a torchthaw model stage by stage; everything else is `Trainer`.

    Defaults that differ from `Trainer`: data sets with an image and a label column (as `load_image_dataset` gives
    them) are turned into augmented training views and plain evaluation views with `processing_class`; the metrics are
    accuracy, macro F1 and balanced accuracy; the collator stacks images and labels.

    Args:
        model: A `TorchvisionForImageClassification`.
        args: The arguments, plan included.
        train_dataset: Training images: a `datasets.Dataset` with columns `image` and `label`, or any data set that
            gives `pixel_values` (3, height, width) and `labels`.
        eval_dataset: Validation images, likewise.
        processing_class: The image processor of the model; needed for data sets of images.
        **kwargs: What `Trainer` takes.

    Attributes:
        plan: The plan with all defaults filled in.
        stage: The stage that runs now, or None.
        stage_records: A `StageRecord` for each stage that was run.

    Raises:
        PlanError: a stage does not fit the model, or an optimizer was passed: each stage makes its own.
    """

    args: ThawTrainingArguments
    model: TorchvisionForImageClassification

    def __init__(
        self,
        model: TorchvisionForImageClassification | None = None,
        args: ThawTrainingArguments | None = None,
        train_dataset: Dataset | ImageDataset | None = None,
        eval_dataset: Dataset | ImageDataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        args = args or ThawTrainingArguments(output_dir="trainer_output")
        if not isinstance(args, ThawTrainingArguments):
            raise PlanError(
                f"args is a {type(args).__name__}, which has no stage plan; pass ThawTrainingArguments(output_dir=...)"
            )
        if any(item is not None for item in kwargs.get("optimizers", (None, None))):
            raise PlanError(
                "optimizers was passed, but every stage makes its own optimizer for what it trains; choose the kind "
                "with ThawTrainingArguments(optim=...), and rates in the plan"
            )
        if eval_dataset is None and args.eval_strategy != "no":
            raise PlanError(
                "there is no eval_dataset to choose the best weights by; pass validation images (split_dataset cuts "
                "some off), or ThawTrainingArguments(eval_strategy='no', load_best_model_at_end=False)"
            )
        check_batch_size(args.train_batch_size, train_dataset)
        if model is not None:
            complete_arguments(args, model)
        kwargs.setdefault("compute_metrics", classification_compute_metrics)
        kwargs.setdefault("data_collator", collate)
        self.stage: Stage | None = None
        self.stage_records: list[StageRecord] = []
        self._stage_index = 0
        self._stage_steps = 0
        self._frozen: Frozen | None = None
        self._fingerprints: dict[str, str] = {}
        self._used_rates: dict[str, float] = {}
        self._run_start = (0.0, 0)
        self._earlier_loss = 0.0
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        # `model_init` makes its model only here.
        complete_arguments(args, self.model)
        self.train_dataset = self._as_view(self.train_dataset, train=True)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self._as_view(data, train=False) for name, data in self.eval_dataset.items()}
        else:
            self.eval_dataset = self._as_view(self.eval_dataset, train=False)
        fire_train_begin_once(self.callback_handler)

    # Data

    def _as_view(self, dataset: Any, *, train: bool) -> Any:
        """Wraps a data set of images in a view; leaves anything that gives tensors already as it is."""
        if not isinstance(dataset, ImageDataset) or not isinstance(dataset.features.get("image"), ImageFeature):
            return dataset
        if self.processing_class is None:
            raise PlanError(
                "the data set has an image column but there is no image processor to prepare it; pass "
                "processing_class=TorchvisionImageProcessor.from_torchvision(...)"
            )
        names = self.model.config.class_names
        ready = "path" in dataset.column_names and getattr(dataset.features["label"], "names", None) == names
        # Labels are numbered by the model's classes, whatever order the data set has.
        images = dataset if ready else load_image_dataset(dataset, class_names=names)["train"]
        augmentation = make_augmentation(self.args.augmentation or "none") if train else None
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return ImageView(images, cast(TorchvisionImageProcessor, self.processing_class), augmentation, seed=seed)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        return super().evaluate(self._as_view(eval_dataset, train=False), *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return super().predict(self._as_view(test_dataset, train=False), *args, **kwargs)

    # The plan

    @property
    def plan(self) -> StagePlan:
        return full_plan(self.args, self.model)

    def batch_norm_policy(self, stage: Stage) -> BatchNormPolicy:
        """Returns the BatchNorm policy of a stage's live groups, `auto` resolved for this data and batch size."""
        return resolve_batch_norm(
            stage.batch_norm, num_images=self._num_train_images(), batch_size=self.args.per_device_train_batch_size
        )

    def _num_train_images(self) -> int | None:
        return len(self.train_dataset) if isinstance(self.train_dataset, Sized) else None

    # One run made of stages

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: Any = None,
        resume_from_checkpoint: str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        if resume_from_checkpoint is not None:
            raise PlanError(
                "resuming a staged run from a checkpoint is not possible yet; start it again without "
                "resume_from_checkpoint"
            )
        self.stage_records = []
        self._run_start = (time.time(), 0)
        self._earlier_loss = 0.0
        output: TrainOutput | None = None
        try:
            for index, stage in enumerate(self.plan.stages):
                self._begin_stage(index, stage)
                started = time.monotonic()
                output = super()._inner_training_loop(
                    batch_size=batch_size, args=args, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval
                )
                self._end_stage(stage, time.monotonic() - started)
                if self.control.should_training_stop:
                    break
        finally:
            self.stage = None
        assert output is not None
        return output

    def _begin_stage(self, index: int, stage: Stage) -> None:
        self.stage, self._stage_index = stage, index
        self._frozen = freeze_for_stage(self.model, stage, self.batch_norm_policy(stage))
        self.optimizer = self.lr_scheduler = None
        # A wrap made for other trainable parameters would not reduce the gradients of the new ones.
        self.model_wrapped = self.model
        self.model.train()
        self._fingerprints = frozen_fingerprints(self.model)

    def _end_stage(self, stage: Stage, seconds: float) -> None:
        assert self._frozen is not None
        epochs = round((self.state.epoch or 0) - self.plan.start_epoch(self._stage_index))
        images = epochs * (self._num_train_images() or 0)
        key = f"eval_{(self.args.metric_for_best_model or '').removeprefix('eval_')}"
        values = [
            entry[key] for entry in self.state.log_history if entry.get("stage") == self._stage_index and key in entry
        ]
        self.stage_records.append(
            StageRecord(
                name=stage.name,
                epochs=epochs,
                seconds=round(seconds, 3),
                train_images_per_second=round(images / seconds, 2),
                trainable_parameters=self._frozen.trainable_parameters,
                best_metric=(max if self.args.greater_is_better else min)(values) if values else None,
                learning_rates=stage.learning_rates(list(self.model.layer_groups())),
                batch_norm=self._frozen.batch_norm,
                accepted=True,
                reason="every stage is kept; the best weights of all epochs are what is saved",
                frozen_unchanged=True,
            )
        )

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        (_, steps_per_epoch, examples, _, total_batch, steps_in_epoch, _) = super().set_initial_training_values(
            args, dataloader
        )
        assert self.stage is not None
        end_epoch = self.plan.start_epoch(self._stage_index) + self.stage.epochs
        self._stage_steps = steps_per_epoch * self.stage.epochs
        max_steps = steps_per_epoch * self.plan.epochs
        samples = examples * self.plan.epochs
        return end_epoch, steps_per_epoch, examples, samples, total_batch, steps_in_epoch, max_steps

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        if self._stage_index == 0:
            return super()._init_training_state(*args, **kwargs)
        return self.plan.start_epoch(self._stage_index), 0

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes the optimizer of the current stage over named layer groups; see `param_groups`."""
        if self.optimizer is None:
            stage = self.stage or self.plan.stages[0]
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = param_groups(self.model, self.model.layer_groups(), stage)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Makes the schedule of the current stage: warmup, then cosine decay (or the stage's own) to its last step."""
        if self.lr_scheduler is None:
            stage = self.stage or self.plan.stages[0]
            steps = self._stage_steps or num_training_steps
            self.lr_scheduler = get_scheduler(
                stage.schedule,
                optimizer=optimizer or self.create_optimizer(),
                num_warmup_steps=round(stage.warmup * steps),
                num_training_steps=steps,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_learning_rate(self) -> float:
        # `Trainer` asks after the optimizer's step and before the schedule's: these are the rates that were used.
        self._used_rates = {
            f"learning_rate/{group['layer_group']}": float(group["lr"])
            for group in self.create_optimizer().param_groups
        }
        return super()._get_learning_rate()

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            assert self.stage is not None
            rates = self.stage.learning_rates(list(self.model.layer_groups()))
            raise TrainingError(
                f"the loss became {loss.item()} in stage {self.stage.name!r} at step {self.state.global_step + 1}, at "
                f"peak learning rates up to {max(rates.values()):g}; write a lower learning_rate for this stage "
                "(a tenth, say), or turn mixed precision off. Checkpoints of earlier epochs are kept in "
                f"{self.args.output_dir}"
            )
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        labels = inputs.get("labels")
        if self.label_smoother is None or labels is None or labels.ndim < 2:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # Trainer's smoothing takes class ids; mixup gives a distribution over the classes.
        share = self.args.label_smoothing_factor
        outputs = model(**{**inputs, "labels": (1 - share) * labels + share / labels.shape[1]})
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs as `Trainer` does, with the stage's number and the learning rate of every layer group."""
        if self.stage is not None:
            logs["stage"] = self._stage_index
            if "loss" in logs:
                logs.update(self._used_rates)
        super().log(logs, *args, **kwargs)
        if self.stage is not None:
            # A name is not a number, so reporters such as TensorBoard only get the stage's index.
            cast(dict[str, Any], self.state.log_history[-1])["stage_name"] = self.stage.name

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        assert self.stage is not None
        # Before the best weights are loaded, which may be those of an earlier stage.
        check_unchanged(self._fingerprints, self.model, self.stage.name)
        last = self._stage_index == len(self.plan.stages) - 1 or self.control.should_training_stop
        if last:
            self._total_loss_scalar += self._earlier_loss
            start_time, self._initial_global_step = self._run_start
            return super()._finalize_training(trial, num_train_samples, start_time)
        self._total_loss_scalar += self._tr_loss.item()
        self._earlier_loss += self._total_loss_scalar
        steps = self.state.global_step
        return TrainOutput(steps, self._earlier_loss / max(steps, 1), {})
