"""How fast one core turns images into batches: decoded each time, or read from the cache of decoded images.

    python tests/benchmarks/image_loading.py [--data FOLDER] [--sizes 224 128] [--images 200] [--large 24]
        [--json out.json]

The baseline is the usual torchvision script: Pillow decodes the whole picture, then RandomResizedCrop, flip (and
TrivialAugment) or Resize and CenterCrop, then tensors and Normalize, one sample at a time, stacked to batches of 32.
Without data, JPEGs of 1/f noise of 500 x 375 pixels are drawn; the large photos, of 3000 x 2000, always are. Times are
those of the processor, of one thread, the least of some rounds, so that other programs matter little; the filling of
the cache is also timed by the clock, with all cores.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from torchvision.transforms import v2

from torchthaw.backbones.image_processing import TorchvisionImageProcessor
from torchthaw.data.augmentation import AUGMENTATIONS, Augmentation
from torchthaw.data.caches.images import with_cached_images
from torchthaw.data.caches.store import ArrayStore
from torchthaw.data.loading import load_image_dataset
from torchthaw.data.views import ImageView, collate

_BATCH = 32


def draw(folder: Path, number: int, width: int, height: int) -> Dataset:
    """Writes JPEGs with the statistics of photographs; a few are drawn, and shifted to make the others."""
    folder.mkdir()
    falloff = 1 / np.maximum(np.hypot(*np.meshgrid(np.fft.fftfreq(height), np.fft.rfftfreq(width), indexing="ij")),
                             1 / max(width, height)) ** 1.1  # fmt: skip
    random = np.random.default_rng(0)
    layers = [np.fft.irfft2(np.fft.rfft2(random.normal(size=(height, width))) * falloff, s=(height, width))
              for _ in range(3)]  # fmt: skip
    pixels = np.stack([layers[0] + 0.3 * layer for layer in layers], axis=-1)
    pixels = (128 + 45 * (pixels - pixels.mean()) / pixels.std()).clip(0, 255).astype(np.uint8)
    paths = []
    for row in range(number):
        paths.append(folder / f"{row}.jpg")
        shift = random.integers(height), random.integers(width)
        Image.fromarray(np.roll(pixels, shift, axis=(0, 1))).save(paths[-1], quality=90)
    columns = {
        "image": [{"path": str(path), "bytes": None} for path in paths],
        "label": [row % 2 for row in range(number)],
        "path": [path.name for path in paths],
    }
    features = Features(image=ImageFeature(decode=False), label=ClassLabel(names=["a", "b"]), path=Value("string"))
    return Dataset.from_dict(columns, features=features)


def usual_script(paths: list[str], processor: TorchvisionImageProcessor, augmentation: Augmentation | None) -> Any:
    """Returns what reads a row as torchvision's reference scripts do."""
    size = [processor.crop_size["height"], processor.crop_size["width"]]
    steps: list[Any]
    if augmentation is None:
        steps = [v2.Resize(processor.size["shortest_edge"]), v2.CenterCrop(size)]
    else:
        steps = [v2.RandomResizedCrop(size, scale=augmentation.crop_scale), v2.RandomHorizontalFlip()]
        if augmentation.policy == "trivial_augment":
            steps.append(v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR))
    steps += [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(processor.image_mean, processor.image_std),
    ]
    transform = v2.Compose(steps)

    def read(rows: list[int]) -> torch.Tensor:
        return torch.stack([transform(Image.open(paths[row]).convert("RGB")) for row in rows])

    return read


def milliseconds(read: Callable[[list[int]], Any], number: int, rounds: int = 3) -> float:
    """Returns the processor's milliseconds for each image."""
    least = float("inf")
    for _ in range(rounds):
        started = time.process_time()
        for start in range(0, number, _BATCH):
            read(list(range(start, min(start + _BATCH, number))))
        least = min(least, time.process_time() - started)
    return 1000 * least / number


def measure(
    dataset: Dataset, processor: TorchvisionImageProcessor, augmentation: Augmentation | None, rounds: int
) -> dict[str, float]:
    """Returns milliseconds for each image, and what filling the cache takes."""
    paths = [row["path"] for row in dataset.cast_column("image", ImageFeature(decode=False))["image"]]
    view = ImageView(dataset, processor, augmentation)
    with tempfile.TemporaryDirectory() as folder:
        clock, processor_time = time.perf_counter(), time.process_time()
        cached = with_cached_images(view, ArrayStore(folder))
        fill_clock, fill = time.perf_counter() - clock, time.process_time() - processor_time
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        number = len(dataset)
        found = {
            "usual script": milliseconds(usual_script(paths, processor, augmentation), number, rounds),
            "decoded each time": milliseconds(lambda rows: collate(view.__getitems__(rows)), number, rounds),
            "from the cache": milliseconds(lambda rows: collate(cached.__getitems__(rows)), number, rounds),
            "filling the cache": 1000 * fill / number,
        }
    return found | {"filling, by the clock": 1000 * fill_clock / number, "kilobytes": size / number / 1000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 128])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--large", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__, "pillow": Image.__version__},
        "date": time.strftime("%Y-%m-%d"), "milliseconds": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        if arguments.data is None:
            photos = draw(Path(folder) / "photos", arguments.images, 500, 375)
        else:
            photos = load_image_dataset(arguments.data)["train"]
            photos = photos.select(range(min(arguments.images, len(photos))))
        paths = [row["path"] for row in photos.cast_column("image", ImageFeature(decode=False))["image"]]
        decoding = milliseconds(
            lambda rows: [Image.open(paths[row]).convert("RGB") for row in rows], len(paths), arguments.rounds
        )
        results["decoding"] = decoding
        print(f"Images per second and core. Decoding alone: {1000 / decoding:.0f}\n")
        columns = ("usual script", "decoded each time", "from the cache", "filling the cache")
        print(f"{'':36}" + "".join(f"{column:>20}" for column in columns) + "   cache against usual    kB each")
        large = draw(Path(folder) / "large", arguments.large, 3000, 2000)
        for size in arguments.sizes:
            processor = TorchvisionImageProcessor().resized(size)
            for data, what in ((photos, "photos"), (large, "3000 x 2000")):
                for name in ("light", "medium", "none"):
                    found = measure(data, processor, AUGMENTATIONS[name], arguments.rounds)
                    view = "evaluation" if name == "none" else f"training, {name}"
                    results["milliseconds"].append({"size": size, "images": what, "view": view, **found})
                    gain = found["usual script"] / found["from the cache"]
                    print(
                        f"{size} px, {what}, {view}".ljust(36)
                        + "".join(f"{1000 / found[column]:>20.0f}" for column in columns)
                        + f"{gain:>21.1f}x {found['kilobytes']:>10.0f}",
                        flush=True,
                    )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
