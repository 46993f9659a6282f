import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from torchthaw.backbones.image_processing import TorchvisionImageProcessor
from torchthaw.data import workers
from torchthaw.data.augmentation import AUGMENTATIONS, Augmentation
from torchthaw.data.caches import images as image_cache
from torchthaw.data.caches.digests import image_digests, image_facts
from torchthaw.data.caches.images import with_cached_images
from torchthaw.data.caches.store import ArrayStore
from torchthaw.data.loading import load_image_dataset
from torchthaw.data.views import ImageView, collate
from torchthaw.data.workers import available_cores, suggest_workers
from torchthaw.errors import DataError

STRONG = Augmentation(
    vertical_flip=0.5, policy="rand_augment", color_jitter=0.4, random_erasing=0.5, mixup=0.4, cutmix=0.4
)


@pytest.fixture
def processor():
    return TorchvisionImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 24}, resample=3)


@pytest.fixture
def photos(tmp_path, draw_photo):
    """JPEGs and PNGs of several sizes, some upright by EXIF alone."""
    for number in range(12):
        folder = tmp_path / "photos" / ("ant", "bee", "cat")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        picture = draw_photo(number, (60 + 80 * number, 50 + 30 * number))
        exif = PILImage.Exif()
        exif[0x0112] = 1 + number % 8
        picture.save(folder / f"{number:02d}.{'png' if number % 4 == 3 else 'jpg'}", exif=exif)
    return load_image_dataset(tmp_path / "photos")["train"]


@pytest.fixture
def store(tmp_path):
    return ArrayStore(tmp_path / "cache")


@pytest.fixture
def decoded(monkeypatch):
    """Counts what is decoded to fill a cache."""
    calls = []
    decode = image_cache.decode_bytes
    monkeypatch.setattr(image_cache, "decode_bytes", lambda *args: calls.append(1) or decode(*args))
    return calls


def batch_of(view, repeat=0):
    return collate([view[row, repeat] for row in range(len(view))])


def assert_equal(view, other, repeat=0):
    expected, found = batch_of(view, repeat), batch_of(other, repeat)
    assert torch.equal(expected["pixel_values"], found["pixel_values"])
    assert torch.equal(expected["labels"], found["labels"])


def pixels_or_error(view, row):
    try:
        return view[row]["pixel_values"]
    except DataError as error:
        return str(error)


def no_decoding(monkeypatch):
    from torchthaw.data import views

    monkeypatch.setattr(views, "decode_image", lambda *args, **options: pytest.fail("decoded again"))


@pytest.mark.parametrize("augmentation", [None, AUGMENTATIONS["light"], STRONG])
def test_samples_are_those_of_the_view_without_a_cache(photos, processor, store, augmentation, monkeypatch):
    view = ImageView(photos, processor, augmentation, seed=5, stage=1)
    expected = []
    for epoch in (0, 2):
        view.set_epoch(epoch)
        expected += [batch_of(view), batch_of(view, repeat=3)]
    cached = with_cached_images(view, store)
    no_decoding(monkeypatch)
    found = []
    for epoch in (0, 2):
        view.set_epoch(epoch)  # the epoch is shared
        found += [batch_of(cached), batch_of(cached, repeat=3)]
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        assert torch.equal(one["labels"], other["labels"])
    assert torch.equal(collate(cached.__getitems__([4, 1]))["pixel_values"], found[2]["pixel_values"][[4, 1]])


@pytest.mark.parametrize("size", [64, 224])
def test_odd_images_look_the_same(shared_data, tmp_path, store, size):
    """Animated, CMYK, 16-bit, palette, rotated, tiny ... and broken ones."""
    folder = shared_data / "odd-images"
    files = sorted(path for path in folder.rglob("*") if path.suffix not in (".tsv", ".md") and path.is_file())
    files = [path for path in files if "bomb" not in str(path)]
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=["a", "b"]), "path": Value("string")})
    rows = {
        "image": [{"path": str(path), "bytes": None} for path in files],
        "label": [0] * len(files),
        "path": [path.name for path in files],
    }
    dataset = Dataset.from_dict(rows, features=features)
    processor = TorchvisionImageProcessor().resized(size)
    kept = 0
    for augmentation in (None, AUGMENTATIONS["light"]):
        view = ImageView(dataset, processor, augmentation)
        cached = with_cached_images(view, store)
        broken = 0
        for row in range(len(dataset)):
            expected, found = pixels_or_error(view, row), pixels_or_error(cached, row)
            if isinstance(expected, str):
                broken += 1
                assert found == expected
            else:
                assert torch.equal(found, expected), files[row]
                kept += cached.kept.pixels(row) is not None
        assert 3 < broken < len(dataset) / 4
    assert kept > 0.98 * 2 * (len(dataset) - broken)


