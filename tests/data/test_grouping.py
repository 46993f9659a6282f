import csv
import io
import json
import logging
import shutil

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage

from torchthaw.data.loading import load_image_dataset
from torchthaw.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def png(number=0):
    buffer = io.BytesIO()
    PILImage.new("RGB", (6, 5), (number % 256, 10, 20)).save(buffer, "PNG")
    return buffer.getvalue()


def write_csv(file, rows):
    with file.open("w", newline="") as lines:
        csv.writer(lines).writerows(rows)


def groups_of(splits):
    return {
        path: group
        for images in splits.values()
        for path, group in zip(images["path"][:], images["group"][:], strict=True)
    }


def refusal(source, **options):
    with pytest.raises(DataError) as caught:
        load_image_dataset(source, **options)
    return str(caught.value)


def table(groups, feature=None, name="patient"):
    features = Features({"image": Image(), "diagnosis": Value("string"), name: feature or Value("string")})
    count = len(groups)
    columns = {
        "image": [{"bytes": png(number), "path": f"{number}.png"} for number in range(count)],
        "diagnosis": ["sick", "well"] * (count // 2),
        name: groups,
    }
    return Dataset.from_dict(columns, features=features)


def test_a_pattern_over_the_paths(make_image_folder):
    root = make_image_folder(("ant", "bee"), per_class=4, splits=("train", "val"))
    found = groups_of(load_image_dataset(root, group=r"/(\d+)\.png"))
    assert len(found) == 16
    assert all(group == path[-7:-4] for path, group in found.items())
    optional = groups_of(load_image_dataset(root, group=r"(?:train|val)/(ant|bee)"))
    assert set(optional.values()) == {"ant", "bee"}


def test_paths_that_a_pattern_does_not_fit_are_all_listed(make_image_folder):
    root = make_image_folder(("ant", "bee"), per_class=3)
    text = refusal(root, group=r"ant/(\d+)")
    assert "finds no group in 3 of 6 paths: 'bee/000.png', 'bee/001.png', 'bee/002.png'" in text
    assert "finds no group in 3 of 6 paths" in refusal(root, group=r"(?:ant/(\d+))|bee")
    assert "finds no group in 6 of 6 paths" in refusal(root, group="(x*)")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(patient", r"group='(patient' is no valid regular expression: missing )"),
        ("(?:ant)", "group='(?:ant)' has 0 capture groups; put parentheses around the one part"),
        ("(a)(b)", "group='(a)(b)' has 2 capture groups"),
    ],
)
def test_patterns_that_cannot_work_are_refused(make_image_folder, pattern, message):
    assert message in refusal(make_image_folder(), group=pattern)


def test_a_csv_in_the_folder_or_anywhere(make_image_folder, tmp_path, monkeypatch):
    root = make_image_folder(("ant", "bee"), per_class=2)
    paths = ["ant/000.png", "ant/001.png", "bee/000.png", "bee/001.png"]
    rows = [
        ["group", "path", "more"],
        *[[f"s{row % 2}", path, "x"] for row, path in enumerate(paths)],
        ["s9", "no", ""],
    ]
    expected = {path: f"s{row % 2}" for row, path in enumerate(paths)}
    write_csv(root / "students.csv", rows)
    assert groups_of(load_image_dataset(root, group="students.csv")) == expected
    shutil.move(root / "students.csv", tmp_path / "students.csv")
    assert groups_of(load_image_dataset(root, group=str(tmp_path / "students.csv"))) == expected
    monkeypatch.chdir(tmp_path)
    assert groups_of(load_image_dataset(root, group="students.csv")) == expected
    # As Windows and `find .` write paths.
    write_csv(tmp_path / "students.csv", [rows[0], *[[g, ".\\" + p.replace("/", "\\"), m] for g, p, m in rows[1:]]])
    assert groups_of(load_image_dataset(root, group="students.csv")) == expected


def test_the_folders_own_groups_are_read_unless_left_aside(make_image_folder, caplog):
    root = make_image_folder(("ant", "bee"), per_class=2)
    assert load_image_dataset(root)["train"].column_names == ["image", "label", "path"]
    write_csv(
        root / "groups.csv",
        [["path", "group"], *[[f"{name}/00{row}.png", row] for name in ("ant", "bee") for row in (0, 1)]],
    )
    with caplog.at_level(logging.WARNING):
        splits = load_image_dataset(root)
    assert not caplog.records
    assert set(groups_of(splits).values()) == {"0", "1"}
    assert load_image_dataset(root, group="none")["train"].column_names == ["image", "label", "path"]
    by_pattern = load_image_dataset(root, group="^(ant|bee)")
    assert set(groups_of(by_pattern).values()) == {"ant", "bee"}
    (root / "groups.csv").write_text("path,group\nant/000.png,0\n")
    text = refusal(root)
    assert "has no group for 3 of 4 images: 'ant/001.png', 'bee/000.png', 'bee/001.png'" in text
    assert "write group='none'" in text
    assert load_image_dataset(root, group="none")


