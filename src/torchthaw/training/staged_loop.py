"""The Trainer's loop, run once per stage of a plan, as one run that can be killed anywhere and gone on with.

A stage is one pass of `Trainer._inner_training_loop` over a range of epochs, with the model frozen for it, a fresh
optimizer, a fresh schedule and a fresh wrap for distributed training. At its end the gate decides whether its weights
are kept. The private methods that are overridden were read in transformers 5.23 and are tested with 5.10.1 too.
"""

import gc
import logging
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from torchthaw.backbones.allocator import tensors_kept_in_memory
from torchthaw.errors import TrainingError
from torchthaw.stages.adapters import add_adapters
from torchthaw.stages.freezing import freeze_for_stage
from torchthaw.stages.low_rank import adapted_weights, merge_adapters, with_adapted_weights
from torchthaw.stages.proof import check_unchanged, frozen_fingerprints
from torchthaw.stages.snapshots import all_tensors, live_names, put_back, take_snapshot
from torchthaw.training import processes
from torchthaw.training.callbacks import StagedCallbackHandler, StageEndCallback
from torchthaw.training.checkpoints import remove_incomplete
from torchthaw.training.completion import stage_arguments
from torchthaw.training.datasets import length_of, stage_view
from torchthaw.training.gradients import NonFiniteError
from torchthaw.training.progress import Progress, read_state
from torchthaw.training.records import StageRecord
from torchthaw.training.resume import (
    check_same_everywhere,
    new_run_id,
)
from torchthaw.training.saving import SavingTrainer
from torchthaw.training.stage_end import conclude
from torchthaw.training.wise_ft import note_mixture

logger = logging.getLogger(__name__)

RETRY_FACTOR = 0.1


