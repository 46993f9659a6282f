"""One stage of a run: what trains, for how long, at which rates; checked on construction.

This module needs no torch, so that recipes are validated before anything heavy is imported.
"""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torchthaw.errors import PlanError, did_you_mean
from torchthaw.stages.lora import LoraSettings, read_lora
from torchthaw.stages.rates import HEAD, check_rates, is_finite_number, resolve_rates, scale_rates

BatchNormPolicy = Literal["auto", "train", "freeze_affine", "eval"]
BATCH_NORM_POLICIES = ("auto", "train", "freeze_affine", "eval")
# The names of transformers.trainer_utils.SchedulerType, written out because importing them imports torch.
SCHEDULES = (
    "cosine", "linear", "constant_with_warmup", "constant", "polynomial", "inverse_sqrt", "cosine_with_restarts",
    "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "reduce_lr_on_plateau", "greedy",
)  # fmt: skip
ON_NAN = ("stop", "retry")
AVERAGES = ("none", "ema", "swa")
SOLVERS = ("gradient", "probe", "auto")
SELECTIONS = ("best", "one_se")
SMALLEST_IMAGE = 16

_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
# What these schedules of transformers cannot do without: one of the keys, and an example.
_NEEDED_SCHEDULE_ARGS = {
    "cosine_with_min_lr": (("min_lr", "min_lr_rate"), "{min_lr_rate: 0.1}"),
    "cosine_warmup_with_min_lr": (("min_lr", "min_lr_rate"), "{min_lr_rate: 0.1}"),
    "warmup_stable_decay": (("num_decay_steps",), "{num_decay_steps: 100}"),
}
# What the stage's own fields say, and transformers therefore gets from there: key -> field.
_OWN_FIELDS = {
    "schedule_args": {"num_warmup_steps": "warmup", "num_training_steps": "epochs or steps"},
    "optimizer_args": {"lr": "learning_rate", "weight_decay": "weight_decay"},
}


