import io
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Image, Value
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from torchthaw.backbones.image_processing import TorchvisionImageProcessor, to_rgb
from torchthaw.data.augmentation import AUGMENTATIONS, Augmentation
from torchthaw.data.images import decode_image
from torchthaw.data.loading import load_image_dataset
from torchthaw.data.transforms import TrainTransform, view_transform
from torchthaw.data.views import ImageView, collate, hashed_seed
from torchthaw.errors import DataError

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
EVERYTHING = Augmentation(
    vertical_flip=0.5, policy="rand_augment", color_jitter=0.4, random_erasing=0.5, mixup=0.4, cutmix=0.4
)


@pytest.fixture
def processor():
    return TorchvisionImageProcessor(
        size={"shortest_edge": 36},
        crop_size={"height": 32, "width": 24},
        resample=PILImage.Resampling.BICUBIC,
        image_mean=MEAN,
        image_std=STD,
    )


@pytest.fixture
def photos(make_image_folder):
    return load_image_dataset(make_image_folder(per_class=4))["train"]


def pixels(view):
    return torch.stack([view[row]["pixel_values"] for row in range(len(view))])


def test_the_evaluation_view_is_the_processor_bit_for_bit(photos, processor):
    view = ImageView(photos, processor)
    assert len(view) == 12
    assert (view.num_classes, view.class_names) == (3, ["ant", "bee", "cat"])
    transform = view_transform(processor, None)
    for row, sample in enumerate(photos):
        picture = to_rgb(PILImage.open(sample["image"]["path"]))
        expected = processor(images=picture, return_tensors="pt")["pixel_values"][0]
        assert expected.shape == (3, 32, 24)
        assert torch.equal(view[row]["pixel_values"], expected)
        assert torch.equal(transform(transform.prepared(picture)), expected)
        assert view[row]["labels"].item() == sample["label"]
        assert view[row]["labels"].dtype == torch.int64


def test_training_without_randomness_is_a_plain_resize(photos, processor):
    # The ratio of the 48 x 40 images, which are too small to be reduced beforehand.
    whole = Augmentation(crop_scale=(1, 1), crop_ratio=(1.2, 1.2), horizontal_flip=0)
    processor = processor.with_settings(crop_size={"height": 36, "width": 28})
    picture = to_rgb(PILImage.open(photos[0]["image"]["path"]))
    resized = np.asarray(picture.resize((28, 36), PILImage.Resampling.BICUBIC))
    expected = (torch.from_numpy(resized.copy()).permute(2, 0, 1) / 255 - torch.tensor(MEAN)[:, None, None]) / (
        torch.tensor(STD)[:, None, None]
    )
    found = ImageView(photos, processor, whole)[0]["pixel_values"]
    assert type(found) is torch.Tensor
    # Pillow and torch round in different places, by one level of 255 at most.
    one_level = 1.01 / 255 / min(STD)
    torch.testing.assert_close(found, expected, rtol=0, atol=one_level)
    flipped = Augmentation(crop_scale=(1, 1), crop_ratio=(1.2, 1.2), horizontal_flip=1, vertical_flip=1)
    torch.testing.assert_close(
        ImageView(photos, processor, flipped)[0]["pixel_values"], expected.flip(1, 2), rtol=0, atol=one_level
    )


@pytest.mark.parametrize("resample", [PILImage.Resampling.BILINEAR, PILImage.Resampling.BICUBIC])
def test_a_training_view_is_torchvisions_on_tensors(photos, processor, resample):
    processor = processor.with_settings(resample=resample)
    view = ImageView(photos, processor, Augmentation(vertical_flip=0.5, random_erasing=0.5), seed=3, stage=2)
    view.set_epoch(4)
    interpolation = {2: v2.InterpolationMode.BILINEAR, 3: v2.InterpolationMode.BICUBIC}[int(resample)]
    steps = [
        v2.RandomResizedCrop((32, 24), scale=(0.35, 1), ratio=(3 / 4, 4 / 3), interpolation=interpolation),
        v2.RandomHorizontalFlip(0.5),
        v2.RandomVerticalFlip(0.5),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
        v2.RandomErasing(0.5),
    ]
    for row in range(len(view)):
        picture = np.array(PILImage.open(photos[row]["image"]["path"]).convert("RGB"))
        torch.manual_seed(hashed_seed("view", 3, 2, 4, row))
        expected = v2.Compose(steps)(torch.from_numpy(picture).permute(2, 0, 1))
        torch.testing.assert_close(view[row]["pixel_values"], expected, rtol=0, atol=1e-6)


