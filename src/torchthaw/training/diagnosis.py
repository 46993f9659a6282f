"""Reads the curves of a run and says in words what went well or wrong, by which figures, and what to write instead.

The table of signals is the usual one of fine-tuning practice: both losses fall (working); training improves while
validation worsens (overfitting); neither improves (rate too low, too much frozen, or bad labels); loss explodes (rate
too high); validation jumps (erratic, or too small). Thresholds are stated with each rule; a rule that is not sure says
nothing.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torchthaw.backbones.anatomy import HEAD
from torchthaw.evaluation.intervals import wilson_interval
from torchthaw.training.records import StageRecord

# Validation loss above its least, relative and in nats, that counts as worse; training loss that counts as better.
_WORSE, _WORSE_NATS, _BETTER = 0.15, 0.05, 0.8
# A stage whose best validation loss is so many times that before it has destroyed something.
_DESTROYED = 1.25
# Training loss, of that of guessing or of its start, above which nothing was learned.
_UNLEARNED = 0.9
# L2 norm of a head's change over its own: a head that starts at random has to move further than this.
_STILL = 0.02
# Standard errors that a jump of validation must exceed, and half the width of an interval that says little.
_ERRORS, _WIDE = 3.0, 0.15
_LONG_PLATEAU = 3
_DATA_BOUND, _SECONDS_LOST = 0.25, 10.0
_LOOK_AT_LABELS = "audit: strict, and a look at the suspicious labels in audit.json"


@dataclass(frozen=True)
class Finding:
    """Something that the curves show.

    Attributes:
        signal: `working`, `overfitting`, `rate too high`, `rate too low`, `too much frozen`, `labels`, `not finite`,
            `erratic validation`, `small validation`, `plateau` or `waiting for data`.
        evidence: The figures that it was read off.
        advice: A line of a recipe to try; None where there is nothing to change.
    """

    signal: str
    evidence: str
    advice: str | None = None

    @property
    def sentence(self) -> str:
        """All of it in a line."""
        return f"{self.signal}: {self.evidence}" + (f". Try {self.advice}" if self.advice else "")

    def to_dict(self) -> dict[str, Any]:
        """Returns the finding as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Course:
    """What a diagnosis is made of.

    Attributes:
        log: `trainer.state.log_history`.
        records: The stages that are over.
        class_counts: Validation images of each class; empty where there are none or they are not known.
        num_classes: Number of classes.
        num_workers: Processes that load images.
        over: Whether the run has ended; before that, nothing is said that later stages may change.
    """

    log: Sequence[Mapping[str, Any]]
    records: Sequence[StageRecord] = ()
    class_counts: Sequence[int] = ()
    num_classes: int = 2
    num_workers: int = 0
    over: bool = True


@dataclass
class _Row:
    """One validation, with the training loss up to it."""

    stage: int
    epoch: float
    loss: float | None
    eval_loss: float
    accuracy: float | None
    balanced: float | None


@dataclass
class _Curves:
    """The validations of a run, and those of each stage."""

    start: _Row | None = None
    rows: list[_Row] = field(default_factory=list)

    @classmethod
    def of(cls, log: Sequence[Mapping[str, Any]]) -> "_Curves":
        curves, losses = cls(), []
        for line in log:
            if "loss" in line:
                losses.append(float(line["loss"]))
            if "eval_loss" not in line:
                continue
            row = _Row(
                stage=int(line.get("stage", 0)),
                epoch=float(line.get("epoch", 0)),
                loss=sum(losses) / len(losses) if losses else None,
                eval_loss=float(line["eval_loss"]),
                accuracy=line.get("eval_accuracy"),
                balanced=line.get("eval_balanced_accuracy"),
            )
            losses = []
            if line.get("step") == 0:
                curves.start = row
            else:
                curves.rows.append(row)
        return curves

    def of_stage(self, index: int) -> list[_Row]:
        return [row for row in self.rows if row.stage == index]


def diagnose(course: Course) -> list[Finding]:
    """Says what the curves of a run, or of its part so far, show.

    Args:
        course: The run.

    Returns:
        The findings, the gravest first. Of a run in which nothing is wrong that is `working`, or nothing where too
        little is known; of a run that is not over yet, nothing that its rest may still change.
    """
    curves = _Curves.of(course.log)
    found = [*_not_finite(course), *_too_high(course, curves)]
    if not found and course.over:
        found += _not_learning(course, curves)
    if not found:
        found += _overfitting(course, curves)
    found += _erratic(course, curves)
    found += _waiting(course)
    if not course.over:
        return found
    healthy = [] if found else [*_plateau(course, curves), *_working(course, curves)]
    return [*found, *healthy, *_small_validation(course, curves)]


