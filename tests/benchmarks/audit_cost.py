"""What the audit costs, step by step, and how that grows with the number of images.

    python tests/benchmarks/audit_cost.py [--sizes 1000 10000 100000] [--data FOLDER] [--json out.json]

Without data, small JPEG pictures of 1/f noise are drawn (64 x 64 pixels, two classes, one in fifty an exact copy of
another, and one in fifty recompressed). The growth is the exponent k of seconds ~ images ** k between sizes.
"""

import argparse
import io
import itertools
import json
import math
import time
from pathlib import Path

import numpy as np
import psutil
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from torchthaw.data.audit.audit import audit_dataset
from torchthaw.data.loading import load_image_dataset

_SIDE = 64
_PERIOD = 50


def draw(number: int) -> DatasetDict:
    """Draws a data set of small pictures."""
    random = np.random.default_rng(0)
    falloff = 1 / np.maximum(
        np.hypot(*np.meshgrid(np.fft.fftfreq(_SIDE), np.fft.rfftfreq(_SIDE), indexing="ij")), 1 / _SIDE
    )
    files: list[bytes] = []
    for row in range(number):
        if row % _PERIOD == _PERIOD - 1:
            files.append(files[int(random.integers(row))])
            continue
        if row % _PERIOD == _PERIOD - 2:
            picture = Image.open(io.BytesIO(files[int(random.integers(row))]))
        else:
            noise = np.fft.irfft2(np.fft.rfft2(random.normal(size=(_SIDE, _SIDE))) * falloff, s=(_SIDE, _SIDE))
            pixels = 128 + 45 * (noise - noise.mean()) / noise.std()
            picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB")
        data = io.BytesIO()
        picture.save(data, "JPEG", quality=75 if row % _PERIOD == _PERIOD - 2 else 90)
        files.append(data.getvalue())
    columns = {
        "image": [{"bytes": data, "path": None} for data in files],
        "label": random.integers(2, size=number).tolist(),
        "path": [f"{row}.jpg" for row in range(number)],
    }
    features = Features(image=ImageFeature(decode=False), label=ClassLabel(names=["a", "b"]), path=Value("string"))
    return DatasetDict(train=Dataset.from_dict(columns, features=features))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1_000, 10_000, 100_000])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    whole = None if arguments.data is None else load_image_dataset(arguments.data)
    rows = []
    for size in arguments.sizes if whole is None else [sum(map(len, whole.values()))]:
        dataset = whole or draw(size)
        started = time.perf_counter()
        report = audit_dataset(dataset)
        total = time.perf_counter() - started
        memory = psutil.Process().memory_info().rss / 2**20
        counts = {finding.name: finding.count for finding in report.findings}
        rows.append({"images": size, "seconds": total, "steps": report.seconds, "rss_mib": memory, "findings": counts})
        steps = ", ".join(f"{step} {seconds:.1f}" for step, seconds in report.seconds.items())
        print(
            f"{size:>8} images: {total:7.1f} s ({1000 * total / size:.2f} ms each; {steps}); {memory:.0f} MiB",
            flush=True,
        )
        print(f"{'':>8} found: {counts}", flush=True)
    for small, large in itertools.pairwise(rows):
        growth = math.log(large["seconds"] / small["seconds"]) / math.log(large["images"] / small["images"])
        print(f"{small['images']} -> {large['images']}: images ** {growth:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
