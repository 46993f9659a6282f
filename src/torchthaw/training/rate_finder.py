"""The learning-rate finder: range tests of the stages of a plan, on copies of the model.

The methods of `Trainer` that are overridden were read in transformers 5.24.
"""

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from torchthaw.backbones.anatomy import uses_transformer_recipe
from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.errors import PlanError, did_you_mean
from torchthaw.stages.plan import StagePlan
from torchthaw.stages.presets import family_defaults
from torchthaw.stages.rates import is_finite_number
from torchthaw.training import processes
from torchthaw.training.gradients import NonFiniteError
from torchthaw.training.range_test import FEWEST_STEPS, RangeTest, has_diverged, rate_at, read_curve
from torchthaw.training.rate_lines import scaled_rate, stage_line
from torchthaw.training.results import ProgressBars, no_progress
from torchthaw.training.stage_copies import StageCopyTrainer, copy_for_stage, surroundings_kept
from torchthaw.training.staged_loop import StagedTrainer


@dataclass(frozen=True)
class RangeTestSettings:
    """How stages are tested.

    Attributes:
        steps: Optimizer steps of a test, from 20 on; those of small data go through it several times.
        lowest: Rate of the first step.
        highest: Rate of the last step, unless the loss diverges before.
        lead_steps: Before the test of a stage, those before it are trained by the plan, each for at most so many steps;
            with 0 every test starts from the weights of the model.

    Raises:
        PlanError: a value is out of range.
    """

    steps: int = 100
    lowest: float = 1e-6
    highest: float = 10.0
    lead_steps: int = 0

    def __post_init__(self) -> None:
        for key, least in (("steps", FEWEST_STEPS), ("lead_steps", 0)):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise PlanError(f"{key} of the learning-rate finder is {value!r}; write a whole number from {least} on")
        numbers = all(is_finite_number(rate) for rate in (self.lowest, self.highest))
        if not numbers or not 0 < self.lowest <= self.highest / 10:
            raise PlanError(
                f"the learning-rate finder is to go from {self.lowest!r} to {self.highest!r}; write two positive "
                "numbers, the second at least ten times the first, such as 1e-6 and 10"
            )


class RangeTestTrainer(StageCopyTrainer):
    """Runs a stage with exponentially rising rates in the place of its schedule, until the loss diverges.

    Attributes:
        rates: Highest rate of each step.
        losses: Its training loss, before it is made; infinite where it was not finite.
        broken: What was said of a loss or gradient that was not finite.
    """

    bounds: tuple[float, float]
    broken: str | None = None

    def _start_run(self, *args: Any, **kwargs: Any) -> None:
        super()._start_run(*args, **kwargs)
        self.rates: list[float] = []
        self.losses: list[float] = []

    @property
    def plan(self) -> StagePlan:
        """The plan, in which a head that is fitted at once takes gradient steps."""
        plan = super().plan
        stages = [dataclasses.replace(stage, solver="gradient") for stage in plan.stages]
        return dataclasses.replace(plan, stages=tuple(stages))

    def _length(self, planned: int) -> int:
        return self._most_steps

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Makes the rising schedule, in which the rates of layer groups keep their ratios."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.create_optimizer()
            top = max(group["lr"] for group in optimizer.param_groups)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: rate_at(step, self._most_steps, *self.bounds) / top
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _settles_later(self) -> bool:
        # Each loss is asked for anyway.
        return False

    def _checked_norm(self, model: nn.Module, max_norm: float) -> torch.Tensor:
        """Clips as in training; notes the loss, and ends the test where it diverges."""
        loss = torch.stack([loss for loss, _ in self._batches]).sum().item()
        mean = sum(processes.gather(loss)) / processes.place()[1]
        self.rates.append(max(float(group["lr"]) for group in self.create_optimizer().param_groups))
        self.losses.append(mean if math.isfinite(mean) else math.inf)
        try:
            norm = super()._checked_norm(model, max_norm)
        except NonFiniteError as error:
            # The weights of this copy need no protection.
            self.broken, self.losses[-1] = str(error), math.inf
            self._batches = []
            norm = torch.tensor(math.nan)
        if has_diverged(np.array(self.losses), self._most_steps):
            self.control.should_training_stop = True
        return norm


