"""From a recipe to what training takes: a model with a new head, its image processor, and arguments."""

from pathlib import Path

import torch

from torchthaw.backbones.anatomy import uses_transformer_recipe
from torchthaw.backbones.configuration import TorchvisionConfig
from torchthaw.backbones.image_processing import TorchvisionImageProcessor
from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.backbones.weights import locate
from torchthaw.evaluation.inference import best_device
from torchthaw.recipe import Recipe
from torchthaw.stages.presets import fill_defaults
from torchthaw.training.arguments import ThawTrainingArguments
from torchthaw.training.completion import SGD_MOMENTUM
from torchthaw.user_errors import as_user_error


def check_model(recipe: Recipe) -> None:
    """Checks backbone, weights' name and stages against each other, before anything slow is done.

    Raises:
        ThawError: the backbone or its weights are unknown, an option does not fit, or a stage names no layer group.
    """
    with as_user_error(), torch.device("meta"):
        model = TorchvisionForImageClassification(
            TorchvisionConfig(
                architecture=recipe.backbone,
                image_size=recipe.image_size,
                dropout=recipe.dropout,
                stochastic_depth=recipe.stochastic_depth,
            )
        )
        if recipe.weights is not None:
            locate(recipe.backbone, recipe.weights)
    plan = fill_defaults(recipe.stage_plan(), transformer=uses_transformer_recipe(recipe.backbone))
    plan.check_groups(list(model.layer_groups()))


def build_model(
    recipe: Recipe, class_names: list[str], *, several_labels: bool = False
) -> tuple[TorchvisionForImageClassification, TorchvisionImageProcessor]:
    """Makes the model with a new head for the classes, and its image processor.

    Raises:
        ThawError: the backbone is unknown, an option does not fit it, or its weights cannot be had.
    """
    with as_user_error():
        model = TorchvisionForImageClassification.from_torchvision(
            recipe.backbone,
            weights=recipe.weights,
            id2label=class_names,
            image_size=recipe.image_size,
            dropout=recipe.dropout,
            stochastic_depth=recipe.stochastic_depth,
            problem_type="multi_label_classification" if several_labels else None,
        )
        processor = TorchvisionImageProcessor.from_torchvision(
            recipe.backbone, weights=recipe.weights, image_size=recipe.image_size
        )
    return model, processor


def training_arguments(
    recipe: Recipe, *, num_images: int, metric: str, folder: Path, validates: bool = True
) -> ThawTrainingArguments:
    """Returns the trainer's arguments for a recipe.

    Args:
        recipe: The recipe.
        num_images: Number of training images.
        metric: What chooses the best weights.
        folder: Where checkpoints and journal go.
        validates: Whether there are validation images; without them, every stage keeps its last weights.

    Raises:
        ThawError: values do not fit together.
    """
    with as_user_error():
        return ThawTrainingArguments(
            output_dir=str(folder),
            plan=recipe.stage_plan(),
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            l2_sp=recipe.l2_sp,
            augmentation=recipe.augmentation,
            per_device_train_batch_size=recipe.images_per_step(num_images),
            per_device_eval_batch_size=recipe.images_per_step(),
            metric_for_best_model=metric,
            eval_strategy="epoch" if validates else "no",
            load_best_model_at_end=validates,
            gate=recipe.gate,
            min_gain=recipe.min_gain,
            on_reject=recipe.on_reject,
            average=recipe.average,
            ema_decay=recipe.ema_decay,
            swa_epochs=recipe.swa_epochs,
            wise_ft=recipe.wise_ft,
            optim=recipe.optimizer,
            optim_args=f"momentum={SGD_MOMENTUM}" if recipe.optimizer == "sgd" else None,
            max_grad_norm=recipe.max_grad_norm,
            label_smoothing_factor=recipe.label_smoothing,
            imbalance=recipe.imbalance,
            class_weights=recipe.class_weights,
            sampling=recipe.sampling,
            loss=recipe.loss,
            focal_gamma=recipe.focal_gamma,
            logit_adjustment=recipe.logit_adjustment,
            report_to=list(recipe.report_to),
            dataloader_num_workers=None if recipe.num_workers == "auto" else recipe.num_workers,
            cache_gb=recipe.cache_gb,
            frozen_precision=recipe.frozen_precision,
            live_precision=recipe.live_precision,
            calibrate=recipe.calibrate,
            thresholds=recipe.thresholds,
            tta=recipe.tta,
            seed=recipe.seed,
            # Without being told, accelerate leaves several processes on CPUs to themselves.
            use_cpu=best_device().type == "cpu",
            disable_tqdm=True,
        )
