"""The audit finds what was planted, names every path, and says what to do."""

import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from torchthaw import audit_dataset, load_image_dataset, split_dataset
from torchthaw.data.audit.audit import examine_dataset, judge
from torchthaw.data.audit.scan import scan_images
from torchthaw.data.audit.suspicious_labels import find_suspicious_labels
from torchthaw.errors import DataError


@pytest.fixture
def photo_folder(tmp_path, draw_photo):
    """A folder of 20 + 20 photographs for training, 10 + 10 for validation, in which nothing is wrong."""
    root = tmp_path / "photos"
    number = 0
    for split, count in (("train", 20), ("validation", 10)):
        for label in ("ant", "bee"):
            (root / split / label).mkdir(parents=True)
            for row in range(count):
                draw_photo(number).save(root / split / label / f"{row:02d}.png")
                number += 1
    return root


def audit(root, **options):
    return audit_dataset(load_image_dataset(root), **options)


def found(report, name):
    return next((finding for finding in report.findings if finding.name == name), None)


def paths_of(finding):
    return {frozenset(image["path"] for image in item["images"]) for item in finding.items}


def test_nothing_is_found_where_nothing_is_wrong(photo_folder):
    report = audit(photo_folder)
    assert report.findings == ()
    assert report.verdict == "pass"
    assert report.num_images == {"train": 40, "validation": 20}
    assert {"exact duplicates", "near duplicates", "label leakage", "classes", "files"} == set(report.checks)
    assert {"groups", "time", "suspicious labels"} == set(report.not_checked)


def test_the_report_is_json_with_every_path(photo_folder):
    copy = photo_folder / "validation" / "ant" / "copy.png"
    copy.write_bytes((photo_folder / "train" / "ant" / "03.png").read_bytes())
    document = json.loads(json.dumps(audit(photo_folder).to_dict()))
    (finding,) = document["findings"]
    assert document["verdict"] == finding["verdict"] == "fail"
    assert [image["path"] for image in finding["items"][0]["images"]] == ["train/ant/03.png", "validation/ant/copy.png"]
    assert document["seconds"].keys() >= {"reading and decoding", "duplicates", "label leakage"}


def test_exact_copies_by_bytes_and_by_pixels(photo_folder):
    source = photo_folder / "train" / "ant" / "00.png"
    (photo_folder / "train" / "ant" / "same.png").write_bytes(source.read_bytes())
    Image.open(source).save(photo_folder / "validation" / "ant" / "same pixels.bmp")
    report = audit(photo_folder)
    across = found(report, "exact duplicates across splits")
    assert across.verdict == "fail"
    assert across.items[0]["same"] == "pixels"
    assert len(across.items[0]["images"]) == 3
    (photo_folder / "validation" / "ant" / "same pixels.bmp").unlink()
    report = audit(photo_folder)
    within = found(report, "exact duplicates within a split")
    assert within.verdict == report.verdict == "warn"
    assert within.items[0]["same"] == "file"
    assert paths_of(within) == {frozenset({"train/ant/00.png", "train/ant/same.png"})}
    assert "--fix" in within.advice


def test_one_picture_with_two_labels_fails(photo_folder):
    source = photo_folder / "train" / "ant" / "00.png"
    (photo_folder / "train" / "bee" / "mistake.png").write_bytes(source.read_bytes())
    finding = found(audit(photo_folder), "the same picture under different labels")
    assert finding.verdict == "fail"
    assert paths_of(finding) == {frozenset({"train/ant/00.png", "train/bee/mistake.png"})}


