"""Looks at the test images of a run: which images these are, and a record of each time that they were measured.

Test images are known by content. A run keeps a short digest of each one's file, so that they are recognised under other
names, in another folder, or as a part of another split.
"""

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from datasets import Dataset, Image

from torchthaw._version import __version__
from torchthaw.data.contents import content_digests
from torchthaw.evaluation.files import replacing

DIGESTS_FILE = "test_images.txt"
# Copies that a leaking split has elsewhere are no look at the test images.
_SHARE = 0.5


def digests_of(images: Dataset) -> list[str]:
    """Returns a digest of each image's file, 32 hexadecimal digits, sorted; nothing is decoded.

    Raises:
        DataError: a file cannot be read.
    """
    return sorted(digest[:16].hex() for digest in content_digests(images.cast_column("image", Image(decode=False))))


def describe_images(digests: Sequence[str]) -> dict[str, Any]:
    """Returns `test_images` of `results.json`: `number` of the images, and a `digest` of them all, in any order."""
    return {"number": len(digests), "digest": hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()}


def write_digests(folder: Path, digests: Sequence[str]) -> None:
    """Writes `test_images.txt`, a line for each test image; the order says nothing of their names."""
    with replacing(folder / DIGESTS_FILE) as temporary:
        temporary.write_text("".join(f"{digest}\n" for digest in sorted(digests)), encoding="ascii")


def read_digests(folder: Path) -> set[str]:
    """Returns what `write_digests` wrote; nothing if there is no such file."""
    file = folder / DIGESTS_FILE
    return set(file.read_text(encoding="ascii").split()) if file.is_file() else set()


def count_test_images(results: Mapping[str, Any], known: set[str], digests: Sequence[str]) -> int:
    """Counts the test images of a run among others.

    Args:
        results: The run's `results.json`.
        known: Digests of its test images, where they are at hand; without them all images have to be the same.
        digests: Of the images in question.

    Returns:
        Their number, if measuring these images is a look at the test images: at least half of the test images are
        among them, or half of them are test images. Otherwise 0.
    """
    described = results.get("test_images")
    if not described or not digests:
        return 0
    if describe_images(digests) == described:
        return len(digests)
    found = sum(digest in known for digest in digests)
    return found if known and found >= _SHARE * min(len(known), len(digests)) else 0


def describe_look(
    by: str, figures: Mapping[str, Any], *, command: str | None = None, recipe: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns an entry of `test_looks` of `results.json`: when, with what, and what was seen.

    Args:
        by: What measured: `train` or `evaluate`.
        figures: What `classification_metrics` gave.
        command: The command line.
        recipe: Its digest, and commit, as far as they are known.
    """
    seen = {key: figures[key] for key in ("num_images", "accuracy", "macro_f1", "loss") if key in figures}
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "by": by,
        "command": command,
        "torchthaw": __version__,
        **({} if recipe is None else {"recipe": dict(recipe)}),
        "figures": seen,
    }
