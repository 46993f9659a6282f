import csv
import io
import json
import os
import shutil
from collections import Counter

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage

from torchthaw.data.images import decode_image
from torchthaw.data.loading import load_image_dataset
from torchthaw.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def png(number=0):
    buffer = io.BytesIO()
    PILImage.new("RGB", (6, 5), (number % 256, 10, 20)).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(count):
    return [{"bytes": png(number), "path": None} for number in range(count)]


def table(labels, feature=None, **more):
    features = Features(
        {"image": Image(), "label": feature or Value("string" if isinstance(labels[0], str) else "int64")}
    )
    dataset = Dataset.from_dict({"image": pictures(len(labels)), "label": labels}, features=features)
    for column, values in more.items():
        dataset = dataset.add_column(column, values)
    return dataset


def write_metadata(folder, rows, kind="csv"):
    if kind == "csv":
        with (folder / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def flat_folder(tmp_path, count=4, name="flat"):
    root = tmp_path / name
    root.mkdir()
    for number in range(count):
        (root / f"{number}.png").write_bytes(png(number))
    return root


def summary(splits):
    """Split -> [(path, class name)]."""
    return {
        split: [
            (path, dataset.features["label"].names[label])
            for path, label in zip(dataset["path"][:], dataset["label"][:], strict=True)
        ]
        for split, dataset in splits.items()
    }


def names(splits):
    lists = [dataset.features["label"].names for dataset in splits.values()]
    assert all(one == lists[0] for one in lists)
    return lists[0]


def message(source, **options):
    with pytest.raises(DataError) as caught:
        load_image_dataset(source, **options)
    return str(caught.value)


# Folders


def test_class_folders_become_one_split(make_image_folder):
    root = make_image_folder(("bee", "ant"), per_class=2)
    splits = load_image_dataset(root)
    assert summary(splits) == {
        "train": [("ant/000.png", "ant"), ("ant/001.png", "ant"), ("bee/000.png", "bee"), ("bee/001.png", "bee")]
    }
    assert splits["train"].features == Features(
        {"image": Image(decode=False), "label": ClassLabel(names=["ant", "bee"]), "path": Value("string")}
    )
    assert list(splits["train"].features) == ["image", "label", "path"]
    decoded = decode_image(splits["train"][2]["image"])
    np.testing.assert_array_equal(decoded, PILImage.open(root / "bee" / "000.png"))


@pytest.mark.parametrize("validation", ["val", "valid", "validation", "dev", "Val"])
def test_split_folders_get_their_usual_names(make_image_folder, validation):
    splits = load_image_dataset(make_image_folder(per_class=1, splits=("test", validation, "train")))
    assert list(splits) == ["train", "validation", "test"]
    assert splits["validation"]["path"][0] == f"{validation}/ant/000.png"
    assert names(splits) == ["ant", "bee", "cat"]


def test_a_relative_path_survives_a_change_of_folder(make_image_folder, monkeypatch, tmp_path):
    root = make_image_folder(per_class=1)
    monkeypatch.chdir(root.parent)
    splits = load_image_dataset(root.name)
    monkeypatch.chdir("/")
    assert decode_image(splits["train"][0]["image"]).mode == "RGB"


def test_classes_may_be_called_like_splits_or_numbers(make_image_folder):
    assert names(load_image_dataset(make_image_folder(("no", "test", "yes"), name="a"))) == ["no", "test", "yes"]
    assert names(load_image_dataset(make_image_folder(("bus", "car", "train"), name="b"))) == ["bus", "car", "train"]
    assert names(load_image_dataset(make_image_folder(tuple("0123456789"), 1, name="c"))) == list("0123456789")
    inner = load_image_dataset(make_image_folder(("test", "train"), 1, splits=("train", "val"), name="d"))
    assert summary(inner)["validation"] == [("val/test/000.png", "test"), ("val/train/000.png", "train")]


def test_deeper_files_belong_to_their_class_and_other_files_are_counted(make_image_folder, caplog):
    root = make_image_folder(("ant", "bee"), per_class=1)
    (root / "ant" / "day 1" / "x").mkdir(parents=True)
    shutil.copy(root / "ant" / "000.png", root / "ant" / "day 1" / "x" / "deep.PNG")
    (root / "ant" / "notes.txt").touch()
    (root / "bee" / ".hidden.png").touch()
    (root / "cover.png").write_bytes(png())
    (root / ".git").mkdir()
    splits = load_image_dataset(root)
    assert summary(splits)["train"] == [("ant/000.png", "ant"), ("ant/day 1/x/deep.PNG", "ant"), ("bee/000.png", "bee")]
    assert "Left out 3 files" in caplog.text
    assert "1 .txt" in caplog.text
    assert "1 hidden" in caplog.text


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links")
def test_symbolic_links_are_followed_once(make_image_folder):
    root = make_image_folder(("ant", "bee"), per_class=1)
    (root / "bug").symlink_to(root / "bee")
    (root / "ant" / "loop").symlink_to(root / "ant")
    assert [path for path, _ in summary(load_image_dataset(root))["train"]] == [
        "ant/000.png",
        "bee/000.png",
        "bug/000.png",
    ]


def test_a_class_may_be_missing_in_validation_but_not_unknown(make_image_folder):
    root = make_image_folder(("ant", "bee", "cat"), per_class=2, splits=("train", "val"))
    shutil.rmtree(root / "val" / "ant")
    splits = load_image_dataset(root)
    assert names(splits) == ["ant", "bee", "cat"]
    assert splits["validation"]["label"][:] == [1, 1, 2, 2]
    (root / "val" / "cat").rename(root / "val" / "cats")
    found = message(root)
    assert "The validation split has images of 'cats'" in found
    assert "Did you mean 'cat'" in found


def test_class_names_of_a_saved_model_decide_the_ids(make_image_folder):
    root = make_image_folder(("ant", "bee"), per_class=1)
    splits = load_image_dataset(root, class_names=["wasp", "bee", "ant"])
    assert splits["train"]["label"][:] == [2, 1]
    assert names(splits) == ["wasp", "bee", "ant"]
    assert "images of 'bee', which the known classes lack: 'ant', 'wasp'" in message(root, class_names=["ant", "wasp"])
    assert "names a class twice" in message(root, class_names=["ant", "bee", "ant"])


def test_splits_without_a_training_split_do_for_a_saved_model(make_image_folder):
    root = make_image_folder(("ant", "bee"), per_class=1, splits=("val", "test"))
    splits = load_image_dataset(root, class_names=["ant", "bee"])
    assert {split: images["label"][:] for split, images in splits.items()} == {"validation": [0, 1], "test": [0, 1]}
    assert "no training split among 'validation', 'test'" in message(root)


def test_a_missing_path_gets_the_closest_name(make_image_folder):
    root = make_image_folder()
    for source in (root.with_name("fotos"), str(root.with_name("photo"))):
        assert "Did you mean 'photos'" in message(source)
        assert "user/name" in message(source)


def test_a_path_below_an_existing_folder_is_no_hub_name(make_image_folder, monkeypatch):
    monkeypatch.chdir(make_image_folder().parent)
    assert "There is no file or folder 'photos/antt'. Did you mean 'ant'" in message("photos/antt")


def test_empty_class_folders_are_all_listed(make_image_folder):
    root = make_image_folder()
    for empty in ("dog", "eel"):
        (root / empty).mkdir()
    (root / "eel" / "readme.md").touch()
    assert "No images in 2 class folders" in message(root)
    assert "'dog', 'eel'" in message(root)


def test_folders_that_cannot_be_used(make_image_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "No images in" in message(tmp_path / "empty")
    assert "one class only: 'ant'" in message(make_image_folder(("ant",), name="one"))
    assert "holds 4 images but no class folders" in message(flat_folder(tmp_path))
    file = tmp_path / "flat" / "0.png"
    assert "is a file; pass a folder" in message(file)
    assert "class folders and no columns" in message(make_image_folder(name="x"), label_column="label")


def test_splits_that_cannot_be_told_apart(make_image_folder, tmp_path):
    root = make_image_folder(splits=("train", "extra"), name="a")
    assert "mixes 'train', which looks like the training split, with 'extra'" in message(root)
    assert "several folders for one split: 'val', 'valid'" in message(
        make_image_folder(splits=("train", "val", "valid"), name="b")
    )
    unsorted = tmp_path / "c"
    for split in ("train", "test"):
        (unsorted / split).mkdir(parents=True)
        (unsorted / split / "1.png").write_bytes(png())
    assert "lie directly in it" in message(unsorted)
    unlabelled = make_image_folder(splits=("train",), name="d")
    (unlabelled / "test").mkdir()
    (unlabelled / "test" / "1.png").write_bytes(png())
    assert "test' holds 1 images but no class folders" in message(unlabelled)


def test_other_folders_beside_splits_are_left_out_with_a_warning(make_image_folder, caplog):
    splits = load_image_dataset(make_image_folder(splits=("train", "val", "extra")))
    assert list(splits) == ["train", "validation"]
    assert "no splits: 'extra'" in caplog.text


@pytest.mark.skipif(os.name == "nt" or os.uname().sysname == "Darwin", reason="file names are Unicode there")
def test_a_file_name_that_is_no_text_is_named(make_image_folder):
    root = make_image_folder(("ant", "bee"), per_class=1)
    with open(os.fsencode(root / "ant") + b"/\xff.png", "wb") as file:  # noqa: PTH123
        file.write(png())
    assert r"'ant/\udcff.png' is not valid UTF-8" in message(root)


# Metadata


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_gives_labels(tmp_path, kind):
    root = flat_folder(tmp_path)
    rows = [{"file_name": f"{number}.png", "age": number, "label": "ab"[number % 2]} for number in range(4)]
    write_metadata(root, rows[:3], kind)
    expected = [("0.png", "a"), ("1.png", "b"), ("2.png", "a")]
    assert summary(load_image_dataset(root)) == {"train": expected}
    assert summary(load_image_dataset(root / f"metadata.{kind}")) == {"train": expected}


def test_metadata_in_split_folders_and_above_them(tmp_path):
    root = tmp_path / "root"
    for split in ("train", "test"):
        (root / split).mkdir(parents=True)
        for number in range(2):
            (root / split / f"{number}.png").write_bytes(png(number))
        write_metadata(root / split, [{"file_name": f"{number}.png", "kind": "ab"[number]} for number in range(2)])
    expected = {split: [(f"{split}/0.png", "a"), (f"{split}/1.png", "b")] for split in ("train", "test")}
    assert summary(load_image_dataset(root)) == expected
    rows = [{"file_name": path, "kind": label} for split in expected for path, label in expected[split]]
    write_metadata(root, rows)
    assert summary(load_image_dataset(root)) == expected


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_whole_numbers_in_metadata_are_sorted_as_numbers(tmp_path, kind):
    root = flat_folder(tmp_path)
    write_metadata(root, [{"file_name": f"{n}.png", "y": label} for n, label in enumerate((10, 9, 2, 10))], kind)
    splits = load_image_dataset(root)
    assert names(splits) == ["2", "9", "10"]
    assert splits["train"]["label"][:] == [2, 1, 0, 2]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"file": "0.png", "label": "a"}], "no column 'file_name'; its columns are 'file', 'label'"),
        ([{"file_name": "0.png"}], "has no column of labels"),
        ([{"file_name": "0.png", "x": "a", "y": "b"}], "could be the label: 'x', 'y'. Pass label_column='x'"),
        ([{"file_name": "7.png", "label": "a"}, {"file_name": "8.png", "label": "a"}], "'7.png', '8.png'"),
        ([{"file_name": "../secret.png", "label": "a"}], "outside its folder, which are not read: '../secret.png'"),
        ([{"file_name": "a/../../secret.png", "label": "a"}], "outside its folder"),
        ([{"file_name": "/etc/secret.png", "label": "a"}], "outside its folder"),
        ([{"file_name": "C:\\secret.png", "label": "a"}], "outside its folder"),
        ([{"file_name": "0.png", "label": "a"}, {"file_name": "./0.png", "label": "b"}], "more than once"),
        ([{"file_name": "", "label": "a"}], "names no file in row 1"),
        ([{"file_name": "0.png", "label": "a"}, {"file_name": "1.png", "label": ""}], "have no label: '1.png'"),
    ],
)
def test_metadata_that_cannot_be_used(tmp_path, rows, expected):
    (tmp_path / "secret.png").write_bytes(png())
    root = flat_folder(tmp_path)
    write_metadata(root, rows)
    assert expected in message(root)