def test_near_copies_across_splits_and_labels(photo_folder):
    picture = Image.open(photo_folder / "train" / "ant" / "05.png")
    picture.save(photo_folder / "validation" / "ant" / "again.jpg", quality=50)
    picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(photo_folder / "validation" / "bee" / "flipped.png")
    picture.resize((80, 60)).save(photo_folder / "train" / "ant" / "small.png")
    # What is not compared, before and after: a blank image, and a second file of the same picture.
    Image.new("RGB", (160, 120)).save(photo_folder / "train" / "ant" / "00 blank.png")
    (photo_folder / "train" / "ant" / "99.png").write_bytes((photo_folder / "train" / "ant" / "05.png").read_bytes())
    report = audit(photo_folder)
    assert {frozenset(copies) for copies in report.copies} == {
        frozenset(
            {
                "train/ant/05.png", "train/ant/99.png", "train/ant/small.png", "validation/ant/again.jpg",
                "validation/bee/flipped.png",
            }
        )
    }  # fmt: skip
    across = found(report, "near duplicates across splits")
    assert across.verdict == "fail"
    assert frozenset({"train/ant/05.png", "validation/ant/again.jpg"}) in paths_of(across)
    assert "validation" in across.summary
    contradictory = found(report, "near duplicates under different labels")
    assert contradictory.verdict == "warn"
    assert frozenset({"train/ant/05.png", "validation/bee/flipped.png"}) in paths_of(contradictory)
    within = found(report, "near duplicates within a split")
    assert within.verdict == "pass"
    assert paths_of(within) == {
        frozenset({"train/ant/05.png", "train/ant/small.png"}),
        frozenset({"validation/ant/again.jpg", "validation/bee/flipped.png"}),
    }


def test_few_near_copies_are_a_warning(tmp_path, draw_photo):
    for split, first, count in (("train", 0, 4), ("test", 100, 120)):
        for index, label in enumerate(("ant", "bee")):
            (tmp_path / split / label).mkdir(parents=True)
            for row in range(count):
                draw_photo(first + count * index + row, (40, 40)).save(tmp_path / split / label / f"{row}.png")
    draw_photo(0, (40, 40)).save(tmp_path / "test" / "ant" / "near.jpg", quality=60)
    finding = found(audit(tmp_path), "near duplicates across splits")
    assert (finding.verdict, finding.count) == ("warn", 1)


def test_files_that_cannot_be_decoded_are_all_listed(photo_folder):
    (photo_folder / "train" / "ant" / "empty.png").touch()
    (photo_folder / "validation" / "bee" / "text.jpg").write_text("no picture")
    examined = examine_dataset(load_image_dataset(photo_folder))
    splits = [image.split for image in examined.scan.images]
    finding = found(judge(examined, splits), "unreadable images")
    assert finding.verdict == "fail"
    assert {(item["path"], item["split"]) for item in finding.items} == {
        ("train/ant/empty.png", "train"),
        ("validation/bee/text.jpg", "validation"),
    }
    assert "empty" in finding.items[0]["reason"]
    assert found(judge(examined, splits, dropped=True), "unreadable images").verdict == "warn"
    for file in photo_folder.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match=r"(?s)No image can be decoded.*train/ant/00.png.*empty"):
        audit(photo_folder)


def test_streams_are_refused(photo_folder):
    streams = {split: rows.to_iterable_dataset() for split, rows in load_image_dataset(photo_folder).items()}
    with pytest.raises(DataError, match=r"streams do not allow \(train, validation\).*without streaming"):
        audit_dataset(streams)


def test_odd_images_are_named(photo_folder, draw_photo):
    train = photo_folder / "train" / "ant"
    Image.new("RGB", (160, 120), (200, 190, 180)).save(train / "blank.png")
    draw_photo(900, (1600, 1200)).save(train / "large.png")
    draw_photo(901, (900, 20)).save(train / "strip.png")
    draw_photo(902).convert("CMYK").save(train / "print.jpg")
    report = audit(photo_folder)
    expected = {
        "nearly uniform images": ("warn", {"train/ant/blank.png"}),
        "extreme sizes": ("warn", {"train/ant/large.png"}),
        "extreme shapes": ("warn", {"train/ant/strip.png"}),
        "unusual modes": ("pass", {"train/ant/print.jpg"}),
    }
    for name, (verdict, paths) in expected.items():
        finding = found(report, name)
        assert finding.verdict == verdict
        assert {item["path"] for item in finding.items} == paths
    assert report.not_checked["near duplicates of some images"].startswith("2 are too small or too uniform")


