"""Where the time of each stage goes: a trace of some of its steps, and what bounds it.

The order in which Trainer fires its events was read in transformers 5.23 and is tested with 5.10.1 too.
"""

import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerControl, TrainerState, TrainingArguments

from torchthaw.evaluation.files import replacing
from torchthaw.stages.plan import Stage
from torchthaw.training.bottlenecks import Circumstances, find_bottleneck
from torchthaw.training.callbacks import StageCallback
from torchthaw.training.records import StageRecord
from torchthaw.training.step_times import Step, step_shares, trace_window
from torchthaw.training.step_trace import StepTrace

FOLDER = "profile"
SUMMARY_FILE = "summary.json"


@dataclass
class _Measured:
    """What is measured of the stage that runs.

    Attributes:
        window: First step to trace, and the first after; None until the length of the stage is known.
        waited: Seconds that the stage had waited for data when it was last looked at.
        handles: Hooks on the model.
        running_trace: The trace that is being made.
        profiling_seconds: What starting it and writing its trace took.
    """

    stage: Stage
    per_epoch: int | None = None
    steps: list[Step] = field(default_factory=list)
    window: tuple[int, int] | None = None
    waited: float = 0.0
    handles: list[RemovableHandle] = field(default_factory=list)
    running_trace: StepTrace | None = None
    profiling_seconds: float = 0.0
    trace: str | None = None
    operators: list[dict[str, Any]] = field(default_factory=list)
    image_size: int | None = None
    augmented: bool = True


class ProfileCallback(StageCallback):
    """Writes a trace of each stage, and a summary that says what bounds the run.

    Into `folder/profile/` come a Chrome trace (chrome://tracing, ui.perfetto.dev) of some steps in the middle of each
    stage, and `summary.json`. The shares of a step are of all other steps, since tracing slows them down; where there
    is a GPU, some steps before the trace wait for it after each part, which shows how its work is shared out. Nothing
    that is trained changes. Of several processes, the first one is profiled.

    Args:
        folder: Output folder of the run.
        steps: How many steps of each stage to trace.

    Attributes:
        stages: What was found for each stage, as in `summary.json`: `name`, `steps`, `seconds`, `in_steps` (share of
            the stage's time), `step_seconds`, `images_per_second`, `shares` (of a step, by `PARTS`), `top_operators`
            (each with its share of all operators' own time), `trace`, `bound`, `sentence`, `advice`.

    Raises:
        ValueError: `steps` is no positive number.
    """

    def __init__(self, folder: str | os.PathLike[str], *, steps: int = 3) -> None:
        if steps < 1:
            raise ValueError(f"steps is {steps}; write how many steps of each stage to trace, such as 3")
        # Else the profiler's own log lines come between those of the run.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self.folder = Path(folder) / FOLDER
        self.stages: list[dict[str, Any]] = []
        self._traced_steps = steps
        self._measured: _Measured | None = None
        self._step: Step | None = None
        self._last = 0.0
        self._device = torch.device("cpu")

    @property
    def summary(self) -> dict[str, Any]:
        """What `summary.json` says: of each stage, and what bounds the longest one."""
        longest = max(self.stages, key=lambda stage: stage["seconds"], default=None)
        verdict = {key: None if longest is None else longest[key] for key in ("bound", "sentence", "advice")}
        return {**verdict, "device": str(self._device), "torch": torch.__version__, "stages": self.stages}

    # Events of stages

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Forgets an earlier run."""
        self.stages = []

    def on_stage_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, stage: Stage, **kwargs: Any
    ) -> None:
        """Begins to measure."""
        self._end()
        if not state.is_world_process_zero:
            return
        self._device = args.device
        self._measured = measured = _Measured(stage)
        self._last = time.perf_counter()
        model = kwargs.get("model")
        # A compiled model would be compiled anew because of hooks.
        if isinstance(model, nn.Module) and not args.torch_compile:
            measured.handles = [
                model.register_forward_pre_hook(lambda *_: self._tick("frozen", then="forward")),
                model.register_forward_hook(lambda *_: self._tick("forward", then="backward")),
            ]

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
        """Says what was found."""
        measured = self._end()
        if measured is None or not measured.steps:
            return
        self.stages.append(_describe(measured, args, record))
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / SUMMARY_FILE) as temporary:
            temporary.write_text(json.dumps(self.summary, indent=2), encoding="utf-8")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Lets go of the model."""
        self._end()

    # Events of steps

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Waits for the first batch from here on."""
        self._plan_trace(args, state, kw.get("train_dataloader"))
        self._start_trace_if_due()
        self._last = time.perf_counter()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The batches are there."""
        if self._measured is None:
            return
        self._step = Step(self._kind())
        before = self._last
        self._tick("data", then="frozen")
        # Without the figure of the trainer, all since the step before is taken for waiting.
        waited = getattr(state, "data_wait_seconds", None)
        if waited is not None:
            gap = self._last - before
            waiting = min(gap, max(0.0, waited - self._measured.waited))
            self._measured.waited = waited
            self._step.parts["data"], self._step.parts["other"] = waiting, gap - waiting

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        """Gradients of one of several batches are there."""
        self._tick("backward", then="frozen")

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Gradients are there, and clipped."""
        self._tick("backward", then="optimizer")

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """The weights have moved."""
        self._tick("optimizer", then="other")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ends the step; what is done until the next one waits for data."""
        if self._measured is None or self._step is None:
            return
        window = self._measured.window
        traced_all = window is not None and len(self._measured.steps) + 1 >= window[1]
        self._tick("other", then=None if traced_all else "data")
        self._measured.steps.append(self._step)
        self._step = None
        if traced_all:
            self._stop_trace(self._measured)
        elif len(self._measured.steps) % (self._measured.per_epoch or sys.maxsize):
            # Else validation comes first, and then the next epoch.
            self._start_trace_if_due()
        self._last = time.perf_counter()

    def on_log(self, *_: Any, **__: Any) -> None:
        """Log lines, validation and checkpoints are no part of a step."""
        self._last = time.perf_counter()

    on_evaluate = on_save = on_log

    def _tick(self, part: str, *, then: str | None) -> None:
        """Books the time since the last tick to a part of the step."""
        step = self._step
        if step is None:
            return
        if step.kind == "synced":
            torch.accelerator.synchronize()
        now = time.perf_counter()
        step.parts[part] += now - self._last
        self._last = now
        if self._measured is not None and self._measured.running_trace is not None:
            self._measured.running_trace.enter(then)

    def _kind(self) -> str:
        assert self._measured is not None
        if self._measured.running_trace is not None:
            return "traced"
        done, window = len(self._measured.steps), self._measured.window
        before_trace = window is not None and window[0] - self._traced_steps <= done < window[0]
        return "synced" if before_trace and self._device.type != "cpu" else "timed"

    # The trace

    def _plan_trace(self, args: TrainingArguments, state: TrainerState, loader: Any) -> None:
        measured = self._measured
        if measured is None or measured.window is not None:
            return
        view = getattr(loader, "dataset", None)
        crop = getattr(getattr(view, "processor", None), "crop_size", None)
        measured.image_size = None if crop is None else int(crop["height"])
        measured.augmented = getattr(view, "augmentation", None) is not None
        try:
            measured.per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
        except TypeError:  # a stream
            measured.per_epoch = None
        length = measured.stage.steps
        if length is None and measured.per_epoch is not None:
            length = (measured.stage.epochs or 1) * measured.per_epoch
        left = state.max_steps - state.global_step
        length = None if length is None else min(length, left) if left > 0 else length
        measured.window = trace_window(length, measured.per_epoch, self._traced_steps)

    def _start_trace_if_due(self) -> None:
        measured = self._measured
        if measured is None or measured.window is None or measured.running_trace is not None:
            return
        if len(measured.steps) != measured.window[0]:
            return
        started = time.perf_counter()
        measured.running_trace = StepTrace(on_device=self._device.type == "cuda")
        measured.profiling_seconds += time.perf_counter() - started

    def _stop_trace(self, measured: _Measured) -> None:
        trace, measured.running_trace = measured.running_trace, None
        if trace is None:
            return
        started = time.perf_counter()
        name = re.sub(r"[^0-9A-Za-z]+", "-", measured.stage.name).strip("-") or "stage"
        measured.trace = f"trace-{len(self.stages) + 1}-{name}.json.gz"
        self.folder.mkdir(parents=True, exist_ok=True)
        measured.operators = trace.stop(self.folder / measured.trace)
        measured.profiling_seconds += time.perf_counter() - started

    def _end(self) -> _Measured | None:
        """Ends the measuring of a stage, however it came to its end."""
        measured, self._measured, self._step = self._measured, None, None
        if measured is not None:
            self._stop_trace(measured)
            for handle in measured.handles:
                handle.remove()
        return measured


