"""One stage as a pass of the Trainer's own loop: its range of epochs, its optimizer and schedule, its place on resume.

The private methods of `Trainer` that are overridden here and in the modules beside it were read in transformers 5.23
and are tested with 5.10.1 too.
"""

import math
import sys
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import get_scheduler
from transformers.trainer_utils import TrainOutput, has_length

from torchthaw.errors import DataError
from torchthaw.stages.freezing import Frozen, resolve_batch_norm
from torchthaw.stages.param_groups import param_groups
from torchthaw.stages.plan import BatchNormPolicy, Stage, StagePlan
from torchthaw.training.completion import (
    full_plan,
    optimizer_arguments,
    optimizer_options,
    schedule_options,
    stage_arguments,
)
from torchthaw.training.datasets import length_of, set_epoch
from torchthaw.training.records import StageRecord
from torchthaw.training.validation import ValidatingTrainer


class StagePassTrainer(ValidatingTrainer):
    """Makes `Trainer._inner_training_loop` run one stage, from its start or from where a checkpoint left it."""

    _frozen: Frozen

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._train_data: Any = None
        self._planned_steps: list[int] = []
        self._planned_epochs: list[int] = []
        self._state_is_ready = False
        self._resumed = False
        super().__init__(*args, **kwargs)

    # The plan

    @property
    def plan(self) -> StagePlan:
        return full_plan(self.args, self.model)

    @property
    def stage_records(self) -> list[StageRecord]:
        return self._progress.records

    def batch_norm_policy(self, stage: Stage) -> BatchNormPolicy:
        """Returns the BatchNorm policy of a stage's live groups, `auto` resolved for this data and batch size."""
        batch_size = stage.batch_size or self.args.per_device_train_batch_size
        return resolve_batch_norm(stage.batch_norm, num_images=length_of(self._train_data), batch_size=batch_size)

    def _plan_lengths(self) -> tuple[list[int], list[int]]:
        """Returns the optimizer steps and the epochs of every stage; a stage of a stream counts as one epoch."""
        lengths = []
        for stage in self.plan.stages:
            with stage_arguments(self.args, stage):
                self._take_batch_size()
                loader = self.get_train_dataloader()
                if not has_length(loader):  # a stream
                    lengths.append((stage.steps or 0, 1))
                    continue
                per_epoch = super().set_initial_training_values(self.args, loader)[1]
                steps = stage.steps or (stage.epochs or 1) * per_epoch
                lengths.append((steps, math.ceil(steps / per_epoch)))
        return [steps for steps, _ in lengths], [epochs for _, epochs in lengths]

    def _stages(self) -> tuple[Stage, ...]:
        """Returns the stages of this run, as far as they are known by now."""
        return self.plan.stages

    def _is_added(self) -> bool:
        """Whether the stage that runs is none of the plan."""
        return self._progress.stage_index >= len(self.plan.stages)

    def _plan_added(self) -> None:
        """Plans the length of stages that a run has beyond its plan: that of the plan's last one."""
        for _ in self._stages()[len(self._planned_steps) :]:
            # New lists, since the plan's own lengths are what the run is known by.
            self._planned_steps = [*self._planned_steps, self._planned_steps[-1]]
            self._planned_epochs = [*self._planned_epochs, self._planned_epochs[-1]]

    def _take_batch_size(self) -> None:
        if not self.args.auto_find_batch_size:
            self._train_batch_size = self.args.train_batch_size

    def _last_step_of_stage(self) -> int:
        return self._progress.stage_start_step + self._planned_steps[self._progress.stage_index]

    def _stage_is_over(self) -> bool:
        progress = self._progress
        at_end = self._state_is_ready and self.state.global_step >= self._last_step_of_stage()
        return at_end or progress.stage_over is not None or progress.run_over

    def _name_stage(self) -> None:
        assert self.stage is not None
        # Not fields of TrainerState, whose saved form other code reads back strictly.
        index = self._progress.stage_index
        vars(self.state).update(
            stage_index=index,
            stage_name=self.stage.name,
            stage_start_step=self._progress.stage_start_step,
            stage_steps=self._planned_steps[index],
            stage_epochs=self._planned_epochs[index],
            stage_names=[stage.name for stage in self._stages()],
        )

    # Hooks into the loop

    def set_initial_training_values(self, args: Any, dataloader: DataLoader) -> Any:
        steps = self._planned_steps[self._progress.stage_index]
        if has_length(dataloader):
            _, per_epoch, examples, _, batch, in_epoch, _ = super().set_initial_training_values(args, dataloader)
            last_epoch = self._progress.stage_start_epoch + math.ceil(steps / per_epoch)
        else:
            batch = self.get_total_train_batch_size(args)
            per_epoch, examples, in_epoch = steps, steps * batch, steps * args.gradient_accumulation_steps
            last_epoch = sys.maxsize
        return last_epoch, per_epoch, examples, examples, batch, in_epoch, self._max_steps()

    def _max_steps(self) -> int:
        return self._progress.stage_start_step + sum(self._planned_steps[self._progress.stage_index :])

    def _max_epochs(self) -> int:
        return self._progress.stage_start_epoch + sum(self._planned_epochs[self._progress.stage_index :])

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: Any,
        trial: Any,
    ) -> tuple[int, int]:
        progress = self._progress
        if not self._state_is_ready:
            super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, None, trial)
            self._state_is_ready = True
        self.state.max_steps, self.state.num_train_epochs = max_steps, self._max_epochs()
        self._name_stage()
        if not self._resumed:
            return progress.stage_start_epoch, 0
        if progress.epoch_over:
            return progress.epoch + 1, 0
        return progress.epoch, (
            self.state.global_step - progress.epoch_start_step
        ) * self.args.gradient_accumulation_steps

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # A stage that begins has its own, whatever the checkpoint of the stage before it holds.
        if self._resumed:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _run_epoch(self, **options: Any) -> None:  # type: ignore[override]  # called with keywords only
        progress = self._progress
        first = options["resume_from_checkpoint"] is not None and options["epoch"] == options["epochs_trained"]
        if first and self._resumed:
            self._tr_loss += progress.unlogged_loss
            self._globalstep_last_logged = progress.last_logged_step
            self._last_norm = torch.tensor(progress.last_grad_norm)
            self._norms_of_groups().load(progress.group_norms)
        done = self.state.global_step - progress.epoch_start_step
        within = first and self._resumed and not progress.epoch_over
        self._random_state_at_end = None
        if not within:
            progress.epoch, progress.epoch_start_step = options["epoch"], self.state.global_step
        elif self._stage_is_over() or progress.epoch_stopped or done == options["num_update_steps_per_epoch"]:
            # The checkpoint was made in the epoch's last step: only the events of its end are left.
            options["num_update_steps_per_epoch"] = done
            self._random_state_at_end = options["resume_from_checkpoint"]
        progress.epoch_over = False
        before = self.state.global_step
        set_epoch(options["train_dataloader"], options["epoch"])
        super()._run_epoch(**options)
        if self.state.global_step == before and not within:
            raise DataError("the training data gave no image in a whole pass; check that the stream is not exhausted")
        self._note_stop()
        if self._stage_is_over():
            self.control.should_training_stop = True

    def _on_epoch_end(self) -> None:
        self._progress.epoch_over = True
        if self._random_state_at_end is not None:
            self._load_rng_state(self._random_state_at_end)

    def _note_stop(self) -> None:
        """Remembers that a callback stopped the run; at its last step, the Trainer does that itself."""
        if self.control.should_training_stop and self.state.global_step < self.state.max_steps:
            self._progress.run_over = True

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        # A pass ends here, but the run may not: see `_finalize_run`.
        self._progress.loss_sum += self._total_loss_scalar + self._tr_loss.item()
        return TrainOutput(self.state.global_step, 0.0, {})

    def _finalize_run(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        """Ends the run as `Trainer` ends its loop: totals, `on_train_end`, pushes."""
        self._initial_global_step, self._tr_loss = 0, torch.tensor(0.0)
        self._total_loss_scalar = self._progress.loss_sum
        # With a limit of 1, Trainer would remove the last checkpoint, from which a run is resumed that is killed now.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            self.args.save_total_limit = limit

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes the optimizer of the current stage over named layer groups; see `param_groups`."""
        if self.optimizer is None:
            stage = self.stage or self.plan.stages[0]
            kind, options = self.get_optimizer_cls_and_kwargs(optimizer_arguments(self.args, stage), self.model)
            groups = param_groups(self.model, self.model.layer_groups(), stage, l2_sp=self.args.l2_sp)
            self.optimizer = kind(groups, **{**options, **optimizer_options(stage)})
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Makes the schedule of the current stage: warmup, then cosine decay (or the stage's own) to its last step."""
        if self.lr_scheduler is None:
            stage = self.stage or self.plan.stages[0]
            steps = num_training_steps if self.stage is None else self._planned_steps[self._progress.stage_index]
            self.lr_scheduler = get_scheduler(
                stage.schedule,
                optimizer=optimizer or self.create_optimizer(),
                num_warmup_steps=stage.warmup_steps(steps),
                num_training_steps=steps,
                scheduler_specific_kwargs=schedule_options(self.args, stage),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # Log lines

    def _get_learning_rate(self) -> float:
        # `Trainer` asks after the optimizer's step and before the schedule's: these are the rates that were used.
        self._progress.last_rates = {
            f"learning_rate/{group['layer_group']}": float(group["lr"])
            for group in self.create_optimizer().param_groups
        }
        self._progress.last_learning_rate = super()._get_learning_rate()
        return self._progress.last_learning_rate

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, *args: Any, learning_rate: float | None = None, **kwargs: Any
    ) -> None:
        if learning_rate is None:
            # Resumed after the last step of an epoch, whose log line is still due.
            grad_norm, learning_rate = self._progress.last_grad_norm, self._progress.last_learning_rate
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **{**kwargs, "learning_rate": learning_rate})

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs as `Trainer` does, with the stage's number, and the rate and gradient norm of every layer group.

        The norm is before clipping, the root mean square over the steps since the last training line.
        """
        if self.stage is not None and "loss" in logs:
            # Once a step, so that reporters get rising steps; validation lines come at the same ones.
            norms = {f"grad_norm/{group}": norm for group, norm in self._norms_of_groups().take().items()}
            logs.update({"stage": self._progress.stage_index, **self._progress.last_rates, **norms})
        super().log(logs, *args, **kwargs)
        if self.stage is not None:
            # A name is not a number, so that reporters such as TensorBoard only get the stage's index.
            line = cast(dict[str, Any], self.state.log_history[-1])
            line.update({"stage": self._progress.stage_index, "stage_name": self.stage.name})
