import csv
import io
import time
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as DatasetImage
from PIL import Image

from torchthaw.data.bad_images import check_images, find_bad_images
from torchthaw.data.images import decode_image, image_extensions
from torchthaw.data.loading import load_image_dataset
from torchthaw.errors import DataError


def picture(size=(20, 12)):
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_every_way_to_give_an_image_decodes_to_the_same_pixels(tmp_path):
    expected = np.asarray(picture())
    file = tmp_path / "a.png"
    file.write_bytes(encoded(picture(), "PNG"))
    data = file.read_bytes()
    values = [file, str(file), data, {"bytes": data, "path": None}, {"bytes": None, "path": str(file)}, picture()]
    for value in values:
        decoded = decode_image(value)
        assert decoded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(decoded), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I", "I;16", "F", "YCbCr"])
def test_every_mode_becomes_rgb(mode):
    image = picture().convert("I" if mode == "I;16" else mode)
    decoded = decode_image(image.convert(mode) if mode == "I;16" else image)
    assert (decoded.mode, decoded.size) == ("RGB", (20, 12))


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    decoded = decode_image(encoded(picture(), "PNG", exif=exif))
    np.testing.assert_array_equal(np.asarray(decoded), np.rot90(np.asarray(picture()), k=-1))


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    decoded = decode_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert decoded.getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty (0 bytes)"),
        (b"not a picture at all", "not an image that Pillow can read"),
        (encoded(picture((300, 300)), "JPEG")[:2000], "truncated or damaged"),
        (encoded(picture((300, 300)), "PNG")[:2000], "truncated or damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n", "is a EPS file"),
        (None, "does not exist"),
    ],
)
def test_an_unusable_file_is_named_with_the_reason(tmp_path, content, reason):
    file = tmp_path / "bad one.jpg"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        decode_image(file)
    assert str(file) in str(caught.value)
    assert reason in str(caught.value)


def test_a_folder_nothing_and_a_number_are_refused(tmp_path):
    for value, reason in [(tmp_path, "cannot be read"), (None, "is missing"), (7, "is a int, not a path")]:
        with pytest.raises(DataError) as caught:
            decode_image(value)
        assert reason in str(caught.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [200, 100])  # 240 pixels: Pillow warns from the limit on, and raises from twice it
def test_an_image_above_the_pixel_limit_is_refused_unread(monkeypatch, limit):
    data = encoded(picture(), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError) as caught:
        decode_image(data, name="huge.png")
    assert "huge.png" in str(caught.value)
    assert "pixels" in str(caught.value)


def test_control_characters_of_a_file_name_do_not_reach_the_terminal():
    with pytest.raises(DataError) as caught:
        decode_image(b"", name="evil\x1b[31m.png")
    assert "\x1b" not in str(caught.value)


def test_extensions_are_those_of_pictures():
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".bmp", ".gif"} <= image_extensions()
    assert not {".eps", ".ps", ".pdf", ".h5", ".txt"} & image_extensions()


@pytest.fixture
def damaged(make_image_folder):
    root = make_image_folder(("ant", "bee"), per_class=40)
    (root / "ant" / "000.png").write_bytes(b"")
    (root / "bee" / "039.png").write_bytes(b"<html>")
    return load_image_dataset(root)["train"]


@pytest.mark.parametrize("num_threads", [None, 1, 3])
def test_check_fails_with_all_bad_files_and_the_way_on(damaged, num_threads):
    with pytest.raises(DataError) as caught:
        check_images(damaged, num_threads=num_threads, progress=False)
    message = str(caught.value)
    assert message.startswith("2 of 80 images cannot be used")
    assert "'ant/000.png': is empty (0 bytes)" in message
    assert "'bee/039.png': is not an image" in message
    assert "data: {on_bad_image: drop}" in message