def test_an_interpolation_that_tensors_do_not_know_is_pillows(photos, processor):
    whole = Augmentation(crop_scale=(1, 1), crop_ratio=(1.2, 1.2), horizontal_flip=0)
    processor = processor.with_settings(crop_size={"height": 36, "width": 28})
    for resample in (PILImage.Resampling.LANCZOS, PILImage.Resampling.BOX, PILImage.Resampling.NEAREST):
        plain = processor.with_settings(resample=resample, do_normalize=False)
        picture = to_rgb(PILImage.open(photos[0]["image"]["path"])).resize((28, 36), resample)
        expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
        assert torch.equal(ImageView(photos, plain, whole)[0]["pixel_values"], expected)


def needed_area(height, width, scale, ratio):
    """Area of a picture of which every crop of a share of it and a ratio has the height and width at least."""
    smallest = 1
    for one in np.linspace(*ratio, 1000):
        smallest = max(smallest, width**2 / one / scale, height**2 * one / scale)
    return smallest


@pytest.mark.parametrize("size", [(3000, 2000), (2000, 3000), (900, 600), (640, 480), (500, 375), (48, 40), (9000, 90)])
@pytest.mark.parametrize("fields", [{}, {"crop_scale": (0.08, 1)}, {"crop_scale": (0.9, 1), "crop_ratio": (1, 2)}])
def test_the_working_resolution_suffices_for_the_smallest_crop(size, fields):
    augmentation = Augmentation(**fields)
    transform = TrainTransform(TorchvisionImageProcessor(crop_size={"height": 224, "width": 160}), augmentation)
    width, height = transform.working_size(*size)
    needed = needed_area(224, 160, augmentation.crop_scale[0], augmentation.crop_ratio)
    assert width / height == pytest.approx(size[0] / size[1], rel=0.02)
    assert width * height >= min(needed * 0.999, size[0] * size[1])
    if size != (9000, 90):
        assert width * height <= max(needed / 0.8**2 * 1.01, 1), "no more is kept than is needed"
    else:
        assert (width, height) == size, "a narrow picture has no pixels to spare"
    assert transform.working_size(size[1], size[0]) == (height, width)


def test_large_photos_are_decoded_at_reduced_scale_and_look_the_same(tmp_path, draw_photo, processor):
    """Against the whole picture, decoded by Pillow: the same crop but for the noise of two ways of averaging."""
    for number, name in enumerate(("ant", "bee")):
        (tmp_path / name).mkdir()
        draw_photo(number, (900, 600)).save(tmp_path / name / "0.jpg", quality=95)
    photo = load_image_dataset(tmp_path)["train"]
    view = ImageView(photo, processor.with_settings(do_normalize=False), Augmentation(horizontal_flip=0), seed=1)
    picture = decode_image(photo[0]["image"], working_size=view.transform.working_size)
    assert picture.size == (113, 75), "an eighth"
    assert view.transform.prepared(picture).shape == (51, 77, 3)
    half = io.BytesIO()
    picture_of_half = PILImage.open(photo[0]["image"]["path"]).resize((450, 300))
    picture_of_half.save(half, "JPEG")
    assert decode_image(half.getvalue(), working_size=view.transform.working_size).size == (113, 75), "a quarter"
    whole = PILImage.open(photo[0]["image"]["path"])
    for epoch in range(5):
        view.set_epoch(epoch)
        torch.manual_seed(hashed_seed("view", 1, 0, epoch, 0))
        crop = v2.RandomResizedCrop((32, 24), scale=(0.35, 1)).make_params([torch.empty(3, 51, 77)])
        box = [crop["left"], crop["top"], crop["left"] + crop["width"], crop["top"] + crop["height"]]
        scaled = [edge * full / reduced for edge, full, reduced in zip(box, (900, 600) * 2, (77, 51) * 2, strict=True)]
        resized = whole.resize((24, 32), PILImage.Resampling.BICUBIC, box=scaled)
        expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
        difference = (view[0]["pixel_values"] - expected).abs()
        assert difference.mean() < 0.03
        assert difference.mean() < 0.2 * (expected - expected.mean()).abs().mean()


