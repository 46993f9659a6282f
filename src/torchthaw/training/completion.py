"""Arguments made complete once the model and the data are known."""

from collections.abc import Sized
from typing import Any

from torchthaw.backbones.anatomy import uses_transformer_recipe
from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.errors import PlanError
from torchthaw.stages.plan import StagePlan
from torchthaw.stages.presets import family_defaults, fill_defaults
from torchthaw.training.arguments import ThawTrainingArguments


def check_batch_size(batch_size: int, dataset: Any) -> None:
    """Refuses batches larger than the data.

    Raises:
        PlanError: there are fewer training images than one batch takes.
    """
    if isinstance(dataset, Sized) and batch_size > len(dataset):
        raise PlanError(
            f"the batch size is {batch_size}, but there are {len(dataset)} training images, so that an epoch would be "
            f"a single incomplete step; write a batch size of at most {max(1, len(dataset) // 4)}"
        )


def complete_arguments(args: ThawTrainingArguments, model: TorchvisionForImageClassification) -> None:
    """Fills what depends on the backbone into arguments that were left open, and checks the plan against it.

    Raises:
        PlanError: a stage does not fit the backbone.
    """
    defaults = family_defaults(transformer=uses_transformer_recipe(model.config.architecture))
    if args.learning_rate is None:
        args.learning_rate = defaults.head_rate
    if args.weight_decay is None:
        args.weight_decay = defaults.weight_decay
    if args.augmentation is None:
        args.augmentation = defaults.augmentation
    full_plan(args, model).check_groups(list(model.layer_groups()))


def full_plan(args: ThawTrainingArguments, model: TorchvisionForImageClassification) -> StagePlan:
    """Returns the plan with all rates and decays filled in for the model's family."""
    assert isinstance(args.plan, dict)
    return fill_defaults(
        StagePlan.from_dict(args.plan),
        transformer=uses_transformer_recipe(model.config.architecture),
        head_rate=args.learning_rate,
        weight_decay=args.weight_decay,
    )
