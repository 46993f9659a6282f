"""Times of optimizer steps by part: which steps to trace, and what the others say."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torchthaw.training.bottlenecks import PARTS

# Where the length of a stage is not known, tracing begins after so many steps.
_FIRST_TRACED = 10


@dataclass
class Step:
    """Seconds of an optimizer step by part, and how they were taken: `timed`, `synced` or `traced`."""

    kind: str = "timed"
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))


def trace_window(length: int | None, per_epoch: int | None, steps: int) -> tuple[int, int]:
    """Returns the steps to trace: some in the middle of a stage, within one epoch, so that no validation is traced.

    Args:
        length: Steps of the stage; None if they are not known.
        per_epoch: Steps of an epoch; None if they are not known.
        steps: How many to trace.

    Returns:
        The first one and the first one after, from 0 on.
    """
    if length is None:
        return _FIRST_TRACED, _FIRST_TRACED + steps
    steps = min(steps, length, per_epoch or length)
    first = (length - steps) // 2
    if per_epoch is not None and first // per_epoch != (first + steps - 1) // per_epoch:
        first = (first + steps - 1) // per_epoch * per_epoch
    return first, min(first + steps, length)


def step_shares(steps: Sequence[Step]) -> tuple[dict[str, float], float]:
    """Returns the share of a step's time that each part takes, and the seconds of a step.

    Steps that ran undisturbed count; of the first, which also warms up, only if there is no other. Their wait for data
    is what it is. How the rest is shared out is taken from steps that waited for the device, where there are some.
    """
    timed = [step for step in steps[1:] if step.kind == "timed"] or [step for step in steps if step.kind == "timed"]
    synced = [step for step in steps if step.kind == "synced"]
    shares = _shares(timed or synced or steps)
    if timed and synced:
        work = _shares(synced)
        scale = (1 - shares["data"]) / max(1e-12, 1 - work["data"])
        shares = {part: shares["data"] if part == "data" else work[part] * scale for part in PARTS}
    chosen = timed or synced or list(steps)
    return shares, sum(sum(step.parts.values()) for step in chosen) / len(chosen)


def _shares(steps: Sequence[Step]) -> dict[str, float]:
    sums = {part: sum(step.parts[part] for step in steps) for part in PARTS}
    total = sum(sums.values()) or 1.0
    return {part: seconds / total for part, seconds in sums.items()}
