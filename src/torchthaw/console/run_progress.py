"""The progress of a staged run: one bar over all of it on a terminal, plain lines elsewhere."""

import math
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from rich.live import Live
from transformers import TrainerControl, TrainerState, TrainingArguments

from torchthaw.console.estimates import TimeLeft
from torchthaw.console.reporter import Reporter
from torchthaw.console.run_bar import RunBar
from torchthaw.console.text import metric_name
from torchthaw.stages.plan import Stage
from torchthaw.training.callbacks import StageCallback
from torchthaw.training.records import StageRecord

# Of each step's loss, this share enters the smoothed one.
_SMOOTHING = 0.1
# Steps between two looks at the losses, which makes the host wait for the device.
_SECONDS_BETWEEN_LOOKS = 0.25
# Lines off a terminal: one for each epoch, or for this share of a run's steps if epochs are shorter or longer.
_SHARE_OF_SHORT_EPOCHS = 0.04
_SHARE_OF_LONG_EPOCHS = 0.1
_SECONDS_BETWEEN_LINES = 10


@dataclass(frozen=True)
class RunPart:
    """What a run is of a larger one.

    Attributes:
        name: Such as `fold 2/5`; empty for a run that stands for itself.
        seconds: How long each stage took in the parts before; this part's are added.
    """

    name: str = ""
    seconds: MutableMapping[str, float] = field(default_factory=dict)


