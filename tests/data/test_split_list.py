"""Lists of splits: what the audit cleans, what is read back, and what is refused."""

import csv

import pytest
from PIL import Image

from torchthaw import load_image_dataset
from torchthaw.data.audit.audit import examine_dataset
from torchthaw.data.audit.cleaning import cleaned_splits
from torchthaw.data.split_list import SplitRow, apply_split_list, write_split_list
from torchthaw.errors import DataError


@pytest.fixture
def splits_folder(tmp_path, draw_photo):
    root = tmp_path / "photos"
    number = 0
    for split, count in (("train", 6), ("validation", 3), ("test", 3)):
        for label in ("ant", "bee"):
            (root / split / label).mkdir(parents=True)
            for row in range(count):
                draw_photo(number).save(root / split / label / f"{row}.png")
                number += 1
    return root


def cleaned(root, **options):
    dataset = load_image_dataset(root, **options)
    examined = examine_dataset(dataset)
    rows = cleaned_splits(examined, [image.split for image in examined.scan.images])
    assert len(rows) == sum(len(rows) for rows in dataset.values())
    return dataset, rows


def changed(rows):
    """What is dropped or moved."""
    return {row.path: (row.split, row.reason) for row in rows if row.reason}


def test_clean_data_stays_as_it_is(splits_folder):
    dataset, rows = cleaned(splits_folder)
    assert changed(rows) == {}
    assert [row.path for row in rows] == sorted(row.path for row in rows)
    assert {(row.path, row.split, row.label) for row in rows} == {
        (path, split, path.split("/")[1]) for split, images in dataset.items() for path in images["path"]
    }


def test_copies_stay_where_they_are_worth_most(splits_folder):
    source = splits_folder / "train" / "ant" / "0.png"
    (splits_folder / "train" / "ant" / "also.png").write_bytes(source.read_bytes())
    (splits_folder / "test" / "ant" / "too.png").write_bytes(source.read_bytes())
    near = Image.open(splits_folder / "train" / "bee" / "1.png")
    near.save(splits_folder / "validation" / "bee" / "near.jpg", quality=60)
    near.save(splits_folder / "train" / "bee" / "nearer.jpg", quality=70)
    wrong = splits_folder / "train" / "bee" / "2.png"
    (splits_folder / "train" / "ant" / "wrong.png").write_bytes(wrong.read_bytes())
    (splits_folder / "test" / "bee" / "broken.png").write_bytes(b"broken")
    before = {file: file.read_bytes() for file in splits_folder.rglob("*.*")}
    _, rows = cleaned(splits_folder)
    assert changed(rows) == {
        "train/ant/0.png": ("drop", "the same picture as test/ant/too.png"),
        "train/ant/also.png": ("drop", "the same picture as test/ant/too.png"),
        "train/bee/1.png": ("drop", "nearly the same picture as validation/bee/near.jpg"),
        "train/bee/nearer.jpg": ("drop", "nearly the same picture as validation/bee/near.jpg"),
        "train/bee/2.png": ("drop", "the same picture has several labels"),
        "train/ant/wrong.png": ("drop", "the same picture has several labels"),
        "test/bee/broken.png": ("drop", "it is not an image that Pillow can read"),
    }
    assert {file: file.read_bytes() for file in splits_folder.rglob("*.*")} == before


def test_groups_move_to_where_most_of_them_are(splits_folder):
    table = splits_folder / "groups.csv"
    with table.open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(("path", "group"))
        for file in sorted(splits_folder.rglob("*.png")):
            path = file.relative_to(splits_folder).as_posix()
            mixed = path in ("train/ant/0.png", "train/ant/1.png", "test/ant/0.png")
            writer.writerow((path, "mixed" if mixed else path))
    _, rows = cleaned(splits_folder, group=str(table))
    assert changed(rows) == {"test/ant/0.png": ("train", "moved from test, with its group")}


def test_a_list_is_written_once_and_read_back(splits_folder, tmp_path):
    dataset, rows = cleaned(splits_folder)
    moved = [SplitRow(row.path, "drop" if row.path.endswith("/2.png") else row.split, row.label) for row in rows]
    file = tmp_path / "lists" / "clean.csv"
    write_split_list(file, moved)
    result = apply_split_list(dataset, file)
    assert {split: len(images) for split, images in result.items()} == {"train": 10, "validation": 4, "test": 4}
    assert all(not path.endswith("/2.png") for images in result.values() for path in images["path"])
    assert result["test"][0]["path"] == "test/ant/0.png"
    text = file.read_text()
    with pytest.raises(DataError, match="exists, and nothing is overwritten"):
        write_split_list(file, rows)
    assert file.read_text() == text


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["path,where", "a,train"], "columns 'path', 'where'; it needs path and split"),
        (["path,split", "train/ant/0.png,training"], "Line 2 of .* names the split 'training'.*Did you mean 'train'"),
        (["path,split", "train/ant/0.png,train", "train/ant/0.png,test"], "Line 3 of .* again"),
        (["path,split", "train/ant/0.png,train"], "lacks 23 images: 'train/ant/1.png'.*audit DATA --fix"),
        ([], "columns ; it needs"),
    ],
)
def test_lists_that_do_not_fit_are_refused(splits_folder, tmp_path, lines, message):
    file = tmp_path / "list.csv"
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=message):
        apply_split_list(load_image_dataset(splits_folder), file)


def test_lists_with_unknown_images_without_training_or_without_a_file_are_refused(splits_folder, tmp_path):
    dataset, rows = cleaned(splits_folder)
    write_split_list(tmp_path / "more.csv", [*rows, SplitRow("gone.png", "train")])
    with pytest.raises(DataError, match=r"names 1 that are not there: 'gone.png'"):
        apply_split_list(dataset, tmp_path / "more.csv")
    write_split_list(tmp_path / "none.csv", [SplitRow(row.path, "test") for row in rows])
    with pytest.raises(DataError, match="no image for training"):
        apply_split_list(dataset, tmp_path / "none.csv")
    with pytest.raises(DataError, match="Cannot read the list of splits"):
        apply_split_list(dataset, tmp_path / "missing.csv")
