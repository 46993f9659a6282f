"""The keys of a recipe, their types and defaults."""

import dataclasses
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from torchthaw.sharing.card_options import CardOptions
from torchthaw.stages.plan import StagePlan
from torchthaw.stages.presets import make_plan
from torchthaw.training.forgetting_settings import ForgettingRecipe, written_out

# The default of `load_image_dataset`, whose import takes long.
_SEPARATOR = "|"
# Of `batch_size: auto`.
_BATCH, _SMALLER_BATCH = 32, 16
_FEW_IMAGES = 512


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataRecipe(_Section):
    """Where the images come from and how they are split.

    Attributes:
        path: A folder of images, a parquet file or folder, or `builtin:digits` (scikit-learn's handwritten digits).
        name: A data set on the Hub, `user/name`, instead of `path`.
        config: The Hub data set's configuration.
        revision: The Hub data set's revision: a commit, branch or tag.
        image_column: Column of images; None finds it.
        label_column: Column of labels; None finds it.
        labels: Columns that hold 0 or 1, one for each class, where images may have several labels; together with
            `label_column`, names of the classes where it holds lists of 0 and 1.
        label_separator: What stands between the labels of an image where the label column is text; None is `|`.
        validation: Share (below 1) or number of training images to cut off for validation where the data has none.
        test: Likewise for a test split; 0 makes none.
        group: What tells images apart that are not independent of each other (patient, product, scene): a column, a
            CSV with the columns `path` and `group`, or a regular expression with one capture group over the paths.
            None takes the file `groups.csv` of the data's folder, where there is one; `none` leaves it aside.
        time: When an image was taken: a column, or `exif`.
        split_by: What splits and folds keep apart: `image`, `group`, `time` (the latest for testing), or `auto`, by
            group where groups are known, else by time where `time` is given, else by image.
        splits: A CSV with the columns `path` and `split` (`train`, `validation`, `test` or `drop`), such as
            `torchthaw audit DATA --fix FILE` writes; None takes the splits that the data has.
        on_bad_image: `fail` lists unreadable images and stops; `drop` lists them and goes on without.
    """

    path: str | None = None
    name: str | None = None
    config: str | None = None
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    labels: tuple[str, ...] | None = None
    label_separator: str | None = None
    validation: float | int = 0.15
    test: float | int = 0.0
    group: str | None = None
    time: str | None = None
    split_by: Literal["auto", "image", "group", "time"] = "auto"
    splits: str | None = None
    on_bad_image: Literal["fail", "drop"] = "fail"


class PushRecipe(_Section):
    """Where a finished run goes on the Hub.

    Attributes:
        repo: The repository, `user/name`; it is made if it does not exist. None pushes nothing.
        private: Whether a repository that is made is private; None takes the account's default.
        revision: Branch; None is `main`.
    """

    repo: str | None = None
    private: bool | None = None
    revision: str | None = None


