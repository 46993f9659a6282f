"""One way from a file, bytes or a picture to RGB pixels, and the check that every image of a data set takes it."""

import io
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError
from rich.console import Console
from rich.progress import track

from torchthaw.backbones.image_processing import to_rgb
from torchthaw.data.label_sets import class_names_of, label_counts
from torchthaw.errors import DataError

# Pillow hands EPS to Ghostscript, which would execute the file; the others are documents and data, not pictures.
_REFUSED_FORMATS = frozenset({"EPS", "WMF", "PDF", "MPEG", "HDF5", "GRIB", "BUFR"})
_LISTED = 50
_CHUNK = 32
# What libjpeg can divide the sides of a picture by while it decodes, which saves most of the work.
_JPEG_DIVISORS = (8, 4, 2)
_JPEG_FORMATS = ("JPEG", "MPO")

WorkingSize = Callable[[int, int], tuple[int, int]]


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be decoded.

    Attributes:
        path: Its `path` in the data set.
        reason: Why, in words: "is empty (0 bytes)", "is truncated or damaged (...)", ...
    """

    path: str
    reason: str


class UnusableImageError(Exception):
    """Carries the reason alone; the callers know the name."""


@dataclass(frozen=True)
class ExaminedImage:
    """A decoded image and its file.

    Attributes:
        picture: In RGB, with EXIF orientation applied.
        data: The bytes of the file.
        format: Pillow's name of the format, such as `JPEG`.
        mode: Pillow's name of the mode in the file, such as `RGB`, `L` or `CMYK`.
        info: What Pillow read besides the pixels; `quantization` has a JPEG's tables.
        exif: EXIF fields by name, as far as they are readable.
    """

    picture: Image.Image
    data: bytes
    format: str | None
    mode: str
    info: dict[Any, Any]
    exif: dict[str, str]


@cache
def image_extensions() -> frozenset[str]:
    """Returns the file extensions (lower case, with the dot) of the picture formats that Pillow can open."""
    registered = Image.registered_extensions()
    return frozenset(
        extension for extension, kind in registered.items() if kind in Image.OPEN and kind not in _REFUSED_FORMATS
    )


def decode_image(value: object, *, name: str | None = None, working_size: WorkingSize | None = None) -> Image.Image:
    """Decodes an image to RGB with all pixels loaded: EXIF orientation applied, first frame of an animation.

    This is the only decoder of the package, so training, evaluation and inference see the same pixels.

    Args:
        value: What an `Image(decode=False)` column holds (`{"bytes": ..., "path": ...}`), a path, bytes, or a picture.
        name: What errors call the image; its path by default.
        working_size: From the width and height of a picture to those that are needed of it. A JPEG is then decoded at
            the smallest of 1/8, 1/4 and 1/2 of its size that is not smaller.

    Returns:
        The picture in mode RGB.

    Raises:
        DataError: The image is missing, empty, not an image, truncated, or has more than `PIL.Image.MAX_IMAGE_PIXELS`
            pixels (89,478,485 unless the program sets another limit, `None` for none).
    """
    try:
        return _decode(value, working_size)
    except UnusableImageError as error:
        raise DataError(f"Cannot use image {name or _name_of(value)!r}: it {error}.") from error


def examine_image(value: object) -> "ExaminedImage":
    """Decodes an image as `decode_image` does, and keeps what the file says of itself.

    Args:
        value: As in `decode_image`.

    Raises:
        UnusableImageError: It cannot be decoded; the message is the reason, without a name.
    """
    if isinstance(value, Image.Image):
        return ExaminedImage(_loaded(value), value.tobytes(), value.format, value.mode, dict(value.info), {})
    data = read_bytes(value)
    with _pillow_errors_named():
        picture = Image.open(io.BytesIO(data))
    with picture:
        kind, mode = picture.format, picture.mode
        rgb = _loaded(picture)
        # EXIF blocks are damaged more often than pictures.
        try:
            exif = _readable_exif(picture)
        except Exception:  # noqa: BLE001
            exif = {}
        info = dict(picture.info) | {"quantization": getattr(picture, "quantization", None)}
    return ExaminedImage(rgb, data, kind, mode, info, exif)


def decode_bytes(data: bytes, working_size: WorkingSize | None = None) -> Image.Image:
    """Decodes the bytes of a file; arguments as of `decode_image`.

    Raises:
        UnusableImageError: It cannot be decoded; the message is the reason, without a name.
    """
    with _pillow_errors_named():
        picture = Image.open(io.BytesIO(data))
    with picture:
        return _loaded(picture, working_size)


@dataclass(frozen=True)
class ImageHeader:
    """What a file says of its picture before it is decoded.

    Attributes:
        format: Pillow's name of the format.
        width: In pixels, before EXIF orientation is applied.
        height: In pixels.
    """

    format: str | None
    width: int
    height: int

    def decoded_size(self, working_size: WorkingSize) -> tuple[int, int]:
        """Returns the width and height that `decode_bytes` gives, of most pictures, turned by 90 degrees or not."""
        divisor = _divisor(self.width, self.height, working_size) if self.format in _JPEG_FORMATS else 1
        return -(-self.width // divisor), -(-self.height // divisor)


def read_header(data: bytes) -> ImageHeader:
    """Reads what the bytes of a file say of its picture.

    Raises:
        UnusableImageError: There is no readable header; the message is the reason, without a name.
    """
    with _pillow_errors_named():
        picture = Image.open(io.BytesIO(data))
    with picture:
        return ImageHeader(picture.format, picture.width, picture.height)


def check_images(
    dataset: Dataset,
    *,
    on_bad: Literal["fail", "drop"] = "fail",
    num_threads: int | None = None,
    progress: bool = True,
) -> tuple[Dataset, list[BadImage]]:
    """Decodes every image once and fails on, or leaves out, the ones that cannot be decoded.

    Args:
        dataset: A split with the columns `image`, `label` and `path`.
        on_bad: "fail" raises one error that lists the bad images; "drop" returns the data set without them.
        num_threads: Decoding threads; the number of CPU cores by default.
        progress: Show a progress bar on stderr.

    Returns:
        The data set (itself, where nothing is dropped) and the bad images in row order.

    Raises:
        DataError: An image is bad and `on_bad` is "fail", or dropping would leave a class without images.
    """
    if on_bad not in ("fail", "drop"):
        raise DataError(f"on_bad={on_bad!r} is unknown; write 'fail' or 'drop'.")
    bad = find_bad_images(dataset, num_threads=num_threads, progress=progress)
    return leave_out({"": dataset}, {"": bad}, on_bad=on_bad)[""], bad


def find_bad_images(dataset: Dataset, *, num_threads: int | None = None, progress: bool = True) -> list[BadImage]:
    """Decodes every image once, and returns those that cannot be decoded, in row order; arguments as above."""
    bad: list[BadImage] = []
    starts = range(0, len(dataset), _CHUNK)
    console = Console(stderr=True)
    with ThreadPoolExecutor(num_threads or os.cpu_count() or 1) as pool:
        checked = pool.map(lambda start: list(_check_rows(dataset, start)), starts)
        try:
            for found in track(
                checked, "Checking images", len(starts), console=console, transient=True, disable=not progress
            ):
                bad.extend(found)
        except BaseException:
            # Without this, an interrupt would wait until every image is decoded.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return bad


def leave_out(
    splits: Mapping[str, Dataset], bad: Mapping[str, list[BadImage]], *, on_bad: Literal["fail", "drop"]
) -> dict[str, Dataset]:
    """Fails on bad images, or returns the splits without them.

    Args:
        splits: With the columns `image`, `label` and `path`.
        bad: Their images that cannot be decoded.
        on_bad: As for `check_images`.

    Raises:
        DataError: There are some and `on_bad` is "fail", or dropping would leave a class of a split without images.
    """
    every = [image for found in bad.values() for image in found]
    if every and on_bad == "fail":
        raise DataError(_report(every, sum(len(dataset) for dataset in splits.values())))
    result = without(splits, bad)
    for split in splits:
        _refuse_emptied_classes(splits[split], result[split])
    return result


def without(splits: Mapping[str, Dataset], bad: Mapping[str, list[BadImage]]) -> dict[str, Dataset]:
    """Returns the splits without some images, even where a class then has none; a split that has none is the same."""
    result = dict(splits)
    for split, found in bad.items():
        if found:
            names = {image.path for image in found}
            paths = splits[split].select_columns(["path"])[:]["path"]
            result[split] = splits[split].select([row for row, path in enumerate(paths) if path not in names])
    return result


def _decode(value: object, working_size: WorkingSize | None = None) -> Image.Image:
    return _loaded(value) if isinstance(value, Image.Image) else decode_bytes(read_bytes(value), working_size)


def read_bytes(value: object) -> bytes:
    """Returns the bytes of an image's file.

    Args:
        value: As in `decode_image`, but no picture.

    Raises:
        UnusableImageError: The image is missing or empty; the message is the reason, without a name.
    """
    data, path = _bytes_and_path(value)
    try:
        if data is None:
            if path is None:
                raise UnusableImageError("is missing: neither bytes nor a path are given")
            data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UnusableImageError("does not exist") from error
    except OSError as error:
        raise UnusableImageError(f"cannot be read ({error.strerror or error})") from error
    if not data:
        raise UnusableImageError("is empty (0 bytes)")
    return data


def _readable_exif(picture: Image.Image) -> dict[str, str]:
    block = picture.getexif()
    tags = {**block, **block.get_ifd(ExifTags.IFD.Exif)}
    named = {ExifTags.TAGS.get(tag, str(tag)): value for tag, value in tags.items()}
    return {
        name: str(value).strip("\0 ")
        for name, value in named.items()
        if isinstance(value, str | int | float | TiffImagePlugin.IFDRational)
    }


def _loaded(picture: Image.Image, working_size: WorkingSize | None = None) -> Image.Image:
    if picture.format in _REFUSED_FORMATS:
        raise UnusableImageError(f"is a {picture.format} file, not a picture")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and picture.width * picture.height > limit:
        raise UnusableImageError(
            f"has {picture.width} x {picture.height} pixels, more than the {limit:,} that are opened safely; "
            "save it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS"
        )
    with _pillow_errors_named():
        if working_size is not None and picture.format in _JPEG_FORMATS:
            divisor = _divisor(*picture.size, working_size)
            picture.draft(None, (picture.width // divisor, picture.height // divisor))
        rgb = to_rgb(picture)
        rgb.load()
    return rgb


def _divisor(width: int, height: int, working_size: WorkingSize) -> int:
    """Returns by how much libjpeg shall divide the sides of a picture."""
    needed_width, needed_height = working_size(width, height)
    fitting = (by for by in _JPEG_DIVISORS if width // by >= needed_width and height // by >= needed_height)
    return next(fitting, 1)


@contextmanager
def _pillow_errors_named() -> Iterator[None]:
    """Says in words what Pillow found; damaged files make its decoders raise nearly any exception."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise UnusableImageError("is not an image that Pillow can read") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnusableImageError(f"has too many pixels to be opened safely ({error})") from error
    except MemoryError:
        raise
    except Exception as error:
        raise UnusableImageError(f"is truncated or damaged ({type(error).__name__}: {error})") from error


