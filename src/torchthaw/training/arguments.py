"""Arguments of `ThawTrainer`: those of `Trainer`, with the defaults of fine-tuning and a stage plan."""

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from torchthaw.data.augmentation import Augmentation, make_augmentation
from torchthaw.errors import PlanError, did_you_mean
from torchthaw.evaluation.augmented_predictions import check_test_time_augmentation
from torchthaw.evaluation.multilabel import PER_CLASS
from torchthaw.evaluation.temperature import METHODS
from torchthaw.stages.presets import PlanLike, make_plan
from torchthaw.training.average_options import check_averages
from torchthaw.training.gate import GATES
from torchthaw.training.imbalance import ImbalanceSettings

if TYPE_CHECKING:
    PlanArgument = PlanLike
    AugmentationArgument = Augmentation | Mapping[str, Any] | str | None
    ClassWeightsArgument = Mapping[Any, float] | str | None
    ThresholdsArgument = float | str
else:
    # HfArgumentParser makes command line options from these: there a preset's name is what can be written.
    PlanArgument = str
    AugmentationArgument = str | None
    ClassWeightsArgument = str | None
    ThresholdsArgument = str

ON_REJECT = ("continue", "stop")
PRECISIONS = ("auto", "float32", "bfloat16")
LAUNCHER_SETTINGS = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")


