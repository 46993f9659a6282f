"""Where the time of a stage goes: training steps, waiting for their data, and the rest.

The methods of `Trainer` that are overridden here were read in transformers 5.23 and are tested with 5.10.1 too.
"""

import sys
import time
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from transformers import Trainer


@dataclass
class Clock:
    """Seconds of a stage so far, in this process.

    Attributes:
        epochs: Passes over the training data, with what comes within them.
        validating: Validation, log lines and checkpoints within them.
        waiting: Waiting for training batches.
    """

    epochs: float = 0.0
    validating: float = 0.0
    waiting: float = 0.0

    @property
    def steps(self) -> float:
        """Seconds in training steps, their data included."""
        return self.epochs - self.validating

    @property
    def data_wait_share(self) -> float | None:
        """Share of the training steps that went by waiting for data; None before there was one."""
        return None if self.steps <= 0 else min(1.0, self.waiting / self.steps)


class TimedTrainer(Trainer):
    """Measures its own stages; `state.data_wait_seconds` tells callbacks how long the stage has waited for batches."""

    _clock = Clock()

    def _start_clock(self) -> None:
        self._clock = Clock()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """Gets the batches of an optimizer step, as `Trainer` does."""
        started = time.perf_counter()
        batches = super().get_batch_samples(*args, **kwargs)
        self._clock.waiting += time.perf_counter() - started
        # Not a field of TrainerState, whose saved form other code reads back strictly.
        vars(self.state).update(data_wait_seconds=self._clock.waiting)
        return batches

    def _run_epoch(self, **options: Any) -> None:  # type: ignore[override]  # called with keywords only
        started = time.perf_counter()
        try:
            super()._run_epoch(**options)
        finally:
            self._clock.epochs += time.perf_counter() - started

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        started = time.perf_counter()
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        finally:
            self._clock.validating += time.perf_counter() - started


def peak_memory_mb() -> float:
    """Returns the peak memory of this process in MiB; where there is CUDA, that of the GPU."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return round(memory.peak_wset / 2**20, 1)  # type: ignore[attr-defined]
    import resource  # Unix only

    # Kilobytes on Linux, bytes on macOS.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
