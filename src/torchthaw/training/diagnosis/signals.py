"""What the curves show, a rule for each signal but those of a run that learns nothing, with the statistic behind it."""

import math
from collections.abc import Iterator

from torchthaw.evaluation.intervals import wilson_interval
from torchthaw.training.diagnosis import advice
from torchthaw.training.diagnosis.advice import short
from torchthaw.training.diagnosis.chance import error_of_difference, guessed_balanced_accuracy
from torchthaw.training.diagnosis.course import Course, Finding
from torchthaw.training.diagnosis.curves import Curves, Validation

# A mean validation loss moves by some percent when nothing but the order of images changes, and by more where it is
# near 0, since a few images carry it; a seventh, and 0.05 nats, are beyond that in the runs of the README.
_WORSE, _WORSE_NATS = 0.15, 0.05
# Training loss that still falls by a fifth: the network goes on learning the training images.
_BETTER = 0.8
# Validation loss over that before a stage, at its best, relative and in nats: its weights are not what they were.
_DESTROYED, _DESTROYED_NATS = 1.25, 0.1
# Standard errors of a difference that a jump must exceed. Chance alone does that once in 740 differences (two sided
# once in 370), and both of a fall and a rise more rarely, so that a run of 50 epochs stays silent 19 times of 20.
_ERRORS = 3.0
# Half the width of a 95 % interval beyond which an accuracy says little.
_WIDE = 0.15
# A stage must have been twice as long as this, in validations, before its end counts as a plateau.
_LONG_PLATEAU = 3
# Least improvement of the validation loss, relative, that counts as still learning.
_STILL_LEARNING = 0.01
# Less waiting than a quarter of the steps is not worth a change, nor is a short time.
_DATA_BOUND, _SECONDS_LOST = 0.25, 20.0


def not_finite(course: Course, curves: Curves) -> Iterator[Finding]:
    """A stage ended since something was not finite; or the log says so."""
    found = False
    for index, record in enumerate(course.records):
        ended = record.ended_early or ""
        if "finite" in ended or "the loss became" in ended:
            found = True
            yield Finding(
                "not finite", f"stage {record.name!r}: {ended}", advice.scaled_rate(course, index, 0.1), stage=index
            )
    if curves.broken and not found:
        yield Finding("not finite", curves.broken[0], advice.scaled_rate(course, max(0, len(course.records) - 1), 0.1))


def rate_too_high(course: Course, curves: Curves) -> Iterator[Finding]:
    """A stage whose best validation loss is well above that before it, or above that of guessing.

    A loss that rises while as many images or more are classified correctly is a matter of calibration, not of this.
    """
    guessing = math.log(max(2, course.num_classes))
    before, accuracy_before = guessing, 0.0
    for index, record in enumerate(course.records):
        rows = curves.of_stage(index)
        if not rows:
            continue
        best = min(row.eval_loss for row in rows)
        accuracy = max((row.accuracy for row in rows if row.accuracy is not None), default=None)
        worse = accuracy is None or accuracy < accuracy_before or before == guessing
        if best > max(_DESTROYED * before, before + _DESTROYED_NATS) and worse:
            what = "guessing gives" if before == guessing else "it was before it"
            yield Finding(
                "rate too high",
                f"stage {record.name!r}: validation loss {_short_loss(best)} at best, where {what} {before:.3f}, at "
                f"rates up to {short(max(record.learning_rates.values(), default=math.nan))}",
                advice.scaled_rate(course, index, 0.1),
                stage=index,
            )
        elif record.accepted:
            before, accuracy_before = best, accuracy or 0.0


def overfitting(course: Course, curves: Curves) -> Iterator[Finding]:
    """Two validations or more after the best of a stage, the last is worse, while the training loss still falls.

    Not where more images are classified correctly than at the best loss, by more than a standard error.
    """
    for index in curves.stages:
        rows = curves.of_stage(index)
        best = min(range(len(rows)), key=lambda number: rows[number].eval_loss)
        least, last = rows[best], rows[-1]
        if len(rows) - best <= 2 or least.loss is None or last.loss is None:
            continue
        worse = last.eval_loss - least.eval_loss > max(_WORSE * least.eval_loss, _WORSE_NATS)
        if worse and last.loss < _BETTER * least.loss and not _more_accurate(course, least, last):
            yield Finding(
                "overfitting",
                f"{course.stage_name(index)}: from epoch {least.epoch:g} to {last.epoch:g} the training loss fell "
                f"from {least.loss:.3f} to {last.loss:.3f}, and the validation loss rose from {least.eval_loss:.3f} to "
                f"{last.eval_loss:.3f}{_and_accuracy(least, last)}",
                advice.against_overfitting(course, index),
                stage=index,
            )