def test_damaged_metadata(tmp_path):
    root = flat_folder(tmp_path)
    file = root / "metadata.jsonl"
    file.write_text('{"file_name": "0.png", "label": "a"}\n{oops')
    assert "Line 2 of" in message(root)
    file.write_text('{"file_name": "0.png", "label": 0.5}\n{"file_name": "1.png", "label": 1.5}')
    assert "'0.png' in train is 0.5; labels are text or whole numbers" in message(root)
    file.write_text('{"file_name": "0.png", "label": ["a", "b"]}\n{"file_name": "1.png", "label": "a"}')
    assert "The label of '1.png' in train is 'a', and other images have lists" in message(root)
    (root / "metadata.csv").write_text("file_name,label\n0.png,a,b\n")
    assert "has both metadata.csv and metadata.jsonl" in message(root)
    file.unlink()
    assert "Row 1 of" in message(root)
    (root / "metadata.csv").write_bytes("file_name,label\n0.png,k\xe4se\n".encode("latin-1"))
    assert "Cannot read" in message(root)
    (root / "metadata.csv").write_text("file_name,label\n")
    assert "has no rows" in message(root)


def test_decimal_labels_of_a_csv_are_refused(tmp_path):
    root = flat_folder(tmp_path)
    write_metadata(root, [{"file_name": f"{n}.png", "label": n / 2} for n in range(4)])
    assert "are decimal numbers, such as '0.0'" in message(root)