def _not_finite(course: Course) -> Iterator[Finding]:
    for record in course.records:
        ended = record.ended_early or ""
        if "finite" in ended or "the loss became" in ended:
            rate = max(record.learning_rates.values())
            yield Finding("not finite", f"stage {record.name!r}: {ended}", f"learning_rate: {_short(rate / 10)}")


def _too_high(course: Course, curves: _Curves) -> Iterator[Finding]:
    """A stage whose best validation loss is well above that before it, or above that of guessing."""
    guessing = math.log(course.num_classes)
    before = guessing
    for index, record in enumerate(course.records):
        rows = curves.of_stage(index)
        if not rows:
            continue
        best = min(row.eval_loss for row in rows)
        if best > _DESTROYED * before:
            rate = max(record.learning_rates.values())
            what = "guessing gives" if before == guessing else "it was before it"
            yield Finding(
                "rate too high",
                f"stage {record.name!r}: validation loss {best:.3f} at best, where {what} {before:.3f}, at rates up to "
                f"{_short(rate)}",
                f"learning_rate: {_short(rate / 10)}",
            )
        elif record.accepted:
            before = best


def _not_learning(course: Course, curves: _Curves) -> Iterator[Finding]:
    """Validation no better than chance after all stages; the weights and the training loss tell why."""
    chance = _chance(course)
    known = [row.balanced for row in curves.rows if row.balanced is not None]
    if not course.records or chance is None or not known or max(known) > chance:
        return
    losses = [row.loss for row in curves.rows if row.loss is not None]
    balanced = f"validation is right for {max(known):.1%} of a class on average, where guessing reaches {chance:.1%}"
    heads = [record for record in course.records if HEAD in record.learning_rates]
    if not heads:
        yield Finding("too much frozen", f"{balanced}; no stage trained the head, which starts at random",
                      "unfreeze: head")  # fmt: skip
        return
    moved = max(record.changes.get(HEAD, 0.0) for record in heads)
    rate = max(max(record.learning_rates.values()) for record in heads)
    if moved < _STILL:
        yield Finding(
            "rate too low",
            f"{balanced}; at rates up to {_short(rate)} the head moved by {moved:.2%} of its norm only",
            f"learning_rate: {_short(10 * rate)}",
        )
        return
    learned = losses and min(losses) < _UNLEARNED * min(losses[0], math.log(course.num_classes))
    if learned:
        yield Finding(
            "labels",
            f"{balanced}, although the training loss fell from {losses[0]:.3f} to {min(losses):.3f}: training images "
            "are learned by heart, and nothing that holds for others",
            _LOOK_AT_LABELS,
        )
    elif all(len(record.learning_rates) < len(record.changes) for record in course.records):
        yield Finding(
            "too much frozen",
            f"{balanced}, and the training loss stays at {losses[-1] if losses else math.nan:.3f}: what is frozen "
            "gives no features of these classes",
            "plan: full",
        )
    else:
        yield Finding(
            "labels",
            f"{balanced}, and the training loss stays at {losses[-1] if losses else math.nan:.3f} although every layer "
            f"trains and the head moved by {moved:.0%}",
            _LOOK_AT_LABELS,
        )


def _overfitting(course: Course, curves: _Curves) -> Iterator[Finding]:
    """Two validations or more after the best of a stage, the last is worse, while the training loss still falls."""
    for index in sorted({row.stage for row in curves.rows}):
        rows = curves.of_stage(index)
        best = min(range(len(rows)), key=lambda number: rows[number].eval_loss)
        least, last = rows[best], rows[-1]
        if len(rows) - best <= 2 or least.loss is None or last.loss is None:
            continue
        worse = last.eval_loss - least.eval_loss > max(_WORSE * least.eval_loss, _WORSE_NATS)
        if worse and last.loss < _BETTER * least.loss:
            yield Finding(
                "overfitting",
                f"{_stage_name(course, index)}: from epoch {least.epoch:g} to {last.epoch:g} the training loss fell "
                f"from {least.loss:.3f} to {last.loss:.3f}, and the validation loss rose from {least.eval_loss:.3f} to "
                f"{last.eval_loss:.3f}{_and_accuracy(least, last)}",
                "augmentation: strong, or patience: 1 in the stage",
            )


