"""What each stage of a plan does to each layer group, as plain data."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.stages.adapters import with_adapters
from torchthaw.stages.freezing import batch_norms, freeze_for_stage, resolve_batch_norm
from torchthaw.stages.param_groups import param_groups
from torchthaw.stages.plan import BatchNormPolicy, Stage, StagePlan

FROZEN = "frozen"


@dataclass(frozen=True)
class RunSettings:
    """What stages take from the run unless they have their own.

    Attributes:
        optimizer: Any `optim` of transformers.
        batch_size: Images per device and step.
        image_size: Side of the images in pixels.
        max_grad_norm: Gradients are clipped to this norm; 0 for no clipping.
    """

    optimizer: str
    batch_size: int
    image_size: int
    max_grad_norm: float


def plan_rows(
    model: TorchvisionForImageClassification,
    plan: StagePlan,
    *,
    num_images: int,
    settings: RunSettings,
    l2_sp: float | None = None,
) -> list[dict[str, Any]]:
    """Returns what each stage does, as plain data.

    Args:
        model: The model, on any device, `meta` included; it is left frozen as for the last stage.
        plan: The plan with its defaults filled in.
        num_images: Number of training images. One process makes ceil(`num_images` / batch size) steps of an epoch.
        settings: What stages take from the run.
        l2_sp: Pull towards the weights that the run begins with, in the place of weight decay of the backbone.

    Returns:
        For each stage its `name`, `solver`, `by_probe`, length (`epochs` is a fraction where the stage is counted in
        steps), `warmup_steps`, settings, and `groups`, input to output: `parameters`, `trainable_parameters` and
        `not_decayed_parameters` (trainable ones without weight decay) as numbers of scalars; peak `learning_rate` and
        `weight_decay` (None where there is nothing to which it applies); `batch_norm`, which is "frozen" in frozen
        groups, the policy in live ones, and None without BatchNorm.

    Raises:
        PlanError: a stage does not fit the model.
    """
    rows = []
    for stage in plan.stages:
        with with_adapters(model, stage):
            rows.append(_stage_row(model, stage, num_images, settings, l2_sp))
    return rows


def _stage_row(
    model: TorchvisionForImageClassification,
    stage: Stage,
    num_images: int,
    settings: RunSettings,
    l2_sp: float | None,
) -> dict[str, Any]:
    own = {key: getattr(stage, key) for key in asdict(settings)}
    chosen = {key: run if own[key] is None else own[key] for key, run in asdict(settings).items()}
    per_epoch = math.ceil(num_images / chosen["batch_size"])
    steps = stage.steps or (stage.epochs or 0) * per_epoch
    policy = resolve_batch_norm(stage.batch_norm, num_images=num_images, batch_size=chosen["batch_size"])
    frozen = freeze_for_stage(model, stage, policy)
    return {
        "name": stage.name,
        "solver": stage.solver,
        "by_probe": stage.by_probe,
        "epochs": stage.epochs or round(steps / per_epoch, 2),
        "steps": steps,
        "warmup_steps": stage.warmup_steps(steps),
        "schedule": stage.schedule,
        **chosen,
        "augmentation": stage.augmentation,
        "views": stage.views,
        "patience": stage.patience,
        "frozen_dropout": stage.frozen_dropout,
        "parameters": frozen.parameters,
        "trainable_parameters": frozen.trainable_parameters,
        "groups": _group_rows(model, stage, policy, frozen.groups, l2_sp),
    }


def _group_rows(
    model: TorchvisionForImageClassification,
    stage: Stage,
    policy: BatchNormPolicy,
    frozen: tuple[str, ...],
    l2_sp: float | None,
) -> list[dict[str, Any]]:
    groups = model.layer_groups()
    by_steps = stage.solver != "probe"
    in_optimizer = {entry["name"]: entry for entry in param_groups(model, groups, stage, l2_sp=l2_sp)}
    rows = []
    for name, group in groups.items():
        decayed, rest = (in_optimizer.get(f"{name}/{kind}") for kind in ("decay", "no_decay"))
        trained = decayed or rest
        rows.append(
            {
                "group": name,
                "parameters": _scalars(group.parameters.values()),
                "trainable_parameters": sum(_scalars(entry["params"]) for entry in (decayed, rest) if entry),
                "not_decayed_parameters": _scalars(rest["params"]) if rest else 0,
                "learning_rate": trained["lr"] if trained and by_steps else None,
                "weight_decay": decayed["weight_decay"] if decayed and by_steps else None,
                "batch_norm": (FROZEN if name in frozen else policy) if batch_norms(group) else None,
            }
        )
    return rows


def _scalars(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)
