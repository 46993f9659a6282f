"""What can be asked for of averages of weights, checked."""

from typing import TYPE_CHECKING

from torchthaw.errors import PlanError, did_you_mean
from torchthaw.stages.plan import StagePlan
from torchthaw.stages.rates import is_finite_number
from torchthaw.stages.stage import AVERAGES, Stage

if TYPE_CHECKING:
    from torchthaw.training.arguments import ThawTrainingArguments


def average_of(args: "ThawTrainingArguments", stage: Stage) -> str:
    """Returns which average of its weights a stage hands on: its own, or the run's."""
    return stage.average or args.average


def averaged_epochs(args: "ThawTrainingArguments", epochs: int) -> int:
    """Returns how many of a stage's last epochs `swa` averages."""
    return args.swa_epochs or max(2, -(-epochs // 2))


def check_averages(args: "ThawTrainingArguments", *, validates: bool) -> None:
    """Checks what is asked for against what there is.

    Raises:
        PlanError: an average is unknown, a number is out of range, or there is no validation for `wise_ft`.
    """
    if args.average not in AVERAGES:
        raise PlanError(
            f"unknown average {args.average!r}.{did_you_mean(args.average, AVERAGES)} There are {', '.join(AVERAGES)}."
        )
    if not (is_finite_number(args.ema_decay) and 0 < args.ema_decay < 1):
        raise PlanError(f"ema_decay is {args.ema_decay!r}; write a number between 0 and 1 such as 0.999")
    epochs = args.swa_epochs
    if epochs is not None and (isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1):
        raise PlanError(f"swa_epochs is {epochs!r}; write a whole number from 1 on, or None for half of the epochs")
    if args.wise_ft and not validates:
        raise PlanError(
            "wise_ft is on, but eval_strategy is 'no', so that there is nothing to choose the share by; write "
            "eval_strategy='epoch', or wise_ft=False"
        )


def check_averaged_stages(args: "ThawTrainingArguments", *, stream: bool) -> None:
    """Checks the averages of stages against their optimizers and the training data.

    Raises:
        PlanError: the optimizer averages weights itself, or `swa` is to average over a stream, which has no epochs.
    """
    for stage in StagePlan.from_dict(args.plan).stages:  # type: ignore[arg-type]  # settled by the arguments
        kind = average_of(args, stage)
        optimizer = str(stage.optimizer or getattr(args.optim, "value", args.optim))
        if kind != "none" and optimizer.startswith("schedule_free"):
            raise PlanError(
                f"stage {stage.name!r}: average is {kind!r}, but the optimizer {optimizer} averages weights itself; "
                "write average: none, or another optimizer such as adamw_torch"
            )
        if kind == "swa" and stream:
            raise PlanError(
                f"stage {stage.name!r}: average is 'swa', the mean over ends of epochs, but the training data is a "
                "stream, whose epochs are not known; write average: ema, or load the data set without streaming"
            )
