"""Labels that files give away are found and named; honest data is left in peace."""

import dataclasses
from functools import partial

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import balanced_accuracy_score

from torchthaw import load_image_dataset
from torchthaw.data.audit.label_leakage import find_label_leaks
from torchthaw.data.audit.scan import ImageFacts, scan_images

PER_CLASS = 30


@pytest.fixture
def make_photos(tmp_path, draw_photo):
    def make(save, classes=("ant", "bee")):
        for index, label in enumerate(classes):
            (tmp_path / label).mkdir(parents=True)
            for number in range(PER_CLASS):
                save(draw_photo(PER_CLASS * index + number, (64, 48)), tmp_path / label, index, number)
        return find_label_leaks(scan_images(load_image_dataset(tmp_path)).images)

    return make


def facts(path, label):
    return ImageFacts(
        path, "train", label, None, None, b"", b"", 1000, "PNG", "RGB", 64, 48, contrast=40, quality=None,
        resolution=None, exif={},
    )  # fmt: skip


def named(leaks):
    return {leak.name: leak for leak in leaks}


def test_honest_files_give_nothing_away(make_photos):
    assert make_photos(lambda photo, folder, index, number: photo.save(folder / f"img{number:03d}.jpg")) == []


def test_one_class_as_png_and_one_as_jpeg(make_photos):
    leaks = named(
        make_photos(lambda photo, folder, index, number: photo.save(folder / f"{number}.{('png', 'jpg')[index]}"))
    )
    assert leaks["format"].balanced_accuracy == 1
    assert leaks["format"].chance == 0.5
    assert leaks["format"].strong
    assert "PNG: 100% ant (of 30)" in leaks["format"].gives_away
    assert "JPEG: 100% bee (of 30)" in leaks["format"].gives_away
    assert {"file extension", "JPEG quality"} <= leaks.keys()


def test_one_class_from_another_camera(make_photos):
    def save(photo, folder, index, number):
        # A tenth of the pictures come from the other camera.
        other = index if number % 10 else 1 - index
        exif = Image.Exif()
        exif[0x010F] = ("Canon", "Nikon")[other]
        photo.resize(((64, 48), (72, 48))[other]).save(folder / f"{number}.jpg", exif=exif)

    leaks = named(make_photos(save))
    assert leaks["size"].balanced_accuracy == pytest.approx(0.9)
    assert leaks["aspect ratio"].balanced_accuracy == pytest.approx(0.9)
    assert leaks["EXIF Make"].gives_away[0] in ("Canon: 90% ant (of 30)", "Nikon: 90% bee (of 30)")


def save_leaking(leak, photo, folder, index, number):
    name = {
        "words in the path": ("site", "ward")[index] + f"_{number}",
        "number in the file name": 500 * index + number,
    }
    options = {"JPEG quality": {"quality": (60, 90)[index]}, "resolution": {"dpi": ((72, 72), (300, 300))[index]}}
    if leak == "mode":
        photo = photo.convert(("RGB", "L")[index])
    photo.save(folder / f"{name.get(leak, number)}.jpg", **options.get(leak, {}))


@pytest.mark.parametrize("leak", ["JPEG quality", "mode", "resolution", "words in the path", "number in the file name"])
def test_every_property_is_looked_at(make_photos, leak):
    leaks = named(make_photos(partial(save_leaking, leak)))
    assert leaks[leak].balanced_accuracy > 0.95


def test_folder_depth_and_the_days_of_photographs(make_photos):
    def save(photo, folder, index, number):
        deep = folder / "extra" if index else folder
        deep.mkdir(exist_ok=True)
        exif = Image.Exif()
        exif[0x0132] = f"2020:01:0{1 + index} 10:00:{number:02d}"
        photo.save(deep / f"{number}.jpg", exif=exif)

    leaks = named(make_photos(save))
    assert leaks["folder depth"].balanced_accuracy == 1
    assert leaks["EXIF DateTime"].gives_away[0] == "2020:01:01: 100% ant (of 30)"


def test_the_name_of_the_class_in_file_names_is_no_leak(make_photos):
    assert make_photos(lambda photo, folder, index, number: photo.save(folder / f"{folder.name}s_{number}.jpg")) == []


def test_length_counts_only_where_it_says_more_than_pictures_do(make_photos):
    def save(photo, folder, index, number):
        # Smoother pictures make shorter files; that is how pictures differ.
        smooth = photo.resize((32, 24)).resize((64, 48)) if index and number % 3 == 0 else photo
        smooth.save(folder / f"{number}.png")

    assert make_photos(save) == []


def test_balanced_accuracy_is_scikit_learns(make_photos):
    def save(photo, folder, index, number):
        photo.save(folder / f"{number}.{'png' if number % 5 or index else 'jpg'}")

    # Ants that are JPEG are recognised, the others are taken for one class or the other: at best 0.5 * (0.2 + 1).
    leaks = named(make_photos(save))
    truth = np.repeat([0, 1], PER_CLASS)
    guess = np.array([int(index or number % 5 > 0) for index in (0, 1) for number in range(PER_CLASS)])
    assert leaks.get("format") is None or leaks["format"].balanced_accuracy == balanced_accuracy_score(truth, guess)


def test_one_class_of_many_is_exposed():
    random = np.random.default_rng(1)
    images = []
    for row in range(300):
        image = facts(f"{random.integers(1000)}.png", f"c{row % 10}")
        images.append(dataclasses.replace(image, format="JPEG" if row % 10 == 3 else "PNG"))
    (leak,) = find_label_leaks(images)
    assert leak.name == "format"
    assert leak.share < 0.2
    assert (leak.exposed, leak.exposure, leak.strong) == ("c3", 1.0, True)
    # Two classes that share the format are not told from each other, but the others are from them.
    images = [dataclasses.replace(image, format="JPEG" if image.label in ("c3", "c4") else "PNG") for image in images]
    (leak,) = find_label_leaks(images)
    assert leak.exposed in ("c3", "c4")
    assert 0.8 < leak.exposure < 0.95


def test_chance_is_not_taken_for_a_leak():
    random = np.random.default_rng(0)
    alarms = 0
    for _ in range(40):
        numbers = random.permutation(1000)[:24]
        images = [facts(f"{number}.png", "ab"[row % 2]) for row, number in enumerate(numbers.tolist())]
        alarms += len(find_label_leaks(images))
    assert alarms <= 2


def test_rare_classes_and_single_classes_are_left_out(tmp_path, draw_photo):
    for label, count in (("ant", 20), ("bee", 3)):
        (tmp_path / label).mkdir()
        for number in range(count):
            draw_photo(number).save(tmp_path / label / f"{number}.{'png' if label == 'ant' else 'jpg'}")
    assert find_label_leaks(scan_images(load_image_dataset(tmp_path)).images) == []


def test_nothing_is_reported_of_the_waste_photographs(shared_data):
    assert find_label_leaks(scan_images(load_image_dataset(shared_data / "trashnet-sixth")).images) == []
