"""Callbacks and their handling over a run of several stages."""

import math
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler


class _OneRunCallbackHandler(CallbackHandler):
    """Fires `on_train_begin` at the first stage only: every stage passes through the Trainer's loop from its start."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> Any:
        if state.global_step > 0:
            return control
        return super().on_train_begin(args, state, control, **kwargs)


def fire_train_begin_once(handler: CallbackHandler) -> None:
    """Makes a handler report one `train_begin` for a run of several stages, keeping its callbacks and references."""
    handler.__class__ = _OneRunCallbackHandler


class ProgressCallback(TrainerCallback):
    """Follows a staged run step by step and epoch by epoch.

    Args:
        current_stage: Returns the name of the stage that runs.
        move: Moves a progress bar; takes the steps done, all steps, and a text.
        say: Prints a line.
    """

    def __init__(
        self, current_stage: Callable[[], str], move: Callable[[int, int, str], None], say: Callable[[str], None]
    ) -> None:
        self._current_stage, self._move, self._say = current_stage, move, say
        self._training_loss: float | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Moves the bar."""
        self._move(state.global_step, state.max_steps, f"{self._current_stage()}, epoch {math.ceil(state.epoch or 0)}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Prints one line for each epoch, once its validation is known."""
        logs = logs or {}
        self._training_loss = logs.get("loss", self._training_loss)
        if "eval_loss" not in logs or self._training_loss is None:
            return
        names = {"eval_accuracy": "accuracy", "eval_macro_f1": "macro F1"}
        figures = [f"{name} {logs[key]:.4f}" for key, name in names.items() if key in logs]
        self._say(
            f"epoch {round(state.epoch or 0)} of {args.num_train_epochs:g} ({self._current_stage()}): "
            f"training loss {self._training_loss:.4f}, validation loss {logs['eval_loss']:.4f}, {', '.join(figures)}"
        )