def test_classes_that_a_split_lacks_and_imbalance(photo_folder):
    for file in (photo_folder / "validation" / "bee").iterdir():
        file.unlink()
    for file in sorted((photo_folder / "train" / "bee").iterdir())[8:]:
        file.unlink()
    (photo_folder / "validation" / "bee").rmdir()
    report = audit(photo_folder)
    lacking = found(report, "classes without images")
    assert lacking.verdict == "warn"
    assert lacking.items == ({"split": "validation", "class": "bee"},)
    imbalance = found(report, "class imbalance")
    assert imbalance.verdict == "pass"
    assert "2.5 times" in imbalance.summary
    assert list(imbalance.items) == [{"class": "ant", "images": 20}, {"class": "bee", "images": 8}]
    for file in sorted((photo_folder / "train" / "bee").iterdir())[2:]:
        file.unlink()
    assert found(audit(photo_folder), "class imbalance").verdict == "warn"


def with_column(dataset, name, values, kind):
    return DatasetDict(
        {split: rows.add_column(name, values[split], feature=Value(kind)) for split, rows in dataset.items()}
    )


def test_groups_across_splits(photo_folder):
    dataset = load_image_dataset(photo_folder)
    groups = {"train": [f"p{row % 10}" for row in range(40)], "validation": [f"p{8 + row % 4}" for row in range(20)]}
    report = audit_dataset(with_column(dataset, "group", groups, "string"))
    finding = found(report, "groups across splits")
    assert finding.verdict == "fail"
    assert finding.items == (
        {"group": "p8", "images": {"train": 4, "validation": 5}},
        {"group": "p9", "images": {"train": 4, "validation": 5}},
    )
    assert "10 of 20 images" in finding.summary
    assert "groups" in report.checks
    groups["validation"] = ["other"] * 20
    assert audit_dataset(with_column(dataset, "group", groups, "string")).findings == ()


def test_time_that_runs_backwards(photo_folder):
    dataset = load_image_dataset(photo_folder)
    times = {"train": [float(row) for row in range(40)], "validation": [37.5, 38.5, *range(40, 57), float("nan")]}
    report = audit_dataset(with_column(dataset, "time", times, "float64"))
    finding = found(report, "time runs backwards from train to validation")
    assert finding.verdict == "fail"
    assert [item["path"] for item in finding.items] == ["validation/ant/00.png", "validation/ant/01.png"]
    assert finding.items[0]["time"] == "1970-01-01 00:00:37"
    times["validation"][:2] = [39.0, 39.5]
    assert audit_dataset(with_column(dataset, "time", times, "float64")).findings == ()


def test_suspicious_labels_are_ranked():
    random = np.random.default_rng(0)
    centres = np.eye(3).repeat(20, axis=0) * 5
    features = centres + random.normal(scale=0.3, size=centres.shape)
    labels = [name for name in ("ant", "bee", "cat") for _ in range(20)]
    labels[3], labels[25] = "cat", "ant"
    suspects = find_suspicious_labels(features, labels)
    assert {suspect.row: (suspect.label, suspect.suggested) for suspect in suspects} == {
        3: ("cat", "ant"),
        25: ("ant", "bee"),
    }
    assert all(suspect.agreement == 1 for suspect in suspects)
    # A copy of an image, which comes before it, does not make the image its own neighbour.
    twins = np.vstack([features[:1], features[:20]])
    assert [suspect.row for suspect in find_suspicious_labels(twins, ["ant", "bee", *["ant"] * 19])] == [1]
    assert find_suspicious_labels(features[:5], labels[:5]) == []


