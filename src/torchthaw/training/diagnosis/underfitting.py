"""A run that learns nothing: told apart by what moved, by the gradients, by the training images, and by the labels."""

import math
from collections.abc import Iterator, Sequence

from torchthaw.stages.plan import HEAD
from torchthaw.training.diagnosis import advice
from torchthaw.training.diagnosis.advice import short
from torchthaw.training.diagnosis.chance import error_of_difference, guessed_balanced_accuracy, guessed_loss
from torchthaw.training.diagnosis.course import Course, Finding
from torchthaw.training.diagnosis.curves import Curves, Validation
from torchthaw.training.records import StageRecord

# Loss, of that of guessing or of its start, above which nothing was learned.
_UNLEARNED = 0.9
# L2 norm of a head's change over its own. A head that starts at random moves by half of its norm and more when it
# learns; below the first figure it has not begun, below the second it may be on its way.
_STILL, _ON_ITS_WAY = 0.02, 0.2
# A gradient of which this is left has not been followed: at its optimum, what is left is noise between batches, which
# falls with the loss.
_UNSPENT = 0.8
# Sum of the rates of all steps from which on Adam moves a head by more than `_STILL`, if any gradient of its weights
# comes: by each step it moves a weight by about the rate, and the weights of a new head are some hundredths.
_FAR_ENOUGH = 0.01
# Below this the network in front of the head is dead: no change of it reaches the loss.
_DEAD = 1e-6
# Of three sets of photos with good labels the audit finds 0.8 to 1.8 % suspicious, with a tenth of them drawn at random
# 2.8 to 8.6 %, with a fifth 2.0 to 13.9 % (mobilenet_v2; the lowest figures are of two classes, where it sees least).
_SUSPICIOUS = 0.05


def learned_nothing(course: Course, rows: Sequence[Validation]) -> bool:
    """Whether neither improves: validation is no better than chance, or neither loss is a tenth below guessing.

    Args:
        course: The run.
        rows: The validations to judge: of all stages, or of one.
    """
    if not course.class_counts or all(row.balanced is None for row in rows):
        return False
    if _at_chance(course, rows):
        return True
    losses = [row.loss for row in rows if row.loss is not None]
    guessed = guessed_loss(course.class_counts, course.num_classes)
    flat = len(losses) > 1 and min(losses) > _UNLEARNED * losses[0]
    return flat and min(row.eval_loss for row in rows) > _UNLEARNED * guessed


def _at_chance(course: Course, rows: Sequence[Validation]) -> bool:
    chance = guessed_balanced_accuracy(course.class_counts, course.num_classes)
    known = [row.balanced for row in rows if row.balanced is not None]
    return chance is not None and bool(known) and max(known) <= chance


def underfitting(course: Course, curves: Curves) -> Iterator[Finding]:
    """Says of a run that learned nothing why that is, the surest reason first."""
    rows = curves.rows
    if not course.records or not learned_nothing(course, rows):
        return
    seen = _what_validation_says(course, rows)
    heads = [number for number, record in enumerate(course.records) if HEAD in record.learning_rates]
    if not heads:
        yield Finding("too much frozen", f"{seen}; no stage trained the head, which starts at random",
                      advice.with_head(course), stage=0)  # fmt: skip
        return
    index = max(heads, key=lambda number: course.records[number].changes.get(HEAD, 0.0))
    moved = course.records[index].changes.get(HEAD, 0.0)
    left = curves.gradient_left(index, HEAD)
    found = (
        _by_heart(course, rows, seen)
        or _dead(course, curves, seen)
        or _without_features(course, index, moved, seen)
        or _too_low(course, index, moved, left, seen)
        or _suspicious(course, seen)
        or _frozen(course, rows, moved, seen)
        or _labels(course, rows, moved, seen)
    )
    if found is not None:
        yield found


def _what_validation_says(course: Course, rows: Sequence[Validation]) -> str:
    if _at_chance(course, rows):
        chance = guessed_balanced_accuracy(course.class_counts, course.num_classes)
        best = max(row.balanced for row in rows if row.balanced is not None)
        return f"validation is right for {best:.1%} of a class on average, where guessing reaches {chance:.1%}"
    guessed = guessed_loss(course.class_counts, course.num_classes)
    least = min(row.eval_loss for row in rows)
    return f"validation loss is {least:.3f} at best, where guessing has {guessed:.3f}, and the training loss stays too"


def _by_heart(course: Course, rows: Sequence[Validation], seen: str) -> Finding | None:
    """Training images are learned, and validation images are not: what the labels say holds for no others."""
    measured = [record for record in course.records if record.train_accuracy is not None]
    if measured:
        best = max(measured, key=_training_balance)
        figures = best.train_accuracy or {}
        chance = guessed_balanced_accuracy(figures.get("class_counts", ()), course.num_classes)
        if chance is None or _training_balance(best) <= chance or not _better_than_validation(course, rows, best):
            return None
        learned = (
            f"of {sum(figures['class_counts'])} training images, as validation would see them, "
            f"{_training_balance(best):.1%} of a class on average are right, where guessing reaches {chance:.1%}"
        )
    else:
        losses = [row.loss for row in rows if row.loss is not None]
        if not losses or min(losses) >= _UNLEARNED * min(losses[0], math.log(max(2, course.num_classes))):
            return None
        learned = f"the training loss fell from {losses[0]:.3f} to {min(losses):.3f}"
    return _about_labels(
        course, f"{seen}, although {learned}: training images are learned by heart, and nothing that holds for others"
    )