def test_numbers_with_leading_zeros_are_names(tmp_path):
    root = flat_folder(tmp_path)
    write_metadata(root, [{"file_name": f"{n}.png", "label": label} for n, label in enumerate(("007", "7", "12"))])
    assert names(load_image_dataset(root)) == ["007", "12", "7"]


# Tables


def test_a_data_set_object_is_the_training_split():
    splits = load_image_dataset(table(["b", "a", "b"]))
    assert summary(splits) == {"train": [("train/0", "b"), ("train/1", "a"), ("train/2", "b")]}
    assert names(splits) == ["a", "b"]
    assert splits["train"].features["image"] == Image(decode=False)
    assert decode_image(splits["train"][2]["image"]).getpixel((0, 0)) == (2, 10, 20)


def test_selected_and_formatted_rows_stay_in_their_order():
    source = table([5, 9, 5, 7]).select([3, 0, 1]).with_format("numpy")
    splits = load_image_dataset(DatasetDict(train=source))
    assert names(splits) == ["5", "7", "9"]
    assert splits["train"]["label"][:] == [1, 0, 2]
    assert [decode_image(row["image"]).getpixel((0, 0))[0] for row in splits["train"]] == [3, 0, 1]


def test_what_was_loaded_can_be_loaded_again(make_image_folder):
    once = load_image_dataset(make_image_folder(splits=("train", "val")))
    twice = load_image_dataset(once)
    assert summary(twice) == summary(once)


