"""When each image was taken: from a column, or from the EXIF data of its file."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime, timezone
from typing import Any

from datasets import Dataset
from PIL import ExifTags, Image

from torchthaw.data.folders import listing
from torchthaw.errors import DataError

EXIF = "exif"
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_DAY = re.compile(r"(19|20)[0-9]{2}(0[1-9]|1[0-2])(0[1-9]|[12][0-9]|3[01])")
_EXIF_DATE = re.compile(r"([0-9]{4}):([0-9]{2}):([0-9]{2})")
_CHUNK = 64


def time_column(time: str | None) -> str | None:
    """Returns the name of the column that is meant by `time`, or `None`."""
    return None if time == EXIF else time


def clean_times(values: Sequence[Any], paths: Sequence[str], where: str) -> list[float]:
    """Returns the values of a column as times in seconds since 1970 (UTC), NaN where they are missing.

    Args:
        values: Numbers of seconds, dates, or texts: ISO 8601 dates, days such as 20240131, EXIF dates, or numbers of
            seconds. What states no time zone is taken as UTC.
        paths: Path of each image, for messages.
        where: What messages call the column.

    Raises:
        DataError: Values are no times, or all are missing.
    """
    times = [_seconds(value) for value in values]
    wrong = [f"{path}: {value}" for path, value, time in zip(paths, values, times, strict=True) if time is None]
    if wrong:
        raise DataError(
            f"{len(wrong)} of {len(values)} values in {where} are no times: {listing(wrong)}. Write ISO dates such as "
            "2024-01-31 or 2024-01-31T16:20:00, or numbers of seconds; leave the cell empty where it is unknown."
        )
    known = [math.nan if time is None else time for time in times]
    if all(map(math.isnan, known)):
        raise DataError(f"No image has a time in {where}; name another column, or leave time out.")
    return known


def exif_times(dataset: Dataset) -> list[float]:
    """Returns when the images were taken, in seconds since 1970 with EXIF's local time taken as UTC.

    It is the file's DateTimeOriginal, else its DateTime; NaN where there is neither, or the file cannot be read.

    Args:
        dataset: Images with the column `image`, not decoded.
    """
    images = dataset.select_columns(["image"])
    starts = range(0, len(images), _CHUNK)
    with ThreadPoolExecutor() as pool:
        parts = pool.map(lambda start: [_exif_time(value) for value in images[start : start + _CHUNK]["image"]], starts)
        return [time for part in parts for time in part]


def _exif_time(image: Mapping[str, Any]) -> float:
    try:
        with Image.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]) as picture:
            exif = picture.getexif()
            taken = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.DateTimeOriginal)
            for value in (taken, exif.get(ExifTags.Base.DateTime)):
                time = _seconds(value.strip("\0 ")) if isinstance(value, str) else None
                if time is not None and not math.isnan(time):
                    return time
    except Exception:  # noqa: BLE001 (damaged files make Pillow raise nearly anything; the check of files lists them)
        return math.nan
    return math.nan


def _seconds(value: Any) -> float | None:
    """Returns a time in seconds, NaN for a missing one, `None` for what is none."""
    if value is None or value == "":
        return math.nan
    if isinstance(value, str):
        return _parsed(value.strip())
    if isinstance(value, datetime):
        return _since_1970(value)
    if isinstance(value, date):
        return _since_1970(datetime(value.year, value.month, value.day))
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isinf(value):
        return None
    return float(value)


def _parsed(text: str) -> float | None:
    if _DAY.fullmatch(text):
        text = f"{text[:4]}-{text[4:6]}-{text[6:]}"
    elif _NUMBER.fullmatch(text):
        return float(text)
    text = _EXIF_DATE.sub(r"\1-\2-\3", text, count=1)
    try:
        # Python 3.10 knows no Z.
        return _since_1970(datetime.fromisoformat(re.sub("[zZ]$", "+00:00", text)))
    except ValueError:
        return None


def _since_1970(moment: datetime) -> float:
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
