"""Keys that put images and groups in an order that depends on their content and a seed, not on names or rows."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from datasets import Dataset

from torchthaw.errors import DataError

_CHUNK = 256


def content_digests(dataset: Dataset) -> list[bytes]:
    """Returns a digest of the file of each image.

    Args:
        dataset: Images with the columns `image` (not decoded) and `path`.

    Raises:
        DataError: A file cannot be read.
    """
    columns = dataset.select_columns(["image", "path"])
    starts = range(0, len(dataset), _CHUNK)
    with ThreadPoolExecutor() as pool:
        return [digest for part in pool.map(lambda start: _digests(columns, start), starts) for digest in part]


def image_keys(digests: Sequence[bytes], paths: Sequence[str], seed: int) -> list[tuple[bytes, str]]:
    """Returns keys to sort images by; the path only decides between files of the same content."""
    salt = str(seed).encode()
    return [(hashlib.blake2b(digest + salt).digest(), path) for digest, path in zip(digests, paths, strict=True)]


def group_keys(digests: Sequence[bytes], groups: Sequence[str], seed: int) -> dict[str, tuple[bytes, str]]:
    """Returns a key for each group to sort groups by; the name only decides between groups of the same content."""
    members: dict[str, list[bytes]] = {}
    for digest, group in zip(digests, groups, strict=True):
        members.setdefault(group, []).append(digest)
    salt = str(seed).encode()
    return {
        group: (hashlib.blake2b(b"".join(sorted(found)) + salt).digest(), group) for group, found in members.items()
    }


def _digests(images: Dataset, start: int) -> list[bytes]:
    rows = images[start : start + _CHUNK]
    digests = []
    for image, path in zip(rows["image"], rows["path"], strict=True):
        try:
            content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        except OSError as error:
            raise DataError(f"Cannot read image {path!r}: {error.strerror or error}.") from error
        digests.append(hashlib.blake2b(content).digest())
    return digests
