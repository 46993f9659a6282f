"""A trace of optimizer steps by torch's profiler, with the parts of each step by name."""

from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from torchthaw.training.bottlenecks import PARTS

_RANGES = {part: f"step: {part}" for part in PARTS}
_TOP = 10


class StepTrace:
    """A trace that runs from here until it is stopped; it begins with waiting for data.

    Args:
        on_device: Whether there is a CUDA device to trace too.
    """

    def __init__(self, *, on_device: bool) -> None:
        self._on_device = on_device
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_device
        self._profiler = profile(activities=activities)
        self._profiler.start()
        self._range: Any = None
        self.enter("data")

    def enter(self, part: str | None) -> None:
        """Names what follows: a part of a step, or nothing."""
        if self._range is not None:
            self._range.__exit__(None, None, None)
        self._range = None if part is None else record_function(_RANGES[part])
        if self._range is not None:
            self._range.__enter__()

    def stop(self, file: Path) -> list[dict[str, Any]]:
        """Ends the trace and writes it to a file; returns the operators that took most of its time."""
        self.enter(None)
        self._profiler.stop()
        self._profiler.export_chrome_trace(str(file))
        return top_operators(self._profiler, on_device=self._on_device)


def top_operators(profiler: profile, *, on_device: bool) -> list[dict[str, Any]]:
    """Returns the operators that took most of the traced time, each with its share of all operators' own time."""
    times: dict[str, tuple[float, int]] = {}
    for event in profiler.key_averages():
        # Kernels stand beside the operators that start them.
        if event.key in _RANGES.values() or event.key.startswith("enumerate(") or event.device_type.name != "CPU":
            continue
        own = event.self_device_time_total if on_device else event.self_cpu_time_total
        if own > 0:
            times[event.key] = (own, event.count)
    total = sum(own for own, _ in times.values())
    largest = sorted(times.items(), key=lambda item: -item[1][0])[:_TOP]
    return [{"name": name, "share": round(own / total, 4), "calls": calls} for name, (own, calls) in largest]