def test_check_drops_the_bad_files_and_returns_them(damaged, capsys):
    kept, bad = check_images(damaged, on_bad="drop", progress=False)
    assert [image.path for image in bad] == ["ant/000.png", "bee/039.png"]
    assert kept["path"][:] == [path for path in damaged["path"][:] if path not in ("ant/000.png", "bee/039.png")]
    output = capsys.readouterr()
    assert (output.out, output.err.strip()) == ("", "")


def test_check_returns_a_good_data_set_as_it_is_and_keeps_stdout_clean(make_image_folder, capsys):
    dataset = load_image_dataset(make_image_folder())["train"]
    kept, bad = check_images(dataset)
    assert kept is dataset
    assert bad == []
    assert capsys.readouterr().out == ""


def test_a_long_list_of_bad_files_is_cut(make_image_folder):
    root = make_image_folder(("ant", "bee"), per_class=30)
    for file in sorted(root.rglob("*.png"))[:53]:
        file.write_bytes(b"")
    with pytest.raises(DataError) as caught:
        check_images(load_image_dataset(root)["train"], progress=False)
    assert str(caught.value).count("is empty") == 50
    assert "and 3 more" in str(caught.value)


def test_dropping_does_not_empty_a_class(make_image_folder):
    root = make_image_folder(("ant", "bee", "cat"), per_class=3)
    for file in (root / "bee").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match=r"No image is left in 'bee'"):
        check_images(load_image_dataset(root)["train"], on_bad="drop", progress=False)


def test_an_unknown_policy_is_refused(damaged):
    with pytest.raises(DataError, match=r"on_bad='skip' is unknown; write 'fail' or 'drop'"):
        check_images(damaged, on_bad="skip")


def plainly_decodes(file: Path) -> bool:
    try:
        with Image.open(file) as picture:
            picture.convert("RGB")
    except Exception:  # noqa: BLE001 - Pillow raises nearly anything for damaged files
        return False
    return True


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore")
def test_odd_files_decode_or_are_refused_in_time(shared_data: Path):
    folder = shared_data / "odd-images"
    with (folder / "MANIFEST.tsv").open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(rows) == 531
    slow, surprises = [], []
    for row in rows:
        start = time.perf_counter()
        try:
            decodes = decode_image(folder / row["file"]).mode == "RGB"
        except DataError:
            decodes = False
        if time.perf_counter() - start > 10:
            slow.append(row["file"])
        # Newer versions of Pillow read more; a file that this one opens must decode.
        if decodes != (row["load"] == "ok") and decodes != plainly_decodes(folder / row["file"]):
            surprises.append(row["file"])
    assert not slow
    assert not surprises


def test_the_check_finds_what_cannot_be_decoded_and_nothing_else(shared_data, tmp_path):
    """It decodes JPEGs at an eighth of their size, where training may decode them whole."""
    files = [path for path in sorted((shared_data / "odd-images").rglob("*")) if path.suffix in (".jpg", ".jpeg")]
    photo = next((shared_data / "hymenoptera").rglob("*.jpg")).read_bytes()
    for number, share in enumerate((0.02, 0.1, 0.3, 0.5, 0.9, 0.99, 0.999)):
        cut = tmp_path / f"cut-{number}.jpg"
        cut.write_bytes(photo[: int(share * len(photo))])
        hole = tmp_path / f"hole-{number}.jpg"
        middle = int(share * len(photo))
        hole.write_bytes(photo[:middle] + bytes(300) + photo[middle + 300 :])
        files += [cut, hole]
    rows = {"image": [str(path) for path in files], "label": [0] * len(files), "path": [str(path) for path in files]}
    features = Features(image=DatasetImage(decode=False), label=ClassLabel(names=["a", "b"]), path=Value("string"))
    found = find_bad_images(Dataset.from_dict(rows, features=features), progress=False)
    expected = []
    for path in files:
        try:
            decode_image(path)
        except DataError as error:
            expected.append(
                (str(path), str(error).removeprefix(f"Cannot use image {str(path)!r}: it ").removesuffix("."))
            )
    assert len(expected) >= 8
    assert [(image.path, image.reason) for image in found] == expected
