"""Reads the log of a run: its validations, with the training loss and gradients up to each; whatever a log may hold."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_GRADIENT = "grad_norm/"


@dataclass(frozen=True)
class Validation:
    """One validation.

    Attributes:
        stage: Number of the stage.
        epoch: Epochs of the run before it.
        eval_loss: Mean cross entropy over the validation images, in nats.
        loss: Mean training loss since the validation before; None if it was not logged.
        accuracy: Share of the images that are classified correctly; None if it was not measured.
        balanced: The same as the mean over the classes.
    """

    stage: int
    epoch: float
    eval_loss: float
    loss: float | None = None
    accuracy: float | None = None
    balanced: float | None = None


@dataclass
class Curves:
    """The course of a run in figures.

    Attributes:
        start: The validation before the first step; None if there was none.
        rows: The later ones, in order. Those without a finite loss are left out.
        gradients: Of each stage and layer group the gradient norms of its training lines, in order.
        broken: What is not finite, in words.
    """

    start: Validation | None = None
    rows: list[Validation] = field(default_factory=list)
    gradients: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def of_stage(self, index: int) -> list[Validation]:
        """Returns the validations of a stage."""
        return [row for row in self.rows if row.stage == index]

    @property
    def stages(self) -> list[int]:
        """Numbers of the stages that were validated."""
        return sorted({row.stage for row in self.rows})

    def gradient_left(self, index: int, group: str) -> float | None:
        """Returns a group's gradient norm at a stage's end over that at its start; None where that is not known."""
        norms = self.gradients.get(index, {}).get(group, [])
        return norms[-1] / norms[0] if len(norms) > 1 and norms[0] > 0 else None


def read_curves(log: Sequence[Mapping[str, Any]]) -> Curves:
    """Reads `trainer.state.log_history`; keys that are missing, or hold no number, are left out of the figures."""
    curves, losses = Curves(), []
    for line in log:
        stage = int(number(line.get("stage")) or 0)
        epoch = number(line.get("epoch")) or 0.0
        if "loss" in line:
            loss = number(line["loss"])
            if loss is None:
                curves.broken.append(f"the training loss is {line['loss']} in epoch {epoch:g}")
            else:
                losses.append(loss)
            _add_gradients(curves.gradients.setdefault(stage, {}), line)
        if "eval_loss" not in line:
            continue
        eval_loss = number(line["eval_loss"])
        if eval_loss is None:
            curves.broken.append(f"the validation loss is {line['eval_loss']} after epoch {epoch:g}")
            continue
        row = Validation(
            stage=stage,
            epoch=epoch,
            eval_loss=eval_loss,
            loss=sum(losses) / len(losses) if losses else None,
            accuracy=_share(line.get("eval_accuracy")),
            balanced=_share(line.get("eval_balanced_accuracy")),
        )
        losses = []
        if line.get("step") == 0:
            curves.start = row
        else:
            curves.rows.append(row)
    return curves


def number(value: Any) -> float | None:
    """Returns a finite number as it is, and None for anything else."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None


def _share(value: Any) -> float | None:
    share = number(value)
    return share if share is not None and 0 <= share <= 1 else None


def _add_gradients(norms: dict[str, list[float]], line: Mapping[str, Any]) -> None:
    for key, value in line.items():
        norm = number(value)
        if isinstance(key, str) and key.startswith(_GRADIENT) and norm is not None:
            norms.setdefault(key.removeprefix(_GRADIENT), []).append(norm)
