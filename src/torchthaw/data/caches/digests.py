"""What identifies images whatever they are called: digests of their bytes."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Image

from torchthaw.data.images import ImageHeader, UnusableImageError, read_bytes, read_header

_CHUNK = 64
# By path, size and time of the last change; what a data set holds itself, by the fingerprint of the data set.
_OF_FILES: dict[tuple[str, int, int], "ImageFacts"] = {}
_OF_DATASETS: dict[str, list["ImageFacts"]] = {}


@dataclass(frozen=True)
class ImageFacts:
    """What is known of an image without decoding it.

    Attributes:
        digest: Of the bytes; of an image that cannot be read, of its path.
        header: None where it cannot be read.
    """

    digest: str
    header: ImageHeader | None


def image_digests(dataset: Dataset) -> list[str]:
    """Returns a digest of each image's bytes; an unchanged file is read once in a process."""
    return [facts.digest for facts in image_facts(dataset)]


def image_facts(dataset: Dataset) -> list[ImageFacts]:
    """Returns what is known of each image of the column `image`; each is read once in a process."""
    images = dataset.with_format(None).select_columns(["image"]).cast_column("image", Image(decode=False))
    fingerprint = str(getattr(images, "_fingerprint", ""))
    if fingerprint in _OF_DATASETS:
        return list(_OF_DATASETS[fingerprint])
    starts = range(0, len(images), _CHUNK)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        chunks = list(pool.map(lambda start: _facts_of_rows(images[start : start + _CHUNK]["image"]), starts))
    found = [facts for chunk, _ in chunks for facts in chunk]
    if fingerprint and not any(has_files for _, has_files in chunks):
        _OF_DATASETS[fingerprint] = found
    return list(found)


def digest_of(data: bytes) -> str:
    """Returns the digest of an image's bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _facts_of_rows(values: list[dict[str, Any]]) -> tuple[list[ImageFacts], bool]:
    """Returns the facts of some images, and whether any of them is a file."""
    files = [value["path"] if value is not None and value["bytes"] is None else None for value in values]
    facts = [_facts(value) if file is None else _facts_of_file(file) for value, file in zip(values, files, strict=True)]
    return facts, any(file is not None for file in files)


def _facts_of_file(path: str) -> ImageFacts:
    try:
        status = Path(path).stat()
    except OSError:
        return _facts(path)
    key = path, status.st_size, status.st_mtime_ns
    if key not in _OF_FILES:
        _OF_FILES[key] = _facts(path)
    return _OF_FILES[key]


def _facts(value: Any) -> ImageFacts:
    try:
        data = read_bytes(value)
    except UnusableImageError as error:
        return ImageFacts(digest_of(f"{error}: {value}".encode()), None)
    try:
        return ImageFacts(digest_of(data), read_header(data))
    except UnusableImageError:
        return ImageFacts(digest_of(data), None)
