"""How long the rest of a run may take, from the steps that were made."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# Steps whose mean is taken for the speed: few, so that a change, such as a filled cache, soon shows.
_STEPS = 20
_FEWEST_STEPS = 3


@dataclass
class TimeLeft:
    """Estimates the time left from the speed of the stage that runs; stages run at different speeds.

    Times are seconds of any clock that only rises. What comes between epochs (validation, checkpoints) counts as a
    pause; before the first one of a stage, those of the stage before are taken for as long.

    Args:
        known: How long stages took before, such as in another fold; stages that are not in it are unknown before they
            run.
    """

    known: Mapping[str, float] = field(default_factory=dict)
    _later: Sequence[str] = ()
    _steps_left: int = 0
    _per_epoch: float = 1.0
    _mark: float = 0.0
    _durations: deque[float] = field(default_factory=lambda: deque(maxlen=_STEPS))
    _pauses: list[float] = field(default_factory=list)
    _usual_pause: float = 0.0
    _is_first_step: bool = True
    _looked: float = 0.0

    def start_stage(self, later: Sequence[str], *, steps: int, epochs: float, now: float) -> None:
        """Begins a stage, or goes on with it after an interruption.

        Args:
            later: Names of the stages that come after it.
            steps: What is left of it.
            epochs: Likewise.
            now: The time.
        """
        self._later, self._steps_left, self._mark, self._looked = later, steps, now, now
        self._per_epoch = max(1.0, steps / max(epochs, 1e-6))
        if self._pauses:
            self._usual_pause = sum(self._pauses) / len(self._pauses)
        self._durations.clear()
        self._pauses.clear()
        self._is_first_step = True

    def step(self, now: float) -> None:
        """Notes that an optimizer step is done."""
        # The first step of a stage starts workers and warms up what later ones use.
        if not self._is_first_step:
            self._durations.append(now - self._mark)
        self._is_first_step = False
        self._steps_left -= 1
        self._mark = self._looked = now

    def resume(self, now: float) -> None:
        """Notes that steps go on after a pause."""
        if not self._is_first_step:
            self._pauses.append(now - self._mark)
        self._mark = now

    def of_stage(self, now: float) -> float | None:
        """Returns the seconds left of the stage; None as long as too few steps were made to tell."""
        if len(self._durations) < max(1, min(_FEWEST_STEPS, self._steps_left)):
            return None
        step = sum(self._durations) / len(self._durations)
        pause = sum(self._pauses) / len(self._pauses) if self._pauses else self._usual_pause
        # The pause after this epoch, and one after each of those that follow.
        pauses = 1 + int(self._steps_left / self._per_epoch)
        seconds = self._steps_left * step + pauses * pause
        return max(0.0, seconds - (now - self._looked))

    def of_run(self, now: float) -> float | None:
        """Returns the seconds left of all stages; None where one of them is unknown."""
        stage = self.of_stage(now)
        if stage is None or any(name not in self.known for name in self._later):
            return None
        return stage + sum(self.known[name] for name in self._later)
