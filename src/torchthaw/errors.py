"""Errors that torchthaw raises on purpose: one clear message, no traceback on the command line."""

import difflib
from collections.abc import Iterable


class ThawError(ValueError):
    """Something the user passed cannot work; the message says what it was, why, and what to write instead.

    Attributes:
        exit_code: What the command line ends with.
    """

    exit_code = 2


class RecipeError(ThawError):
    """A recipe, or an override of one, has an unknown key or a value out of range."""


class WeightsError(ThawError):
    """Pretrained weights are missing, unreachable, or do not fit the architecture."""


class DataError(ThawError):
    """A data set cannot be read, or its splits, columns or labels do not fit."""


class PlanError(ThawError):
    """A stage plan names no group, unfreezes nothing, or has impossible lengths or rates."""


class TrainingError(ThawError):
    """Training ran into a state from which it must not go on, such as a loss that is not finite."""


class SharingError(ThawError):
    """A saved model cannot be described, exported, averaged or pushed as asked."""


class SavedModelError(SharingError):
    """What was saved does not give what was measured."""

    exit_code = 1


class HubError(SharingError):
    """The Hub could not be reached or refused; nothing local was lost."""

    exit_code = 1


def did_you_mean(word: object, candidates: Iterable[object], *, number: int = 3) -> str:
    """Returns `" Did you mean 'a' or 'b'?"` with the closest candidates, or an empty string when none is close."""
    close = difflib.get_close_matches(str(word), [str(candidate) for candidate in candidates], n=number, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
