"""Arguments of `ThawTrainer`: those of `Trainer`, with the defaults of fine-tuning and a stage plan."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from torchthaw.data.augmentation import Augmentation, make_augmentation
from torchthaw.errors import PlanError
from torchthaw.stages.presets import PlanLike, make_plan

if TYPE_CHECKING:
    PlanArgument = PlanLike
    AugmentationArgument = Augmentation | Mapping[str, Any] | str | None
else:
    # HfArgumentParser makes command line options from these: there a preset's name is what can be written.
    PlanArgument = str
    AugmentationArgument = str | None


@dataclass
class ThawTrainingArguments(TrainingArguments):
    """`TrainingArguments` of a staged run.

    Defaults that differ from `TrainingArguments`: the plan gives the number of epochs and the learning rates
    (`num_train_epochs` stretches a preset, `learning_rate` is the rate of a new head and moves all rates that the plan
    leaves open in proportion); `weight_decay` is that of the backbone's family; batches have 32 images; loss is logged
    every epoch; validation and checkpoints come every epoch, and the weights with the best validation accuracy are
    loaded at the end; a loss that is not finite ends the run; columns are kept (`remove_unused_columns=False`), because
    images are decoded on the fly; memory is pinned only where there is CUDA.

    Args:
        output_dir: Folder of checkpoints.
        plan: Name of a preset (`head`, `partial`, `two_phase`, `staged`, `full`), a `StagePlan`, a list of `Stage`, or
            `StagePlan.to_dict()`.
        augmentation: Training augmentation: a preset's name (`none`, `light`, `medium`, `strong`), an `Augmentation`,
            or its fields. None takes the default of the backbone's family.

    Raises:
        PlanError: the plan is unknown or contradicts `num_train_epochs` or `max_steps`.
    """

    plan: PlanArgument = "staged"
    augmentation: AugmentationArgument = None
    num_train_epochs: float | None = None  # type: ignore[assignment]
    learning_rate: float | None = None  # type: ignore[assignment]
    weight_decay: float | None = None  # type: ignore[assignment]
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 32
    logging_strategy: str = "epoch"
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int | None = 1
    load_best_model_at_end: bool = True
    metric_for_best_model: str | None = "accuracy"
    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)
    label_names: list[str] | None = field(default_factory=lambda: ["labels"])

    def __post_init__(self) -> None:
        if self.max_steps > 0:
            raise PlanError(f"max_steps is {self.max_steps}, but the plan's stages give the length; write their epochs")
        epochs = self.num_train_epochs
        if epochs is not None and epochs != int(epochs):
            raise PlanError(f"num_train_epochs is {epochs}; a plan is made of whole epochs")
        plan = make_plan(self.plan, epochs=None if epochs is None else int(epochs))
        self.plan = plan.to_dict()
        self.num_train_epochs = float(plan.epochs)
        if isinstance(self.augmentation, Augmentation):
            self.augmentation = self.augmentation.to_dict()
        make_augmentation(self.augmentation or "none")
        super().__post_init__()
