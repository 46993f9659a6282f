"""The rules of `plan: auto`: how a backbone is unfrozen, by how well a linear probe on its features does.

A linear probe that tells held-out training images well says that the pretrained features fit these images, so that
large steps would rather spoil them; one that does not says that they have far to go. See README for what was measured
by `tests/benchmarks/accuracy/run.py`, and on which images the numbers here were chosen.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from torchthaw.stages.plan import Stage
from torchthaw.stages.presets import family_defaults

# Macro F1 on held-out training images.
NEAR = 0.85
FAR = 0.5
FARTHER_RATE = 1e-3


@dataclass(frozen=True)
class Choice:
    """How a backbone is unfrozen.

    Attributes:
        rate: Learning rate of the head, which layer decay lowers towards the input.
        batch_norm: BatchNorm policy; `auto` goes by the number of images and the batch size.
        reason: Why, as a part of a sentence.
    """

    rate: float
    batch_norm: Literal["auto", "train"]
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
        return Choice(family, "auto", "without a linear probe the family's defaults stand")
    found = f"the linear probe has macro F1 {macro_f1:.3f} on held-out images"
    if transformer:
        return Choice(family, "auto", f"{found}; for transformers the family's defaults stand")
    if macro_f1 >= NEAR:
        return Choice(family, "auto", f"{found}, {NEAR:g} or more: near the pretraining, so small steps")
    if macro_f1 > FAR:
        return Choice(FARTHER_RATE, "auto", f"{found}, below {NEAR:g}: farther from the pretraining, so larger steps")
    return Choice(
        FARTHER_RATE,
        "train",
        f"{found}, {FAR:g} or less: far from the pretraining, so larger steps, and BatchNorm trains",
    )


def chosen(stage: Stage, choice: Choice, *, head_rate: float, transformer: bool) -> Stage:
    """Returns a stage with what was chosen for it.

    Args:
        stage: One with `by_probe`, its defaults filled in.
        choice: What was chosen.
        head_rate: The run's rate of a new head, with which all rates move.
        transformer: Whether the backbone trains by the habits of vision transformers.
    """
    scale = head_rate / family_defaults(transformer=transformer).head_rate
    batch_norm = choice.batch_norm if stage.batch_norm == "auto" else stage.batch_norm
    return dataclasses.replace(stage, learning_rate=choice.rate * scale, batch_norm=batch_norm)
