"""Chooses what the frozen part of a network is computed in, by a measurement that is made once on a machine."""

import contextlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from time import perf_counter

import torch

Run = Callable[[torch.Tensor], torch.Tensor]

SMALLEST_GAIN = 1.2
"""How many times as fast bfloat16 must be to be chosen."""

LARGEST_DIFFERENCE = 0.05
"""How far bfloat16 may take the outputs from those of float32: `||a - b|| / ||a||`."""

_REPETITIONS = 3
_FILE = "precision.jsonl"


@dataclass(frozen=True)
class Precision:
    """What the frozen part is computed in.

    Attributes:
        dtype: `torch.bfloat16` (by autocast) or `torch.float32`.
        gain: Time in float32 over time in bfloat16; 1 where it was not measured.
        difference: `||a - b|| / ||a||` of the outputs in float32 (a) and bfloat16 (b); 0 where it was not measured.
        why: The reason in words.
    """

    dtype: torch.dtype
    gain: float
    difference: float
    why: str


def frozen_dtype(run: Run, pixels: torch.Tensor, *, key: Mapping[str, str], folder: Path | None) -> Precision:
    """Decides whether the frozen part of a network is computed in bfloat16.

    It is where the device has bfloat16 instructions, is at least `SMALLEST_GAIN` times as fast with them, and the
    outputs differ by `LARGEST_DIFFERENCE` at most. A timing never comes out the same twice, and the outputs depend on
    the choice; so the first decision for a device, a version of torch and a key is remembered and holds from then on.

    Args:
        run: The frozen part in float32, images to outputs. It runs a few times, without gradients.
        pixels: Images, (batch, 3, height, width), on the device.
        key: What else the decision depends on: network, weights, image and batch size.
        folder: Where decisions are remembered, made if need be. Several processes may use it at the same time. None,
            or a folder that cannot be written to: the decision is for this time only.
    """
    device = pixels.device
    if not has_bfloat16(device):
        return Precision(torch.float32, 1.0, 0.0, f"{_device_name(device)} has no bfloat16 instructions")
    name = json.dumps({**key, "device": _device_name(device), "torch": torch.__version__}, sort_keys=True)
    remembered = _remembered(folder, name)
    if remembered is not None:
        return remembered
    measured = _measured(run, pixels)
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


@torch.no_grad()
def _measured(run: Run, pixels: torch.Tensor) -> Precision:
    exact, fast = _output(run, pixels, bfloat16=False), _output(run, pixels, bfloat16=True)
    difference = float((exact.double() - fast.double()).norm() / exact.double().norm())
    # In turn, so that what else the machine does slows both; the fastest is the least disturbed.
    times = [(_seconds(run, pixels, bfloat16=False), _seconds(run, pixels, bfloat16=True)) for _ in range(_REPETITIONS)]
    gain = min(slow for slow, _ in times) / min(quick for _, quick in times)
    found = f"bfloat16 is {gain:.2f} times as fast and changes the outputs by {difference:.2%}"
    # Written so that an output that is not finite stays in float32.
    if not difference <= LARGEST_DIFFERENCE:
        return Precision(torch.float32, gain, difference, f"{found}; at most {LARGEST_DIFFERENCE:.0%} is accepted")
    if gain < SMALLEST_GAIN:
        return Precision(torch.float32, gain, difference, f"{found}; at least {SMALLEST_GAIN} times is asked for")
    return Precision(torch.bfloat16, gain, difference, found)


def _output(run: Run, pixels: torch.Tensor, *, bfloat16: bool) -> torch.Tensor:
    autocast = torch.autocast(pixels.device.type, torch.bfloat16) if bfloat16 else contextlib.nullcontext()
    with autocast:
        return run(pixels)


def _seconds(run: Run, pixels: torch.Tensor, *, bfloat16: bool) -> float:
    _wait_for(pixels.device)
    start = perf_counter()
    _output(run, pixels, bfloat16=bfloat16)
    _wait_for(pixels.device)
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