def test_features_are_asked_for_by_their_finding(photo_folder):
    features = np.random.default_rng(1).normal(size=(60, 8))
    features[:, 0] = np.array([9.0] * 20 + [-9.0] * 20 + [9.0] * 10 + [-9.0] * 10)
    features[4, 0] = -9
    report = audit(photo_folder, features=features)
    finding = found(report, "suspicious labels")
    assert finding.verdict == "pass"
    assert finding.items[0]["path"] == "train/ant/04.png"
    assert finding.items[0]["suggested"] == "bee"


def test_each_image_is_read_and_decoded_once(photo_folder, monkeypatch):
    opened = []
    really_open = Image.open
    monkeypatch.setattr(Image, "open", lambda file, *args: opened.append(file) or really_open(file, *args))
    audit(photo_folder)
    assert len(opened) == 60


def test_facts_of_a_file(tmp_path, draw_photo):
    picture = draw_photo(1, (90, 60))
    for label in ("ant", "bee"):
        (tmp_path / label).mkdir()
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Maker\0", 6
    picture.save(tmp_path / "ant" / "a.jpg", exif=exif, dpi=(300, 300), quality=80)
    picture.convert("L").save(tmp_path / "bee" / "b.png")
    jpeg, png = scan_images(load_image_dataset(tmp_path)).images
    assert (jpeg.format, jpeg.mode, jpeg.width, jpeg.height) == ("JPEG", "RGB", 60, 90)
    assert (jpeg.exif["Make"], jpeg.exif["Orientation"], jpeg.resolution) == ("Maker", "6", "(300, 300)")
    assert jpeg.num_bytes == (tmp_path / "ant" / "a.jpg").stat().st_size
    assert jpeg.quality > 0
    assert (png.format, png.mode, png.quality, png.label, png.group, png.time) == ("PNG", "L", None, "bee", None, None)


def test_threads_do_not_change_what_is_found(photo_folder):
    dataset = load_image_dataset(photo_folder)
    one, four = (scan_images(dataset, num_threads=number) for number in (1, 4))
    assert one.images == four.images
    np.testing.assert_array_equal(one.thumbnails, four.thumbnails)


def test_the_real_duplicates_of_the_brain_scans(shared_data):
    report = audit(shared_data / "brain-mri-yesno")
    finding = found(report, "exact duplicates within a split")
    same_file = [item for item in finding.items if item["same"] == "file"]
    assert sum(len(item["images"]) - 1 for item in same_file) == 25


def test_students_leak_through_a_random_split_only(shared_data):
    whole = load_image_dataset(shared_data / "sign-digits")
    dataset = whole.filter(lambda path: path[0] in "0123", input_columns="path")
    examined = examine_dataset(dataset)
    verdicts = {}
    for by in ("image", "group"):
        cut = split_dataset(dataset, validation=0.2, by=by)
        where = {path: split for split, rows in cut.items() for path in rows["path"]}
        report = judge(examined, [where[image.path] for image in examined.scan.images])
        verdicts[by] = found(report, "groups across splits")
    assert verdicts["image"].verdict == "fail"
    assert verdicts["image"].count > 50
    assert verdicts["group"] is None


def test_odd_files_decode_or_are_listed(shared_data):
    files = sorted(str(file) for file in (shared_data / "odd-images").glob("*/*") if file.is_file())
    columns = {"image": [{"path": file, "bytes": None} for file in files], "label": [0] * len(files), "path": files}
    features = Features(image=ImageFeature(decode=False), label=ClassLabel(names=["odd"]), path=Value("string"))
    examined = examine_dataset({"train": Dataset.from_dict(columns, features=features)})
    bad = examined.scan.bad["train"]
    assert len(examined.scan.images) + len(bad) == len(files) == 531
    assert all(image.reason for image in bad)
    report = judge(examined, ["train"] * len(examined.scan.images))
    assert {item["path"] for item in found(report, "unreadable images").items} == {image.path for image in bad}
