"""Fixtures shared by all tests: no network, images drawn on the spot, real data where it is at hand."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Each test process has its core; threads of several would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hub_stand_in import HubStandIn
from PIL import Image

# Files with few, long tests; begun last, they would keep one process busy while the others wait.
LONG = {"test_kill_anywhere", "test_two_processes", "test_trainer_pushes", "test_export_onnx", "test_saved_folder",
        "test_cross_validation", "test_audit_command", "test_terminal"}  # fmt: skip

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Lets nothing that was cached before these tests decide what they see."""
    os.environ["TORCHTHAW_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _little_to_wait_for() -> Iterator[None]:
    """Spares the many runs of a test process some time, for what they do not test.

    A run begins with a collection of garbage, which looks through all that was imported unless that is frozen; a run in
    a process of its own has next to nothing to collect. Flushing files to the disk protects from a loss of power only.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    # Test modules, and with them the package, were imported when tests were collected.
    gc.collect()
    gc.freeze()
    flush, os.fsync = os.fsync, lambda _: None
    yield
    os.fsync = flush
    gc.unfreeze()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command of torchthaw in this process; returns its exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        from torchthaw import cli

        monkeypatch.setattr(sys, "argv", ["torchthaw", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    """A Hub on this machine."""
    with HubStandIn() as running:
        yield running


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real image sets; only development machines have it."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the real image sets are not on this machine")
    return folder


@pytest.fixture(scope="session")
def shared_weights() -> Path:
    """File with real ImageNet weights of mobilenet_v2; only development machines have it."""
    file = SHARED / "weights" / "mobilenet_v2_imagenet.safetensors"
    if not file.is_file():
        pytest.skip("the real ImageNet weights are not on this machine")
    return file


def draw_image(class_index: int, number: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """Draws a picture whose class shows in its colour: a noisy field with one bright channel."""
    random = np.random.default_rng(1000 * class_index + number)
    pixels = random.integers(0, 120, size=(size[1], size[0], 3), dtype=np.uint8)
    pixels[..., class_index % 3] += 100
    return Image.fromarray(pixels)


@pytest.fixture
def make_image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that writes `root/[split/]class/NNN.png` and gives back the root."""

    def make(
        classes: tuple[str, ...] = ("ant", "bee", "cat"),
        per_class: int = 6,
        splits: tuple[str, ...] = (),
        name: str = "photos",
        size: tuple[int, int] = (48, 40),
    ) -> Path:
        root = tmp_path / name
        for split_number, split in enumerate(splits or ("",)):
            for index, label in enumerate(classes):
                folder = root / split / label
                folder.mkdir(parents=True)
                for number in range(per_class):
                    draw_image(index, 100 * split_number + number, size).save(folder / f"{number:03d}.png")
        return root

    return make


@pytest.fixture(scope="session")
def draw_photo() -> Callable[..., Image.Image]:
    """Returns a function that draws what has the statistics of photographs, another number an unrelated one."""

    def draw(number: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
        random = np.random.default_rng(number)
        width, height = size
        rows, columns = np.meshgrid(np.fft.fftfreq(height), np.fft.rfftfreq(width), indexing="ij")
        # 1/f noise: smooth shapes, and ever less detail at ever finer scales.
        falloff = 1 / np.maximum(np.hypot(rows, columns), 1 / max(size)) ** 1.1
        noise = [np.fft.rfft2(random.normal(size=(height, width))) * falloff for _ in range(3)]
        layers = [np.fft.irfft2(layer, s=(height, width)) for layer in noise]
        # The colours of a photograph go together.
        pixels = np.stack([layers[0] + 0.3 * layer for layer in layers], axis=-1)
        pixels = 128 + 45 * (pixels - pixels.mean()) / pixels.std()
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    return draw
