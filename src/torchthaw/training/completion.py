"""Arguments made complete and checked once the model and the data are known."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.training_args import OptimizerNames

from torchthaw.backbones.anatomy import check_image_size, family_of, uses_transformer_recipe
from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.data.augmentation import make_augmentation
from torchthaw.errors import PlanError, did_you_mean
from torchthaw.stages.adapters import check_peft, weights_to_adapt
from torchthaw.stages.plan import Stage, StagePlan
from torchthaw.stages.presets import family_defaults, fill_defaults
from torchthaw.stages.rates import HEAD
from torchthaw.training.arguments import ThawTrainingArguments
from torchthaw.training.datasets import length_of

SGD_MOMENTUM = 0.9
# Schedules that lower the rates when the validation metric stalls.
METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
# Optimizers that step within the backward pass, or hold the weights elsewhere between steps.
_WITHOUT_PULL = ("lomo", "layerwise", "schedule_free")


def check_data(args: ThawTrainingArguments, dataset: Any) -> None:
    """Refuses batches larger than the data, and a plan in epochs for a stream, which has no length.

    Raises:
        PlanError: there are fewer training images than one batch takes, or a stage of a stream is counted in epochs.
    """
    length = length_of(dataset)
    stages = StagePlan.from_dict(args.plan).stages  # type: ignore[arg-type]
    if length is None:
        in_epochs = [stage.name for stage in stages if stage.steps is None]
        if dataset is not None and in_epochs:
            raise PlanError(
                f"the training data is a stream of unknown length, but the stages {', '.join(map(repr, in_epochs))} "
                "are counted in epochs; give every stage its length in steps, such as Stage('head', 'head', steps=200)"
            )
        return
    for batch_size in (args.train_batch_size, *(stage.batch_size for stage in stages)):
        if batch_size is not None and batch_size > length:
            raise PlanError(
                f"the batch size is {batch_size}, but there are {length} training images, so that an epoch would be a "
                f"single incomplete step; write a batch size of at most {max(1, length // 4)}"
            )


def complete_arguments(args: ThawTrainingArguments, model: TorchvisionForImageClassification) -> None:
    """Fills what depends on the backbone into arguments that were left open, and checks the plan against it.

    Raises:
        PlanError: a stage does not fit the backbone, or names an optimizer or augmentation that does not exist; or a
            temperature is asked for where images have several labels.
    """
    if args.calibrate == "temperature" and model.config.problem_type == "multi_label_classification":
        raise PlanError(
            "calibrate is 'temperature', which is for scores of which one class takes what the others leave; the model "
            "gives several labels an image. Write calibrate='none'"
        )
    defaults = family_defaults(transformer=uses_transformer_recipe(model.config.architecture))
    if args.learning_rate is None:
        args.learning_rate = defaults.head_rate
    if args.weight_decay is None:
        args.weight_decay = defaults.weight_decay
    if args.augmentation is None:
        args.augmentation = defaults.augmentation
    plan = full_plan(args, model)
    plan.check_groups(list(model.layer_groups()))
    for stage in plan.stages:
        _check_stage(stage, model)
        _check_pull(stage, args, list(model.layer_groups()))
        if stage.schedule in METRIC_SCHEDULES and args.eval_strategy == "no":
            raise PlanError(
                f"stage {stage.name!r} has the schedule {stage.schedule}, which follows the validation metric, but "
                "eval_strategy is 'no'; write eval_strategy='epoch', or another schedule such as cosine"
            )


def full_plan(args: ThawTrainingArguments, model: TorchvisionForImageClassification) -> StagePlan:
    """Returns the plan with all rates and decays filled in for the model's family."""
    assert isinstance(args.plan, dict)
    return fill_defaults(
        StagePlan.from_dict(args.plan),
        transformer=uses_transformer_recipe(model.config.architecture),
        head_rate=args.learning_rate,
        weight_decay=args.weight_decay,
    )


def optimizer_arguments(args: ThawTrainingArguments, stage: Stage) -> ThawTrainingArguments:
    """Returns a copy of the arguments with the stage's kind of optimizer, for `Trainer` to look it up."""
    args = copy.copy(args)
    if stage.optimizer is not None:
        args.optim = OptimizerNames(stage.optimizer)
        args.optim_args = None
    return args