class Recipe(_Section):
    """A run of `torchthaw train`.

    Attributes:
        backbone: Name of a torchvision classifier.
        weights: `DEFAULT` or another name of torchvision's weights, a file, a saved folder or Hub repository,
            `builtin`, or null for random weights.
        data: The images.
        problem_type: `single_label` if each image is of one class, `multi_label` if it may be of any number of them;
            `auto` takes the latter where the label column holds lists, or `data` has `labels` or `label_separator`.
        audit: What is done with the audit of the data, which comes first: `warn` tells what it found and goes on,
            `strict` stops where a finding fails, `off` only checks that all images can be decoded.
        cv: Number of folds of a cross-validation: every training image is validated once, by a model that was trained
            on the other folds (by time: on what came before), and `data.validation` has no effect; null trains one
            model.
        cv_final: Whether a cross-validation ends with a model that is trained on the images of all folds; it alone
            reads the test images.
        plan: `auto` (the default; with random weights `full`), `head`, `partial`, `two_phase`, `staged` or `full`; not
            together with `stages`.
        epochs: Length of the plan, shared out over its stages; None takes 7.
        stages: Explicit stages instead of `plan`, with the keys of `Stage`.
        learning_rate: Rate of a new head; rates that the plan leaves open move in proportion. None takes the default
            of the backbone's family, as do the next two.
        weight_decay: Decoupled weight decay of weights.
        l2_sp: Strength of the pull of the backbone's weights towards those that training began with, in place of their
            weight decay (L2-SP); null for none.
        augmentation: `none`, `light`, `medium`, `strong`, or its fields.
        image_size: Side of the square input, in pixels; None takes that of the weights.
        batch_size: Images per step and device; `auto` takes 32; of fewer than 512 training images 16, and at most a
            quarter of them, since epochs of a few steps teach little.
        metric: What chooses the best weights: `accuracy`, `macro_f1`, or `auto`, which takes macro F1 when the largest
            class has at least twice the images of the smallest. Where images may have several labels also `map` (mean
            average precision, which `auto` takes) and `micro_f1`; `accuracy` then counts images all of whose labels are
            right.
        thresholds: Where images may have several labels: the probability from which on an image is given one; or
            `per_class`, which chooses those with the best F1 on the validation images in the end.
        gate: What decides after each stage, on the validation images, whether it is kept: `best` if the metric is
            better than before it, `significant` if it also gains beyond noise, `off` keeps every stage. The first one
            that trains a new head always is, since there is nothing worth going back to.
        min_gain: Least gain in the metric for which `best` and `significant` keep a stage.
        on_reject: What follows when a stage is not kept: it is rolled back, and the run goes on with the next stage
            from the best weights so far (`continue`), or ends (`stop`).
        average: Which average of each stage's weights is validated and kept: `none`; `ema`, the exponential moving
            average over its steps; or `swa`, the equal mean at the ends of its last epochs. Stages may have their own.
        ema_decay: Highest decay of `ema` per step; a stage's first steps have a lower one.
        swa_epochs: How many of a stage's last epochs `swa` averages; null takes half of them, at least two.
        wise_ft: Whether the best weights of a stage that trains more than the head are mixed with those before it, by
            the share that validates best (WiSE-FT), before the gate decides.
        optimizer: Any `optim` of transformers; `sgd` comes with momentum 0.9. Stages may have their own, as well as
            their own `max_grad_norm`, `batch_size`, `image_size` and `augmentation`.
        max_grad_norm: Gradients are clipped to this norm; 0 turns clipping off.
        label_smoothing: Share of each label spread over all classes.
        imbalance: `auto` sets the next three by the numbers of training images of the classes; null does nothing, and
            says what could be done where they are uneven; `off` does not say it.
        class_weights: Weights of classes in the training loss: `balanced`, `sqrt`, or a weight for each class name, 1
            for those that are left out.
        sampling: Draws training images by class: `balanced` or `sqrt`; null takes each image once an epoch.
        loss: What training minimises: `cross_entropy`, `focal` or `logit_adjusted`; validation always measures plain
            cross entropy.
        focal_gamma: Focusing of the focal loss.
        logit_adjustment: tau of the logit adjusted loss.
        dropout: Dropout before the head, where the architecture has it; None keeps torchvision's.
        stochastic_depth: Likewise.
        report_to: Reporters of transformers, such as `tensorboard`, or `codecarbon`, of which the card states the CO2.
        num_workers: Processes that decode images besides the main one; `auto` takes as many as pay.
        cache_gb: Most that cached images and features may take on the disk, in GB; 0 caches nothing.
        frozen_precision: What frozen layers are computed in: `float32`, `bfloat16`, or `auto`, which takes bfloat16
            where it is faster on this machine and gives the same features.
        live_precision: What the part of the network that trains is computed in, likewise, where gradients are the
            same up to rounding. Weights stay in float32.
        calibrate: What is done to the scores of the finished model: `none`, or `temperature`, which divides its logits
            in eval mode by what fits the validation images best (Guo et al., 2017); predictions stay as they are.
        forgetting: Images of the task that the weights were pretrained for, by which is measured after training what
            the backbone still knows of it: a folder or data set on the Hub, or the keys of `ForgettingRecipe`.
        tta: Test-time augmentation that is measured beside the plain scores: the mean prediction over an image and its
            mirror image (`flip`), over its centre and four corners (`five_crop`), over these and their mirror images
            (`ten_crop`), or `none`. It is no part of the saved model: `predict` and `evaluate` have `--tta`.
        seed: Seed of everything random.
        output: Folder of the results.
        card: What the model card says that no run can know: license, intended use ...; see `CardOptions`.
        push: Where the finished run goes on the Hub.
    """

    backbone: str
    weights: str | None = "DEFAULT"
    data: DataRecipe = DataRecipe()
    problem_type: Literal["auto", "single_label", "multi_label"] = "auto"
    audit: Literal["strict", "warn", "off"] = "warn"
    cv: int | None = Field(default=None, ge=2)
    cv_final: bool = False
    plan: str | None = None
    epochs: int | None = Field(default=None, ge=1)
    stages: tuple[dict[str, Any], ...] | None = None
    learning_rate: float | None = Field(default=None, gt=0)
    weight_decay: float | None = Field(default=None, ge=0)
    l2_sp: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    augmentation: str | dict[str, Any] | None = None
    image_size: int | None = Field(default=None, ge=16)
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    metric: Literal["auto", "accuracy", "macro_f1", "map", "micro_f1"] = "auto"
    thresholds: Annotated[float, Field(gt=0, lt=1)] | Literal["per_class"] = 0.5
    gate: Literal["best", "significant", "off"] = "best"
    min_gain: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    on_reject: Literal["continue", "stop"] = "continue"
    average: Literal["none", "ema", "swa"] = "none"
    ema_decay: float = Field(default=0.999, gt=0, lt=1)
    swa_epochs: int | None = Field(default=None, ge=1)
    wise_ft: bool = False
    optimizer: str = "adamw_torch_fused"
    max_grad_norm: float = Field(default=1.0, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    imbalance: str | None = None
    class_weights: str | dict[str | int | float | bool, float] | None = None
    sampling: str | None = None
    loss: str = "cross_entropy"
    focal_gamma: float = 2.0
    logit_adjustment: float = 1.0
    dropout: float | None = Field(default=None, ge=0, lt=1)
    stochastic_depth: float | None = Field(default=None, ge=0, lt=1)
    report_to: tuple[str, ...] = ()
    num_workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    cache_gb: float = Field(default=10.0, ge=0, allow_inf_nan=False)
    frozen_precision: Literal["auto", "float32", "bfloat16"] = "auto"
    live_precision: Literal["auto", "float32", "bfloat16"] = "auto"
    calibrate: Literal["none", "temperature"] = "none"
    forgetting: Annotated[ForgettingRecipe | None, BeforeValidator(written_out)] = None
    tta: Literal["none", "flip", "five_crop", "ten_crop"] = "none"
    seed: int = Field(default=0, ge=0)
    output: str | None = None
    card: CardOptions = CardOptions()
    push: PushRecipe = PushRecipe()

    def image_source(self) -> DataRecipe:
        """Returns the data section, which alone says how text is taken apart where images may have several labels."""
        if self.problem_type != "multi_label" or self.data.label_separator is not None or self.data.labels is not None:
            return self.data
        return self.data.model_copy(update={"label_separator": _SEPARATOR})

    def stage_plan(self) -> StagePlan:
        """Returns the plan, with the rates that the backbone's family gives still open.

        With random weights, BatchNorm `auto` becomes `train`: random statistics must not be kept.
        """
        default = "full" if self.weights is None else "auto"
        plan = make_plan(self.plan or default if self.stages is None else {"stages": self.stages}, epochs=self.epochs)
        if self.weights is not None:
            return plan
        stages = [
            dataclasses.replace(stage, batch_norm="train") if stage.batch_norm == "auto" else stage
            for stage in plan.stages
        ]
        return StagePlan(tuple(stages), plan.name)

    def images_per_step(self, num_images: int | None = None) -> int:
        """Returns the batch size, per device.

        Args:
            num_images: Number of training images, which `auto` goes by; None where it is unknown, or does not matter.
        """
        if self.batch_size != "auto":
            return self.batch_size
        if num_images is None or num_images >= _FEW_IMAGES:
            return _BATCH
        return max(1, min(_SMALLER_BATCH, num_images // 4))

    def to_yaml(self) -> str:
        """Returns the complete recipe, from which the run can be repeated."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