class RunProgressCallback(StageCallback):
    """Shows how a staged run goes on: a bar where there is a terminal, a line for each validation and each stage.

    Where epochs are short there are fewer lines than epochs; where they are long, and there is no terminal, lines
    come within them.

    Args:
        reporter: Where to.
        part: What the run is of a larger one.
        now: The clock, in seconds.
    """

    def __init__(
        self,
        reporter: Reporter,
        part: RunPart | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reporter, self._part, self._now = reporter, part or RunPart(), now
        self._time_left = TimeLeft(dict(self._part.seconds))
        self._bar = RunBar(part=self._part.name, seconds_left=self._seconds_left)
        self._losses: list[torch.Tensor] = []
        self._looked = -math.inf
        self._waited = self._stepping = 0.0
        self._mark = 0.0
        self._training_loss: float | None = None
        self._said_step, self._said_at = 0, now()
        self._in_steps = ""

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Shows the bar while the block runs; it vanishes at its end, whatever ends it."""
        if not self._reporter.draws:
            yield
            return
        with Live(
            get_renderable=lambda: self._bar, console=self._reporter.console, refresh_per_second=4, transient=True
        ):
            yield

    def computing(self, split: str, done: int, total: int) -> None:
        """Tells that the frozen part is computed for so many images of a split."""
        self._bar.doing = f"frozen layers of {split} images: {done} of {total}" if done < total else ""

    def on_stage_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, stage: Stage, **kwargs: Any
    ) -> None:
        """Begins the stage's figures anew."""
        index, names = state.stage_index, state.stage_names  # type: ignore[attr-defined]
        first, steps, epochs = (getattr(state, name) for name in ("stage_start_step", "stage_steps", "stage_epochs"))
        left = steps - (state.global_step - first)
        self._mark = self._now()
        later = names[index + 1 :]
        self._time_left.start_stage(later, steps=left, epochs=epochs * left / max(1, steps), now=self._mark)
        self._losses.clear()
        self._waited = self._stepping = 0.0
        self._bar.stage, self._bar.doing = stage.name, ""
        self._bar.rate = self._bar.loss = self._bar.waiting = None
        self._bar.step, self._bar.steps = state.global_step, state.max_steps
        self._in_steps = "linear probe" if stage.solver == "probe" else ""
        choice = getattr(state, "stage_choice", None)
        if choice:
            rate = stage.learning_rate if isinstance(stage.learning_rate, float) else None
            at = "" if rate is None else f" (up to {rate:g})"
            self._reporter.say(f"stage {stage.name}: {choice}{at}")

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ends the pause between epochs."""
        self._mark = self._now()
        self._time_left.resume(self._mark)
        self._bar.doing = self._in_steps
        self._bar.epoch, self._bar.epochs = math.floor(state.epoch or 0) + 1, state.num_train_epochs

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves the bar."""
        now = self._now()
        self._stepping += now - self._mark
        self._waited = getattr(state, "data_wait_seconds", 0.0)
        self._mark = now
        self._time_left.step(now)
        bar = self._bar
        bar.doing, bar.step, bar.steps = "", state.global_step, state.max_steps
        # The last group is the head, or else what trains next to it.
        bar.rate = float(kwargs["optimizer"].param_groups[-1]["lr"])
        if self._reporter.quiet:
            return
        self._losses += getattr(state, "step_losses", [])
        if now - self._looked >= _SECONDS_BETWEEN_LOOKS:
            self._looked = now
            self._take_losses()
            bar.waiting = min(1.0, self._waited / self._stepping) if self._stepping > 0 else None
        self._maybe_say_step(state, now)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Says what the bar waits for."""
        self._bar.doing = "validating"

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Shows the metric by which weights are chosen."""
        key = f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        self._bar.doing = ""
        if metrics and key in metrics:
            self._bar.metric = (metric_name(key), metrics[key])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Prints a line for a validation, once its training loss is known."""
        logs = logs or {}
        self._training_loss = logs.get("loss", self._training_loss)
        if "eval_loss" not in logs or self._training_loss is None:
            return
        is_stages_last = state.global_step >= state.stage_start_step + state.stage_steps  # type: ignore[attr-defined]
        if not is_stages_last and self._share_since_said(state) < _SHARE_OF_SHORT_EPOCHS:
            return
        first = "eval_map" if "eval_map" in logs else "eval_accuracy"
        figures = [f"{metric_name(key)} {logs[key]:.4f}" for key in (first, "eval_macro_f1") if key in logs]
        self._say(
            state,
            f"training loss {self._training_loss:.4f}, validation loss {logs['eval_loss']:.4f}, {', '.join(figures)}",
        )

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
        """Prints what was decided, and how far the layer groups moved."""
        self._part.seconds[stage.name] = record.seconds
        if record.probe is not None and record.probe["macro_f1"] is not None:
            self._reporter.say(
                f"stage {stage.name}: linear probe, macro F1 {record.probe['macro_f1']:.4f} on "
                f"{record.probe['held_out_images']} training images, held out in turn"
            )
        moved = ", ".join(f"{group} {change:.2%}" for group, change in record.changes.items() if change)
        self._reporter.say(f"stage {stage.name}: {record.reason}. Moved: {moved or 'nothing'}.")
        if record.ended_early:
            self._reporter.say(f"stage {stage.name} ended early: {record.ended_early}")
        self._bar.doing = "saving" if state.global_step >= state.max_steps else ""

    def _seconds_left(self) -> tuple[float | None, float | None]:
        now = self._now()
        return self._time_left.of_run(now), self._time_left.of_stage(now)

    def _take_losses(self) -> None:
        if not self._losses:
            return
        losses = torch.stack([loss.float() for loss in self._losses]).tolist()
        self._losses.clear()
        smoothed = self._bar.loss
        for loss in losses:
            smoothed = loss if smoothed is None else smoothed + _SMOOTHING * (loss - smoothed)
        self._bar.loss = smoothed

    def _share_since_said(self, state: TrainerState) -> float:
        return (state.global_step - self._said_step) / max(1, state.max_steps)

    def _maybe_say_step(self, state: TrainerState, now: float) -> None:
        """Prints a line within a long epoch, where no bar shows how far it is."""
        if self._reporter.draws or self._share_since_said(state) < _SHARE_OF_LONG_EPOCHS:
            return
        if now - self._said_at < _SECONDS_BETWEEN_LINES:
            return
        self._take_losses()
        loss = "" if self._bar.loss is None else f", training loss {self._bar.loss:.4f}"
        self._say(state, f"step {state.global_step} of {state.max_steps}{loss}, {self._bar.left()}")

    def _say(self, state: TrainerState, text: str) -> None:
        self._said_step, self._said_at = state.global_step, self._now()
        part = f"{self._part.name}, " if self._part.name else ""
        epoch = f"epoch {math.ceil(state.epoch or 0)} of {state.num_train_epochs}"
        self._reporter.say(f"{part}{epoch} ({cast(Any, state).stage_name}): {text}")
