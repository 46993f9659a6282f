import csv
import io
import math
from datetime import date, datetime, timedelta, timezone

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import ExifTags
from PIL import Image as PILImage

from torchthaw.data.loading import load_image_dataset
from torchthaw.data.splitting import split_dataset
from torchthaw.data.times import clean_times
from torchthaw.errors import DataError

NEW_YEAR = datetime(2024, 1, 1, tzinfo=timezone.utc).timestamp()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(number, taken=None, changed=None, kind="JPEG"):
    buffer = io.BytesIO()
    image = PILImage.new("RGB", (8, 8), (number, 20, 30))
    exif = PILImage.Exif()
    exif[ExifTags.Base.Software] = "test"
    if taken is not None:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = taken
    if changed is not None:
        exif[ExifTags.Base.DateTime] = changed
    image.save(buffer, kind, exif=exif)
    return buffer.getvalue()


def refusal(source, **options):
    with pytest.raises(DataError) as caught:
        load_image_dataset(source, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("2024-01-01", NEW_YEAR),
        ("20240101", NEW_YEAR),
        ("2024-01-01T00:00:10", NEW_YEAR + 10),
        ("2024-01-01 00:00:10.250", NEW_YEAR + 10.25),
        ("2024-01-01T01:00:00+01:00", NEW_YEAR),
        ("2024-01-01T00:00:00Z", NEW_YEAR),
        ("2024:01:01 00:00:10", NEW_YEAR + 10),
        (" 1704067200 ", NEW_YEAR),
        ("1.5e3", 1500.0),
        ("-3", -3.0),
        ("2019", 2019.0),
        (12, 12.0),
        (2.5, 2.5),
        (date(2024, 1, 1), NEW_YEAR),
        (datetime(2024, 1, 1, 0, 0, 10), NEW_YEAR + 10),
        (datetime(2024, 1, 1, 2, tzinfo=timezone(timedelta(hours=2))), NEW_YEAR),
    ],
)
def test_what_a_time_may_look_like(value, seconds):
    assert clean_times([value], ["1.png"], "column 'date'") == [seconds]


@pytest.mark.parametrize("value", ["yesterday", "2024-13-01", "01/02/2024", "nan", True, [1], math.inf, "12:30"])
def test_what_is_no_time_is_listed(value):
    with pytest.raises(DataError) as caught:
        clean_times([value, "2024-01-01", value], ["1.png", "2.png", "3.png"], "column 'date'")
    text = str(caught.value)
    assert "2 of 3 values in column 'date' are no times" in text
    assert "1.png" in text
    assert "3.png" in text
    assert str(value) in text
    assert "ISO dates" in text


def test_missing_times_are_nan_but_not_all_of_them():
    assert np.isnan(clean_times([None, "", math.nan, 5], list("abcd"), "column 'date'")).tolist() == [True] * 3 + [
        False
    ]
    with pytest.raises(DataError, match="No image has a time in column 'date'"):
        clean_times([None, ""], ["1.png", "2.png"], "column 'date'")


def test_exif_gives_when_a_picture_was_taken(tmp_path):
    pictures = {
        "a/1.jpg": picture(1, taken="2024:01:01 00:00:10", changed="2025:01:01 00:00:00"),
        "a/2.jpg": picture(2, changed="2024:01:01 00:00:20"),
        "a/3.png": picture(3, taken="2024:01:01 00:00:30", kind="PNG"),
        "b/4.jpg": picture(4),
        "b/5.jpg": picture(5, taken="0000:00:00 00:00:00", changed="2024:01:01 00:00:50"),
        "b/6.jpg": picture(6, taken="    :  :     :  :  "),
        "b/7.jpg": b"no picture",
        "b/8.tif": picture(8, changed="2024:01:01 00:01:20", kind="TIFF"),
    }
    for path, content in pictures.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    splits = load_image_dataset(tmp_path, time="exif")
    assert splits["train"].features["time"] == Value("float64")
    found = dict(zip(splits["train"]["path"][:], splits["train"]["time"][:], strict=True))
    known = {path: time - NEW_YEAR for path, time in found.items() if not math.isnan(time)}
    assert known == {"a/1.jpg": 10, "a/2.jpg": 20, "a/3.png": 30, "b/5.jpg": 50, "b/8.tif": 80}
    with pytest.raises(DataError, match=r"3 of 8 images have no time.*'b/4.jpg', 'b/6.jpg', 'b/7.jpg'"):
        split_dataset(splits)
    # The same of bytes in a table.
    rows = {
        "image": [{"bytes": content, "path": path} for path, content in pictures.items()],
        "label": ["a", "b"] * 4,
    }
    dataset = Dataset.from_dict(rows, features=Features({"image": Image(), "label": Value("string")}))
    again = load_image_dataset(dataset, time="exif")["train"]
    assert np.array_equal(again["time"][:], list(found.values()), equal_nan=True)


def test_pictures_without_any_exif_date_are_refused(make_image_folder):
    assert "No image has a time in the EXIF data of the files" in refusal(make_image_folder(), time="exif")


def test_a_column_of_times_splits_in_their_order(tmp_path):
    days = [f"2024-01-{day:02d}" for day in (9, 3, 7, 1, 5, 10, 2, 8, 4, 6)]
    for number in range(10):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number))
    with (tmp_path / "metadata.csv").open("w", newline="") as file:
        rows = [[f"{n}.jpg", "ab"[n % 2], day] for n, day in enumerate(days)]
        csv.writer(file).writerows([["file_name", "kind", "day"], *rows])
    splits = split_dataset(load_image_dataset(tmp_path, time="day"), validation=0.2, test=0.1)
    assert splits["train"].features["label"].names == ["a", "b"]
    assert sorted(splits["validation"]["path"][:]) == ["0.jpg", "7.jpg"]
    assert splits["test"]["path"][:] == ["5.jpg"]
    text = refusal(tmp_path, time="days", label_column="kind")
    assert "time='days' names no column" in text
    assert "Did you mean 'day'" in text
    assert "or exif" in text
    assert "values in column 'kind' are no times" in refusal(tmp_path, time="kind", label_column="kind")


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("timestamp[s]", [datetime(2024, 1, 1, 0, 0, second) for second in (0, 5, 9)]),
        ("timestamp[ns, tz=Europe/Berlin]", [datetime(2024, 1, 1, 0, 0, s, tzinfo=timezone.utc) for s in (0, 5, 9)]),
        ("int64", [int(NEW_YEAR) + second for second in (0, 5, 9)]),
        ("float32", [0.0, 5.0, 9.0]),
        ("date32", [date(2024, 1, day) for day in (1, 2, 3)]),
    ],
)
def test_columns_of_dates_and_numbers_of_a_table(tmp_path, kind, values):
    features = Features({"image": Image(), "label": Value("string"), "taken": Value(kind)})
    rows = {
        "image": [{"bytes": picture(number), "path": None} for number in range(3)],
        "label": ["a", "b", "a"],
        "taken": values,
    }
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    found = load_image_dataset(tmp_path, time="taken")["train"]["time"][:]
    steps = [86400, 86400] if kind == "date32" else [5, 4]
    assert np.diff(found).tolist() == steps
    assert found[0] == (0 if kind == "float32" else NEW_YEAR)
