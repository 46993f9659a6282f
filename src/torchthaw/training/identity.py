"""What a run is of: all that must be the same for it to go on exactly."""

from typing import Any

from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.data.streams import ImageStream
from torchthaw.data.views import ImageView
from torchthaw.stages.plan import StagePlan
from torchthaw.training.arguments import ThawTrainingArguments
from torchthaw.training.datasets import fingerprint_of, length_of

_ARGUMENTS = (
    "seed",
    "data_seed",
    "gate",
    "min_gain",
    "on_reject",
    "average",
    "ema_decay",
    "swa_epochs",
    "wise_ft",
    "metric_for_best_model",
    "greater_is_better",
    "augmentation",
    "gradient_accumulation_steps",
    "max_grad_norm",
    "label_smoothing_factor",
    "l2_sp",
    "imbalance",
    "class_weights",
    "sampling",
    "loss",
    "focal_gamma",
    "logit_adjustment",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "fp16",
    "frozen_precision",
    "live_precision",
    "dataloader_drop_last",
    "load_best_model_at_end",
)


def identity_of(
    args: ThawTrainingArguments,
    model: TorchvisionForImageClassification,
    plan: StagePlan,
    planned_steps: list[int],
    data: dict[str, Any],
) -> dict[str, Any]:
    """Describes a run as plain data.

    Args:
        args: The run's arguments.
        model: The model.
        plan: The plan, with all defaults filled in.
        planned_steps: Optimizer steps of each stage.
        data: Data sets by split.
    """
    per_device = [stage.batch_size or args.per_device_train_batch_size for stage in plan.stages]
    return {
        "architecture": model.config.architecture,
        "classes": model.config.class_names,
        "plan": plan.to_dict(),
        "steps": planned_steps,
        "images_per_step": [size * args.world_size * args.gradient_accumulation_steps for size in per_device],
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        **{name: getattr(args, name) for name in _ARGUMENTS},
        "images": {name: _describe(dataset) for name, dataset in data.items()},
    }


def _describe(dataset: Any) -> Any:
    if isinstance(dataset, dict):
        return {name: _describe(part) for name, part in dataset.items()}
    size = dataset.processor.crop_size if isinstance(dataset, ImageView | ImageStream) else None
    return {
        "number": length_of(dataset),
        "names_and_labels": fingerprint_of(dataset),
        "image_size": None if size is None else [size["height"], size["width"]],
    }
