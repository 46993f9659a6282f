"""Reads the curves of a run and says in words what went well or wrong, by which figures, and what to write instead.

The table of signals is the usual one of fine-tuning practice: both losses fall (working); training improves while
validation worsens (overfitting); neither improves (rate too low, too much frozen, or bad labels); loss explodes (rate
too high); validation jumps (erratic, or too small). A rule that is not sure says nothing.
"""

from torchthaw.training.diagnosis.course import ORDER, Course, Finding
from torchthaw.training.diagnosis.diagnose import diagnose, wants_training_accuracy

__all__ = ["ORDER", "Course", "Finding", "diagnose", "wants_training_accuracy"]