# Without a repr of its own, which would show tokens.
@dataclass(repr=False)
class ThawTrainingArguments(TrainingArguments):
    """`TrainingArguments` of a staged run.

    Defaults that differ from `TrainingArguments`: the plan gives the number of epochs and the learning rates
    (`num_train_epochs` stretches a preset, `learning_rate` is the rate of a new head and moves all rates that the plan
    leaves open in proportion); `weight_decay` is that of the backbone's family; batches have 32 images; loss is logged
    every epoch; validation and checkpoints come every epoch, and validation before the first step too
    (`eval_on_start`), since the gate compares with it; each stage hands on the weights of its best epoch, and those
    that the gate kept are in the model at the end (`load_best_model_at_end`; without it, a stage hands on its last
    weights); a loss that is not finite ends the stage; columns are kept (`remove_unused_columns=False`), because images
    are decoded on the fly; as many workers load images as pay on this machine, which never changes what they load
    (`dataloader_num_workers=None`); memory is pinned only where there is CUDA; callbacks get their state back on resume
    (`restore_callback_states_from_checkpoint`); DDP does not look for unused parameters
    (`ddp_find_unused_parameters`), since each stage wraps the model anew.

    Args:
        output_dir: Folder of checkpoints and of the run's journal.
        plan: Name of a preset (`auto`, the default, `head`, `partial`, `two_phase`, `staged`, `full`), a `StagePlan`, a
            list of `Stage`, or `StagePlan.to_dict()`.
        augmentation: Training augmentation: a preset's name (`none`, `light`, `medium`, `strong`), an `Augmentation`,
            or its fields. None takes the default of the backbone's family, and in stages that train the head alone
            none, so that each image's features are computed once.
        gate: What decides after each stage, on the validation images, whether its weights are kept: `best` if the
            metric is better than before the stage, `significant` if it also gains beyond noise (exact McNemar test for
            accuracy, paired bootstrap for macro F1 and others, p < 0.05), `off` keeps every stage. What is not kept is
            rolled back, but not to a head that nothing has trained. None takes `best`, or `off` without validation.
        min_gain: Least gain in the metric for which `best` and `significant` keep a stage.
        on_reject: Whether the run goes on with the next stage from the weights before a stage that was not kept
            (`continue`), or ends (`stop`).
        l2_sp: Strength of the pull of the backbone's weights towards those that the run began with, which takes the
            place of their weight decay; biases, norms and tokens are left alone, and the head is decayed as ever. It is
            decoupled, as AdamW's weight decay, so that each step goes the share rate times strength of the way back;
            see `PullToStart`. None for none.
        average: Which average of each stage's weights is validated, judged by the gate and handed on: `none`; `ema`,
            the exponential moving average over its steps; or `swa`, the equal mean at the ends of its last epochs.
            Stages may have their own. See `torchthaw.stages.averages.WeightAverage`.
        ema_decay: Highest decay of `ema` per step; in a stage's first steps it is lower (see `ema_decay` there). The
            default is that of Tarvainen and Valpola (NeurIPS 2017).
        swa_epochs: How many of a stage's last epochs `swa` averages; None takes half of them, at least two.
        wise_ft: Whether the best weights of a stage that trains more than the head are mixed with those before it, by
            the share that validates best (WiSE-FT: Wortsman et al., CVPR 2022), before the gate decides.
        imbalance: `auto` chooses the next three by the number of training images of each class; see
            `torchthaw.training.imbalance.propose`. None and `off` leave them as they are.
        class_weights: Weight of each class in the training loss: `balanced` is n / (K n_c), `sqrt` is in proportion to
            its square root, both with a mean over images of 1; or a mapping from class names, 1 for those that it
            leaves out. The loss of a step is the sum of weighted losses over the sum of weights of all its images:
            those of all processes, and of all batches whose gradients are accumulated. See `TrainingLoss` for mixup
            and label smoothing.
        sampling: Draws training images with replacement, as many an epoch as there are: `balanced` draws all classes
            equally often, `sqrt` in proportion to the square root of their images. See `ClassSampler`.
        loss: What training minimises: `cross_entropy`, `focal`, or `logit_adjusted`. The loss that validation measures
            is always plain cross entropy, so that runs can be compared.
        focal_gamma: Focusing of the focal loss: 0 is cross entropy, and more makes less of images that are classified
            well already.
        logit_adjustment: tau of the logit adjusted loss: 1 trains for balanced accuracy, less goes part of the way.
        cache_gb: Most that cached images and features may take on the disk, in GB (see `ArrayStore`); 0 caches nothing.
        frozen_precision: What frozen layers are computed in: `float32`, `bfloat16`, or `auto`, which takes bfloat16
            where the hardware has it, it is faster, and it gives the same features (see `frozen_dtype`).
        live_precision: What the part of the network that trains is computed in, likewise: `auto` takes bfloat16 where
            gradients are the same up to rounding (see `live_dtype`). Weights and optimizer stay in float32.
        calibrate: `temperature` makes `save_run` fit a temperature on the validation images once training is over (see
            `fit_temperature`); it goes into the model's configuration. Training and what it chooses by never see it.
        thresholds: Where images may have several labels: the probability from which on an image is given a class, the
            same for all; or `per_class`, by which those with the best F1 on the validation images are chosen in the
            end and stored in the model's configuration.
        tta: Test-time augmentation that `save_run` measures beside the plain scores: `none`, `flip`, `five_crop` or
            `ten_crop` (see `predict_augmented`). Training, what it chooses by and what is saved never see it.

    Raises:
        PlanError: the plan is unknown or contradicts `num_train_epochs` or `max_steps`, the gate is unknown or has no
            validation to decide by, an average is unknown or its numbers are out of range, `wise_ft` has none to choose
            by, `calibrate` or `tta` is unknown, the former has no validation to fit on, settings against imbalance
            contradict each other, or FSDP or DeepSpeed is asked for.
    """

    plan: PlanArgument = "auto"
    augmentation: AugmentationArgument = None
    gate: str | None = None
    min_gain: float = 0.0
    on_reject: str = "continue"
    l2_sp: float | None = None
    average: str = "none"
    ema_decay: float = 0.999
    swa_epochs: int | None = None
    wise_ft: bool = False
    imbalance: str | None = None
    class_weights: ClassWeightsArgument = None
    sampling: str | None = None
    loss: str = "cross_entropy"
    focal_gamma: float = 2.0
    logit_adjustment: float = 1.0
    cache_gb: float = 10.0
    frozen_precision: str = "auto"
    live_precision: str = "auto"
    calibrate: str = "none"
    thresholds: ThresholdsArgument = 0.5
    tta: str = "none"
    num_train_epochs: float | None = None  # type: ignore[assignment]
    learning_rate: float | None = None  # type: ignore[assignment]
    weight_decay: float | None = None  # type: ignore[assignment]
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 32
    logging_strategy: str = "epoch"
    eval_strategy: str = "epoch"
    eval_on_start: bool | None = None  # type: ignore[assignment]
    save_strategy: str = "epoch"
    save_total_limit: int | None = 1
    load_best_model_at_end: bool = True
    metric_for_best_model: str | None = "auto"
    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False
    restore_callback_states_from_checkpoint: bool = True
    ddp_find_unused_parameters: bool | None = False
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)
    dataloader_num_workers: int | None = None  # type: ignore[assignment]
    label_names: list[str] | None = field(default_factory=lambda: ["labels"])

    def __post_init__(self) -> None:
        self._check_engine()
        if self.max_steps > 0:
            raise PlanError(
                f"max_steps is {self.max_steps}, but the plan's stages give the length; write their epochs or steps"
            )
        epochs = self.num_train_epochs
        if epochs is not None and epochs != int(epochs):
            raise PlanError(f"num_train_epochs is {epochs}; a plan is made of whole epochs")
        plan = make_plan(self.plan, epochs=None if epochs is None else int(epochs))
        self.plan = plan.to_dict()
        # Kept, since models of several labels per image have another default.
        self.asked_metric = self.metric_for_best_model
        if self.asked_metric == "auto":
            self.metric_for_best_model = "accuracy"
        # 0 stands for the length that a plan counted in steps has of itself.
        self.num_train_epochs = float(plan.epochs or 0)
        # Kept, since the backbone's family fills it in later.
        self.asked_augmentation = self.augmentation
        if isinstance(self.augmentation, Augmentation):
            self.augmentation = self.augmentation.to_dict()
        make_augmentation(self.augmentation or "none")
        self._settle_gate()
        check_averages(self, validates=self._validates())
        self._check_imbalance()
        self._check_speed()
        self._check_l2_sp()
        self._check_calibration()
        self.thresholds = checked_thresholds(self.thresholds)
        check_test_time_augmentation(self.tta, None)
        # The order of the images must be the run's own on resume, whatever else has drawn random numbers.
        self.data_seed = self.seed if self.data_seed is None else self.data_seed
        if self.accelerator_config is None and torch.cuda.is_available():
            # Pinned batches are copied while the GPU computes.
            self.accelerator_config = {"non_blocking": True}
        # `Trainer` compares it with numbers.
        workers, self.dataloader_num_workers = self.dataloader_num_workers, self.dataloader_num_workers or 0
        if workers is None and self.dataloader_prefetch_factor is not None:
            self.dataloader_num_workers = 1
        super().__post_init__()
        self.dataloader_num_workers = workers

    def __getstate__(self) -> dict[str, Any]:
        """Returns what is pickled: everything but tokens, since `Trainer` pickles its arguments into checkpoints."""
        return {name: None if name.endswith("_token") else value for name, value in vars(self).items()}

    def __copy__(self) -> "ThawTrainingArguments":
        # Copies stay in this process and need the token.
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> "ThawTrainingArguments":
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    @property
    def device(self) -> torch.device:
        """The device, without a number if it is the CPU: torch 2.8 cannot load a checkpoint's tensors to `cpu:0`."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    def _check_engine(self) -> None:
        for name, wanted in (("fsdp", self.fsdp), ("deepspeed", self.deepspeed)):
            if wanted:
                raise PlanError(
                    f"{name} is {wanted!r}, but stages change what is trainable, which {name} does not allow in one "
                    "run; leave it out and use DDP (torchrun or accelerate launch), or one device: every backbone "
                    "of torchvision fits on one"
                )
        for name in LAUNCHER_SETTINGS:
            # `accelerate launch` says it in the environment.
            if os.environ.get(name, "false").lower() in ("true", "1", "yes", "on"):
                raise PlanError(
                    f"the environment has {name}={os.environ[name]}, but stages change what is trainable, which that "
                    "does not allow in one run; choose multi-GPU (DDP) in `accelerate config`, or start with torchrun"
                )

    def _check_imbalance(self) -> None:
        if isinstance(self.class_weights, Mapping):
            self.class_weights = dict(self.class_weights)
        ImbalanceSettings.of(self).check()
        strategy = getattr(self, "train_sampling_strategy", "random")
        if self.sampling is not None and str(getattr(strategy, "value", strategy)) != "random":
            raise PlanError(
                f"sampling is {self.sampling!r}, and train_sampling_strategy {strategy!r}; keep one of them"
            )

    def _check_l2_sp(self) -> None:
        if self.l2_sp is not None and not 0 < self.l2_sp < math.inf:
            raise PlanError(f"l2_sp is {self.l2_sp!r}; write a positive number such as 0.01, or None for no pull")

    def _check_speed(self) -> None:
        if not self.cache_gb >= 0:
            raise PlanError(f"cache_gb is {self.cache_gb!r}; write 0 for no cache, or a number of GB such as 10")
        for key, value in (("frozen_precision", self.frozen_precision), ("live_precision", self.live_precision)):
            if value not in PRECISIONS:
                raise PlanError(
                    f"unknown {key} {value!r}.{did_you_mean(value, PRECISIONS)} There are {', '.join(PRECISIONS)}."
                )

    def _validates(self) -> bool:
        return str(getattr(self.eval_strategy, "value", self.eval_strategy)) != "no"

    def _check_calibration(self) -> None:
        if self.calibrate not in METHODS:
            raise PlanError(
                f"unknown calibrate {self.calibrate!r}.{did_you_mean(self.calibrate, METHODS)} There are "
                f"{', '.join(METHODS)}."
            )
        if self.calibrate != "none" and not self._validates():
            raise PlanError(
                f"calibrate is {self.calibrate!r}, but eval_strategy is 'no', so that there are no validation images "
                "to fit it on; write eval_strategy='epoch', or calibrate='none'"
            )

    def _settle_gate(self) -> None:
        validates = self._validates()
        if self.gate is None:
            self.gate = "best" if validates else "off"
        for key, value, choices in (("gate", self.gate, GATES), ("on_reject", self.on_reject, ON_REJECT)):
            if value not in choices:
                raise PlanError(
                    f"unknown {key} {value!r}.{did_you_mean(value, choices)} There are {', '.join(choices)}."
                )
        if self.gate != "off" and not validates:
            raise PlanError(
                f"gate is {self.gate!r}, but eval_strategy is 'no', so that there is nothing to decide by; "
                "write eval_strategy='epoch', or gate='off'"
            )
        if not self.min_gain >= 0:
            raise PlanError(f"min_gain is {self.min_gain!r}; write 0 or a positive number such as 0.005")
        if self.eval_on_start is None:
            self.eval_on_start = self.gate != "off"


def checked_thresholds(value: Any) -> float | str:
    """Returns a threshold as a number, or `per_class`.

    Raises:
        PlanError: it is neither, or no probability.
    """
    if value == PER_CLASS:
        return PER_CLASS
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 < number < 1:
        raise PlanError(f"thresholds is {value!r}; write a probability such as 0.5, or {PER_CLASS}")
    return number