def range_tests(
    trainer: StagedTrainer,
    stages: Sequence[str | int] | None = None,
    settings: RangeTestSettings | None = None,
    *,
    progress: ProgressBars = no_progress,
) -> Iterator[RangeTest]:
    """Tests the rates of stages in the order of the plan; the trainer stays bit for bit what it is.

    Everything is done on copies of the model, with the trainer's data, augmentation, batch sizes, loss, clipping,
    frozen part and BatchNorm policy, and without its callbacks. Files that are cached on the way stay for training.

    Args:
        trainer: A trainer that is not training.
        stages: Names or numbers (from 0 on) of the stages; None for all.
        settings: How they are tested.
        progress: Shows a bar.

    Raises:
        PlanError: there is no such stage, there are no training images, or the trainer is training.
    """
    settings = settings or RangeTestSettings()
    if trainer.stage is not None:
        raise PlanError("find_lr was called while the trainer is training; call it before or after train()")
    if trainer._train_data is None:
        raise PlanError("there is no train_dataset to test learning rates on; pass training images")
    wanted = check_stages(trainer.plan, stages)
    return _range_tests(trainer, wanted, settings, progress)


def _range_tests(
    trainer: StagedTrainer, wanted: list[int], settings: RangeTestSettings, progress: ProgressBars
) -> Iterator[RangeTest]:
    model = copy.deepcopy(trainer.model)
    for index in range(max(wanted) + 1):
        if index in wanted:
            yield _test(trainer, copy.deepcopy(model), index, settings, progress)
        if index < max(wanted) and settings.lead_steps:
            _lead(trainer, model, index, settings, progress)


def _test(
    trainer: StagedTrainer,
    model: TorchvisionForImageClassification,
    index: int,
    settings: RangeTestSettings,
    progress: ProgressBars,
) -> RangeTest:
    stage = trainer.plan.stages[index]
    with surroundings_kept(), progress(f"testing rates of {stage.name}", settings.steps) as bar:
        test = copy_for_stage(RangeTestTrainer, trainer, model, index=index, steps=settings.steps, on_step=bar.update)
        test.bounds = (settings.lowest, settings.highest)
        test.run()
    reading = read_curve(np.array(test.rates), np.array(test.losses), settings.steps, test.broken)
    plan_rate = max(stage.learning_rates(list(trainer.model.layer_groups())).values())
    learning_rate = recipe = None
    if reading.suggestion is not None:
        learning_rate = scaled_rate(stage, reading.suggestion / plan_rate)
        written = StagePlan.from_dict(cast(Any, trainer.args.plan)).stages[index]
        recipe = stage_line(written, stage, learning_rate)
    defaults = family_defaults(transformer=uses_transformer_recipe(trainer.model.config.architecture))
    return RangeTest(
        stage=stage.name,
        rates=test.rates,
        losses=test.losses,
        smoothed=reading.smoothed.tolist(),
        plan_rate=plan_rate,
        family_rate=defaults.head_rate if stage.trains_head_alone else defaults.unfrozen_rate,
        suggestion=reading.suggestion,
        minimum=reading.minimum,
        sentence=reading.sentence,
        learning_rate=learning_rate,
        recipe=recipe,
    )


def _lead(
    trainer: StagedTrainer,
    model: TorchvisionForImageClassification,
    index: int,
    settings: RangeTestSettings,
    progress: ProgressBars,
) -> None:
    """Trains a stage in short, so that the next one is tested from weights such as it will begin with."""
    name = trainer.plan.stages[index].name
    with surroundings_kept(), progress(f"training {name} in short", settings.lead_steps) as bar:
        copy_for_stage(
            StageCopyTrainer, trainer, model, index=index, steps=settings.lead_steps, on_step=bar.update
        ).run()


def check_stages(plan: StagePlan, stages: Sequence[str | int] | None) -> list[int]:
    """Returns the numbers of the stages that are named, in the order of the plan; None names all.

    Raises:
        PlanError: there is no such stage.
    """
    names = [stage.name for stage in plan.stages]
    if stages is None:
        return list(range(len(names)))
    found = []
    for stage in stages:
        if isinstance(stage, str) and stage in names:
            found.append(names.index(stage))
        elif isinstance(stage, int) and not isinstance(stage, bool) and 0 <= stage < len(names):
            found.append(stage)
        else:
            raise PlanError(
                f"there is no stage {stage!r} in the plan.{did_you_mean(stage, names)} There are "
                f"{', '.join(map(repr, names))}."
            )
    if not found:
        raise PlanError(f"no stage was named; there are {', '.join(map(repr, names))}")
    return sorted(set(found))
