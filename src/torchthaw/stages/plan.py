"""What a run unfreezes, for how long and at which rates: `Stage` and `StagePlan`, checked on construction.

This module needs no torch, so that recipes are validated before anything heavy is imported.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torchthaw.errors import PlanError, did_you_mean

BatchNormPolicy = Literal["auto", "train", "freeze_affine", "eval"]
BATCH_NORM_POLICIES = ("auto", "train", "freeze_affine", "eval")
SCHEDULES = ("cosine", "linear", "constant_with_warmup", "constant", "polynomial", "inverse_sqrt")
HEAD = "head"


@dataclass(frozen=True)
class Stage:
    """One stretch of training with a fixed set of trainable layer groups and its own optimizer and schedule.

    Attributes:
        name: What logs, plots and results call the stage.
        unfreeze: What trains: `"head"`; a number N for the head and the last N groups of the backbone; `"all"`; or
            names and patterns of layer groups, such as `["head", "layer[34]"]`.
        epochs: Length, in passes over the training images.
        learning_rate: Peak rate of the head (see `layer_decay` for the others), or a mapping from `head`, `backbone`
            or a layer group's name or pattern to its rate; a group's own name wins over a pattern, and a pattern over
            `backbone`. None takes the default of the backbone's family.
        layer_decay: Factor between the rates of neighbouring groups, towards the input: a group that is d groups away
            from the head trains at `learning_rate * layer_decay ** d`. 1 gives all groups one rate. Only together
            with a single `learning_rate`. None takes the default of the backbone's family.
        warmup: Share of the stage's steps during which the rates rise linearly from 0.
        schedule: Course of the rates after warmup; one of `SCHEDULES`.
        weight_decay: Decoupled weight decay of weights; norms, biases and tokens are never decayed. None takes the
            run's.
        batch_norm: `train` (batch statistics, everything trains), `freeze_affine` (batch statistics, scale and shift
            frozen), `eval` (pretrained statistics, scale and shift kept), or `auto`: `eval` for small data or batches.
            Frozen groups are always kept in eval mode.

    Raises:
        PlanError: a value is out of range or contradicts another.
    """

    name: str
    unfreeze: str | int | tuple[str, ...] = "all"
    epochs: int = 1
    learning_rate: float | Mapping[str, float] | None = None
    layer_decay: float | None = None
    warmup: float = 0.1
    schedule: str = "cosine"
    weight_decay: float | None = None
    batch_norm: BatchNormPolicy = "auto"

    def __post_init__(self) -> None:
        if not self.name:
            raise PlanError("a stage has an empty name; write, for example, name: head")
        if isinstance(self.unfreeze, list):
            object.__setattr__(self, "unfreeze", tuple(self.unfreeze))
        self._check_unfreeze()
        self._check_rates()
        if isinstance(self.epochs, bool) or not isinstance(self.epochs, int) or self.epochs < 1:
            raise PlanError(f"stage {self.name!r}: epochs is {self.epochs!r}; write a whole number from 1 on")
        if not 0 <= self.warmup < 1:
            raise PlanError(
                f"stage {self.name!r}: warmup is {self.warmup!r}; it is a share of the stage's steps, from 0 to below 1"
            )
        if self.weight_decay is not None and not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise PlanError(f"stage {self.name!r}: weight_decay is {self.weight_decay!r}; write 0 or a positive number")
        for key, value, choices in (
            ("schedule", self.schedule, SCHEDULES),
            ("batch_norm", self.batch_norm, BATCH_NORM_POLICIES),
        ):
            if value not in choices:
                raise PlanError(
                    f"stage {self.name!r}: unknown {key} {value!r}.{did_you_mean(value, choices)} "
                    f"There are {', '.join(choices)}."
                )

    def _check_unfreeze(self) -> None:
        if isinstance(self.unfreeze, bool) or (isinstance(self.unfreeze, int) and self.unfreeze < 0):
            raise PlanError(
                f"stage {self.name!r}: unfreeze is {self.unfreeze!r}; write head, a number of groups, all, or names"
            )
        if self.unfreeze in ((), ""):
            raise PlanError(f"stage {self.name!r} unfreezes nothing; write unfreeze: head, 1, all, or names of groups")

    def _check_rates(self) -> None:
        rates = self.learning_rate if isinstance(self.learning_rate, Mapping) else {"": self.learning_rate}
        for key, rate in rates.items():
            if rate is not None and not (math.isfinite(rate) and rate > 0):
                where = f" of {key!r}" if key else ""
                raise PlanError(
                    f"stage {self.name!r}: the learning rate{where} is {rate!r}, so nothing would be learned; "
                    "write a positive number such as 1e-3, or leave the group out of unfreeze"
                )
        if self.layer_decay is None:
            return
        if isinstance(self.learning_rate, Mapping):
            raise PlanError(
                f"stage {self.name!r} gives both layer_decay and a rate per group; write one rate with layer_decay, "
                "or only the rates"
            )
        if not 0 < self.layer_decay <= 1:
            raise PlanError(f"stage {self.name!r}: layer_decay is {self.layer_decay!r}; write a factor in (0, 1]")

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
        return tuple(group for group in groups if any(fnmatch.fnmatchcase(group, pattern) for pattern in patterns))

    def learning_rates(self, groups: Sequence[str]) -> dict[str, float]:
        """Returns the peak learning rate of each live group.

        Args:
            groups: Names of all layer groups, input to output.

        Raises:
            PlanError: a key of `learning_rate` matches no group, or a live group gets no rate.
        """
        live = self.live_groups(groups)
        if not isinstance(self.learning_rate, Mapping):
            assert self.learning_rate is not None, "a plan's defaults are filled in before it runs"
            decay = 1.0 if self.layer_decay is None else self.layer_decay
            return {group: self.learning_rate * decay ** (len(groups) - 1 - groups.index(group)) for group in live}
        for key in self.learning_rate:
            if key != "backbone" and not fnmatch.filter(groups, key):
                raise PlanError(
                    f"stage {self.name!r}: learning_rate names {key!r}, which matches no layer group."
                    f"{did_you_mean(key, (*groups, 'backbone'))} There are backbone, {', '.join(groups)}."
                )
        return {group: self._rate_from_mapping(group, self.learning_rate) for group in live}

    def _rate_from_mapping(self, group: str, rates: Mapping[str, float]) -> float:
        if group in rates:
            return rates[group]
        for key, rate in rates.items():
            if fnmatch.fnmatchcase(group, key):
                return rate
        if group != HEAD and "backbone" in rates:
            return rates["backbone"]
        raise PlanError(f"stage {self.name!r} trains {group!r} but learning_rate has no rate for it; add {group}: 1e-4")


@dataclass(frozen=True)
class StagePlan:
    """The stages of a run, in order.

    Raises:
        PlanError: there is no stage, or two stages share a name.
    """

    stages: tuple[Stage, ...]
    name: str = "custom"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages:
            raise PlanError("the plan has no stage; write at least one, such as {name: head, unfreeze: head}")
        names = [stage.name for stage in self.stages]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise PlanError(f"stages share the name {', '.join(map(repr, repeated))}; give every stage its own")

    @property
    def epochs(self) -> int:
        """Length of all stages together, in epochs."""
        return sum(stage.epochs for stage in self.stages)

    def start_epoch(self, index: int) -> int:
        """First epoch of stage number `index`, counted over the whole run from 0."""
        return sum(stage.epochs for stage in self.stages[:index])

    def check_groups(self, groups: Sequence[str]) -> None:
        """Resolves every stage against the layer groups of a backbone.

        Raises:
            PlanError: a stage names a group that the backbone does not have.
        """
        for stage in self.stages:
            stage.learning_rates(groups)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data (JSON, YAML) from which `from_dict` makes an equal plan."""
        stages = []
        for stage in self.stages:
            fields = {field.name: getattr(stage, field.name) for field in dataclasses.fields(stage)}
            fields["unfreeze"] = list(stage.unfreeze) if isinstance(stage.unfreeze, tuple) else stage.unfreeze
            fields["learning_rate"] = (
                dict(stage.learning_rate) if isinstance(stage.learning_rate, Mapping) else stage.learning_rate
            )
            stages.append(fields)
        return {"name": self.name, "stages": stages}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "StagePlan":
        """Makes a plan from plain data.

        Raises:
            PlanError: a stage has an unknown key or a value out of range.
        """
        known = [field.name for field in dataclasses.fields(Stage)]
        for stage in data.get("stages", ()):
            for key in stage:
                if key not in known:
                    raise PlanError(f"a stage has the unknown key {key!r}.{did_you_mean(key, known)}")
        return cls(stages=tuple(Stage(**stage) for stage in data.get("stages", ())), name=data.get("name", "custom"))
