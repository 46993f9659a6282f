"""How time, memory and cache of torchthaw grow with images, classes, resolution and epochs.

    python tests/benchmarks/growth.py --output growth.json
    python tests/benchmarks/growth.py --images 100 300 --classes 2 10 --sizes 32 64 --epochs 1 3 --base-images 100

Along each axis the other three stay at their base. Every point is a process of its own, with an empty cache on disk and
default settings: a head stage, and where there are not too many images a staged plan too (head, last block,
everything). The images are drawn: noise over one colour a class. Prints each axis as a table with growth exponents, the
slopes of least squares in log-log scale (1 is linear growth, 0 none), and writes JSON.
"""

import argparse
import datetime
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

AXES = ("images", "classes", "sizes", "epochs")
MEASURES = ("seconds", "seconds_loading", "peak_rss_mb", "cache_mb")
# Of the pictures along the axis of resolutions, so that all are read alike.
LARGE_PICTURE = 256


def main() -> None:
    arguments = _parse()
    if arguments.point is not None:
        print(json.dumps(measure(json.loads(arguments.point))), flush=True)
        return
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": {"system": platform.platform(), "cores": os.cpu_count()},
        "threads": arguments.threads,
        "architecture": arguments.architecture,
        "points": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for point in points(arguments):
            data = Path(folder, f"{point['images']}-{point['classes']}-{point['picture']}")
            if not data.exists():
                draw_images(data, point["images"], point["classes"], point["picture"])
            figures = _run({**point, "data": str(data)}, arguments.threads)
            result["points"].append({**point, **figures})
            print(f"{point}: {figures}", file=sys.stderr, flush=True)
            arguments.output.write_text(json.dumps(result, indent=2), encoding="utf-8")
    result["exponents"] = exponents(result["points"])
    arguments.output.write_text(json.dumps(result, indent=2), encoding="utf-8")
    print(tables(result))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 5000, 10000, 50000])
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 10, 100, 1000])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128, 160, 192, 224])
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 3, 10, 30], help="Epochs of the head stage.")
    parser.add_argument("--base-images", type=int, default=2000)
    parser.add_argument("--base-classes", type=int, default=10)
    parser.add_argument("--base-size", type=int, default=64)
    parser.add_argument("--base-epochs", type=int, default=3)
    parser.add_argument("--staged-up-to", type=int, default=5000, help="Most images for which a staged plan runs too.")
    parser.add_argument("--architecture", default="mobilenet_v2")
    parser.add_argument("--weights", help="A file; random weights take as long.")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path("growth.json"))
    parser.add_argument("--point", help=argparse.SUPPRESS)
    return parser.parse_args()


