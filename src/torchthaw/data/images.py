"""One way from a file, bytes or a picture to RGB pixels."""

import io
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from torchthaw.backbones.image_processing import to_rgb
from torchthaw.errors import DataError

# Pillow hands EPS to Ghostscript, which would execute the file; the others are documents and data, not pictures.
_REFUSED_FORMATS = frozenset({"EPS", "WMF", "PDF", "MPEG", "HDF5", "GRIB", "BUFR"})
# What libjpeg can divide the sides of a picture by while it decodes, which saves most of the work.
_JPEG_DIVISORS = (8, 4, 2)
_JPEG_FORMATS = ("JPEG", "MPO")

WorkingSize = Callable[[int, int], tuple[int, int]]


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
        return decode_value(value, working_size)
    except UnusableImageError as error:
        raise DataError(f"Cannot use image {name or _name_of(value)!r}: it {error}.") from error


def decode_value(value: object, working_size: WorkingSize | None = None) -> Image.Image:
    """Does what `decode_image` does, for callers that name images themselves; arguments as there.

    Raises:
        UnusableImageError: It cannot be decoded; the message is the reason, without a name.
    """
    return _loaded(value) if isinstance(value, Image.Image) else decode_bytes(read_bytes(value), working_size)


def examine_image(value: object) -> ExaminedImage:
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
