"""`ThawTrainer`: the Hugging Face Trainer for staged fine-tuning of torchvision classifiers."""

import dataclasses
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from datasets import Dataset as ImageDataset
from datasets import IterableDataset as ImageIterable
from torch.utils.data import Dataset

from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.data.views import collate
from torchthaw.errors import PlanError, did_you_mean
from torchthaw.evaluation import multilabel
from torchthaw.evaluation.augmented_predictions import check_test_time_augmentation
from torchthaw.evaluation.metrics import compute_metrics as classification_compute_metrics
from torchthaw.evaluation.range_test_plot import plot_range_test
from torchthaw.stages.plan import StagePlan
from torchthaw.stages.presets import make_plan
from torchthaw.training import processes
from torchthaw.training.arguments import ThawTrainingArguments
from torchthaw.training.average_options import check_averaged_stages
from torchthaw.training.balanced_training import BalancedTrainer
from torchthaw.training.comparison import supports_test
from torchthaw.training.completion import check_data, complete_arguments
from torchthaw.training.datasets import as_view, length_of, stage_view
from torchthaw.training.range_test import RangeTest
from torchthaw.training.rate_finder import RangeTestSettings, range_tests


class ThawTrainer(BalancedTrainer):
    """Trains a torchthaw model stage by stage; everything else is `Trainer`.

    Defaults that differ from `Trainer`: data sets with an image and a label column (as `load_image_dataset` gives
    them) are turned into augmented training views and plain evaluation views with `processing_class`; the metrics are
    accuracy, macro F1 and balanced accuracy, for a model of several labels per image those of
    `evaluation.multilabel.compute_metrics`, of which mAP chooses the best weights by default; the collator stacks
    images and labels. `hyperparameter_search` tries rates of the head, weight decay and label smoothing unless
    `hp_space` says otherwise.

    Callbacks that have `on_stage_begin` and `on_stage_end` (see `StageCallback`) are told of stages; all can read
    `state.stage_index` and `state.stage_name`.

    Args:
        model: A `TorchvisionForImageClassification`.
        args: The arguments, plan included.
        train_dataset: Training images: a `datasets.Dataset` with columns `image` and `label`, or any data set that
            gives `pixel_values` (3, height, width) and `labels`. A stream (`IterableDataset`) needs stages in steps.
        eval_dataset: Validation images, likewise.
        processing_class: The image processor of the model; needed for data sets of images.
        **kwargs: What `Trainer` takes.

    Attributes:
        plan: The plan with all defaults filled in.
        stage: The stage that runs now, or None.
        stage_records: A `StageRecord` for each stage that was run.
        balance: What the run does about uneven classes.

    Raises:
        PlanError: a stage, or what was asked for against imbalance, does not fit the model or the data, an optimizer
            was passed (each stage makes its own), or FSDP or DeepSpeed was asked for.
    """

    def __init__(
        self,
        model: TorchvisionForImageClassification | None = None,
        args: ThawTrainingArguments | None = None,
        train_dataset: Dataset | ImageDataset | ImageIterable | None = None,
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
        check_data(args, train_dataset)
        check_averaged_stages(args, stream=train_dataset is not None and length_of(train_dataset) is None)
        if train_dataset is not None and length_of(train_dataset) is None:
            # Trainer asks for it where there is no length.
            args.max_steps = sum(stage.steps or 0 for stage in StagePlan.from_dict(cast(Any, args.plan)).stages)
        if model is not None:
            complete_arguments(args, model)
        own_metrics = kwargs.setdefault("compute_metrics", classification_compute_metrics)
        kwargs.setdefault("data_collator", collate)
        with warnings.catch_warnings():
            # The training loss here smooths labels itself.
            warnings.filterwarnings("ignore", "Label smoothing is not compatible with multi-label")
            super().__init__(
                model=model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                **kwargs,
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise PlanError(
                "the launcher asks for FSDP or DeepSpeed, but stages change what is trainable, which neither allows in "
                "one run; choose multi-GPU (DDP) in `accelerate config`, or start with torchrun"
            )
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started > 1 and self.args.world_size == 1:
            raise PlanError(
                f"{started} processes were started, but each would train for itself, since there is no GPU for them; "
                "pass ThawTrainingArguments(use_cpu=True) to train together on CPUs"
            )
        processes.leave_at_exit()
        # `model_init` makes its model only here.
        complete_arguments(args, self.model)
        if self.model.config.several_labels and own_metrics is classification_compute_metrics:
            self.compute_metrics = multilabel.compute_metrics
            if args.asked_metric == "auto":
                args.metric_for_best_model = multilabel.DEFAULT_METRIC
        self._check_gate()
        self._given_data = self.train_dataset
        self.train_dataset = self._train_data = self._as_view(self._given_data, train=True)
        for index, stage in enumerate(self.plan.stages):
            stage_view(self._train_data, index, stage, self.args)
        self._settle_balance()
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self._as_view(data, train=False) for name, data in self.eval_dataset.items()}
        else:
            self.eval_dataset = self._as_view(self.eval_dataset, train=False)
        seen = self._validation_view()
        check_test_time_augmentation(self.args.tta, self._train_data if seen is None else seen)

    def _check_gate(self) -> None:
        if self.args.gate != "significant":
            return
        metric = self._metric_key()
        parts = metric.split("_")
        if not any(supports_test("_".join(parts[start:])) for start in range(1, len(parts))):
            raise PlanError(
                f"gate is 'significant', but there is no paired test for the metric {metric!r}; write gate='best', or "
                "metric_for_best_model='accuracy', 'macro_f1', 'balanced_accuracy' or 'loss'"
            )

    def _as_view(self, dataset: Any, *, train: bool) -> Any:
        return as_view(dataset, self.model, self.processing_class, self.args, train=train)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        return super().evaluate(self._as_view(eval_dataset, train=False), *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return super().predict(self._as_view(test_dataset, train=False), *args, **kwargs)

    def hyperparameter_search(  # type: ignore[override]  # the rest is passed on
        self, hp_space: Callable[[Any], dict[str, Any]] | None = None, **kwargs: Any
    ) -> Any:
        """Searches as `Trainer` does; what is compared is the model that each run ends with.

        Args:
            hp_space: Takes a trial and returns values of arguments, such as `learning_rate` (the head's, with which
                all rates that the plan leaves open move). None tries the rate, weight decay and label smoothing.
            **kwargs: What `Trainer.hyperparameter_search` takes.

        Raises:
            PlanError: the space has a key that is no argument, or that has no effect with a plan.
        """
        if hp_space is None and kwargs.get("backend", "optuna") == "optuna":
            hp_space = _default_space
        space = hp_space if hp_space is None else lambda trial: self._checked_values(hp_space(trial))
        return super().hyperparameter_search(space, **kwargs)

    def find_lr(
        self,
        stage: str | int | None = None,
        *,
        steps: int = 100,
        lowest: float = 1e-6,
        highest: float = 10.0,
        lead_steps: int = 0,
        plot: str | Path | None = None,
    ) -> RangeTest:
        """Tests with which learning rate a stage learns fastest: a range test (Smith, WACV 2017) on a copy.

        The rates of the stage's layer groups rise together, in their ratios, from step to step, until the loss
        diverges; what is suggested is the highest of them, usually the head's. Everything else is as in training:
        what is frozen, BatchNorm, augmentation, batch size, loss, clipping. The trainer, its model and the state of all
        random generators stay bit for bit what they are, and callbacks are told nothing. See
        `torchthaw.training.range_test` for how the suggestion is read off the curve.

        Args:
            stage: Name or number (from 0 on) of a stage of the plan; None for the first.
            steps: Optimizer steps, from 20 on; small data is gone through several times.
            lowest: Rate of the first step.
            highest: Rate of the last step, unless the loss diverges before.
            lead_steps: The test starts from the weights that the model has now; with more than 0, the stages before
                it are trained on the copy first, by the plan, each for at most so many steps.
            plot: Where to draw the curve, a PNG.

        Returns:
            The curve with the suggestion, or with what it shows instead.

        Raises:
            PlanError: there is no such stage, a value is out of range, or the trainer is training.
        """
        settings = RangeTestSettings(steps=steps, lowest=lowest, highest=highest, lead_steps=lead_steps)
        found = next(iter(range_tests(self, [0 if stage is None else stage], settings)))
        if plot is not None and processes.is_main():
            plot_range_test(found.to_dict(), plot)
        return found

    def _checked_values(self, values: dict[str, Any]) -> dict[str, Any]:
        for key in values:
            if key in ("num_train_epochs", "max_steps"):
                raise PlanError(f"the search space has {key}, but the plan gives the length; let it choose the plan")
            if not hasattr(self.args, key):
                known = [field.name for field in dataclasses.fields(self.args)]
                raise PlanError(
                    f"the search space has {key!r}, which is no argument of training.{did_you_mean(key, known)}"
                )
        return values if "plan" not in values else {**values, "plan": make_plan(values["plan"]).to_dict()}

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        if trial is None:
            return
        # Made in the beginning, before the search has set what they depend on.
        self.train_dataset = self._train_data = self._as_view(self._given_data, train=True)
        self._settle_balance()


def _default_space(trial: Any) -> dict[str, Any]:
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-4, 0.1, log=True),
        "label_smoothing_factor": trial.suggest_float("label_smoothing_factor", 0.0, 0.2),
    }