def test_a_broken_image_spoils_nothing_and_is_named_when_it_is_drawn(photos, processor, store, tmp_path):
    files = sorted((tmp_path / "photos").rglob("*.jpg"))
    files[2].write_bytes(files[2].read_bytes()[:1500])
    files[3].write_bytes(b"")
    files[4].unlink()
    view = ImageView(photos, processor, AUGMENTATIONS["light"])
    cached = with_cached_images(view, store)
    failed = {}
    for row in range(len(cached)):
        found = pixels_or_error(cached, row)
        if isinstance(found, str):
            failed[photos[row]["path"]] = found
        else:
            assert torch.equal(found, view[row]["pixel_values"])
    names = [str(file.relative_to(tmp_path / "photos")) for file in files[2:5]]
    assert sorted(failed) == sorted(names)
    assert "is truncated or damaged" in failed[names[0]]
    assert "it is empty (0 bytes)" in failed[names[1]]
    assert "does not exist" in failed[names[2]]


def test_pictures_are_found_by_content_whatever_their_names_and_order(
    photos, processor, store, decoded, tmp_path, monkeypatch
):
    with_cached_images(ImageView(photos, processor), store)
    assert len(decoded) == 12
    shutil.copytree(tmp_path / "photos", tmp_path / "moved")
    moved = load_image_dataset(tmp_path / "moved")["train"].select([*range(11, -1, -1), 3, 3])
    view = ImageView(moved, processor)
    expected = batch_of(view)
    cached = with_cached_images(view, store)
    assert len(decoded) == 12
    no_decoding(monkeypatch)
    assert torch.equal(batch_of(cached)["pixel_values"], expected["pixel_values"])


def test_a_changed_file_is_decoded_again(photos, processor, store, tmp_path, draw_photo):
    before = with_cached_images(ImageView(photos, processor), store)
    seen = batch_of(before)["pixel_values"]
    name = photos[5]["path"]
    draw_photo(99, (70, 60)).save(tmp_path / "photos" / name)
    view = ImageView(photos, processor)
    cached = with_cached_images(view, store)
    assert_equal(view, cached)
    changed = (batch_of(cached)["pixel_values"] != seen).flatten(1).any(1)
    assert changed.tolist() == [row == 5 for row in range(12)]


def test_a_file_that_changes_while_the_cache_is_filled_is_not_kept(
    photos, processor, store, tmp_path, draw_photo, monkeypatch
):
    def facts_before_a_change(dataset):
        found = image_facts(dataset)
        draw_photo(99, (70, 60)).save(tmp_path / "photos" / photos[5]["path"])
        return found

    monkeypatch.setattr(image_cache, "image_facts", facts_before_a_change)
    view = ImageView(photos, processor)
    cached = with_cached_images(view, store)
    assert [cached.kept.pixels(row) is None for row in range(12)] == [row == 5 for row in range(12)]
    assert_equal(view, cached)


def test_each_resolution_has_its_own_pictures(photos, processor, store, decoded):
    light = AUGMENTATIONS["light"]
    view = ImageView(photos, processor, light)
    cached = with_cached_images(view, store)
    assert len(decoded) == 12
    same = cached.for_stage(1, augmentation=AUGMENTATIONS["medium"])
    assert same.kept is cached.kept, "another augmentation of the same crops"
    assert_equal(view.for_stage(1, augmentation=AUGMENTATIONS["medium"]), same)
    for other in (
        cached.for_stage(1, augmentation=None),
        cached.for_stage(1, image_size=48),
        cached.for_stage(1, augmentation=Augmentation(crop_scale=(0.5, 1))),
        cached.for_stage(1, augmentation=Augmentation(crop_ratio=(1, 1))),
    ):
        decoded.clear()
        assert other.kept is None
        assert_equal(other, with_cached_images(other, store))
        assert len(decoded) == 12
    decoded.clear()
    finer = ImageView(photos, processor.with_settings(resample=2), light)
    assert_equal(finer, with_cached_images(finer, store))
    normalised = ImageView(photos, processor.with_settings(image_mean=[0, 0, 0]), light)
    assert_equal(normalised, with_cached_images(normalised, store))
    assert len(decoded) == 12, "pictures are kept before they are normalised"


