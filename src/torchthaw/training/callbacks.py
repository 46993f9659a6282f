"""Callbacks and their handling over a run of several stages."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from torchthaw.stages.plan import Stage
from torchthaw.training.diagnosis import Finding
from torchthaw.training.records import StageRecord


class StageCallback(TrainerCallback):
    """A `TrainerCallback` that is also told where stages begin and end.

    Any callback with a method of these names gets the events. All callbacks can read the current stage from
    `state.stage_index` and `state.stage_name`, and from the entries of `state.log_history`; its first step, planned
    steps and epochs from `state.stage_start_step`, `stage_steps` and `stage_epochs`.
    """

    def on_stage_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, stage: Stage, **kwargs: Any
    ) -> None:
        """The model is frozen for the stage, and its optimizer and schedule are made."""

    def on_stage_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        stage: Stage,
        record: StageRecord,
        **kwargs: Any,
    ) -> None:
        """The gate has decided, and the model holds the weights that the run goes on from."""


class StagedCallbackHandler(CallbackHandler):
    """Makes the stages look like one run: `on_train_begin` fires once, and the epoch is told once a step."""

    has_begun = False
    stage: Stage | None = None
    _last_logged_step = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> Any:
        control = self.begin_run(args, state, control, **kwargs)
        self.stage_event("on_stage_begin", args, state, control, stage=self.stage)
        return control

    def begin_run(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """Fires `on_train_begin`, unless the run has begun."""
        if self.has_begun:
            return control
        self.has_begun = True
        return super().on_train_begin(args, state, control, **kwargs)

    def on_log(  # type: ignore[override]  # as CallbackHandler has it
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> Any:
        """Tells the epoch once a step: validation lines come at the step of a training line."""
        if self._last_logged_step == state.global_step:
            logs = {key: value for key, value in logs.items() if key != "epoch"}
        self._last_logged_step = state.global_step
        return super().on_log(args, state, control, logs, **kwargs)

    def stage_event(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Calls `on_stage_begin` or `on_stage_end` of the callbacks that have it."""
        for callback in self.callbacks:
            handle = getattr(callback, event, None)
            if handle is not None:
                handle(args, state, control, model=self.model, **kwargs)


class StageEndCallback(TrainerCallback):
    """Ends a stage at its last step, with the log line, validation and checkpoint that belong to a stage's end.

    Args:
        last_step: Returns the run's step at which the stage ends.
        at_epoch_end: Called at the end of each epoch, before its log line, validation and checkpoint.
    """

    def __init__(self, last_step: Callable[[], int], at_epoch_end: Callable[[], None]) -> None:
        self._last_step, self._at_epoch_end = last_step, at_epoch_end

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ends the epoch too, since a stage counted in steps may end within one."""
        if state.global_step < self._last_step():
            return
        control.should_epoch_stop = True
        control.should_log |= args.logging_strategy == IntervalStrategy.STEPS
        control.should_evaluate |= args.eval_strategy == IntervalStrategy.STEPS
        control.should_save |= args.save_strategy == SaveStrategy.STEPS

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Passes the event on."""
        self._at_epoch_end()


class DiagnosisCallback(StageCallback):
    """Says what the curves show that is wrong, at the first validation or end of a stage that shows it.

    Each thing is said once a stage.

    Args:
        diagnose: Returns the findings so far.
        say: Prints a line.
    """

    def __init__(self, diagnose: Callable[[], list[Finding]], say: Callable[[str], None]) -> None:
        self._diagnose, self._say = diagnose, say
        self._said: set[tuple[str, int | None]] = set()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Prints new findings, once the stage has begun to train."""
        if state.global_step > 0:
            self._say_what_is_new()

    def on_stage_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        stage: Stage,
        record: StageRecord,
        **kwargs: Any,
    ) -> None:
        """Prints new findings."""
        self._say_what_is_new()

    def _say_what_is_new(self) -> None:
        for finding in self._diagnose():
            if (finding.signal, finding.stage) not in self._said:
                self._said.add((finding.signal, finding.stage))
                self._say(finding.sentence)
