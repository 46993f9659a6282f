"""The rules put together: which of them speaks when another one has spoken."""

from torchthaw.training.diagnosis import signals
from torchthaw.training.diagnosis.course import ALARMS, ORDER, Course, Finding
from torchthaw.training.diagnosis.curves import read_curves
from torchthaw.training.diagnosis.underfitting import learned_nothing, underfitting


def diagnose(course: Course) -> list[Finding]:
    """Says what the curves of a run, or of its part so far, show.

    Args:
        course: The run.

    Returns:
        The findings in the order of `ORDER`, the gravest first. Of a run in which nothing is wrong that is `working`,
        or nothing where too little is known; of a run that is not over yet, nothing that its rest may still change.
    """
    curves = read_curves(course.log)
    found = [*signals.not_finite(course, curves), *signals.rate_too_high(course, curves)]
    if not found and course.over:
        found += underfitting(course, curves)
    if not found:
        found += signals.overfitting(course, curves)
    found += signals.erratic(course, curves)
    found += signals.waiting_for_data(course)
    if course.over:
        if not any(finding.signal in ALARMS for finding in found):
            found += signals.plateau(course, curves)
            if not learned_nothing(course, curves.rows):
                found += signals.working(course, curves)
        found += signals.small_validation(course, curves)
    return sorted(found, key=lambda finding: ORDER.index(finding.signal))


def wants_training_accuracy(course: Course, stage: int) -> bool:
    """Whether a stage, by its validations, learned nothing, so that its reason shows on training images."""
    return learned_nothing(course, read_curves(course.log).of_stage(stage))
