"""Images with several labels: read from all forms, split evenly, mixed, audited."""

import io
import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset, List, Value
from PIL import Image as PILImage

from torchthaw import TorchvisionImageProcessor, audit_dataset, load_image_dataset, split_dataset
from torchthaw.data.augmentation import Augmentation
from torchthaw.data.bad_images import leave_out
from torchthaw.data.label_sets import label_counts
from torchthaw.data.splitting import describe_split, fold_dataset
from torchthaw.data.streams import ImageStream
from torchthaw.data.views import ImageView
from torchthaw.errors import DataError

SETS = [["cat", "dog"], [], ["dog"], ["cat"]]
SQUARES = [[0, 1], [], [1], [0]]


def png(number=0):
    random = np.random.default_rng(number)
    file = io.BytesIO()
    PILImage.fromarray(random.integers(0, 255, size=(24, 24, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def table(labels, feature, name="label", **columns):
    rows = {"image": [{"bytes": png(number), "path": None} for number in range(len(labels))], name: labels}
    return Dataset.from_dict(
        {**rows, **columns}, features=Features({"image": Image(decode=False), name: feature, **{
            key: Value("int64") for key in columns}})
    )  # fmt: skip


def folder(tmp_path, text, name="metadata.csv"):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    (tmp_path / name).write_text(text)
    return tmp_path


def read(splits, split="train"):
    feature = splits[split].features["label"]
    assert isinstance(feature, List)
    assert isinstance(feature.feature, ClassLabel)
    return feature.feature.names, splits[split]["label"][:]


JSON_LINES = {
    "names": [{"tags": tags} for tags in SETS],
    "flags": [{"tags": [int(name in tags) for name in ("cat", "dog")]} for tags in SETS],
}


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("0.png,cat|dog\n1.png,\n2.png, dog \n3.png,cat", "metadata.csv", {"problem_type": "multi_label"}),
        ("0.png,dog;cat\n1.png,\n2.png,dog\n3.png,cat;cat", "metadata.csv", {"label_separator": ";"}),
        ("0.png,1,1\n1.png,0,0\n2.png,0,1\n3.png,1,0", "flags", {"labels": ["cat", "dog"]}),
        ("0.png,true,1.0\n1.png,False,0\n2.png,0,1\n3.png,1,0", "flags", {"labels": ["cat", "dog"]}),
        ("names", "metadata.jsonl", {}),
        ("flags", "metadata.jsonl", {"label_column": "tags", "labels": ["cat", "dog"]}),
    ],
)
def test_a_folder_with_metadata(tmp_path, text, name, options):
    if name == "metadata.jsonl":
        rows = [{"file_name": f"{number}.png", **row} for number, row in enumerate(JSON_LINES[text])]
        root = folder(tmp_path, "\n".join(map(json.dumps, rows)), name)
    elif name == "flags":
        root = folder(tmp_path, f"file_name,cat,dog\n{text}")
    else:
        root = folder(tmp_path, f"file_name,label\n{text}")
    assert read(load_image_dataset(root, **options)) == (["cat", "dog"], SQUARES)


@pytest.mark.parametrize(
    ("labels", "feature", "options", "names"),
    [
        ([[1, 0], [], [1], [0, 0]], List(ClassLabel(names=["cat", "dog"])), {}, ["cat", "dog"]),
        (SETS, List(Value("string")), {}, ["cat", "dog"]),
        ([[10, 9], [], [10], [9]], List(Value("int64")), {}, ["9", "10"]),
        ([[1, 1], [0, 0], [0, 1], [1, 0]], List(Value("int8")), {}, ["0", "1"]),
        ([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]], List(Value("float32")), {}, ["0", "1"]),
        ([[True, True], [False, False], [False, True], [True, False]], List(Value("bool")), {}, ["0", "1"]),
        (["cat,dog", "", "dog", "cat"], Value("string"), {"label_separator": ","}, ["cat", "dog"]),
        (["9|10", None, "10", "9"], Value("string"), {"problem_type": "multi_label"}, ["9", "10"]),
    ],
)
def test_a_table(labels, feature, options, names):
    assert read(load_image_dataset(table(labels, feature), **options)) == (names, SQUARES)
    again = load_image_dataset(load_image_dataset(table(labels, feature), **options)["train"])
    assert read(again) == (names, SQUARES), "what was loaded can be loaded"


def test_columns_of_flags_keep_their_order_and_may_be_those_of_a_model():
    source = table([0] * 4, Value("int64"), name="id", dog=[1, 0, 1, 0], cat=[1, 0, 0, 1])
    assert read(load_image_dataset(source, labels=["dog", "cat"])) == (["dog", "cat"], [[0, 1], [], [0], [1]])
    model = {"class_names": ["cat", "dog"], "problem_type": "multi_label"}
    assert read(load_image_dataset(source, **model)) == (["cat", "dog"], SQUARES)