def _bytes_and_path(value: object) -> tuple[bytes | None, str | None]:
    if isinstance(value, Mapping):
        path = value.get("path")
        return value.get("bytes"), None if path is None else str(path)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value), None
    if isinstance(value, str | os.PathLike):
        return None, os.fspath(value)
    if value is None:
        return None, None
    raise UnusableImageError(f"is a {type(value).__name__}, not a path, bytes, a picture or a dict of bytes and path")


def _name_of(value: object) -> str:
    if isinstance(value, Mapping):
        return str(value.get("path") or "<bytes>")
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    return str(getattr(value, "filename", None) or f"<{type(value).__name__}>")


def _check_rows(dataset: Dataset, start: int) -> Iterator[BadImage]:
    rows = dataset[start : start + _CHUNK]
    for value, path in zip(rows["image"], rows["path"], strict=True):
        try:
            # All of the file is read at any scale, and what is damaged found; at an eighth that is fastest.
            _decode(value, lambda _width, _height: (1, 1))
        except UnusableImageError as error:
            yield BadImage(path, str(error))


def _report(bad: list[BadImage], total: int) -> str:
    lines = [f"{len(bad)} of {total} images cannot be used:"]
    lines += [f"  {image.path!r}: {image.reason}" for image in bad[:_LISTED]]
    if len(bad) > _LISTED:
        lines.append(f"  ... and {len(bad) - _LISTED} more")
    lines.append("Mend or remove them, or leave them out by writing `data: {on_bad_image: drop}` in the recipe.")
    return "\n".join(lines)


def _refuse_emptied_classes(before: Dataset, after: Dataset) -> None:
    if after is before:
        return
    emptied = (label_counts(before) > 0) & (label_counts(after) == 0)
    if emptied.any():
        classes = ", ".join(repr(name) for name, gone in zip(class_names_of(before), emptied, strict=True) if gone)
        raise DataError(f"No image is left in {classes} after dropping those that cannot be decoded; mend the files.")