def optimizer_options(stage: Stage) -> dict[str, Any]:
    """Returns what the stage asks of its optimizer; SGD comes with momentum."""
    momentum = {"momentum": SGD_MOMENTUM} if stage.optimizer == OptimizerNames.SGD else {}
    return {**momentum, **(stage.optimizer_args or {})}


def schedule_options(args: ThawTrainingArguments, stage: Stage) -> dict[str, Any]:
    """Returns what the stage's schedule is made with; those that follow a metric get its direction."""
    options: dict[str, Any] = dict(stage.schedule_args or {})
    if stage.schedule in METRIC_SCHEDULES:
        options.setdefault("mode", "max" if args.greater_is_better else "min")
    if stage.schedule == "greedy":
        # Its own floor of 1e-3 is above most rates of fine-tuning.
        options.setdefault("min_lr", 0.0)
    return options


@contextmanager
def stage_arguments(args: ThawTrainingArguments, stage: Stage) -> Iterator[None]:
    """Lets the stage's own batch size and clipping stand in the arguments while it runs."""
    own = {"per_device_train_batch_size": stage.batch_size, "max_grad_norm": stage.max_grad_norm}
    before = {key: getattr(args, key) for key in own}
    try:
        for key, value in own.items():
            if value is not None:
                setattr(args, key, value)
        yield
    finally:
        for key, value in before.items():
            setattr(args, key, value)


def _check_lora(stage: Stage, model: TorchvisionForImageClassification) -> None:
    architecture = model.config.architecture
    if not uses_transformer_recipe(architecture):
        raise PlanError(
            f"stage {stage.name!r} has lora, which adapts the linear layers of transformers (ViT, Swin, MaxViT, "
            f"ConvNeXt), but {architecture} is made of convolutions; leave lora out: few weights train with "
            "unfreeze: 1 (the last block and the head) or unfreeze: head"
        )
    check_peft(stage.name)
    weights_to_adapt(model.layer_groups(), stage)


def _check_pull(stage: Stage, args: ThawTrainingArguments, groups: list[str]) -> None:
    rates = [rate for name, rate in stage.learning_rates(groups).items() if name != HEAD]
    if args.l2_sp is None or not rates or stage.adapters is not None:
        return
    if max(rates) * args.l2_sp > 1:
        raise PlanError(
            f"l2_sp is {args.l2_sp:g} and stage {stage.name!r} has a learning rate of {max(rates):g}: each step goes "
            "their product of the way back to the weights that training began with, which must not be above 1; write "
            f"l2_sp={0.1 / max(rates):.1g} or less"
        )
    optimizer = str(stage.optimizer or getattr(args.optim, "value", args.optim))
    if any(kind in optimizer for kind in _WITHOUT_PULL):
        raise PlanError(
            f"stage {stage.name!r}: l2_sp acts on weights before each step of the optimizer, which {optimizer} does "
            "not let it do; write another optimizer, such as adamw_torch, or leave l2_sp out"
        )


def _check_stage(stage: Stage, model: TorchvisionForImageClassification) -> None:
    if stage.adapters is not None:
        _check_lora(stage, model)
    if stage.augmentation is not None:
        make_augmentation(stage.augmentation)
    names = [member.value for member in OptimizerNames]
    if stage.optimizer is not None and stage.optimizer not in names:
        raise PlanError(
            f"stage {stage.name!r}: unknown optimizer {stage.optimizer!r}.{did_you_mean(stage.optimizer, names)} "
            "Write any optim of transformers, such as adamw_torch or sgd."
        )
    if stage.image_size is None:
        return
    architecture = model.config.architecture
    if family_of(architecture).fixed_size:
        raise PlanError(
            f"stage {stage.name!r} has image_size {stage.image_size}, but {architecture} takes images of one size "
            "only; leave it out, or take a backbone that accepts any size, such as resnet50 or convnext_tiny"
        )
    try:
        check_image_size(architecture, stage.image_size)
    except ValueError as error:
        raise PlanError(f"stage {stage.name!r}: {error}") from error
