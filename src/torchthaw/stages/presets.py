"""Named plans and the default rates of the two kinds of backbone.

Where the numbers come from:

- Head first, then the rest at a 10-100 times lower rate: Howard and Ruder 2018 (ULMFiT, gradual unfreezing and
  discriminative rates); Kumar et al. 2022 show why the head goes first (LP-FT).
- AdamW at 1e-3 for a new linear head is the usual choice and was not tuned further. Neither were the rates of an
  unfrozen backbone, 3e-4 (CNNs) and 2e-4 (transformers), which layer decay lowers further towards the input; nor the
  length of 7 epochs, and how it is shared out over the stages.
- Weight decay: 0.05 for transformers as in the fine-tuning of BEiT and MAE; 0.01 for CNNs is torch's default of AdamW.
- Layer decay of transformers: 0.75 per block, Bao et al. 2022 (BEiT) and He et al. 2022 (MAE); their warmup is 5 of
  50-100 epochs, the 5-10 % that `Stage.warmup` defaults to.
- Adapters (LoRA) are as new as a head, and get its rate without layer decay; not tuned either.
- Layer decay of CNNs: 0.3 per resolution stage, close to the factor 1 / 2.6 between layers of ULMFiT.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchthaw.errors import PlanError, did_you_mean
from torchthaw.stages.plan import Stage, StagePlan

# Relative length of each stage: a preset of E epochs shares them out in this proportion.
_SHAPES: dict[str, tuple[tuple[str, str | int, int], ...]] = {
    "head": (("head", "head", 7),),
    "partial": (("head", "head", 3), ("last block", 1, 4)),
    "two_phase": (("head", "head", 3), ("all", "all", 4)),
    "staged": (("head", "head", 3), ("last block", 1, 2), ("all", "all", 2)),
    "full": (("all", "all", 7),),
    "auto": (("head", "head", 1), ("all", "all", 6)),
}
# What stages say beside that.
_MORE: dict[tuple[str, str], dict[str, Any]] = {
    ("auto", "head"): {"solver": "auto"},
    ("auto", "all"): {"by_probe": True, "selection": "one_se"},
}
PRESETS = tuple(_SHAPES)
PlanLike = StagePlan | Sequence[Stage] | Mapping[str, Any] | str
DEFAULT_EPOCHS = 7


@dataclass(frozen=True)
class FamilyDefaults:
    """Rates and regularization that one kind of backbone starts from."""

    head_rate: float
    unfrozen_rate: float
    layer_decay: float
    weight_decay: float
    augmentation: str


CNN_DEFAULTS = FamilyDefaults(
    head_rate=1e-3, unfrozen_rate=3e-4, layer_decay=0.3, weight_decay=0.01, augmentation="light"
)
TRANSFORMER_DEFAULTS = FamilyDefaults(
    head_rate=1e-3, unfrozen_rate=2e-4, layer_decay=0.75, weight_decay=0.05, augmentation="medium"
)


def family_defaults(*, transformer: bool) -> FamilyDefaults:
    """Returns the defaults of vision transformers and their kin (ViT, Swin, MaxViT, ConvNeXt), or of CNNs."""
    return TRANSFORMER_DEFAULTS if transformer else CNN_DEFAULTS


def preset_plan(name: str, *, epochs: int | None = None) -> StagePlan:
    """Returns a named plan; its rates are left to `fill_defaults`.

    Args:
        name: One of `PRESETS`.
        epochs: Length of the whole plan, shared out in the preset's proportion with at least one epoch a stage;
            None takes 7.

    Raises:
        PlanError: the name is unknown, or there are fewer epochs than stages.
    """
    if name not in _SHAPES:
        raise PlanError(f"unknown plan {name!r}.{did_you_mean(name, PRESETS)} There are {', '.join(PRESETS)}.")
    shape = _SHAPES[name]
    lengths = _share_out(DEFAULT_EPOCHS if epochs is None else epochs, [weight for _, _, weight in shape], name)
    stages = [
        Stage(name=stage, unfreeze=unfreeze, epochs=length, **_MORE.get((name, stage), {}))
        for (stage, unfreeze, _), length in zip(shape, lengths, strict=True)
    ]
    return StagePlan(stages=tuple(stages), name=name)


def make_plan(plan: PlanLike, *, epochs: int | None = None) -> StagePlan:
    """Returns the plan that a preset's name, stages, or plain data stand for.

    Args:
        plan: A preset's name, a `StagePlan`, a sequence of `Stage`, or `StagePlan.to_dict()`.
        epochs: Length of a preset; plans with explicit stages have their own. 0 stands for the length that a plan
            counted in steps has of itself.

    Raises:
        PlanError: the name is unknown, a value is out of range, or `epochs` contradicts explicit stages.
    """
    if isinstance(plan, str):
        return preset_plan(plan, epochs=epochs)
    if isinstance(plan, Mapping):
        plan = StagePlan.from_dict(plan)
    elif not isinstance(plan, StagePlan):
        plan = StagePlan(stages=tuple(plan))
    if plan.epochs is None:
        if epochs:
            raise PlanError(
                f"the length of the plan is {epochs} epochs by one setting, but its stages are counted in steps; "
                "leave the number of epochs out, or give every stage its length in epochs"
            )
    elif epochs is not None and epochs != plan.epochs:
        raise PlanError(
            f"the stages are {plan.epochs} epochs long in all, but {epochs} epochs were asked for; "
            "change the stages' epochs, or name a preset, which is shared out over any number of epochs"
        )
    return plan


def fill_defaults(
    plan: StagePlan, *, transformer: bool, head_rate: float | None = None, weight_decay: float | None = None
) -> StagePlan:
    """Returns the plan with every rate, layer decay and weight decay that was left open filled in.

    A stage that trains the head alone, or adapters, gets the head's rate; any other the lower rate of unfrozen
    backbones, with the family's layer decay. Those of stages with `by_probe` stand until the probe is made.

    Args:
        plan: The plan to complete.
        transformer: Whether the backbone trains by the habits of vision transformers.
        head_rate: Rate of a new head; the other open rates move in proportion. None takes the family's.
        weight_decay: The run's own weight decay; None takes the family's.

    Raises:
        PlanError: a stage has a rate, and is to have it chosen as well.
    """
    defaults = family_defaults(transformer=transformer)
    scale = 1.0 if head_rate is None else head_rate / defaults.head_rate
    decay = defaults.weight_decay if weight_decay is None else weight_decay

    def fill(stage: Stage) -> Stage:
        if stage.weight_decay is None:
            stage = dataclasses.replace(stage, weight_decay=decay)
        if stage.learning_rate is not None:
            if stage.by_probe:
                raise PlanError(
                    f"stage {stage.name!r}: by_probe chooses the rates, but learning_rate is {stage.learning_rate!r}; "
                    "leave one of them out"
                )
            return stage
        rate = defaults.head_rate if stage.trains_head_alone or stage.adapters else defaults.unfrozen_rate
        family_decay = defaults.layer_decay if stage.adapters is None else 1.0
        layer_decay = family_decay if stage.layer_decay is None else stage.layer_decay
        return dataclasses.replace(stage, learning_rate=rate * scale, layer_decay=layer_decay)

    return StagePlan(stages=tuple(fill(stage) for stage in plan.stages), name=plan.name)


def stage_augmentation(stage: Stage, run: Any) -> Any:
    """Returns what a stage does to its training images: its own augmentation, or else the run's.

    Where neither says anything, a stage that trains the head alone does nothing (`"none"`): so the features of each
    image need to be computed only once. Every other stage then takes the default of the backbone's family. A linear
    probe takes the images as they are unless the stage itself says otherwise.

    Args:
        stage: The stage.
        run: The run's augmentation; None where it was left open.

    Returns:
        A name or fields; None for the family's default.
    """
    if stage.augmentation is not None:
        return stage.augmentation
    alone = run is None and stage.trains_head_alone
    return "none" if alone or stage.solver == "probe" else run


def _share_out(epochs: int, weights: list[int], plan: str) -> list[int]:
    if epochs < len(weights):
        raise PlanError(f"plan {plan!r} has {len(weights)} stages and needs at least as many epochs, not {epochs}")
    # One epoch each, then every further one to the stage that is furthest below its share.
    lengths = [1] * len(weights)
    for _ in range(epochs - len(weights)):
        gaps = [epochs * weight / sum(weights) - length for weight, length in zip(weights, lengths, strict=True)]
        lengths[gaps.index(max(gaps))] += 1
    return lengths
