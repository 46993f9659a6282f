"""Runs that are interrupted by an exception at a known moment."""

from transformers import TrainerCallback


class InterruptionError(Exception):
    pass


class Interrupt(TrainerCallback):
    """Raises at an event of callbacks, of stages too, at a step of the run."""

    def __init__(self, event, step):
        setattr(self, event, self.strike)
        self.step = step

    def strike(self, args, state, control, **_):
        if state.global_step == self.step:
            raise InterruptionError