def _better_than_validation(course: Course, rows: Sequence[Validation], record: StageRecord) -> bool:
    """Whether more of the training images are right, by three standard errors of fewer than these images."""
    images = min(sum((record.train_accuracy or {}).get("class_counts", ())), sum(course.class_counts))
    shares = _training_balance(record), max(row.balanced for row in rows if row.balanced is not None)
    return images > 0 and shares[0] - shares[1] > 3 * error_of_difference(shares, images)


def _training_balance(record: StageRecord) -> float:
    return float((record.train_accuracy or {}).get("balanced_accuracy", 0.0))


def _dead(course: Course, curves: Curves, seen: str) -> Finding | None:
    """A stage whose steps left no gradient in front of the head: its units give the same for every image."""
    for index, record in enumerate(course.records):
        for group in record.learning_rates:
            left = curves.gradient_left(index, group)
            if group != HEAD and left is not None and left < _DEAD:
                rate = max(record.learning_rates.values())
                return Finding(
                    "rate too high",
                    f"{seen}; in stage {record.name!r}, at rates up to {short(rate)}, the gradient of {group} fell to "
                    f"{left:.0e} of what it was: the network is dead in front of the head",
                    advice.scaled_rate(course, index, 0.1),
                    stage=index,
                )
    return None


def _without_features(course: Course, index: int, moved: float, seen: str) -> Finding | None:
    """A head that does not move at a rate that moves any other: what is frozen gives it nothing to move by."""
    record, frozen = course.records[index], _never_trained(course)
    adaptive = (course.optimizer_of(index) or "adamw").startswith("ada")
    rate = record.learning_rates[HEAD]
    if not frozen or not adaptive or moved >= _STILL or rate * record.steps < _FAR_ENOUGH:
        return None
    return Finding(
        "too much frozen",
        f"{seen}; in {record.steps} steps at {short(rate)} the head moved by {moved:.2%} of its norm only: what is "
        f"frozen ({', '.join(frozen)}) gives it the same for all images",
        advice.less_frozen(course),
    )


def _never_trained(course: Course) -> list[str]:
    trained = {group for record in course.records for group in record.learning_rates}
    groups = dict.fromkeys(group for record in course.records for group in record.changes)
    return [group for group in groups if group not in trained]


def _too_low(course: Course, index: int, moved: float, left: float | None, seen: str) -> Finding | None:
    """The head has hardly moved; or a little, while its gradient is what it was."""
    if course.records[index].probe is not None:
        return None
    on_its_way = moved < _ON_ITS_WAY and left is not None and left > _UNSPENT and not _many_suspicious(course)
    if moved >= _STILL and not on_its_way:
        return None
    rate = max(max(record.learning_rates.values()) for record in course.records if HEAD in record.learning_rates)
    gradient = "" if left is None else f", and {left:.0%} of its gradient is left"
    return Finding(
        "rate too low",
        f"{seen}; at rates up to {short(rate)} the head moved by {moved:.2%} of its norm only{gradient}",
        advice.scaled_rate(course, index, 10),
        stage=index,
    )


def _many_suspicious(course: Course) -> bool:
    found, looked_at = course.suspicious_labels or (0, 0)
    return looked_at > 0 and found / looked_at >= _SUSPICIOUS


def _suspicious(course: Course, seen: str) -> Finding | None:
    return _about_labels(course, f"{seen}, and the head moved") if _many_suspicious(course) else None


def _frozen(course: Course, rows: Sequence[Validation], moved: float, seen: str) -> Finding | None:
    """The head moved, training images are not learned either, and some layers never trained."""
    frozen = _never_trained(course)
    if not frozen:
        return None
    losses = [row.loss for row in rows if row.loss is not None]
    loss = f"the training loss stays at {losses[-1]:.3f}" if losses else "training images are not learned either"
    return Finding(
        "too much frozen",
        f"{seen}, and {loss} although the head moved by {moved:.0%}{_training_images(course)}: what is frozen "
        f"({', '.join(frozen)}) gives no features of these classes",
        advice.less_frozen(course),
    )


def _training_images(course: Course) -> str:
    figures = [record.train_accuracy for record in course.records if record.train_accuracy is not None]
    if not figures:
        return ""
    best = max(float(figure["balanced_accuracy"]) for figure in figures)
    return f" and {best:.1%} of a class are right on training images"


def _labels(course: Course, rows: Sequence[Validation], moved: float, seen: str) -> Finding | None:
    """Nothing else is left; which is a reason only where not even chance is exceeded."""
    if not _at_chance(course, rows):
        return None
    losses = [row.loss for row in rows if row.loss is not None]
    loss = f"the training loss stays at {losses[-1]:.3f}" if losses else "training images are not learned either"
    return _about_labels(course, f"{seen}, and {loss} although every layer trains and the head moved by {moved:.0%}")


def _about_labels(course: Course, evidence: str) -> Finding:
    """Says that labels are to be looked at, with what the audit found."""
    if course.suspicious_labels is None:
        audit = ". Look at some images and their labels"
    else:
        found, looked_at = course.suspicious_labels
        audit = f". The audit finds {found} of {looked_at} labels suspicious"
        audit += ", which audit.json lists" if found else "; look at some images and their labels all the same"
    return Finding("labels", evidence + audit, advice.against_bad_labels(course))