def points(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the runs: for each value along each axis a head stage, and maybe a staged plan."""
    base = {
        "images": arguments.base_images,
        "classes": arguments.base_classes,
        "size": arguments.base_size,
        "epochs": arguments.base_epochs,
        "architecture": arguments.architecture,
        "weights": arguments.weights,
    }
    result = []
    for axis in arguments.axes:
        key = "size" if axis == "sizes" else axis
        for value in sorted(getattr(arguments, axis)):
            point = {**base, key: value, "axis": axis, "value": value}
            point["images"] = max(point["images"], 2 * point["classes"])
            point["picture"] = LARGE_PICTURE if axis == "sizes" else max(96, base["size"])
            plans = ["head", "staged"] if point["images"] <= arguments.staged_up_to else ["head"]
            result += [{**point, "plan": plan} for plan in plans]
    return result


def draw_images(folder: Path, images: int, classes: int, side: int) -> None:
    """Draws training images, and a fifth as many for validation, as JPEG."""
    folders = {
        (split, label): folder / split / f"class{label:04d}" for split in ("train", "val") for label in range(classes)
    }
    for place in folders.values():
        place.mkdir(parents=True)

    def draw(job: tuple[str, int]) -> None:
        split, number = job
        label = number % classes
        random = np.random.default_rng([number, split == "val"])
        colour = np.random.default_rng(label).integers(40, 160, 3)
        # Blocks of 8 x 8 pixels, for files of the size of photographs.
        noise = random.integers(0, 90, (side // 8 + 1, side // 8 + 1, 3)).repeat(8, 0).repeat(8, 1)[:side, :side]
        picture = Image.fromarray((noise + colour).astype(np.uint8))
        picture.save(folders[split, label] / f"{number:06d}.jpg", quality=90)

    jobs = [("train", number) for number in range(images)]
    jobs += [("val", number) for number in range(max(classes, images // 5))]
    with ThreadPoolExecutor() as pool:
        list(pool.map(draw, jobs, chunksize=100))


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """Runs one point in this process."""
    import transformers

    from torchthaw import (
        Stage,
        ThawTrainer,
        ThawTrainingArguments,
        TorchvisionForImageClassification,
        TorchvisionImageProcessor,
        load_image_dataset,
    )

    transformers.set_seed(0)
    start = time.perf_counter()
    images = load_image_dataset(point["data"])
    loaded = time.perf_counter()
    stages = [Stage("head", unfreeze="head", epochs=point["epochs"])]
    if point["plan"] == "staged":
        stages += [Stage("last block", unfreeze=1, epochs=1), Stage("all", unfreeze="all", epochs=1)]
    names = images["train"].features["label"].names
    with tempfile.TemporaryDirectory() as folder:
        trainer = ThawTrainer(
            model=TorchvisionForImageClassification.from_torchvision(
                point["architecture"], weights=point["weights"], id2label=names
            ),
            args=ThawTrainingArguments(output_dir=folder, plan=stages, report_to=[], disable_tqdm=True),
            train_dataset=images["train"],
            eval_dataset=images["validation"],
            processing_class=TorchvisionImageProcessor.from_torchvision(
                point["architecture"], weights=point["weights"], image_size=point["size"]
            ),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        end = time.perf_counter()
    unit = 1024**2 if sys.platform == "darwin" else 1024
    records = [record.to_dict() for record in trainer.stage_records]
    return {
        "seconds": end - start,
        "seconds_loading": loaded - start,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
        "stages": [
            {key: record.get(key) for key in ("name", "seconds", "train_images_per_second", "data_wait_share")}
            for record in records
        ],
    }


def _run(point: dict[str, Any], threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder, "cache")
        environ = {**os.environ, "OMP_NUM_THREADS": str(threads), "TORCHTHAW_CACHE": str(cache)}
        command = [sys.executable, str(Path(__file__).resolve()), "--point", json.dumps(point)]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"failed": "\n".join(done.stderr.strip().splitlines()[-15:])}
        size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "cache_mb": size / 1024**2}


def _of(points: list[dict[str, Any]], axis: str, plan: str) -> list[dict[str, Any]]:
    return [point for point in points if (point["axis"], point["plan"]) == (axis, plan) and "failed" not in point]


def exponents(points: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Returns the growth exponent of each measure and stage, by axis and plan."""
    result: dict[str, dict[str, dict[str, float | None]]] = {}
    for axis in dict.fromkeys(point["axis"] for point in points):
        for plan in ("head", "staged"):
            chosen = _of(points, axis, plan)
            if len(chosen) > 1:
                values = [point["value"] for point in chosen]
                columns = [_columns(point) for point in chosen]
                result.setdefault(axis, {})[plan] = {
                    key: _slope(values, [column[key] for column in columns]) for key in columns[0]
                }
    return result


def _columns(point: dict[str, Any]) -> dict[str, float]:
    stages = {f"seconds, {stage['name']}": stage["seconds"] for stage in point["stages"]}
    return {**{key: point[key] for key in MEASURES}, **stages}


def _slope(values: list[float], measured: list[float]) -> float | None:
    """Returns the exponent; None where something measured is 0."""
    if min(measured) <= 0:
        return None
    return float(np.polyfit([math.log(value) for value in values], [math.log(one) for one in measured], 1)[0])


def tables(result: dict[str, Any]) -> str:
    """Returns a Markdown table for each axis and plan."""
    lines = [f"{result['architecture']}, {result['threads']} threads, {result['date']}"]
    for axis, plans in result["exponents"].items():
        for plan, slopes in plans.items():
            lines += ["", f"| {axis}, {plan} | {' | '.join(slopes)} |", "|---:|" + "---:|" * len(slopes)]
            for point in _of(result["points"], axis, plan):
                cells = [f"{value:.1f}" for value in _columns(point).values()]
                lines.append(f"| {point['value']} | {' | '.join(cells)} |")
            cells = ["-" if slope is None else f"{slope:.2f}" for slope in slopes.values()]
            lines.append(f"| exponent | {' | '.join(cells)} |")
    broken = [point for point in result["points"] if "failed" in point]
    return "\n".join(lines + [f"\nfailed: {point}" for point in broken])


if __name__ == "__main__":
    main()