def _describe(measured: _Measured, args: TrainingArguments, record: StageRecord) -> dict[str, Any]:
    shares, step_seconds = step_shares(measured.steps)
    # Of a resumed stage, only the steps since then were seen.
    seconds = max(record.seconds - measured.profiling_seconds, 1e-9)
    in_steps = min(1.0, step_seconds * record.steps / seconds)
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    operator = measured.operators[0]["name"] if measured.operators else None
    found = find_bottleneck(measured.stage.name, shares, in_steps, operator, _circumstances(measured, args, record))
    return {
        "name": measured.stage.name,
        "steps": len(measured.steps),
        "seconds": round(seconds, 3),
        "in_steps": round(in_steps, 4),
        "step_seconds": round(step_seconds, 6),
        "images_per_second": round(batch / max(step_seconds, 1e-12), 1),
        "shares": {part: round(share, 4) for part, share in shares.items()},
        "top_operators": measured.operators,
        "trace": measured.trace,
        "bound": found.bound,
        "sentence": found.sentence,
        "advice": found.advice,
    }


def _circumstances(measured: _Measured, args: TrainingArguments, record: StageRecord) -> Circumstances:
    frozen = record.frozen_part
    return Circumstances(
        num_workers=args.dataloader_num_workers or 0,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        batch_size=args.per_device_train_batch_size,
        image_size=measured.image_size,
        device=args.device.type,
        frozen_dtype=frozen.get("dtype"),
        train_cached="train" in frozen.get("cached", ()),
        augmented=measured.augmented,
    )