@pytest.mark.parametrize("augmentation", [None, AUGMENTATIONS["light"]])
def test_what_the_budget_has_no_room_for_is_decoded_when_drawn(photos, processor, tmp_path, caplog, augmentation):
    view = ImageView(photos, processor, augmentation)
    whole = with_cached_images(view, ArrayStore(tmp_path / "whole"))
    (file,) = (tmp_path / "whole").glob("*.safetensors")
    small = ArrayStore(tmp_path / "small", budget_gb=0.6 * file.stat().st_size / 1e9)
    cached = with_cached_images(view, small)
    kept = [cached.kept.pixels(row) is not None for row in range(12)]
    assert 3 <= sum(kept) <= 8
    assert_equal(whole, cached)
    assert "images do not fit into what caches may take" in caplog.text
    assert sum(path.stat().st_size for path in (tmp_path / "small").iterdir()) <= small.budget_bytes
    again = with_cached_images(view, small)
    assert [again.kept.pixels(row) is not None for row in range(12)] == kept, "the same entry, though it is in use"
    caplog.clear()
    tiny = ArrayStore(tmp_path / "tiny", budget_gb=1e-7)
    assert with_cached_images(view, tiny).kept is None
    assert "Not cached" in caplog.text


def test_a_share_of_the_budget(photos, processor, tmp_path):
    store = ArrayStore(tmp_path / "cache", budget_gb=0.0002)
    with_cached_images(ImageView(photos, processor), store, share=0.1)
    assert 5_000 < sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 20_000


def test_without_a_store_and_for_other_processors_nothing_changes(photos, processor, store):
    view = ImageView(photos, processor)
    assert with_cached_images(view, None) is view

    class Inverted(TorchvisionImageProcessor):
        def _process(self, image, input_data_format):
            return -super()._process(image, input_data_format)

    settings = {name: getattr(processor, name) for name in processor._settings}
    inverted = ImageView(photos, Inverted(**settings))
    assert torch.equal(with_cached_images(inverted, store)[2]["pixel_values"], -view[2]["pixel_values"])
    uncut = ImageView(photos, processor.with_settings(do_center_crop=False))
    cached = with_cached_images(uncut, store)
    for row in range(12):
        assert torch.equal(cached[row]["pixel_values"], uncut[row]["pixel_values"])


@pytest.mark.parametrize("scaling", [{"do_rescale": False}, {"do_normalize": False}, {"rescale_factor": 1 / 127.5}])
def test_every_way_to_normalise_is_the_processors(photos, processor, store, scaling):
    processor = processor.with_settings(**scaling)
    cached = with_cached_images(ImageView(photos, processor), store)
    for row in range(12):
        expected = processor(images=PILImage.open(photos[row]["image"]["path"]), return_tensors="pt")
        assert torch.equal(cached[row]["pixel_values"], expected["pixel_values"][0])


def test_images_within_the_data_set(photos, processor, store, decoded, monkeypatch):
    embedded = photos.map(lambda row: {"image": {"bytes": Path(row["image"]["path"]).read_bytes(), "path": None}})
    assert image_digests(embedded) == image_digests(photos)
    view = ImageView(embedded, processor)
    assert_equal(ImageView(photos, processor), with_cached_images(view, store))
    assert len(decoded) == 12
    with_cached_images(ImageView(photos, processor), store)
    assert len(decoded) == 12, "the same content"


def test_digests_are_of_the_content_and_read_once(photos, tmp_path, monkeypatch):
    from torchthaw.data.caches import digests

    selected = photos.select([0, 5, 0])
    one, two, three = image_digests(selected)
    assert one == three != two
    monkeypatch.setattr(digests, "read_bytes", lambda value: pytest.fail("read again"))
    assert image_digests(selected) == [one, two, one]
    monkeypatch.undo()
    file = tmp_path / "photos" / photos[5]["path"]
    file.write_bytes(file.read_bytes() + b" ")
    assert image_digests(selected)[1] not in (one, two)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_the_same_file(photos, processor, store, method):
    view = with_cached_images(ImageView(photos, processor, STRONG), store)
    pickled = pickle.dumps(view.kept)
    assert len(pickled) < 3000
    assert (pickle.loads(pickled).pixels(3) == view.kept.pixels(3)).all()
    options = {"num_workers": 1, "multiprocessing_context": method}
    batches = list(DataLoader(view, batch_size=5, collate_fn=collate, **options))
    expected = list(DataLoader(view, batch_size=5, collate_fn=collate))
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch["pixel_values"], other["pixel_values"])
        assert torch.equal(batch["labels"], other["labels"])