def _more_accurate(course: Course, first: Validation, last: Validation) -> bool:
    images = sum(course.class_counts)
    if first.accuracy is None or last.accuracy is None or not images:
        return False
    return last.accuracy - first.accuracy > error_of_difference((first.accuracy, last.accuracy), images)


def erratic(course: Course, curves: Curves) -> Iterator[Finding]:
    """Accuracy falls and comes back by more than the number of validation images explains."""
    images = sum(course.class_counts)
    if not images:
        return
    for index in curves.stages:
        rows = [(row.epoch, row.accuracy) for row in curves.of_stage(index) if row.accuracy is not None]
        for triple in zip(rows, rows[1:], rows[2:], strict=False):
            first, low, after = (accuracy for _, accuracy in triple)
            noise = _ERRORS * error_of_difference((first, low, after), images)
            if min(first, after) - low > noise:
                yield Finding(
                    "erratic validation",
                    f"{course.stage_name(index)}: accuracy {first:.3f}, {low:.3f}, {after:.3f} in epochs "
                    f"{triple[0][0]:g} to {triple[2][0]:g}, where {images} images explain jumps of {noise:.3f}",
                    _steadier(course, index),
                    stage=index,
                )
                break


def _steadier(course: Course, index: int) -> str | None:
    record = course.records[index] if index < len(course.records) else None
    steadier = None
    if record is not None and record.batch_norm == "train":
        steadier = advice.frozen_statistics(course, index)
    return steadier or advice.scaled_rate(course, index, 1 / 3)


def plateau(course: Course, curves: Curves) -> Iterator[Finding]:
    """The later half of a stage's validations brought neither a better accuracy nor a better loss.

    Both, since the accuracy of few images stands still by chance for some epochs while the loss shows that more is
    being learned.
    """
    for index, record in enumerate(course.records):
        rows = curves.of_stage(index)
        known = [row.accuracy for row in rows if row.accuracy is not None]
        if len(rows) < 2 * _LONG_PLATEAU or len(known) < len(rows):
            continue
        best = max(range(len(rows)), key=lambda number: known[number])
        enough = (1 + _STILL_LEARNING) * min(row.eval_loss for row in rows)
        gained = max(best, next(number for number, row in enumerate(rows) if row.eval_loss <= enough))
        since = len(rows) - 1 - gained
        if since < max(_LONG_PLATEAU, len(rows) / 2):
            continue
        yield Finding(
            "plateau",
            f"{course.stage_name(index)}: after epoch {rows[gained].epoch:g}, {since} more of {len(rows)} validations "
            f"brought nothing better than accuracy {max(known):.3f} and loss "
            f"{min(row.eval_loss for row in rows):.3f}, in about {record.seconds * since / len(rows):.0f} s",
            advice.shorter(course, index, math.ceil(record.epochs * (gained + 1) / len(rows))),
            stage=index,
        )


def working(course: Course, curves: Curves) -> Iterator[Finding]:
    """Both losses fell over the run, and validation is beyond chance."""
    rows = curves.rows
    chance = guessed_balanced_accuracy(course.class_counts, course.num_classes)
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


def small_validation(course: Course, curves: Curves) -> Iterator[Finding]:
    """The 95 % interval of the best accuracy (Wilson's) is so wide that choices by it are hardly better than chance."""
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


def waiting_for_data(course: Course) -> Iterator[Finding]:
    """Training waits for images; not where it reads what the frozen part gave before, whose steps are all but free."""
    for index, record in enumerate(course.records):
        share = record.data_wait_share or 0.0
        if "train" in record.frozen_part.get("cached", ()):
            continue
        if share >= _DATA_BOUND and share * record.seconds >= _SECONDS_LOST:
            yield Finding(
                "waiting for data",
                f"stage {record.name!r}: {share:.0%} of the time of its steps went by waiting for images, with "
                f"{course.num_workers} processes that load them beside the main one",
                advice.faster_loading(course),
                stage=index,
            )


def _short_loss(loss: float) -> str:
    return f"{loss:.3f}" if loss < 1000 else f"{loss:.1e}"


def _and_accuracy(first: Validation, last: Validation) -> str:
    if first.accuracy is None or last.accuracy is None:
        return ""
    return f" (accuracy {first.accuracy:.3f} to {last.accuracy:.3f})"