def test_lists_beside_a_label_are_something_else():
    boxes = table([[1, 2], [3, 4]], List(Value("int64")), name="box").add_column("animal", ["a", "b"])
    assert load_image_dataset(boxes)["train"].features["label"].names == ["a", "b"]
    assert read(load_image_dataset(boxes, problem_type="multi_label"))[0] == ["1", "2", "3", "4"]


def test_classes_go_by_name_in_every_split():
    splits = DatasetDict(
        train=table([[0], [1]], List(ClassLabel(names=["cat", "dog"]))),
        test=table([[0], [0, 1]], List(ClassLabel(names=["dog", "cat"]))),
    )
    assert read(load_image_dataset(splits), "test") == (["cat", "dog"], [[1], [0, 1]])
    unknown = table([["emu"]], List(Value("string")))
    with pytest.raises(DataError, match="The test split has images of 'emu'"):
        load_image_dataset(DatasetDict(train=table(SETS, List(Value("string"))), test=unknown))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (lambda: table([[0], None], List(Value("int64"))), {}, "1 of 2 images in train have no list.*train/1"),
        (lambda: table([["a", None], ["b"]], List(Value("string"))), {}, "or one with gaps: 'train/0'"),
        (lambda: table([[0, -1], [1]], List(ClassLabel(names=["a", "b"]))), {}, "the class id -1"),
        (lambda: table([[0.5], [1.5]], List(Value("float64"))), {}, "that is regression"),
        (lambda: table([["a"], ["a"]], List(Value("string"))), {}, "one class only: 'a'"),
        (lambda: table([0, 1], Value("int64")), {"problem_type": "multi_label"}, "holds one class per image"),
        (lambda: table([["a"], ["b"]], List(Value("string"))), {"problem_type": "single_label"}, "one label per image"),
        (lambda: table([0.5, 0.7], Value("float64")), {}, "regression, which torchthaw does not do"),
        (lambda: table(["a", "b"], Value("string")), {"problem_type": "regression"}, "regression, which torch"),
        (lambda: table(["a", "b"], Value("string")), {"problem_type": "multilabel"}, "Did you mean 'multi_label'"),
        (lambda: table(["a", "b"], Value("string")), {"labels": ["x", "y"]}, "names 'x', and the data set .train. has"),
        (lambda: table(["a", "b"], Value("string"), x=[0, 1], y=[2, 0]), {"labels": ["x", "y"]}, "'y' of .* holds 2"),
        (lambda: table(["a", "b"], Value("string"), x=[0, 1]), {"labels": ["x"]}, "write label_column='x' instead"),
        (
            lambda: table([[0, 1], [1, 1]], List(Value("int64"))),
            {"label_column": "label", "labels": ["a", "b", "c"]},
            "lists of 2 flags, and labels names 3 classes",
        ),
        (
            lambda: table(["a", "b"], Value("string")),
            {"problem_type": "single_label", "label_separator": "|"},
            "label_separator is for several labels",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_labels_is_named(source, options, message):
    with pytest.raises(DataError, match=message):
        load_image_dataset(source(), **options)


def test_class_folders_are_one_label_each(make_image_folder):
    with pytest.raises(DataError, match=r"class folders, which give each image one label.*metadata.csv"):
        load_image_dataset(make_image_folder(), problem_type="multi_label")


def test_a_separator_that_is_nowhere_is_told(caplog):
    load_image_dataset(table(["a,b", "b"], Value("string")), problem_type="multi_label")
    assert "No image has more than one label; what stands between labels is taken to be '|'" in caplog.text


def test_streams_are_refused():
    processor = TorchvisionImageProcessor(crop_size=32)
    stream = table([[0], [1]], List(Value("int64"))).to_iterable_dataset()
    assert isinstance(stream, IterableDataset)
    with pytest.raises(DataError, match="not supported for streams"):
        ImageStream(stream, processor, class_names=["a", "b"])


# Splits


def drawn(images, classes=8, seed=0):
    random = np.random.default_rng(seed)
    labels = random.random((images, classes)) < random.beta(0.6, 4, size=classes)
    labels[:classes] |= np.eye(classes, dtype=bool)
    feature = List(ClassLabel(names=[f"c{number}" for number in range(classes)]))
    return load_image_dataset(table([np.flatnonzero(row).tolist() for row in labels], feature))


def shares(split, classes=8):
    return label_counts(split) / max(1, len(split))


def test_splits_keep_the_shares_of_every_label():
    whole = drawn(300)
    cut = split_dataset(whole, validation=0.2, test=0.2, seed=0)
    assert {split: len(rows) for split, rows in cut.items()} == {"train": 180, "validation": 60, "test": 60}
    for split in ("train", "validation", "test"):
        np.testing.assert_allclose(shares(cut[split]), shares(whole["train"]), atol=1.01 / 60)
    by_chance = [shares(whole["train"].shuffle(seed=seed).select(range(60))) for seed in range(5)]
    assert np.abs(np.array(by_chance) - shares(whole["train"])).max() > 2.5 / 60
    assert "the shares of all labels as even as whole images allow" in describe_split(whole)[1]
    shuffled = DatasetDict(train=whole["train"].shuffle(seed=1))
    paths = set(split_dataset(shuffled, validation=0.2, test=0.2, seed=0)["validation"]["path"][:])
    assert paths == set(cut["validation"]["path"][:]), "the order of the images has no say"


def test_folds_keep_them_too_and_groups_stay_whole():
    whole = drawn(200)
    for fold in fold_dataset(whole, folds=4, seed=0):
        assert abs(len(fold["validation"]) - 50) <= 1
        np.testing.assert_allclose(shares(fold["validation"]), shares(whole["train"]), atol=1.5 / 50)
    grouped = DatasetDict(train=whole["train"].add_column("group", [f"g{row // 4}" for row in range(200)]))
    cut = split_dataset(grouped, validation=0.25, seed=0)
    assert set(cut["train"]["group"][:]).isdisjoint(cut["validation"]["group"][:])
    np.testing.assert_allclose(shares(cut["validation"]), shares(whole["train"]), atol=2 / 50)


# Views


def test_labels_are_flags_and_mixing_mixes_them():
    images = load_image_dataset(table(SETS, List(Value("string"))))["train"]
    processor = TorchvisionImageProcessor(crop_size={"height": 32, "width": 32}, resize_size=32)
    plain = ImageView(images, processor)
    flags = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert torch.equal(torch.stack([plain[row]["labels"] for row in range(4)]), flags)
    view = ImageView(images, processor, Augmentation(mixup=1.0), seed=3)
    single = ImageView(images, processor, Augmentation(), seed=3)
    batch = view.__getitems__([0, 1, 2, 3]).stacked["labels"]
    seen = set()
    for row in range(4):
        mixed = view[row]
        assert torch.equal(batch[row], mixed["labels"])
        own = single[row]["pixel_values"]
        for partner in range(4):
            other = single[partner]["pixel_values"] - own
            if not other.abs().sum():
                continue
            part = ((mixed["pixel_values"] - own) / other).nanmedian()
            if torch.allclose(mixed["pixel_values"], own + part * other, atol=1e-4):
                expected = (1 - part) * flags[row] + part * flags[partner]
                torch.testing.assert_close(mixed["labels"], expected, atol=1e-3, rtol=0)
                seen.add(row)
    assert len(seen) >= 2, "partners other than the image itself were found"


# Audit


def test_the_audit_counts_labels_and_says_what_it_leaves_out():
    images = load_image_dataset(table([["cat", "dog"], ["dog"], [], ["cat"]] * 10, List(Value("string"))))
    report = audit_dataset(images, features=np.zeros((40, 4)))
    assert "label leakage" not in report.checks
    assert "suspicious labels" not in report.checks
    assert {"label leakage", "suspicious labels"} <= set(report.not_checked)
    twice = table([["cat", "dog"], ["dog"], ["dog"], ["cat"]], List(Value("string")))
    same = twice.map(lambda row: {"image": {"bytes": png(0), "path": None}}, features=twice.features)
    report = audit_dataset(load_image_dataset(same))
    found = next(finding for finding in report.findings if finding.name == "the same picture under different labels")
    assert {item["label"] for group in found.items for item in group["images"]} == {"cat + dog", "dog", "cat"}
    uneven = load_image_dataset(table([["a", "b"]] * 2 + [["a"]] * 18, List(Value("string"))))
    imbalance = next(finding for finding in audit_dataset(uneven).findings if finding.name == "class imbalance")
    assert "a (20), has 10.0 times the images of the smallest, b (2)" in imbalance.summary
    assert "class_weights: {NAME: WEIGHT}" in imbalance.advice


def test_a_class_that_loses_its_last_image_is_named():
    images = load_image_dataset(table([["a", "b"], ["a"]], List(Value("string"))))
    broken = images["train"].select([0])
    bad = [type("Bad", (), {"path": broken["path"][0], "reason": "broken"})()]
    with pytest.raises(DataError, match="No image is left in 'b'"):
        leave_out(images, {"train": bad}, on_bad="drop")