class StagedTrainer(SavingTrainer):
    """Runs the stages of a plan as one run of `Trainer`; `ThawTrainer` adds what users pass and read."""

    callback_handler: StagedCallbackHandler
    _ran_before = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._train_data = self.train_dataset
        self.callback_handler.__class__ = StagedCallbackHandler
        self.add_callback(StageEndCallback(self._last_step_of_stage, self._on_epoch_end))

    # One run made of stages

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Runs all stages; with `resume_from_checkpoint`, goes on exactly where an interrupted run was.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or True for the last whole one in `output_dir`.
            trial: Trial of a hyperparameter search.
            ignore_keys_for_eval: As in `Trainer`.

        Raises:
            PlanError: there is no whole checkpoint, or it belongs to another run; the differences are shown.
            TrainingError: the first stage broke down, something frozen moved, or parameters got no gradient.
        """
        if resume_from_checkpoint:
            wanted = resume_from_checkpoint
            resume_from_checkpoint = processes.on_main(lambda: str(self._checkpoint_to_resume(wanted)))
            # Now, since `Trainer` loads the checkpoint's weights before its loop.
            self._find_start(read_state(Path(resume_from_checkpoint))["progress"].get("start_digest"))
        kept = tensors_kept_in_memory() if self.args.device.type == "cpu" else nullcontext()
        # Each stage begins with a collection of garbage, which need not look through all that was imported.
        # Who froze objects before keeps them frozen.
        freezes = gc.get_freeze_count() == 0
        if freezes:
            # Earlier trainers of the process refer to themselves; frozen, what they hold would stay for another run.
            if StagedTrainer._ran_before:
                gc.collect()
            StagedTrainer._ran_before = True
            gc.freeze()
        try:
            with kept:
                return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            if freezes:
                gc.unfreeze()

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: Any = None,
        resume_from_checkpoint: str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        started = time.time()
        checkpoint = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        options = {"batch_size": batch_size, "args": args, "trial": trial, "ignore_keys_for_eval": ignore_keys_for_eval}
        try:
            self._start_run(checkpoint, trial)
            while True:
                is_border = self._is_border()
                record = self._run_stage(checkpoint, options)
                # A stage that was over when the checkpoint was made hands it on: for its random state.
                checkpoint = checkpoint if is_border else None
                if record is not None and not self._move_on(record):
                    return self._finish_run(trial, started)
        finally:
            self._slow_down()
            merge_adapters(self.model)
            self.stage = None
            self.train_dataset = self._train_data
            self._take_batch_size()

    def _start_run(self, checkpoint: Path | None, trial: Any) -> None:
        self.callback_handler.has_begun = False
        self._run_folder = Path(str(self._get_output_dir(trial)))
        self._planned_steps, self._planned_epochs = self._plan_lengths()
        self._identity = self._describe_run(self._planned_steps)
        check_same_everywhere(self._identity)
        if self.model.config.temperature != 1:
            logger.warning(
                "The scores of this model were calibrated, with a temperature of %g. Training starts without one.",
                self.model.config.temperature,
            )
            self.model.config.temperature = 1.0
        # A new head is drawn by each process for itself.
        processes.share_state(self.model)
        # A run that was interrupted in this process leaves what it did since its last checkpoint.
        self.current_flos = 0
        self._state_is_ready = checkpoint is not None
        self._last_checkpoint = None if checkpoint is None else checkpoint.resolve()
        if checkpoint is None:
            self._note_start()
            self._progress = Progress(
                run_id=processes.share(new_run_id()),
                start_digest=self._start_digest(),
                head_is_new=self.model.head_is_new,
            )
        else:
            self._progress = Progress.load(checkpoint)
            self._plan_added()
            if self.args.should_save:
                remove_incomplete(self._run_folder, run_id=self._progress.run_id)
            self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            self._load_callback_state()
            known = cast(dict[str, Any], self.state.stateful_callbacks)
            for callback in (*self.callback_handler.callbacks, self.control):
                if isinstance(callback, ExportableState):
                    # Trainer cannot save the state of one that the checkpoint does not know.
                    known.setdefault(type(callback).__name__, callback.state())
            # Set when the checkpoint was made; the event that clears it, `on_save`, comes after.
            self.control.should_save = False
            self.state.init_training_references(self, self._max_steps(), self._max_epochs(), trial)
        self._write_journal(finished=False)

    def _is_border(self) -> bool:
        """Whether nothing but the gate's decision is left of the stage."""
        return self._progress.epoch_over and self._stage_is_over()

    def _run_stage(self, checkpoint: Path | None, options: dict[str, Any]) -> StageRecord | None:
        """Runs a stage, or what is left of it; returns None if it is to run again at lower rates."""
        progress = self._progress
        stage = self._chosen(self._stages()[progress.stage_index])
        self.stage = stage.at_lower_rate(RETRY_FACTOR) if progress.lower_rates else stage
        self._resumed = checkpoint is not None and self.state.global_step > progress.stage_start_step
        failure = None
        with stage_arguments(self.args, self.stage):
            self._enter_stage()
            if not self._is_border():
                try:
                    super()._inner_training_loop(
                        resume_from_checkpoint=None if checkpoint is None else str(checkpoint), **options
                    )
                except NonFiniteError as error:
                    failure = str(error)
                    progress.loss_sum += self._total_loss_scalar + self._unlogged_loss()
            else:
                # The checkpoint that the run is resumed from was the stage's last.
                self.control = self.callback_handler.begin_run(self.args, self.state, self.control)
                progress.loss_sum += progress.unlogged_loss
            return self._leave_stage(failure, options["ignore_keys_for_eval"])

    def _enter_stage(self) -> None:
        assert self.stage is not None
        progress = self._progress
        self._stage_started = time.monotonic()
        self._take_batch_size()
        self.train_dataset = stage_view(self._train_data, progress.stage_index, self.stage, self.args)
        # Mixed precision wraps `forward` in place; unwrapped and unmarked, it gets one wrap a stage.
        self.model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        vars(self.model).pop("_is_accelerate_prepared", None)
        self._put_on_adapters()
        self._frozen = freeze_for_stage(self.model, self.stage, self.batch_norm_policy(self.stage))
        self.optimizer = self.lr_scheduler = None
        # A wrap made for other trainable parameters would not reduce the gradients of the new ones.
        self.model_wrapped = self.model
        self.model.train()
        self._live_names = live_names(self.model)
        if not self._resumed and not progress.lower_rates:
            progress.before = take_snapshot(self.model, with_adapted_weights(self.model, self._live_names))
            progress.fingerprints = frozen_fingerprints(self.model)
        if self.stage.new_head and not self._resumed:
            # After the snapshot, from which a stage that is not kept, or runs again, gets the old one back.
            self._draw_head()
        self._begin_average()
        self._prepare_checks()
        self._start_clock()
        if not self._is_border() or self._shares():
            self._speed_up(trains=not self._is_border())
        self.control.should_training_stop = self.control.should_epoch_stop = False
        self.callback_handler.stage = self.stage
        self._name_stage()

    def _put_on_adapters(self) -> None:
        assert self.stage is not None
        progress = self._progress
        # `Trainer` counts operations by the number of parameters.
        self._operations_per_value = None
        add_adapters(self.model.layer_groups(), self.stage, seed=self.args.seed + progress.stage_index)
        if self._resumed and progress.adapters:
            # A checkpoint's model has them merged.
            put_back(self.model, {name: progress.before[name] for name in adapted_weights(self.model)})
            put_back(self.model, progress.adapters)
            progress.adapters = {}

    def _leave_stage(self, failure: str | None, ignore_keys: list[str] | None = None) -> StageRecord | None:
        """Proves, decides and records; the model then holds the weights that the run goes on from."""
        assert self.stage is not None
        progress, stage = self._progress, self.stage
        retries = failure is not None and stage.on_nan == "retry" and not progress.lower_rates
        # On validation images as the stage has seen them, so before it slows down.
        mixed = None if retries else self._mix(ignore_keys)
        self._slow_down()
        self._end_average()
        processes.share_buffers(self.model)
        # First, so that all processes go on or none does.
        processes.check_equal_on_all(all_tensors(self.model), f"at the end of stage {stage.name!r}")
        check_unchanged(progress.fingerprints, self.model, stage.name)
        merge_adapters(self.model)
        if failure is not None and retries:
            self._go_back_for_retry(failure)
            return None
        mixed = self._mix_unvalidated() if mixed is None and failure is None else mixed
        seconds = progress.stage_seconds + time.monotonic() - self._stage_started
        record = conclude(
            progress, self.args, self.model, stage, self._frozen, self.state,
            failure=failure, seconds=seconds, num_images=length_of(self._train_data),
            images_per_step=self.get_total_train_batch_size(self.args), metric=self._metric_name(),
            clock=self._clock,
            train_accuracy=self._accuracy_on_training_images() if failure is None else None,
            tolerant=self._is_added(),
        )  # fmt: skip
        record.average = self._describe_average()
        note_mixture(record, mixed)
        self._note_probe(record)
        self._name_best()
        self._write_journal(finished=False)
        self.callback_handler.stage_event(
            "on_stage_end", self.args, self.state, self.control, stage=stage, record=record
        )
        if failure is not None and not any(done.accepted for done in progress.records):
            raise TrainingError(
                f"{failure}. No stage before it was kept, so the run ends with the weights it began with"
            )
        return record

    def _accuracy_on_training_images(self) -> dict[str, Any] | None:
        """Measured where it is worth it, by those that know more of the run; see `StageRecord`."""
        return None

    def _go_back_for_retry(self, failure: str) -> None:
        progress = self._progress
        put_back(self.model, progress.before)
        failures = [*progress.failures, failure]
        candidate, peak, without_gain = progress.candidate, progress.peak, progress.validations_without_gain
        if candidate is not None:
            put_back(self.model, cast(dict[str, torch.Tensor], candidate.weights))
        progress.start_stage(progress.stage_index, step=self.state.global_step, epoch=math.ceil(self.state.epoch))
        progress.lower_rates, progress.failures = True, failures
        progress.candidate, progress.peak, progress.validations_without_gain = candidate, peak, without_gain

    def _move_on(self, record: StageRecord) -> bool:
        """Makes the next stage the current one; returns False if the run is over."""
        progress = self._progress
        rejected = not record.accepted and self.args.on_reject == "stop"
        if progress.run_over or rejected or progress.stage_index + 1 == len(self._stages()):
            return False
        progress.start_stage(progress.stage_index + 1, step=self.state.global_step, epoch=math.ceil(self.state.epoch))
        return True

    def _finish_run(self, trial: Any, started: float) -> TrainOutput:
        images = round(sum(r.train_images_per_second * r.seconds for r in self.stage_records))
        output = self._finalize_run(trial, images, started)
        if trial is not None and self._progress.kept is not None:
            # What the search compares is the model that the run ends with, not its last epoch.
            self.objective: Any = self.compute_objective(self._progress.kept.metrics)
        self._write_journal(finished=True)
        return output
