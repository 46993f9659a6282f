"""What a stage says about low-rank adapters (LoRA), checked; needs neither torch nor peft."""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchthaw.errors import PlanError, did_you_mean
from torchthaw.stages.rates import is_finite_number

_KEYS = ("rank", "alpha", "targets")
_EXAMPLE = "lora: 8, or lora: {rank: 8, alpha: 16, targets: [mlp]}"


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters of a stage: a frozen weight W acts as W + alpha / rank * B A.

    Attributes:
        rank: Rows of A and columns of B.
        alpha: Scale of their product, over the rank.
        targets: Which linear maps get adapters, by patterns of one or several parts of their dotted names; empty for
            all of the layer groups that the stage names.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / self.rank

    def adapts(self, name: str) -> bool:
        """Whether the linear map of a dotted name, such as `encoder_layer_0.mlp.0`, gets an adapter."""
        return not self.targets or any(fnmatch.fnmatchcase(f".{name}.", f"*.{target}.*") for target in self.targets)


def read_lora(value: Any, stage: str) -> LoraSettings:
    """Reads what stands at `lora`: the rank alone, or a mapping.

    Args:
        value: A whole number, or a mapping with `rank` and, if wanted, `alpha` (twice the rank by default) and
            `targets`.
        stage: Name of the stage, for messages.

    Raises:
        PlanError: a key is unknown or a value out of range.
    """
    given = {"rank": value} if isinstance(value, int) else value
    if isinstance(value, bool) or not isinstance(given, Mapping) or not given:
        raise PlanError(f"stage {stage!r}: lora is {value!r}; write, for example, {_EXAMPLE}")
    for key in given:
        if key == "dropout":
            raise PlanError(
                f"stage {stage!r}: lora has dropout, which belongs to the input of a layer, while adapters here act on "
                "its weight, so that what is validated is what is saved; leave it out, and write dropout or "
                "stochastic_depth of the recipe instead"
            )
        if key not in _KEYS:
            raise PlanError(
                f"stage {stage!r}: lora has the unknown key {key!r}.{did_you_mean(key, _KEYS)} "
                f"Known keys: {', '.join(_KEYS)}."
            )
    rank = given.get("rank")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise PlanError(f"stage {stage!r}: the rank of lora is {rank!r}; write a whole number from 1 on, such as 8")
    alpha = given.get("alpha", 2 * rank)
    if not (is_finite_number(alpha) and alpha > 0):
        raise PlanError(f"stage {stage!r}: alpha of lora is {alpha!r}; write a positive number such as {2 * rank}")
    targets = given.get("targets", [])
    if isinstance(targets, str):
        targets = [targets]
    if not (isinstance(targets, list) and all(isinstance(target, str) and target for target in targets)):
        raise PlanError(
            f"stage {stage!r}: targets of lora is {targets!r}; write names or patterns of linear layers, such as "
            "[mlp], or leave it out for all"
        )
    return LoraSettings(rank, float(alpha), tuple(targets))