def _erratic(course: Course, curves: _Curves) -> Iterator[Finding]:
    """Accuracy falls and comes back by more than the number of validation images explains."""
    images = sum(course.class_counts)
    if not images:
        return
    for index in sorted({row.stage for row in curves.rows}):
        rows = [row for row in curves.of_stage(index) if row.accuracy is not None]
        for first, low, after in zip(rows, rows[1:], rows[2:], strict=False):
            values = [float(row.accuracy or 0) for row in (first, low, after)]
            # As if the two validations had been on different images: on the same ones they differ less.
            noise = math.sqrt(2 * max(v * (1 - v) for v in values) / images)
            fall, back = values[0] - values[1], values[2] - values[1]
            if min(fall, back) > _ERRORS * noise:
                yield Finding(
                    "erratic validation",
                    f"{_stage_name(course, index)}: accuracy {values[0]:.3f}, {values[1]:.3f}, {values[2]:.3f} in "
                    f"epochs {first.epoch:g} to {after.epoch:g}, where {images} images explain jumps of "
                    f"{_ERRORS * noise:.3f}",
                    _steadier(course, index),
                )
                break


def _steadier(course: Course, index: int) -> str | None:
    record = course.records[index] if index < len(course.records) else None
    if record is not None and record.batch_norm == "train":
        return "batch_norm: eval in the stage"
    if record is None:
        return None
    return f"learning_rate: {_short(max(record.learning_rates.values()) / 3)} in the stage"


def _plateau(course: Course, curves: _Curves) -> Iterator[Finding]:
    """The better half of the last stage's validations brought nothing more."""
    if not course.records:
        return
    index = len(course.records) - 1
    rows = curves.of_stage(index)
    values = [row.accuracy for row in rows]
    if len(rows) < 2 * _LONG_PLATEAU or any(value is None for value in values):
        return
    accuracies = [float(value or 0) for value in values]
    best = max(range(len(rows)), key=lambda number: accuracies[number])
    since = len(rows) - 1 - best
    if since >= max(_LONG_PLATEAU, len(rows) / 2):
        seconds = course.records[index].seconds * since / len(rows)
        yield Finding(
            "plateau",
            f"{_stage_name(course, index)}: accuracy {accuracies[best]:.3f} in epoch {rows[best].epoch:g} was not "
            f"reached again in {since} more, about {seconds:.0f} s",
            "patience: 2 in the stage",
        )


def _working(course: Course, curves: _Curves) -> Iterator[Finding]:
    """Both losses fell over the run, and validation is beyond chance."""
    rows, chance = curves.rows, _chance(course)
    if not rows or not course.records or chance is None:
        return
    first, best = curves.start or rows[0], min(rows, key=lambda row: row.eval_loss)
    losses = [row.loss for row in rows if row.loss is not None]
    fell = len(losses) > 1 and min(losses[1:]) < losses[0] and best.eval_loss < first.eval_loss
    if fell and (best.balanced or 0.0) > chance:
        yield Finding(
            "working",
            f"training loss {losses[0]:.3f} to {min(losses):.3f}, validation loss {first.eval_loss:.3f} to "
            f"{best.eval_loss:.3f}{_and_accuracy(first, best)}",
        )


def _small_validation(course: Course, curves: _Curves) -> Iterator[Finding]:
    images = sum(course.class_counts)
    values = [row.accuracy for row in curves.rows if row.accuracy is not None]
    if not images or not values:
        return
    low, high = wilson_interval(round(max(values) * images), images)
    if (high - low) / 2 > _WIDE:
        yield Finding(
            "small validation",
            f"{images} images: an accuracy of {max(values):.2f} may be anything from {low:.2f} to {high:.2f}",
            "cv: 5",
        )


def _waiting(course: Course) -> Iterator[Finding]:
    for record in course.records:
        share = record.data_wait_share or 0.0
        if share >= _DATA_BOUND and share * record.seconds >= _SECONDS_LOST:
            yield Finding(
                "waiting for data",
                f"stage {record.name!r}: {share:.0%} of the time of its steps went by waiting for images, with "
                f"{course.num_workers} processes that load them",
                f"num_workers: {2 * course.num_workers or 2}",
            )


def _chance(course: Course) -> float | None:
    """Returns the balanced accuracy that guessing exceeds once in a hundred times; None without validation images."""
    counts = [count for count in course.class_counts if count]
    if not counts:
        return None
    guess = 1 / course.num_classes
    error = math.sqrt(sum(guess * (1 - guess) / count for count in counts)) / len(counts)
    return guess + 2.33 * error


def _stage_name(course: Course, index: int) -> str:
    return f"stage {course.records[index].name!r}" if index < len(course.records) else "this stage"


def _and_accuracy(first: _Row, last: _Row) -> str:
    if first.accuracy is None or last.accuracy is None:
        return ""
    return f" (accuracy {first.accuracy:.3f} to {last.accuracy:.3f})"


def _short(rate: float) -> str:
    return f"{rate:.1e}".replace("e-0", "e-").replace("e+0", "e+").replace(".0e", "e")
