"""One look at every image of a data set: each file is read and decoded once, and all checks work on what is kept."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset

from torchthaw.data.audit.fingerprints import THUMBNAIL_SIDE, thumbnail
from torchthaw.data.bad_images import BadImage
from torchthaw.data.images import ExaminedImage, UnusableImageError, examine_image
from torchthaw.data.label_sets import class_names_of, has_label_sets, shown

_CHUNK = 32
# Of a text in EXIF, no more is kept.
_LONGEST_TEXT = 80
EXIF_FIELDS = (
    "Make", "Model", "Software", "LensModel", "DateTimeOriginal", "DateTime", "Orientation", "XResolution",
    "ColorSpace", "ExifVersion", "Artist", "FocalLength", "FNumber", "ISOSpeedRatings", "PhotographicSensitivity",
)  # fmt: skip


@dataclass(frozen=True)
class ImageFacts:
    """What is known of an image and its file.

    Attributes:
        path: Its `path` in the data set.
        split: Its split in the data set as it was given.
        label: Its class name; of several, all of them in one text.
        group: The unit of independence that it belongs to, where groups are known.
        time: Seconds since 1970, where times are known.
        file_digest: Of the bytes of the file.
        pixel_digest: Of the decoded pixels and their size.
        num_bytes: Length of the file.
        format: Pillow's name of the format; None for what was never a file.
        mode: Pillow's name of the mode, as it is in the file.
        width: In pixels, turned as EXIF says.
        height: Likewise.
        contrast: Standard deviation of the grey levels, from 0 to 127.5, at 64 x 64 pixels.
        quality: The sum of a JPEG's quantization tables, which goes with its quality setting.
        resolution: Dots per inch as the file states them.
        exif: Some EXIF fields, as text.
        classes: Its class names where images may have several labels; None where they have one.
    """

    path: str
    split: str
    label: str
    group: str | None
    time: float | None
    file_digest: bytes
    pixel_digest: bytes
    num_bytes: int
    format: str | None
    mode: str
    width: int
    height: int
    contrast: float
    quality: int | None
    resolution: str | None
    exif: dict[str, str]
    classes: tuple[str, ...] | None = None


@dataclass
class Scan:
    """All that the audit knows of a data set.

    Attributes:
        images: Those that can be decoded, split after split in row order.
        thumbnails: Of the same, shape (images, 64, 64); on disk, so that many fit.
        bad: Those that cannot be decoded, by split.
        class_names: In the order of their ids.
    """

    images: list[ImageFacts] = field(default_factory=list)
    thumbnails: npt.NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, 0, 0), np.uint8))
    bad: dict[str, list[BadImage]] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)


def scan_images(
    splits: Mapping[str, Dataset],
    *,
    num_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scan:
    """Reads and decodes every image of a data set once.

    Args:
        splits: Each with the columns `image`, `label` and `path`, and as far as known `group` and `time`.
        num_threads: Decoding threads; the number of CPU cores by default.
        progress: Is told how many images are done, of how many.
    """
    total = sum(len(dataset) for dataset in splits.values())
    # The file has no name, so that it goes with the process, however that ends.
    unnamed = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the array)
    thumbnails = np.memmap(unnamed, np.uint8, "w+", shape=(max(1, total), THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    names = class_names_of(next(iter(splits.values()))) if splits else []
    scan = Scan(class_names=list(names), bad={split: [] for split in splits})
    done = 0
    with ThreadPoolExecutor(num_threads or os.cpu_count() or 1) as pool:
        try:
            for split, dataset in splits.items():
                starts = range(0, len(dataset), _CHUNK)
                for found in pool.map(
                    lambda start, data=dataset, name=split: list(_scan_rows(data, name, start)), starts
                ):
                    for facts in found:
                        if isinstance(facts, BadImage):
                            scan.bad[split].append(facts)
                        else:
                            thumbnails[len(scan.images)] = facts[1]
                            scan.images.append(facts[0])
                    done += len(found)
                    if progress is not None:
                        progress(done, total)
        except BaseException:
            # Without this, an interrupt would wait until every image is decoded.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    scan.thumbnails = thumbnails[: len(scan.images)]
    return scan


def _scan_rows(
    dataset: Dataset, split: str, start: int
) -> Iterator[BadImage | tuple[ImageFacts, npt.NDArray[np.uint8]]]:
    rows = dataset[start : start + _CHUNK]
    names, several = class_names_of(dataset), has_label_sets(dataset)
    for offset, (value, path) in enumerate(zip(rows["image"], rows["path"], strict=True)):
        try:
            image = examine_image(value)
        except UnusableImageError as error:
            yield BadImage(path, str(error))
            continue
        about = {
            "path": path,
            "split": split,
            "label": shown(rows["label"][offset], names),
            "classes": tuple(names[number] for number in rows["label"][offset]) if several else None,
            "group": rows["group"][offset] if "group" in rows else None,
            "time": _known(rows["time"][offset]) if "time" in rows else None,
        }
        yield _facts(image, about)


def _facts(image: ExaminedImage, about: Mapping[str, Any]) -> tuple[ImageFacts, npt.NDArray[np.uint8]]:
    small = thumbnail(image.picture)
    pixels = hashlib.blake2b(str(image.picture.size).encode(), digest_size=16)
    pixels.update(image.picture.tobytes())
    tables = image.info.get("quantization")
    resolution = image.info.get("dpi")
    return (
        ImageFacts(
            **about,
            file_digest=hashlib.blake2b(image.data, digest_size=16).digest(),
            pixel_digest=pixels.digest(),
            num_bytes=len(image.data),
            format=image.format,
            mode=image.mode,
            width=image.picture.width,
            height=image.picture.height,
            contrast=float(small.std()),
            quality=sum(map(sum, tables.values())) if tables else None,
            resolution=None if resolution is None else str(tuple(round(float(value)) for value in resolution)),
            exif={name: image.exif[name][:_LONGEST_TEXT] for name in EXIF_FIELDS if name in image.exif},
        ),
        small,
    )


def _known(time: float | None) -> float | None:
    return None if time is None or np.isnan(time) else float(time)
