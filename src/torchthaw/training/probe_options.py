"""Which stages of a plan are linear probes."""

import dataclasses
from typing import Any

from datasets import Dataset as ImageDataset
from torch import nn

from torchthaw.backbones.anatomy import family_of
from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.data.augmentation import make_augmentation
from torchthaw.data.views import ImageView
from torchthaw.errors import PlanError
from torchthaw.stages.plan import Stage, StagePlan
from torchthaw.training.arguments import ThawTrainingArguments

# Images x features x classes: some hundred times as many multiplications take minutes on a few cores.
MOST_WORK = 2e10


def final_layer(model: TorchvisionForImageClassification) -> nn.Module:
    """Returns the layer that gives the logits."""
    return model.backbone.get_submodule(family_of(model.config.architecture).final_layer)


def probe_obstacle(
    stage: Stage, model: TorchvisionForImageClassification, args: ThawTrainingArguments, data: Any
) -> str | None:
    """Returns why the head cannot be fitted by logistic regression, as a part of a sentence; None if it can.

    Args:
        stage: The stage that would do it.
        model: The model, on any device, `meta` included.
        args: The run's arguments.
        data: Its training images; None where they are not known.
    """
    head = final_layer(model)
    if not isinstance(head, nn.Linear):
        return f"the head of {model.config.architecture} is no linear layer on features"
    if model.config.aux_logits:
        return "the auxiliary heads would stay as they were drawn; write aux_logits: false for the model"
    if model.config.several_labels:
        return "an image may have several labels"
    if args.loss == "focal":
        return "the focal loss is not that of logistic regression"
    if not isinstance(data, ImageView | ImageDataset | None):
        return "the training data is a stream, or gives tensors, which may differ from epoch to epoch"
    if data is not None and len(data) * head.weight.numel() > MOST_WORK:
        return f"for {len(data)} images and {head.out_features} classes it would take longer than epochs of steps"
    if stage.augmentation is not None and make_augmentation(stage.augmentation) is not None:
        return "it has an augmentation of its own; write augmentation: none"
    return None


def settle_solvers(
    plan: StagePlan,
    model: TorchvisionForImageClassification,
    args: ThawTrainingArguments,
    data: Any,
    *,
    obstacle: str | None = None,
) -> StagePlan:
    """Returns the plan with each `solver` settled: `gradient`, or `probe`, which takes one step.

    Args:
        plan: The plan.
        model: See `probe_obstacle`.
        args: Likewise.
        data: Likewise.
        obstacle: What speaks against every probe of the run.

    Raises:
        PlanError: a stage asks for a probe, and there can be none.
    """
    return StagePlan(tuple(_settled(stage, model, args, data, obstacle) for stage in plan.stages), plan.name)


def _settled(
    stage: Stage,
    model: TorchvisionForImageClassification,
    args: ThawTrainingArguments,
    data: Any,
    obstacle: str | None,
) -> Stage:
    if stage.solver == "gradient":
        return stage
    found = obstacle or probe_obstacle(stage, model, args, data)
    if found is None:
        return dataclasses.replace(stage, solver="probe", epochs=None, steps=1)
    if stage.solver == "probe":
        raise PlanError(
            f"stage {stage.name!r} has solver: probe, but {found}. Or write solver: auto, which then takes gradient "
            "steps."
        )
    return dataclasses.replace(stage, solver="gradient")
