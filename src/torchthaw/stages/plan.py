"""The stages of a run: `StagePlan`, checked on construction, and what belongs to the language of stages.

This module needs no torch, so that recipes are validated before anything heavy is imported.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchthaw.errors import PlanError, did_you_mean
from torchthaw.stages.rates import HEAD
from torchthaw.stages.stage import BATCH_NORM_POLICIES, ON_NAN, SCHEDULES, BatchNormPolicy, Stage

__all__ = ["BATCH_NORM_POLICIES", "HEAD", "ON_NAN", "SCHEDULES", "BatchNormPolicy", "Stage", "StagePlan"]


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
    def epochs(self) -> int | None:
        """Length of all stages together, in epochs; None if a stage is counted in steps."""
        lengths = [stage.epochs for stage in self.stages]
        return None if None in lengths else sum(length or 0 for length in lengths)

    def check_groups(self, groups: Sequence[str]) -> None:
        """Resolves every stage against the layer groups of a backbone.

        Raises:
            PlanError: a stage names a group that the backbone does not have.
        """
        for stage in self.stages:
            stage.learning_rates(groups)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data (JSON, YAML) from which `from_dict` makes an equal plan."""
        stages = [
            {field.name: copy.deepcopy(getattr(stage, field.name)) for field in dataclasses.fields(stage)}
            for stage in self.stages
        ]
        for stage in stages:
            stage["unfreeze"] = list(stage["unfreeze"]) if isinstance(stage["unfreeze"], tuple) else stage["unfreeze"]
        return {"name": self.name, "stages": stages}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "StagePlan":
        """Makes a plan from plain data.

        Raises:
            PlanError: a stage has no name, an unknown key or a value out of range.
        """
        stages = data.get("stages", ())
        known = [field.name for field in dataclasses.fields(Stage)]
        for number, stage in enumerate(stages, start=1):
            if not isinstance(stage, Mapping) or "name" not in stage:
                raise PlanError(
                    f"stage number {number} has no name: {stage!r}; write, for example, {{name: head, unfreeze: head}}"
                )
            for key in stage:
                if key not in known:
                    raise PlanError(
                        f"stage {stage['name']!r} has the unknown key {key!r}.{did_you_mean(key, known)} "
                        f"Known keys: {', '.join(known)}."
                    )
        return cls(stages=tuple(Stage(**stage) for stage in stages), name=data.get("name", "custom"))
