"""The choice of a precision: by the hardware, a measurement, the difference of the outputs; and made once."""

import json
import multiprocessing

import pytest
import torch

from torchthaw.backbones import precision
from torchthaw.backbones.precision import (
    LARGEST_DIFFERENCE,
    LARGEST_GRADIENT_DIFFERENCE,
    SMALLEST_GAIN,
    frozen_dtype,
    has_bfloat16,
    live_dtype,
)

KEY = {"architecture": "resnet18", "weights": "abc"}
CPU = torch.device("cpu")


def probe():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Clock:
    """A clock that only a frozen part moves."""

    seconds = 0.0

    def __call__(self):
        return Clock.seconds


@pytest.fixture
def bfloat16_hardware(monkeypatch):
    """As if this CPU had the instructions; what is measured takes as long as the test says."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(precision, "perf_counter", Clock())


class Part:
    """A frozen part that takes as long, and is as far off, as it is told to, in each precision."""

    def __init__(self, *, gain=2.0, difference=0.0):
        self.seconds = {False: gain, True: 1.0}
        self.difference = difference
        self.calls = []

    def __call__(self, pixels):
        fast = torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()
        self.calls.append(fast)
        # Something else slows some of the runs.
        disturbed = len(self.calls) in (3, 6)
        Clock.seconds += self.seconds[fast] * (10 if disturbed else 1)
        output = pixels.mean((2, 3))
        return (output * (1 + self.difference)) if fast else output


@pytest.mark.parametrize(
    ("gain", "difference", "dtype"),
    [
        (2.0, 0.0, torch.bfloat16),
        (2.0, 0.045, torch.bfloat16),
        (2.0, 0.055, torch.float32),
        (2.0, float("nan"), torch.float32),
        (1.05, 0.0, torch.float32),
        (0.5, 0.0, torch.float32),
    ],
)
@pytest.mark.usefixtures("bfloat16_hardware")
def test_it_must_be_faster_and_near(gain, difference, dtype):
    result = frozen_dtype(Part(gain=gain, difference=difference), probe, CPU, key=KEY, folder=None)
    assert result.dtype == dtype
    assert result.gain == pytest.approx(gain)
    assert result.difference == pytest.approx(difference, abs=1e-6, nan_ok=True)
    assert f"{result.gain:.2f} times as fast" in result.why
    assert ("at most 5%" in result.why) == (not difference <= LARGEST_DIFFERENCE)
    assert ("at least 1.2 times" in result.why) == (gain < SMALLEST_GAIN)


class Training:
    """A training step that takes as long, and has a gradient as far off, as it is told to."""

    def __init__(self, *, gain, difference):
        self.seconds = {False: gain, True: 1.0}
        self.difference = difference
        self.first = {False, True}

    def step(self, context):
        with context:
            fast = torch.is_autocast_enabled("cpu")
        # Kernels are chosen in the first step.
        Clock.seconds += self.seconds[fast] * (100 if fast in self.first else 1)
        self.first.discard(fast)
        return torch.tensor([float("nan")])

    def gradient(self, context):
        with context:
            fast = torch.is_autocast_enabled("cpu")
        return torch.ones(3) * (1 + self.difference * fast)

    def decide(self, folder=None):
        return live_dtype(lambda: (self.step, self.gradient), CPU, key=KEY, folder=folder)


@pytest.mark.parametrize(
    ("gain", "difference", "dtype"),
    [
        (1.3, 0.2, torch.bfloat16),
        (1.3, 0.35, torch.float32),
        (1.3, float("nan"), torch.float32),
        (1.1, 0.0, torch.float32),
    ],
)
@pytest.mark.usefixtures("bfloat16_hardware")
def test_training_must_be_faster_with_gradients_that_are_near(gain, difference, dtype):
    result = Training(gain=gain, difference=difference).decide()
    assert result.dtype == dtype
    assert result.gain == pytest.approx(gain)
    assert f"{gain:.2f} times as fast and changes the gradient by" in result.why
    assert ("at most 30%" in result.why) == (not difference <= LARGEST_GRADIENT_DIFFERENCE)


@pytest.mark.usefixtures("bfloat16_hardware")
def test_the_first_decision_on_training_holds(tmp_path):
    first = Training(gain=2, difference=0).decide(tmp_path)
    assert Training(gain=0.5, difference=0).decide(tmp_path) == first


def test_without_instructions_nothing_is_measured(monkeypatch, tmp_path):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    part = Part()
    result = frozen_dtype(part, probe, CPU, key=KEY, folder=tmp_path)
    assert (result.dtype, result.gain, result.difference) == (torch.float32, 1.0, 0.0)
    assert "no bfloat16 instructions" in result.why
    assert part.calls == []
    assert list(tmp_path.iterdir()) == []
    assert not has_bfloat16(torch.device("mps"))


def test_the_hardware_is_asked(monkeypatch):
    for supported in ([True, False], [False, True], [False, False]):
        for name, value in zip(("_is_avx512_bf16_supported", "_is_amx_tile_supported"), supported, strict=True):
            monkeypatch.setattr(torch.cpu, name, lambda value=value: value, raising=False)
        assert has_bfloat16(torch.device("cpu")) == any(supported)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert not has_bfloat16(torch.device("cpu"))


@pytest.mark.usefixtures("bfloat16_hardware")
def test_the_first_decision_holds(tmp_path):
    folder = tmp_path / "cache" / "torchthaw"
    first = frozen_dtype(Part(gain=2), probe, CPU, key=KEY, folder=folder)
    part = Part(gain=0.5)
    # The images to measure with are not even loaded.
    assert frozen_dtype(part, None, CPU, key=dict(reversed(KEY.items())), folder=folder) == first
    assert part.calls == []
    assert frozen_dtype(part, probe, CPU, key={**KEY, "weights": "other"}, folder=folder).dtype == torch.float32
    assert frozen_dtype(part, probe, CPU, key=KEY, folder=None).dtype == torch.float32


@pytest.mark.parametrize("changed", ["device", "torch", "torchthaw"])
@pytest.mark.usefixtures("bfloat16_hardware")
def test_another_device_or_version_decides_anew(tmp_path, monkeypatch, changed):
    frozen_dtype(Part(gain=2), probe, CPU, key=KEY, folder=tmp_path)
    if changed == "device":
        monkeypatch.setattr(precision, "_cpu_name", lambda: "another")
    else:
        monkeypatch.setattr(torch if changed == "torch" else precision, "__version__", "9.9")
    assert frozen_dtype(Part(gain=0.5), probe, CPU, key=KEY, folder=tmp_path).dtype == torch.float32


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: b"\xff\x00 not json",
        lambda text: b"[1]\n3\nnull\n{}\n" + text.replace(b"bfloat16", b"float99"),
        lambda text: b"",
    ],
)
@pytest.mark.usefixtures("bfloat16_hardware")
def test_a_damaged_file_is_written_on(tmp_path, damage):
    first = frozen_dtype(Part(gain=2), probe, CPU, key=KEY, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    second = frozen_dtype(Part(gain=3), probe, CPU, key=KEY, folder=tmp_path)
    assert second.gain > first.gain
    assert frozen_dtype(Part(gain=0.5), probe, CPU, key=KEY, folder=tmp_path) == second


@pytest.mark.usefixtures("bfloat16_hardware")
def test_a_folder_that_cannot_be_used_is_no_error(tmp_path):
    file = tmp_path / "file"
    file.write_text("not a folder")
    assert frozen_dtype(Part(), probe, CPU, key=KEY, folder=file / "cache").dtype == torch.bfloat16


def _decide(folder, gain, start, results):
    torch.cpu._is_avx512_bf16_supported = lambda: True
    precision.perf_counter = Clock()
    start.wait()
    results.put(str(frozen_dtype(Part(gain=gain), probe, CPU, key=KEY, folder=folder)))


def test_processes_that_decide_at_once_agree(tmp_path):
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(4), context.Queue()
    processes = [
        context.Process(target=_decide, args=(tmp_path, gain, start, results)) for gain in (2.0, 0.5, 3.0, 0.7)
    ]
    for process in processes:
        process.start()
    decisions = {results.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    (file,) = tmp_path.iterdir()
    entries = [json.loads(line) for line in file.read_text().splitlines() if line]
    assert len(decisions) == 1
    assert len({entry["name"] for entry in entries}) == 1


@pytest.mark.skipif(not has_bfloat16(torch.device("cpu")), reason="this CPU has no bfloat16 instructions")
def test_a_real_network_is_measured():
    network = torch.nn.Conv2d(3, 64, 3, padding=1).requires_grad_(False)
    result = frozen_dtype(network, lambda: torch.randn(8, 3, 64, 64), CPU, key=KEY, folder=None)
    assert 0.0001 < result.difference < LARGEST_DIFFERENCE
    assert result.gain > 0