@pytest.mark.parametrize(
    ("fields", "step"),
    [
        ({"policy": "rand_augment"}, v2.RandAugment),
        ({"policy": "trivial_augment"}, v2.TrivialAugmentWide),
        ({"color_jitter": 0.3}, v2.ColorJitter),
        ({"random_erasing": 1.0}, v2.RandomErasing),
    ],
)
def test_every_field_changes_the_images(photos, processor, fields, step):
    augmented = ImageView(photos, processor, Augmentation(**fields))
    assert not torch.equal(pixels(augmented), pixels(ImageView(photos, processor, Augmentation())))
    transform = TrainTransform(processor, Augmentation(**fields))
    assert any(
        isinstance(one, step)
        for one in [*(transform.changes.transforms if transform.changes else ()), transform.erasing]
    )


@pytest.mark.parametrize("augmentation", [AUGMENTATIONS["light"], AUGMENTATIONS["medium"], EVERYTHING])
def test_a_view_is_a_function_of_seed_stage_epoch_and_sample_alone(photos, processor, augmentation):
    first = ImageView(photos, processor, augmentation, seed=3, stage=1)
    first.set_epoch(2)
    expected = pixels(first)

    again = ImageView(photos, processor, augmentation, seed=3, stage=1)
    for epoch in (0, 1, 2):
        again.set_epoch(epoch)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    order = [7, 3, 3, 11, 0]
    assert torch.equal(torch.stack([again[row]["pixel_values"] for row in order]), expected[order])
    assert torch.equal(again[-1]["pixel_values"], expected[-1])
    restored = pickle.loads(pickle.dumps(first))
    assert torch.equal(pixels(restored), expected)

    for other in ({"seed": 4, "stage": 1}, {"seed": 3, "stage": 0}):
        changed = ImageView(photos, processor, augmentation, **other)
        changed.set_epoch(2)
        assert not any(map(torch.equal, pixels(changed), expected))
    first.set_epoch(3)
    assert not any(map(torch.equal, pixels(first), expected))


def test_another_stage_has_its_own_views_augmentation_and_size(photos, processor):
    first = ImageView(photos, processor, EVERYTHING, seed=3)
    first.set_epoch(2)
    before = pixels(first)
    second = first.for_stage(1)
    expected = ImageView(photos, processor, EVERYTHING, seed=3, stage=1)
    for epoch in (0, 2):
        second.set_epoch(epoch)
        expected.set_epoch(epoch)
        assert torch.equal(pixels(second), pixels(expected))
    assert torch.equal(pixels(first), before), "its epoch is its own"
    assert not any(map(torch.equal, pixels(second), before))

    light = AUGMENTATIONS["light"]
    expected = ImageView(photos, processor.with_settings(crop_size=48), light, seed=3, stage=2)
    large = first.for_stage(2, augmentation=light, image_size=48)
    assert large[0]["pixel_values"].shape == (3, 48, 48)
    assert torch.equal(pixels(large), pixels(expected))
    assert torch.equal(pixels(large.for_stage(2, augmentation=light)), pixels(expected)), "the size is kept"
    assert (processor.size, processor.crop_size) == ({"shortest_edge": 36}, {"height": 32, "width": 24})
    assert first[0]["pixel_values"].shape == (3, 32, 24)
    assert torch.equal(pixels(first.for_stage(0)), pixels(ImageView(photos, processor, EVERYTHING, seed=3)))


