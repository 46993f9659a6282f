"""Chooses what a part of a network is computed in, by a measurement that is made once on a machine."""

import contextlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from time import perf_counter

import torch

from torchthaw._version import __version__

Run = Callable[[torch.Tensor], torch.Tensor]
# Does something with its forward pass in the context that it gets.
Work = Callable[[AbstractContextManager[object]], torch.Tensor]
# Makes what is timed, and what is compared.
Works = Callable[[], tuple[Work, Work]]

SMALLEST_GAIN = 1.2
"""How many times as fast bfloat16 must be to be chosen."""

LARGEST_DIFFERENCE = 0.05
"""How far bfloat16 may take the outputs of a frozen part from those of float32: `||a - b|| / ||a||`."""

LARGEST_GRADIENT_DIFFERENCE = 0.3
"""How far it may take the gradient of all that trains, likewise: at 0.3 the two directions are 17 degrees apart."""

_REPETITIONS = 3
_FILE = "precision.jsonl"


@dataclass(frozen=True)
class Precision:
    """What the frozen part is computed in.

    Attributes:
        dtype: `torch.bfloat16` (by autocast) or `torch.float32`.
        gain: Time in float32 over time in bfloat16; 1 where it was not measured.
        difference: `||a - b|| / ||a||` of the outputs, or gradients, in float32 (a) and bfloat16 (b); 0 where it was
            not measured.
        why: The reason in words.
    """

    dtype: torch.dtype
    gain: float
    difference: float
    why: str


def frozen_dtype(
    run: Run, probe: Callable[[], torch.Tensor], device: torch.device, *, key: Mapping[str, str], folder: Path | None
) -> Precision:
    """Decides whether the frozen part of a network is computed in bfloat16.

    It is where the device has bfloat16 instructions, is at least `SMALLEST_GAIN` times as fast with them, and the
    outputs differ by `LARGEST_DIFFERENCE` at most. A timing never comes out the same twice, and the outputs depend on
    the choice; so the first decision for a device, the versions of torch and torchthaw, whose kernels they are, and a
    key is remembered and holds from then on.

    Args:
        run: The frozen part in float32, images to outputs. It runs a few times, without gradients.
        probe: Returns images, (batch, 3, height, width), on the device; called where there is something to measure.
        device: The device.
        key: What else the decision depends on: network, weights, image and batch size.
        folder: Where decisions are remembered, made if need be. Several processes may use it at the same time. None,
            or a folder that cannot be written to: the decision is for this time only.
    """

    def works() -> tuple[Work, Work]:
        pixels = probe()

        @torch.no_grad()
        def work(context: AbstractContextManager[object]) -> torch.Tensor:
            with context:
                return run(pixels)

        return work, work

    return _decide(works, LARGEST_DIFFERENCE, device, key=key, folder=folder)


def live_dtype(works: Works, device: torch.device, *, key: Mapping[str, str], folder: Path | None) -> Precision:
    """Decides whether what trains of a network is computed in bfloat16, by autocast; weights stay as they are.

    It is where the device has bfloat16 instructions, a step is at least `SMALLEST_GAIN` times as fast with them, and
    gradients differ by `LARGEST_GRADIENT_DIFFERENCE` at most. Remembered as by `frozen_dtype`.

    Args:
        works: Returns two; called where there is something to measure. The first runs forward and backward as in
            training; its result is not looked at. The second does so without anything random, and returns the
            gradient, (parameters,). Both get the context for the forward pass alone, run a few times, and leave no
            trace.
        device: The device.
        key: What the decision depends on: network, what trains of it, image size.
        folder: Where decisions are remembered; see `frozen_dtype`.
    """
    return _decide(works, LARGEST_GRADIENT_DIFFERENCE, device, key=key, folder=folder)


def _decide(
    works: Works, tolerance: float, device: torch.device, *, key: Mapping[str, str], folder: Path | None
) -> Precision:
    if not has_bfloat16(device):
        return Precision(torch.float32, 1.0, 0.0, f"{_device_name(device)} has no bfloat16 instructions")
    versions = {"torch": torch.__version__, "torchthaw": __version__}
    name = json.dumps({**key, "device": _device_name(device), **versions}, sort_keys=True)
    remembered = _remembered(folder, name)
    if remembered is not None:
        return remembered
    measured = _measured(*works(), tolerance, device)
    _remember(folder, name, measured)
    # Another process may have been first.
    return _remembered(folder, name) or measured


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16; others convert to float32 and back, which takes longer."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # Not public; a version of torch without them computes in float32.
    checks = (getattr(torch.cpu, check, None) for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in checks)


def _measured(timed: Work, compared: Work, tolerance: float, device: torch.device) -> Precision:
    exact, fast = (compared(_precision(device, bfloat16=bfloat16)).double() for bfloat16 in (False, True))
    difference = float((exact - fast).norm() / exact.norm())
    if timed is not compared:
        # The first time costs more.
        for bfloat16 in (False, True):
            timed(_precision(device, bfloat16=bfloat16))
    # In turn, so that what else the machine does slows both; the fastest is the least disturbed.
    times = [[_seconds(timed, device, bfloat16=bfloat16) for bfloat16 in (False, True)] for _ in range(_REPETITIONS)]
    gain = min(slow for slow, _ in times) / min(quick for _, quick in times)
    what = "the outputs" if timed is compared else "the gradient"
    found = f"bfloat16 is {gain:.2f} times as fast and changes {what} by {difference:.2%}"
    # Written so that an output that is not finite stays in float32.
    if not difference <= tolerance:
        return Precision(torch.float32, gain, difference, f"{found}; at most {tolerance:.0%} is accepted")
    if gain < SMALLEST_GAIN:
        return Precision(torch.float32, gain, difference, f"{found}; at least {SMALLEST_GAIN} times is asked for")
    return Precision(torch.bfloat16, gain, difference, found)


def _precision(device: torch.device, *, bfloat16: bool) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if bfloat16 else contextlib.nullcontext()


def _seconds(work: Work, device: torch.device, *, bfloat16: bool) -> float:
    _wait_for(device)
    start = perf_counter()
    work(_precision(device, bfloat16=bfloat16))
    _wait_for(device)
    return perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu_name()}, {os.cpu_count()} cores"


@lru_cache
def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# A line for each decision, appended in one write. The first whole line for a name counts, so that processes which
# measured at the same time agree; what a killed process left of a line is skipped.


def _remembered(folder: Path | None, name: str) -> Precision | None:
    try:
        lines = [] if folder is None else (folder / _FILE).read_bytes().splitlines()
    except OSError:
        return None
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            entry = json.loads(line)
            if entry["name"] == name:
                dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[entry["dtype"]]
                return Precision(dtype, float(entry["gain"]), float(entry["difference"]), str(entry["why"]))
    return None


def _remember(folder: Path | None, name: str, precision: Precision) -> None:
    if folder is None:
        return
    entry = {
        "name": name,
        "dtype": str(precision.dtype).removeprefix("torch."),
        "gain": precision.gain,
        "difference": precision.difference,
        "why": precision.why,
    }
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        # Begins a line too, in case that the last one was cut short.
        with (folder / _FILE).open("ab", buffering=0) as file:
            file.write(f"\n{json.dumps(entry)}\n".encode())