def test_class_labels_of_splits_are_matched_by_name():
    source = DatasetDict(
        train=table([0, 1, 1], ClassLabel(names=["cat", "ant"])), valid=table([0, 1], ClassLabel(names=["ant", "cat"]))
    )
    splits = load_image_dataset(source)
    assert names(splits) == ["cat", "ant"]
    assert splits["validation"]["label"][:] == [1, 0]


def test_class_names_without_training_images_are_kept_with_a_warning(caplog):
    splits = load_image_dataset(table([2, 0], ClassLabel(names=["a", "b", "c"])))
    assert names(splits) == ["a", "b", "c"]
    assert "No training images for 1 of 3 classes: 'b'" in caplog.text


def test_the_usual_label_column_is_preferred_and_others_can_be_named():
    source = table(["x", "y"], fine_label=["p", "q"], coarse=["m", "n"], path=["one", "two"])
    assert names(load_image_dataset(source)) == ["x", "y"]
    assert names(load_image_dataset(source, label_column="coarse")) == ["m", "n"]
    assert names(load_image_dataset(source.remove_columns("label"))) == ["p", "q"]
    only = source.remove_columns(["label", "fine_label"])
    assert summary(load_image_dataset(only)) == {"train": [("one", "m"), ("two", "n")]}


@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        (lambda: table(["a", None]), {}, "1 of 2 images in train have no label: 'train/1'"),
        (lambda: table([0, -1], ClassLabel(names=["a", "b"])), {}, "1 of 2 images in train have no label"),
        (lambda: table([0.5, 1.5], Value("float32")), {}, "has the type float32; labels are text or whole numbers"),
        (
            lambda: table([[0], [0, 1]], List(Value("int64"))),
            {"problem_type": "single_label"},
            "holds lists, so that an image may have several labels",
        ),
        (lambda: table([[[0]], [[1]]], List(List(Value("int64")))), {}, "holds lists that are no labels"),
        (lambda: table(["a", "b"]), {"label_column": "labl"}, "Did you mean 'label'"),
        (lambda: table(["a", "b"]), {"label_column": ["a", "b"]}, "one column of labels"),
        (lambda: table(["a", "b"]), {"image_column": "img"}, "no column 'img' for images"),
        (lambda: table(["a", "b"]), {"image_column": "label"}, "'label' of the data set (train) has no images"),
        (lambda: table(["a", "b"]).remove_columns("image"), {}, "has no column of images; its columns are: 'label'"),
        (lambda: table(["a", "b"], mask=pictures(2)), {}, "several columns of images: 'image', 'mask'"),
        (
            lambda: table(["a", "b"], ant=[0, 1], bee=[1, 0]).remove_columns("label"),
            {},
            "one column of 0 and 1 for each class",
        ),
        (lambda: table(["a", "a"]), {}, "one class only: 'a'"),
        (lambda: table(["a", "b"]).select([]), {}, "No images in 'train'"),
        (lambda: DatasetDict(test=table(["a", "b"])), {}, "no training split among 'test'"),
        (lambda: DatasetDict(full=table(["a", "b"])), {}, "no split named train, validation or test but 'full'"),
        (lambda: DatasetDict(val=table(["a"]), dev=table(["b"])), {}, "two splits for validation: 'val', 'dev'"),
        (lambda: DatasetDict(train=table(["a", "b"]), test=table(["c"])), {}, "The test split has images of 'c'"),
        (lambda: table(["a", "b"]).to_iterable_dataset(), {}, "type IterableDataset is not supported"),
        (lambda: 7, {}, "type int is not supported"),
    ],
)
def test_tables_that_cannot_be_used(source, options, expected):
    assert expected in message(source(), **options)