def test_a_worker_decodes_again_where_the_cache_was_deleted(photos, processor, store):
    view = with_cached_images(ImageView(photos, processor), store)
    pickled = pickle.dumps(view)
    for file in store.folder.glob("*.safetensors"):
        file.unlink()
    assert_equal(view, pickle.loads(pickled))


def test_killed_while_filling_and_filled_by_the_next(photos, processor, store, tmp_path, decoded):
    code = """
        import sys, time
        from torchthaw.backbones.image_processing import TorchvisionImageProcessor
        from torchthaw.data.caches import images
        from torchthaw.data.caches.store import ArrayStore
        from torchthaw.data.loading import load_image_dataset
        from torchthaw.data.views import ImageView
        decode, count = images.decode_bytes, []
        def slow(*args):
            count.append(1)
            if len(count) == 5:
                print("half", flush=True)
                time.sleep(100)
            return decode(*args)
        images.decode_bytes = slow
        photos = load_image_dataset(sys.argv[1])["train"]
        processor = TorchvisionImageProcessor(
            size={"shortest_edge": 36}, crop_size={"height": 32, "width": 24}, resample=3)
        images.with_cached_images(ImageView(photos, processor), ArrayStore(sys.argv[2]))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "photos"), str(store.folder)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "half\n"
    assert len(list(store.folder.glob("*.part"))) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    view = ImageView(photos, processor)
    assert_equal(view, with_cached_images(view, store))
    assert len(decoded) == 12
    assert list(store.folder.glob("*.part")) == []


def test_progress_is_shown_only_where_it_is_asked_for(photos, processor, store, capfd):
    with_cached_images(ImageView(photos, processor), store)
    assert capfd.readouterr().err == ""
    with_cached_images(ImageView(photos, processor, AUGMENTATIONS["light"]), store, progress=True)
    assert "Decoding images" in capfd.readouterr().err


def test_reading_from_a_cache_gives_no_warnings_and_leaves_random_states_alone(photos, processor, store, recwarn):
    state = torch.get_rng_state()
    for augmentation in (None, STRONG):
        view = with_cached_images(ImageView(photos, processor, augmentation), store)
        view.__getitems__([0, 1])
        view[3]
    assert torch.equal(torch.get_rng_state(), state)
    assert [str(warning.message) for warning in recwarn] == []


def test_workers_for_what_takes_long_only(tmp_path, draw_photo, photos, processor, store, monkeypatch):
    assert suggest_workers(object(), "cpu") == 0
    view = ImageView(photos, processor)
    assert suggest_workers(view, "cpu") == suggest_workers(view, "cuda") == 0, "read before a worker has started"
    large = tmp_path / "large"
    for name in ("ant", "bee"):
        (large / name).mkdir(parents=True)
        draw_photo(1, (1600, 1200)).resize((3200, 2400)).save(large / name / "0.jpg")
    many = load_image_dataset(large)["train"].select([0, 1] * 500)
    view = ImageView(many, processor.with_settings(size=1200, crop_size=1000))
    if multiprocessing.get_start_method() == "fork":
        assert suggest_workers(view, "cpu") == (available_cores() if available_cores() > 1 else 0)
        assert suggest_workers(view, "cuda:1") == min(available_cores(), 16)
    cached = with_cached_images(ImageView(many, processor), store)
    assert suggest_workers(cached, "cpu") == 0
    monkeypatch.setattr(workers, "_seconds_per_sample", lambda view: 0.0012)
    assert suggest_workers(cached, "cpu") == 0, "an epoch takes long, but moving samples is no faster"
    assert (suggest_workers(cached, "cuda") > 0) == (multiprocessing.get_start_method() == "fork")
    monkeypatch.setattr(workers, "_seconds_per_sample", lambda view: 0.1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64), raising=False)
    assert suggest_workers(view, "cuda") == 16
