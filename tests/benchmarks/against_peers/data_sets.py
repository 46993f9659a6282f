"""The images that all tools train on, as one folder: `train/` and `val/`, each with a folder for each class.

No torch here: what run.py takes of memory would count as the peak of the processes that it starts.
"""

import io
import random
import re
import shutil
from collections import defaultdict
from pathlib import Path

import pyarrow.parquet
from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png")
_SPLITS = {"train": ("train",), "val": ("val", "validation", "valid", "test")}
# The same images for every seed.
_SEED = 0


def write_images(source: Path, target: Path, subset: tuple[int, int] | None) -> None:
    """Copies the images of a source that every tool reads, JPEG and PNG; with a subset, draws so many of each class.

    Args:
        source: A folder with `train/` and `val/`, or one of parquet files named by split with the columns `image` and
            `label`.
        target: Gets the folders.
        subset: How many images to draw for training and for validation, in equal parts from all classes; None takes
            all of a folder.
    """
    for number, split in enumerate(_SPLITS):
        files = _parquet_files(source, split)
        wanted = None if subset is None else subset[number]
        if files:
            _write_parquet(files, target / split, wanted)
        else:
            _copy_folder(_split_folder(source, split), target / split, wanted)


def _split_folder(source: Path, split: str) -> Path:
    for name in _SPLITS[split]:
        if (source / name).is_dir():
            return source / name
    raise SystemExit(f"{source} has no folder {' or '.join(_SPLITS[split])}, and no parquet file of that name")


def _copy_folder(source: Path, target: Path, wanted: int | None) -> None:
    by_class = {
        folder.name: sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
        for folder in sorted(source.iterdir())
        if folder.is_dir()
    }
    for label, files in by_class.items():
        (target / label).mkdir(parents=True)
        for file in _draw(files, wanted, len(by_class)):
            shutil.copy2(file, target / label / file.name)


def _parquet_files(source: Path, split: str) -> list[Path]:
    found = sorted(source.rglob("*.parquet"))
    for name in _SPLITS[split]:
        files = [file for file in found if re.match(rf"{name}\b|{name}[-_]", file.name)]
        if files:
            return files
    return []


def _write_parquet(files: list[Path], target: Path, wanted: int | None) -> None:
    rows = [row for file in files for row in pyarrow.parquet.read_table(file, columns=["image", "label"]).to_pylist()]
    by_class = defaultdict(list)
    for number, row in enumerate(rows):
        by_class[row["label"]].append(number)
    for label, numbers in sorted(by_class.items()):
        folder = target / f"class{label:04d}"
        folder.mkdir(parents=True)
        for number in _draw(numbers, wanted, len(by_class)):
            picture = Image.open(io.BytesIO(rows[number]["image"]["bytes"]))
            picture.convert("RGB").save(folder / f"{number:06d}.png")


def _draw(items: list, wanted: int | None, classes: int) -> list:
    if wanted is None:
        return items
    if len(items) < wanted // classes:
        raise SystemExit(f"--subset asks for {wanted // classes} images of each class, but one has only {len(items)}")
    return sorted(random.Random(_SEED).sample(items, wanted // classes))
