"""What a diagnosis is made of, and what it says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchthaw.stages.plan import StagePlan
from torchthaw.training.records import StageRecord

# The gravest first: what spoils weights, what learns nothing, what learns the wrong thing, what costs time, what is
# well, and how sure all of that is.
ORDER = (
    "not finite", "rate too high", "too much frozen", "rate too low", "labels", "overfitting", "erratic validation",
    "waiting for data", "plateau", "working", "small validation",
)  # fmt: skip
# Those that do not go together with `working`.
ALARMS = ORDER[: ORDER.index("waiting for data")]


@dataclass(frozen=True)
class Finding:
    """Something that the curves show.

    Attributes:
        signal: One of `ORDER`.
        evidence: The figures that it was read off.
        advice: A line of a recipe to try, which replaces the recipe's own; None where there is nothing to change.
        stage: Number of the stage that shows it; None for the whole run.
    """

    signal: str
    evidence: str
    advice: str | None = None
    stage: int | None = field(default=None, compare=False)

    @property
    def sentence(self) -> str:
        """All of it in a line."""
        return f"{self.signal}: {self.evidence}" + (f". Try {self.advice}" if self.advice else "")

    def to_dict(self) -> dict[str, Any]:
        """Returns what `results.json` says of it."""
        return {"signal": self.signal, "evidence": self.evidence, "advice": self.advice}


@dataclass(frozen=True)
class Course:
    """What a diagnosis is made of.

    Attributes:
        log: `trainer.state.log_history`.
        records: The stages that are over.
        class_counts: Validation images of each class; empty where there are none or they are not known.
        num_classes: Number of classes.
        over: Whether the run has ended; before that, nothing is said that later stages may change.
        plan: The stages as they were asked for, what is left open included; None where that is not known.
        learning_rate: The run's rate of a new head, with which rates that the plan leaves open move.
        augmentation: Name or fields of the run's augmentation.
        label_smoothing: Share of each label that is spread over all classes.
        optimizer: The run's kind of optimizer, as transformers names it.
        num_workers: Processes that load images.
        cores: Processors that they could use.
        image_size: Side of the training images in pixels.
        suspicious_labels: Number of images whose labels the audit finds suspicious, and of those that it looked at;
            None where it did not look for them.
    """

    log: Sequence[Mapping[str, Any]]
    records: Sequence[StageRecord] = ()
    class_counts: Sequence[int] = ()
    num_classes: int = 2
    over: bool = True
    plan: StagePlan | None = None
    learning_rate: float | None = None
    augmentation: str | Mapping[str, Any] | None = None
    label_smoothing: float = 0.0
    optimizer: str | None = None
    num_workers: int = 0
    cores: int = 1
    image_size: int | None = None
    suspicious_labels: tuple[int, int] | None = None

    def optimizer_of(self, index: int) -> str | None:
        """Returns the kind of optimizer of a stage; None where it is not known."""
        own = self.plan.stages[index].optimizer if self.plan is not None and index < len(self.plan.stages) else None
        return own or self.optimizer

    def stage_name(self, index: int) -> str:
        """Returns what messages call a stage."""
        if index < len(self.records):
            return f"stage {self.records[index].name!r}"
        if self.plan is not None and index < len(self.plan.stages):
            return f"stage {self.plan.stages[index].name!r}"
        return "this stage"