def test_a_stage_without_augmentation_sees_the_evaluation_view(photos, processor):
    augmented = ImageView(photos, processor, EVERYTHING, seed=3)
    plain = augmented.for_stage(1, augmentation=None)
    assert torch.equal(pixels(plain), pixels(ImageView(photos, processor)))
    assert plain[0]["labels"].ndim == 0
    larger = augmented.for_stage(1, augmentation=None, image_size=64)
    picture = to_rgb(PILImage.open(photos[0]["image"]["path"]))
    expected = processor.with_settings(size={"shortest_edge": 72}, crop_size=64)(picture, return_tensors="pt")
    assert torch.equal(larger[0]["pixel_values"], expected["pixel_values"][0])


def test_the_same_picture_in_two_rows_looks_different(photos, processor):
    view = ImageView(photos.select([4, 4, 4]), processor, Augmentation())
    one, two, three = pixels(view)
    assert not torch.equal(one, two)
    assert not torch.equal(two, three)


@pytest.mark.parametrize(("method", "num_workers"), [("fork", 2), ("spawn", 1)])
def test_workers_make_no_difference_even_when_they_outlive_the_epoch(photos, processor, method, num_workers):
    if method not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    view = ImageView(photos, processor, EVERYTHING)
    options = {"num_workers": num_workers, "persistent_workers": True, "multiprocessing_context": method}
    loaders = [
        DataLoader(view, batch_size=5, collate_fn=collate),
        DataLoader(view, batch_size=3, collate_fn=collate, **options),
    ]
    seen = []
    for epoch in (0, 1):
        view.set_epoch(epoch)
        here, there = (
            {key: torch.cat([batch[key] for batch in batches]) for key in ("pixel_values", "labels")}
            for batches in map(list, loaders)
        )
        assert torch.equal(here["pixel_values"], there["pixel_values"])
        assert torch.equal(here["labels"], there["labels"])
        seen.append(here["pixel_values"])
    assert not torch.equal(*seen)


def test_reading_a_sample_leaves_all_random_states_alone(photos, processor):
    view = ImageView(photos, processor, EVERYTHING)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    view[0]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_reading_a_sample_leaves_the_state_of_the_gpu_alone(photos, processor):
    state = torch.cuda.get_rng_state()
    ImageView(photos, processor, EVERYTHING)[0]
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_mixup_blends_two_views_as_it_blends_their_labels(photos, processor):
    plain = pixels(ImageView(photos, processor, Augmentation()))
    view = ImageView(photos, processor, Augmentation(mixup=1.0))
    labels = torch.tensor(photos["label"][:])
    for row in range(len(view)):
        sample = view[row]
        assert sample["labels"].shape == (3,)
        assert sample["labels"].sum().item() == pytest.approx(1)
        # Least squares finds the partner and the share that were used.
        fits = []
        for partner in range(len(view)):
            change, target = plain[partner] - plain[row], sample["pixel_values"] - plain[row]
            weight = float((change * target).sum() / (change * change).sum().clamp_min(1e-9))
            fits.append((float((target - weight * change).abs().max()), partner, weight))
        error, partner, weight = min(fits)
        assert error < 1e-4
        expected = torch.zeros(3)
        expected[labels[row]] += 1 - weight
        expected[labels[partner]] += weight
        torch.testing.assert_close(sample["labels"], expected, rtol=0, atol=1e-4)


def test_cutmix_pastes_a_rectangle_and_counts_its_area(photos, processor):
    plain = pixels(ImageView(photos, processor, Augmentation()))
    view = ImageView(photos, processor, Augmentation(cutmix=1.0))
    labels = torch.tensor(photos["label"][:])
    pasted = 0
    for row in range(len(view)):
        sample = view[row]
        kept = (sample["pixel_values"] == plain[row]).all(0)
        if kept.all():
            continue
        sources = (sample["pixel_values"] == plain).all(1)  # (images, height, width)
        partner = next(other for other in range(len(view)) if (sources[other] | kept).all())
        rows, columns = torch.where(~kept)
        rectangle = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        share = float(rectangle / kept.numel())
        expected = torch.zeros(3)
        expected[labels[row]] += 1 - share
        expected[labels[partner]] += share
        torch.testing.assert_close(sample["labels"], expected, rtol=0, atol=1e-6)
        pasted += 1
    assert pasted >= 4


