"""The `predictions/*.jsonl` files of an output folder: one JSON line per image."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from torchthaw.errors import DataError
from torchthaw.evaluation.arrays import as_class_ids, as_class_names, as_logits, softmax
from torchthaw.evaluation.files import replacing

FIELDS = ("path", "label", "predicted", "scores")


def write_predictions(
    file: str | os.PathLike[str],
    paths: Sequence[str | os.PathLike[str]],
    labels: npt.ArrayLike,
    logits: npt.ArrayLike,
    class_names: Sequence[str],
) -> None:
    """Writes one line per image: `path`, `label`, `predicted` and `scores` (class name -> probability).

    Scores are the softmax of the logits in float32, as `pipeline("image-classification")` computes them. The file is
    ASCII (other characters as JSON escapes), so that any file name the system allows can be written, and replaces an
    earlier one only when complete.

    Args:
        file: Where to write; missing parent folders are made.
        paths: One path per image.
        labels: Class ids, shape (images,).
        logits: Shape (images, classes).
        class_names: One name per column of `logits`.

    Raises:
        DataError: Logits that are not finite, or arrays, paths and names that do not fit each other.
    """
    checked = as_logits(logits).astype(np.float32)
    num_images, num_classes = checked.shape
    ids = as_class_ids(labels, num_images, num_classes)
    names = as_class_names(class_names, num_classes)
    if len(paths) != num_images:
        raise DataError(f"There are {len(paths)} paths for {num_images} images. Pass one path per image.")
    with replacing(file) as temporary, temporary.open("w", encoding="ascii", newline="\n") as lines:
        for path, label, predicted, scores in zip(paths, ids, checked.argmax(axis=1), softmax(checked), strict=True):
            line = {
                "path": os.fspath(path),
                "label": names[label],
                "predicted": names[predicted],
                "scores": dict(zip(names, scores.tolist(), strict=True)),
            }
            lines.write(json.dumps(line) + "\n")


def read_predictions(file: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads what `write_predictions` wrote, one dictionary per image.

    Raises:
        DataError: The file is missing, or a line of it is not one of `write_predictions`.
    """
    source = Path(file)
    if not source.is_file():
        raise DataError(f"There is no file of predictions at {source}. Evaluate the model to write it.")
    with source.open(encoding="utf-8") as lines:
        return [_parsed(line, number, source) for number, line in enumerate(lines, start=1)]


def _parsed(text: str, number: int, source: Path) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"Line {number} of {source} is not JSON ({error}). Evaluate the model again to rewrite the file."
        ) from error
    missing = [field for field in FIELDS if not isinstance(line, dict) or field not in line]
    if missing:
        raise DataError(
            f"Line {number} of {source} has no {', '.join(missing)}: it is not a file of predictions, whose lines "
            f"have {', '.join(FIELDS)}."
        )
    parsed: dict[str, Any] = line
    return parsed