def test_csv_files_that_cannot_work_are_refused(make_image_folder):
    root = make_image_folder(("ant", "bee"), per_class=1)
    file = root / "g.csv"
    write_csv(file, [["path", "group"], ["ant/000.png", "1"], ["ant/000.png", "2"], ["bee/000.png", "1"]])
    assert "names more than one group for: 'ant/000.png'" in refusal(root, group="g.csv")
    write_csv(file, [["path", "group"], ["ant/000.png", "1"], ["bee/000.png", ""]])
    assert "has no group for 1 of 2 images: 'bee/000.png'" in refusal(root, group="g.csv")
    write_csv(file, [["path", "group"], ["photos/ant/000.png", "1"]])
    text = refusal(root, group="g.csv")
    assert "Write paths as they are within the data" in text
    assert "'photos/ant/000.png'" in text
    write_csv(file, [["path", "groups"], ["ant/000.png", "1"]])
    assert "has no column 'group'; its columns are: 'path', 'groups'. Did you mean 'groups'" in refusal(
        root, group="g.csv"
    )
    file.write_text("")
    assert "has no column 'path'; its columns are: none" in refusal(root, group="g.csv")
    file.write_bytes(b"\xff\xfe\x00")
    assert "as CSV in UTF-8" in refusal(root, group="g.csv")
    text = refusal(root, group="gg.csv")
    assert "There is no file 'gg.csv' with groups" in text
    assert "Did you mean 'g.csv'" in text


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_column_of_a_metadata_file(tmp_path, kind):
    rows = [{"file_name": f"{n}.png", "finding": "ab"[n % 2], "patient": f"00{n // 2}"} for n in range(4)]
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    if kind == "csv":
        write_csv(tmp_path / "metadata.csv", [list(rows[0]), *[list(row.values()) for row in rows]])
    else:
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = load_image_dataset(tmp_path, group="patient")
    assert groups_of(splits) == {"0.png": "000", "1.png": "000", "2.png": "001", "3.png": "001"}
    assert splits["train"].features["label"].names == ["a", "b"]
    # Without the patient, either column could be the label.
    assert "several columns that could be the label" in refusal(tmp_path)
    text = refusal(tmp_path, group="patients", label_column="finding")
    assert "group='patients' names no column" in text
    assert "Did you mean 'patient'" in text
    assert "regular expression" in text


def test_missing_groups_of_a_metadata_file_are_listed(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "0.png", "label": "a", "p": 1}\n'
        '{"file_name": "1.png", "label": "b", "p": null}\n'
        '{"file_name": "2.png", "label": "b", "p": NaN}'
    )
    assert "2 of 3 images have no group in column 'p': '1.png', '2.png'" in refusal(tmp_path, group="p")


def test_a_column_of_a_data_set(tmp_path):
    dataset = table(["x", "x", "y", "y"])
    assert groups_of(load_image_dataset(dataset, group="patient")) == dict(
        zip(["0.png", "1.png", "2.png", "3.png"], "xxyy", strict=True)
    )
    both = DatasetDict(train=dataset, test=table(["y", "z"]))
    found = load_image_dataset(both, group="patient")
    assert {split: images["group"][:] for split, images in found.items()} == {
        "train": ["x", "x", "y", "y"],
        "test": ["y", "z"],
    }
    numbers = load_image_dataset(table([7, 7, 8, 9], Value("int64")), group="patient", label_column="diagnosis")
    assert numbers["train"]["group"][:] == ["7", "7", "8", "9"]
    named = load_image_dataset(table([1, 0, 1, 0], ClassLabel(names=["zoo", "park"])), group="patient")
    assert named["train"]["group"][:] == ["park", "zoo", "park", "zoo"]
    # A column may be both, as a day of which all pictures belong together.
    days = table(["2024-01-02", "2024-01-02", "2024-01-05", "2024-01-06"], name="day")
    days = load_image_dataset(days, group="day", time="day")["train"]
    assert days["group"][:] == ["2024-01-02", "2024-01-02", "2024-01-05", "2024-01-06"]
    assert np.diff(days["time"][:]).tolist() == [0, 3 * 86400, 86400]
    dataset.to_parquet(tmp_path / "train.parquet")
    assert set(groups_of(load_image_dataset(tmp_path, group="patient")).values()) == {"x", "y"}


def test_a_pattern_and_a_csv_for_a_data_set(tmp_path):
    dataset = table(["x"] * 4, name="site")
    write_csv(tmp_path / "g.csv", [["path", "group"], *[[f"{row}.png", row // 2] for row in range(4)]])
    splits = load_image_dataset(dataset, label_column="diagnosis", group=str(tmp_path / "g.csv"))
    assert splits["train"]["group"][:] == ["0", "0", "1", "1"]
    splits = load_image_dataset(dataset, label_column="diagnosis", group=r"^(\d)")
    assert splits["train"]["group"][:] == ["0", "1", "2", "3"]


def test_a_column_called_group_is_used_only_when_asked_for():
    dataset = table(["x", "x", "y", "y"], name="group")
    assert load_image_dataset(dataset, label_column="diagnosis")["train"].column_names == ["image", "label", "path"]
    assert load_image_dataset(dataset, group="group")["train"]["group"][:] == ["x", "x", "y", "y"]


def test_columns_that_cannot_be_groups_are_refused(make_image_folder):
    assert "1 of 4 images have no group in column 'patient': '1.png'" in refusal(
        table(["x", None, "y", "y"]), group="patient"
    )
    text = refusal(table([["x"], ["x"], ["y"], ["y"]], List(Value("string"))), group="patient")
    assert "The groups in column 'patient' are of type list" in text
    text = refusal(table(["x"] * 4), group="patent", label_column="diagnosis")
    assert "group='patent' names no column" in text
    assert "'patient'" in text
    assert "has class folders and no columns" in refusal(make_image_folder(), group="patient")


def test_streams_have_no_groups():
    for options in ({"group": "patient"}, {"time": "date"}):
        assert "a stream is neither split nor checked" in refusal("user/name", streaming=True, **options)
