"""What becomes of a stage: the gate's decision, the weights that the run goes on from, the record."""

import math
from typing import Any, cast

from torch import nn
from transformers import TrainerState

from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.stages.freezing import Frozen
from torchthaw.stages.plan import HEAD, Stage
from torchthaw.stages.proof import relative_changes
from torchthaw.stages.snapshots import put_back
from torchthaw.training.arguments import ThawTrainingArguments
from torchthaw.training.comparison import Comparison, compare
from torchthaw.training.gate import Decision, decide
from torchthaw.training.processes import on_main
from torchthaw.training.progress import Outcome, Progress
from torchthaw.training.records import StageRecord
from torchthaw.training.timing import Clock, peak_memory_mb


def decide_stage(
    progress: Progress,
    args: ThawTrainingArguments,
    *,
    metric: str,
    trains_head: bool = True,
    failure: str | None = None,
    tolerant: bool = False,
) -> Decision:
    """Compares the weights that a stage proposes with those before it, on the same validation images.

    Args:
        progress: The run, with what was validated before and in the stage.
        args: Gate, least gain, and the direction of the metric.
        metric: The selection metric, without the name of the validation set.
        trains_head: Whether the head is among what the stage trains.
        failure: Why the stage broke down, if it did.
        tolerant: See `gate.decide`.
    """
    candidate = progress.candidate
    if candidate is None:
        if failure is not None:
            return Decision(False, "it broke down before anything was validated; rolled back", None)
        return Decision(True, "kept without validation", None)
    comparison: Comparison | None = None
    if progress.kept is not None:
        comparison = compare(metric, progress.kept.measured, candidate.measured, seed=args.seed)
    return decide(
        cast(str, args.gate),
        comparison,
        min_gain=args.min_gain,
        greater_is_better=bool(args.greater_is_better),
        from_new_head=progress.head_is_new and trains_head,
        tolerant=tolerant,
    )


def settle_weights(progress: Progress, model: nn.Module, decision: Decision) -> None:
    """Puts the weights into the model that the run goes on from, and notes how they were validated."""
    candidate = progress.candidate
    if not decision.accepted:
        put_back(model, progress.before)
    elif candidate is None:
        progress.kept = None
    else:
        progress.kept = Outcome(candidate.step, candidate.metrics, candidate.measured)


def conclude(
    progress: Progress,
    args: ThawTrainingArguments,
    model: TorchvisionForImageClassification,
    stage: Stage,
    frozen: Frozen,
    state: TrainerState,
    *,
    failure: str | None,
    seconds: float,
    num_images: int | None,
    images_per_step: int,
    metric: str,
    clock: Clock,
    train_accuracy: dict[str, Any] | None = None,
    tolerant: bool = False,
) -> StageRecord:
    """Ends a stage: decides on the main process, settles the weights on all, and appends the record.

    Args:
        progress: The run.
        args: The run's arguments.
        model: Holds the stage's last weights; afterwards those that the run goes on from.
        stage: The stage.
        frozen: What it kept frozen.
        state: The Trainer's state at the stage's end.
        failure: Why the stage broke down, if it did.
        seconds: Wall time of the stage.
        num_images: Number of training images; None for streams.
        images_per_step: Images of one optimizer step, over all processes.
        metric: The selection metric, without the name of the validation set.
        clock: Where the time went.
        train_accuracy: See `StageRecord`.
        tolerant: See `gate.decide`.
    """
    trains_head = HEAD in frozen.live
    decision = on_main(
        lambda: decide_stage(progress, args, metric=metric, trains_head=trains_head, failure=failure, tolerant=tolerant)
    )
    candidate = progress.candidate
    if candidate is not None and candidate.weights is not None:
        put_back(model, candidate.weights)
    groups = model.layer_groups()
    changes = relative_changes(progress.before, model, groups)
    settle_weights(progress, model, decision)
    if decision.accepted and trains_head:
        model.head_is_new = progress.head_is_new = False
    rates = stage.learning_rates(list(groups))
    steps = state.global_step - progress.stage_start_step
    epochs = float(state.epoch or 0) - progress.stage_start_epoch
    if stage.solver == "probe":
        rates, epochs = dict.fromkeys(rates, 0.0), 1.0
    images = steps * images_per_step if num_images is None else round(epochs * num_images)
    best_step = None if candidate is None else candidate.step - progress.stage_start_step
    if best_step is not None and best_step <= 0:
        best_step = None  # in a try that broke down
    record = StageRecord(
        name=stage.name,
        epochs=math.ceil(epochs),
        steps=steps,
        seconds=round(seconds, 3),
        train_images_per_second=round(images / seconds, 2),
        trainable_parameters=frozen.trainable_parameters,
        best_metric=None if candidate is None else candidate.measured.value,
        learning_rates={name: rate for name, rate in rates.items() if name in frozen.live},
        batch_norm=frozen.batch_norm,
        accepted=decision.accepted,
        reason=decision.reason,
        comparison=None if decision.comparison is None else decision.comparison.to_dict(),
        changes={name: round(change, 6) for name, change in changes.items()},
        frozen_unchanged=True,
        ended_early="; then ".join([*progress.failures, *filter(None, [failure or progress.stage_over])]) or None,
        best_step=best_step,
        best_epoch=None if best_step is None else round(best_step * epochs / steps, 4),
        step_images_per_second=None if clock.steps <= 0 else round(images / clock.steps, 2),
        data_wait_share=None if clock.data_wait_share is None else round(clock.data_wait_share, 4),
        peak_memory_mb=peak_memory_mb(),
        frozen_part=progress.frozen_part,
        live_dtype=progress.live_dtype,
        train_accuracy=train_accuracy,
        selection=stage.selection,
    )
    progress.records.append(record)
    return record
