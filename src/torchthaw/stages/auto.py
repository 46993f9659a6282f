"""The rules of `plan: auto`: how a backbone is unfrozen, by how well a linear probe on its features does.

A linear probe that tells held-out training images well says that the pretrained features serve for them as they are,
so that large steps would rather spoil them; one that does not says that they have farther to go. The numbers were
chosen on four small sets of images with `tests/benchmarks/accuracy/run.py`; README says which, and what they came to
there and on others.
"""

import dataclasses
from dataclasses import dataclass

from torchthaw.stages.plan import Stage
from torchthaw.stages.presets import family_defaults

# Macro F1 on held-out training images from which on they count as near to what the backbone was pretrained for.
NEAR = 0.85
# With layer decay 0.3, BatchNorm in eval: to train it was worse in two of the four sets, and no better in the others.
NEAR_RATE = 5e-4
FARTHER_RATE = 1e-3


@dataclass(frozen=True)
class Choice:
    """How a backbone is unfrozen.

    Attributes:
        rate: Learning rate of the head, which layer decay lowers towards the input.
        reason: Why, as a part of a sentence.
    """

    rate: float
    reason: str


def choose(macro_f1: float | None, *, transformer: bool) -> Choice:
    """Chooses by a probe's macro F1 on held-out images; None where there was no probe, or nothing was held out.

    Args:
        macro_f1: From 0 to 1.
        transformer: Whether the backbone trains by the habits of vision transformers, for which nothing was measured:
            their family's defaults stand.
    """
    family = family_defaults(transformer=transformer).unfrozen_rate
    if macro_f1 is None:
        return Choice(family, "without a linear probe the family's defaults stand")
    found = f"the linear probe has macro F1 {macro_f1:.3f} on held-out images"
    if transformer:
        return Choice(family, f"{found}; for transformers the family's defaults stand")
    if macro_f1 >= NEAR:
        return Choice(NEAR_RATE, f"{found}, {NEAR:g} or more: its features serve, so smaller steps")
    return Choice(FARTHER_RATE, f"{found}, below {NEAR:g}: its features have farther to go, so larger steps")


def chosen(stage: Stage, choice: Choice, *, head_rate: float, transformer: bool) -> Stage:
    """Returns a stage with what was chosen for it.

    Args:
        stage: One with `by_probe`, its defaults filled in.
        choice: What was chosen.
        head_rate: The run's rate of a new head, with which all rates move.
        transformer: Whether the backbone trains by the habits of vision transformers.
    """
    scale = head_rate / family_defaults(transformer=transformer).head_rate
    return dataclasses.replace(stage, learning_rate=choice.rate * scale)