def test_parquet_files_are_splits_by_name(tmp_path):
    # Plain storage, without the features that `datasets` writes into the file.
    root = tmp_path / "tables"
    root.mkdir()
    for file, labels in (("train-0.parquet", [3, 8]), ("train-1.parquet", [8, 3]), ("test.parquet", [8])):
        table(labels).cast_column("image", {"bytes": Value("binary"), "path": Value("string")}).to_pandas().to_parquet(
            root / file
        )
    splits = load_image_dataset(root)
    assert summary(splits) == {
        "train": [("train/0", "3"), ("train/1", "8"), ("train/2", "8"), ("train/3", "3")],
        "test": [("test/0", "8")],
    }
    assert len(load_image_dataset(root / "train-0.parquet")["train"]) == 2
    shutil.copy(root / "test.parquet", root / "more.parquet")
    assert "named by split and others: 'more.parquet'" in message(root)


def test_binary_columns_are_images(tmp_path):
    source = Dataset.from_dict({"picture": [png(1), png(2)], "label": ["a", "b"]}, features=None)
    splits = load_image_dataset(source)
    assert decode_image(splits["train"][1]["image"]).getpixel((0, 0)) == (2, 10, 20)


def test_a_damaged_parquet_file_is_named(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no")
    assert str(tmp_path) in message(tmp_path)
    assert "Cannot read the parquet files" in message(tmp_path)


def test_the_hub_without_a_network():
    found = message("some-user/some-photos", revision="main")
    assert "Cannot reach the data set 'some-user/some-photos' on the Hub" in found
    assert "HF_HUB_OFFLINE" in found


# Real data


def test_real_folders(shared_data):
    hymenoptera = load_image_dataset(shared_data / "hymenoptera")
    # The training folder of ants holds one placeholder GIF beside its 123 photos.
    assert {split: len(images) for split, images in hymenoptera.items()} == {"train": 245, "validation": 153}
    assert [path for path in hymenoptera["train"]["path"][:] if path.endswith(".gif")] == [
        "train/ants/imageNotFound.gif"
    ]

    trash = load_image_dataset(shared_data / "trashnet-sixth")["train"]
    assert (len(trash), len(trash.features["label"].names)) == (442, 6)
    assert names(load_image_dataset(shared_data / "brain-mri-yesno")) == ["no", "yes"]
    assert len(load_image_dataset(shared_data / "brain-mri-yesno")["train"]) == 253
    digits = load_image_dataset(shared_data / "sign-digits")["train"]
    assert (len(digits), digits.features["label"].names) == (2062, list("0123456789"))


def test_real_parquet(shared_data):
    splits = load_image_dataset(shared_data / "cifar10-half")
    assert {split: len(images) for split, images in splits.items()} == {"train": 25000, "test": 5000}
    assert names(splits)[:3] == ["airplane", "automobile", "bird"]
    assert set(Counter(splits["test"]["label"][:]).values()) == {500}
    assert decode_image(splits["test"][4999]["image"]).size == (32, 32)
