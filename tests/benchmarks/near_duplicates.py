"""Recall and precision of the near-duplicate finder on photographs with planted copies.

    python tests/benchmarks/near_duplicates.py FOLDER... [--seeds 0 1 2] [--share 0.5] [--json out.json]

Of a random half of a folder's images, a changed copy is written to a second folder, and the audit looks at both.
Recall is the share of the planted pairs that are found; precision the share of the pairs found that were planted,
pairs among the images as they came left aside (their number is shown as "own"). With imagehash installed, its pHash
(64 bits, of pictures as they are) is measured beside it, at the distance where it finds most with precision 0.98.
"""

import argparse
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from torchthaw.data.audit.copies import find_copies
from torchthaw.data.audit.scan import scan_images
from torchthaw.data.loading import load_image_dataset

Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def _jpeg(picture: Image.Image, _random: np.random.Generator) -> Image.Image:
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=40)
    return Image.open(data).convert("RGB")


def _crop(picture: Image.Image, random: np.random.Generator) -> Image.Image:
    """Cuts 10 % off width and height, from random sides."""
    width, height = round(0.9 * picture.width), round(0.9 * picture.height)
    left = int(random.integers(picture.width - width + 1))
    top = int(random.integers(picture.height - height + 1))
    return picture.crop((left, top, left + width, top + height))


CHANGES: dict[str, Change] = {
    "exact copy": lambda picture, _: picture,
    "resize 0.5x": lambda picture, _: picture.resize((picture.width // 2, picture.height // 2)),
    "JPEG quality 40": _jpeg,
    "10 % crop": _crop,
    "horizontal flip": lambda picture, _: picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "brightness +20 %": lambda picture, _: ImageEnhance.Brightness(picture).enhance(1.2),
    "brightness -20 %": lambda picture, _: ImageEnhance.Brightness(picture).enhance(0.8),
    "rotation by 90": lambda picture, _: picture.transpose(Image.Transpose.ROTATE_90),
    "gray": lambda picture, _: picture.convert("L"),
}


def measure(folder: Path, name: str, change: Change, *, share: float, seed: int) -> dict[str, float]:
    """Plants copies of one kind, and counts what is found."""
    dataset = load_image_dataset(folder)
    rows = [row for split in dataset.values() for row in split]
    random = np.random.default_rng(seed)
    chosen = sorted(random.choice(len(rows), round(share * len(rows)), replace=False))
    with tempfile.TemporaryDirectory() as planted:
        for number, row in enumerate(chosen):
            target = Path(planted) / ("ab"[number % 2]) / f"{number:05d}.png"
            target.parent.mkdir(exist_ok=True)
            with Image.open(rows[row]["image"]["path"]) as picture:
                change(picture.convert("RGB"), random).save(target, compress_level=1)
        copies = load_image_dataset(planted)
        scan = scan_images({**dataset, "planted": copies["train"]})
    number_of = {image.path: row for row, image in enumerate(scan.images)}
    original = {number_of[f"{'ab'[number % 2]}/{number:05d}.png"]: row for number, row in enumerate(chosen)}
    found = find_copies(scan)
    pairs = {(pair.first, pair.second) for pair in found.near}
    for alike in found.same_pixels:
        pairs |= {(first, second) for first in alike for second in alike if first < second}
    own = {pair for pair in pairs if pair[1] < len(rows)}
    twins = {row: {row} for row in range(len(rows))}
    for first, second in own:
        twins[first].add(second), twins[second].add(first)
    across = {pair for pair in pairs if pair[0] < len(rows) <= pair[1]}
    # A copy of an image that has a twin is a copy of the twin, too; likewise copies of both.
    right = {pair for pair in across if pair[0] in twins[original[pair[1]]]}
    among = {pair for pair in pairs if pair[0] >= len(rows)}
    right |= {pair for pair in among if original[pair[1]] in twins[original[pair[0]]]}
    hits = {pair[1] for pair in across if original[pair[1]] == pair[0]}
    result = {
        "recall": len(hits) / len(chosen),
        "precision": len(right) / max(1, len(across | among)),
        "planted": len(chosen),
        "own": len(own),
    }
    return result | _imagehash(scan.thumbnails, original, len(rows))


def _imagehash(thumbnails: np.ndarray, original: dict[int, int], num_rows: int) -> dict[str, float]:
    try:
        import imagehash
    except ImportError:
        return {}
    bits = np.stack([imagehash.phash(Image.fromarray(small)).hash.ravel() for small in np.asarray(thumbnails)])
    distances = (bits[num_rows:, None, :] != bits[None, :num_rows]).sum(-1)
    best = 0.0
    for limit in range(0, 25, 2):
        copy, source = np.nonzero(distances <= limit)
        right = sum(
            original[num_rows + number] == row for number, row in zip(copy.tolist(), source.tolist(), strict=True)
        )
        if right / max(1, len(copy)) >= 0.98:
            best = max(best, right / len(original))
    return {"phash_recall": best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    table: dict[str, dict[str, list[dict[str, float]]]] = {}
    for folder in arguments.folders:
        print(f"\n{folder.name}: recall and precision, lowest and highest of seeds {arguments.seeds}")
        print(f"{'':<20}{'planted':>8}{'recall':>16}{'precision':>16}{'pHash recall':>16}{'own':>6}")
        for name, change in CHANGES.items():
            found = [measure(folder, name, change, share=arguments.share, seed=seed) for seed in arguments.seeds]
            table.setdefault(folder.name, {})[name] = found
            shown = [_range([figures.get(key) for figures in found]) for key in ("recall", "precision", "phash_recall")]
            print(
                f"{name:<20}{found[0]['planted']:>8}"
                + "".join(f"{part:>16}" for part in shown)
                + f"{found[0]['own']:>6}"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=2))


def _range(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, high = min(known), max(known)
    return f"{low:.3f}" if low == high else f"{low:.3f} - {high:.3f}"


if __name__ == "__main__":
    main()