def test_batches_have_the_shapes_that_a_model_takes(photos, processor):
    plain = collate([ImageView(photos, processor)[row] for row in (0, 5, 11)])
    assert plain["pixel_values"].shape == (3, 3, 32, 24)
    assert plain["labels"].tolist() == [0, 1, 2]
    mixed = collate([ImageView(photos, processor, AUGMENTATIONS["strong"])[row] for row in (0, 5)])
    assert mixed["labels"].shape == (2, 3)
    loss = torch.nn.functional.cross_entropy(torch.zeros(2, 3), mixed["labels"])
    assert loss.item() == pytest.approx(np.log(3))


@pytest.mark.parametrize("augmentation", [None, AUGMENTATIONS["light"], EVERYTHING])
def test_a_batch_that_is_read_at_once_is_that_of_its_samples(photos, processor, augmentation):
    view = ImageView(photos, processor, augmentation)
    rows = [3, (3, 1), -1, 0, (5, 2), 3]
    batch = view.__getitems__(rows)
    expected = collate([view[row] for row in rows])
    for key, values in collate(batch).items():
        assert torch.equal(values, expected[key])
        assert values.dtype == expected[key].dtype
        assert torch.equal(torch.utils.data.default_collate(batch)[key], expected[key])
        assert torch.equal(collate(list(batch))[key], expected[key])


def test_images_of_several_sizes_come_one_by_one(make_image_folder, processor):
    root = make_image_folder(("ant", "bee"), per_class=2)
    PILImage.open(root / "ant" / "000.png").crop((0, 0, 40, 40)).save(root / "ant" / "000.png")
    whole = processor.with_settings(do_center_crop=False)
    view = ImageView(load_image_dataset(root)["train"], whole)
    assert [tuple(sample["pixel_values"].shape) for sample in view.__getitems__([0, 1])] == [(3, 36, 36), (3, 36, 43)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_that_breaks_after_the_check_is_named(make_image_folder, processor, num_workers):
    root = make_image_folder(("ant", "bee"), per_class=1)
    photos = load_image_dataset(root)["train"]
    (root / "bee" / "000.png").write_bytes(b"")
    loader = DataLoader(ImageView(photos, processor), batch_size=2, collate_fn=collate, num_workers=num_workers)
    with pytest.raises(DataError, match=r"image 'bee/000.png': it is empty"):
        list(loader)


def test_rows_that_do_not_exist(photos, processor):
    with pytest.raises(IndexError, match="row 12 of a data set with 12 images"):
        ImageView(photos, processor)[12]


def test_other_columns_are_refused_with_the_way_on(photos, processor):
    with pytest.raises(DataError, match=r"Pass the data set through load_image_dataset"):
        ImageView(photos.cast_column("label", Value("int64")), processor)


def test_a_plain_data_set_with_pictures_will_do(photos, processor):
    plain: Dataset = photos.remove_columns("path").cast_column("image", Image())
    assert torch.equal(pixels(ImageView(plain, processor)), pixels(ImageView(photos, processor)))


def test_a_selection_in_another_order(photos, processor):
    order = [7, 2, 2, 11]
    expected = pixels(ImageView(photos, processor))[order]
    assert torch.equal(pixels(ImageView(photos.select(order), processor)), expected)
    # Data sets of the Hub hold the bytes, and the name that the file once had.
    held = photos.map(lambda row: {"image": {"bytes": Path(row["image"]["path"]).read_bytes(), "path": "000.png"}})
    assert torch.equal(pixels(ImageView(held.select(order), processor)), expected)