@dataclass(frozen=True)
class Stage:
    """One stretch of training with a fixed set of trainable layer groups and its own optimizer and schedule.

    Attributes:
        name: What logs, plots and results call the stage.
        unfreeze: What trains: `"head"`; a number N for the head and the last N groups of the backbone; `"all"`; or
            names and patterns of layer groups, such as `["head", "layer[34]"]`.
        epochs: Length, in passes over the training images; 1 unless `steps` gives the length.
        learning_rate: Peak rate of the head (see `layer_decay` for the others); or a mapping from `head`, `backbone`
            or a layer group's name or pattern to its rate, where a group's own name wins over a pattern, and a pattern
            over `backbone`; or a range `"low..high"`, such as `"1e-5..1e-3"`, which gives the first group that trains
            the low rate, the last one the high rate, and those between rates evenly spaced on a logarithmic scale (as
            fastai's `slice`; a single group gets the high rate). None takes the default of the backbone's family.
        layer_decay: Factor between the rates of neighbouring groups, towards the input: a group that is d groups away
            from the head trains at `learning_rate * layer_decay ** d`. 1 gives all groups one rate. Only together
            with a single `learning_rate`. None takes the default of the backbone's family.
        warmup: Length of the linear rise of the rates from 0: below 1 a share of the stage's steps, a whole number
            from 1 on that many steps. The schedules `constant`, `reduce_lr_on_plateau` and `greedy` have none.
        schedule: Course of the rates after warmup; one of `SCHEDULES`, the `lr_scheduler_type` of transformers.
        weight_decay: Decoupled weight decay of weights; norms, biases and tokens are never decayed. None takes the
            run's.
        batch_norm: `train` (batch statistics, everything trains), `freeze_affine` (batch statistics, scale and shift
            frozen), `eval` (pretrained statistics, scale and shift kept), or `auto`: `eval` for small data or batches.
            Frozen groups are always kept in eval mode.
        steps: Length in optimizer steps, instead of `epochs`.
        schedule_args: Further arguments of the schedule, the `lr_scheduler_kwargs` of transformers, such as
            `{"num_cycles": 2}` for `cosine_with_restarts`.
        optimizer: Any `optim` of transformers, such as `adamw_torch`, or `sgd`, which comes with momentum 0.9 unless
            `optimizer_args` say otherwise. None takes the run's.
        optimizer_args: Further arguments of the optimizer, such as `{"betas": [0.9, 0.95]}`.
        max_grad_norm: Gradients are clipped to this norm; 0 turns clipping off. None takes the run's.
        batch_size: Images per device and step. None takes the run's.
        image_size: Side of the training images in pixels, from 16 on (progressive resizing); validation keeps the
            model's. None takes the model's.
        augmentation: Name of an augmentation, or its fields. None takes the run's.
        views: How many differently augmented views of each image the stage's epochs go through in turn, so that what
            frozen layers make of them is computed once. None gives each epoch a view of its own.
        patience: The stage ends after this many validations in a row without a metric better than the stage's best
            (early stopping). None runs it to its end.
        on_nan: What follows when the loss or a gradient is not finite: `stop` ends the stage, `retry` runs it once
            more at a tenth of its rates.
        frozen_dropout: Whether dropout and stochastic depth stay active in frozen groups. By default frozen groups
            are in eval mode as a whole; otherwise only their BatchNorm modules are.
        average: Which average of the stage's weights is validated and handed on: `none`, `ema` or `swa`. None takes the
            run's.
        lora: Low-rank adapters (LoRA) of transformer backbones, which need peft: the rank, or a mapping with `rank`,
            `alpha` (twice the rank by default) and `targets` (names or patterns of linear layers; all by default). The
            weights of the layer groups that `unfreeze` names are then frozen, and adapters on their linear layers
            train, together with the head; the stage ends with the adapters merged into the weights.
        solver: How a stage that trains the head alone does so: `gradient` in steps of its optimizer; `probe` at once,
            by logistic regression on the features of all training images, whose strength of regularization is chosen by
            cross-validation among them (see `fit_linear_probe`), so that length, rates and schedule do not matter;
            `auto` by a probe where there can be one (see `probe_obstacle`), by gradient steps elsewhere.
        by_probe: Whether rates, BatchNorm and head are chosen by what the linear probe of an earlier stage found (see
            `stages.auto`), and after a plan's last stage, whether a further one comes; not together with a
            `learning_rate`.
        new_head: Whether the stage begins with a new, random head instead of the one that earlier stages trained. Where
            the stage is not kept, that one stays.
        selection: Which of the stage's validated weights it proposes: the `best`, of equal ones the first; or `one_se`,
            the last that are not worse than the best by more than the standard error of the difference (the one
            standard error rule: Breiman et al., Classification and Regression Trees, 1984), since with few validation
            images the best epoch is mostly luck, and the last one has trained at the lowest rates.
        wise_ft: Share of the stage's weights, above 0, in the mixture with those before it that the stage proposes
            (WiSE-FT; see `training.wise_ft`); 1 takes its own as they are. None takes the run's, where validation
            chooses the share.

    Raises:
        PlanError: a value is out of range or contradicts another.
    """

    name: str
    unfreeze: str | int | tuple[str, ...] = "all"
    epochs: int | None = None
    learning_rate: float | Mapping[str, float] | str | None = None
    layer_decay: float | None = None
    warmup: float | int = 0.1
    schedule: str = "cosine"
    weight_decay: float | None = None
    batch_norm: BatchNormPolicy = "auto"
    steps: int | None = None
    schedule_args: Mapping[str, Any] | None = None
    optimizer: str | None = None
    optimizer_args: Mapping[str, Any] | None = None
    max_grad_norm: float | None = None
    batch_size: int | None = None
    image_size: int | None = None
    augmentation: str | Mapping[str, Any] | None = None
    views: int | None = None
    patience: int | None = None
    on_nan: Literal["stop", "retry"] = "stop"
    frozen_dropout: bool = False
    average: Literal["none", "ema", "swa"] | None = None
    lora: int | Mapping[str, Any] | None = None
    solver: Literal["gradient", "probe", "auto"] = "gradient"
    by_probe: bool = False
    new_head: bool = False
    selection: Literal["best", "one_se"] = "best"
    wise_ft: float | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and self.name):
            raise PlanError(f"a stage has the name {self.name!r}; write, for example, name: head")
        for key in ("learning_rate", "schedule_args", "optimizer_args", "augmentation", "lora"):
            self._set(key, self._plain(getattr(self, key), key))
        if isinstance(self.unfreeze, list):
            self._set("unfreeze", tuple(self.unfreeze))
        self._check_unfreeze()
        self._check_length()
        check_rates(self.learning_rate, self.layer_decay, self.name)
        self._check_numbers()
        self._check_choices()
        self._check_arguments()
        self._check_lora()
        self._check_probe()

    def _set(self, key: str, value: Any) -> None:
        object.__setattr__(self, key, value)

    def _fail(self, key: str, advice: str) -> PlanError:
        return PlanError(f"stage {self.name!r}: {key} is {getattr(self, key)!r}; {advice}")

    def _plain(self, value: Any, key: str) -> Any:
        """Copies a value as JSON data, so that a plan can be written and read back equal."""
        if isinstance(value, Mapping):
            return {str(name): self._plain(item, f"{key}.{name}") for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._plain(item, key) for item in value]
        if value is None or isinstance(value, str | int | float):
            return value
        raise PlanError(
            f"stage {self.name!r}: {key} has the value {value!r}, which a recipe cannot hold; write numbers, text, "
            "true or false, lists and mappings"
        )

    def _check_unfreeze(self) -> None:
        advice = "write head, a number of groups, all, or names of groups"
        if isinstance(self.unfreeze, bool) or not isinstance(self.unfreeze, str | int | tuple):
            raise self._fail("unfreeze", advice)
        if isinstance(self.unfreeze, int):
            if self.unfreeze < 0:
                raise self._fail("unfreeze", advice)
            return
        if not self.unfreeze:
            raise PlanError(f"stage {self.name!r} unfreezes nothing; write unfreeze: head, 1, all, or names of groups")
        if not all(isinstance(pattern, str) and pattern for pattern in self.unfreeze):
            raise self._fail("unfreeze", advice)

    def _check_length(self) -> None:
        if self.epochs is not None and self.steps is not None:
            raise PlanError(
                f"stage {self.name!r} has both epochs ({self.epochs!r}) and steps ({self.steps!r}); keep one of them"
            )
        if self.steps is None and self.epochs is None:
            self._set("epochs", 1)

    def _check_numbers(self) -> None:
        for key, least in (
            ("epochs", 1),
            ("steps", 1),
            ("batch_size", 1),
            ("patience", 1),
            ("views", 1),
            ("image_size", SMALLEST_IMAGE),
        ):
            value = getattr(self, key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise self._fail(key, f"write a whole number from {least} on")
        for key in ("weight_decay", "max_grad_norm"):
            value = getattr(self, key)
            if value is not None and not (is_finite_number(value) and value >= 0):
                raise self._fail(key, "write 0 or a positive number")
        share = is_finite_number(self.warmup) and 0 <= self.warmup < 1
        steps = isinstance(self.warmup, int) and not isinstance(self.warmup, bool) and self.warmup >= 1
        if not (share or steps):
            raise self._fail("warmup", "write a share of the stage's steps below 1, or a whole number of steps")
        if self.wise_ft is None:
            return
        if not (is_finite_number(self.wise_ft) and 0 < self.wise_ft <= 1):
            raise self._fail("wise_ft", "write the share of the stage's weights, such as 0.5, or leave it out")
        if self.trains_head_alone:
            raise self._fail("wise_ft", "it is for stages that train more than the head: leave it out")

    def _check_choices(self) -> None:
        for key, choices in (
            ("schedule", SCHEDULES),
            ("batch_norm", BATCH_NORM_POLICIES),
            ("on_nan", ON_NAN),
            ("average", AVERAGES),
            ("solver", SOLVERS),
            ("selection", SELECTIONS),
        ):
            value = getattr(self, key)
            if value not in choices and not (key == "average" and value is None):
                raise PlanError(
                    f"stage {self.name!r}: unknown {key} {value!r}.{did_you_mean(value, choices)} "
                    f"There are {', '.join(choices)}."
                )
        for key in ("frozen_dropout", "by_probe", "new_head"):
            if not isinstance(getattr(self, key), bool):
                raise self._fail(key, "write true or false")
        if self.optimizer is not None and not (isinstance(self.optimizer, str) and self.optimizer):
            raise self._fail("optimizer", "write an optim of transformers, such as adamw_torch or sgd")
        if self.augmentation is not None and not (self.augmentation and isinstance(self.augmentation, str | dict)):
            raise self._fail("augmentation", "write a name such as light, or fields such as {mixup: 0.2}")

    def _check_arguments(self) -> None:
        for key, own in _OWN_FIELDS.items():
            arguments = getattr(self, key)
            if arguments is not None and not isinstance(arguments, dict):
                raise self._fail(key, "write a mapping of names to values")
            for name in own.keys() & (arguments or {}):
                raise PlanError(f"stage {self.name!r}: {key} has {name!r}; write it as the stage's {own[name]}")
        names, example = _NEEDED_SCHEDULE_ARGS.get(self.schedule, ((), ""))
        if names and not any(name in (self.schedule_args or {}) for name in names):
            raise PlanError(
                f"stage {self.name!r}: the schedule {self.schedule} needs {' or '.join(names)}; write, for example, "
                f"schedule_args: {example}"
            )

    def _check_lora(self) -> None:
        if self.adapters is None:
            return
        if self.trains_head_alone:
            raise self._fail("unfreeze", "lora adapts layers of the backbone: write all, or a number of groups")
        if self.batch_norm not in ("auto", "eval"):
            raise self._fail("batch_norm", "lora freezes the statistics of the backbone: write eval, or leave it out")
        self._set("batch_norm", "eval")

    def _check_probe(self) -> None:
        if self.solver != "gradient" and not self.trains_head_alone:
            raise self._fail("solver", "a linear probe is a head, nothing else: write unfreeze: head, or leave it out")

    @property
    def adapters(self) -> LoraSettings | None:
        """What `lora` says, with its defaults; None without it."""
        return None if self.lora is None else read_lora(self.lora, self.name)

    @property
    def trains_head_alone(self) -> bool:
        """Whether nothing but the head trains."""
        return self.unfreeze in (HEAD, 0, (HEAD,))

    def live_groups(self, groups: Sequence[str]) -> tuple[str, ...]:
        """Returns the layer groups that train, in the order of `groups` (input to output, the head last).

        Raises:
            PlanError: `unfreeze` names no group of the backbone, or asks for more groups than there are.
        """
        backbone = [group for group in groups if group != HEAD]
        if self.unfreeze == "all":
            return tuple(groups)
        if isinstance(self.unfreeze, int):
            if self.unfreeze > len(backbone):
                raise PlanError(
                    f"stage {self.name!r}: unfreeze is {self.unfreeze}, but the backbone has {len(backbone)} groups "
                    f"({', '.join(backbone)}); write a smaller number or all"
                )
            return (*backbone[len(backbone) - self.unfreeze :], HEAD)
        patterns = (self.unfreeze,) if isinstance(self.unfreeze, str) else self.unfreeze
        for pattern in patterns:
            if not fnmatch.filter(groups, pattern):
                raise PlanError(
                    f"stage {self.name!r}: unfreeze names {pattern!r}, which matches no layer group."
                    f"{did_you_mean(pattern, groups)} There are {', '.join(groups)}."
                )
        live = tuple(group for group in groups if any(fnmatch.fnmatchcase(group, pattern) for pattern in patterns))
        if self.new_head and HEAD not in live:
            raise self._fail("new_head", f"the head does not train: add {HEAD} to unfreeze")
        return live

    def learning_rates(self, groups: Sequence[str]) -> dict[str, float]:
        """Returns the peak learning rate of each live group.

        Args:
            groups: Names of all layer groups, input to output.

        Raises:
            PlanError: a key of `learning_rate` matches no group, or a live group gets no rate.
        """
        live = self.live_groups(groups)
        return resolve_rates(self.learning_rate, self.layer_decay, live=live, groups=groups, stage=self.name)

    def warmup_steps(self, total_steps: int) -> int:
        """Returns the number of warmup steps of a stage that is `total_steps` long."""
        if self.schedule in _WITHOUT_WARMUP:
            return 0
        return round(self.warmup * total_steps) if self.warmup < 1 else min(int(self.warmup), total_steps)

    def at_lower_rate(self, factor: float) -> "Stage":
        """Returns a copy with every learning rate multiplied by `factor`; rates that are left open stay open."""
        return dataclasses.replace(self, learning_rate=scale_rates(self.learning_rate, factor, self.name))
