"""Last steps of augmentation taken for whole batches give, bit for bit, what they give image by image."""

import pytest
import torch
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from torchthaw.backbones.image_processing import TorchvisionImageProcessor
from torchthaw.data.augmentation import AUGMENTATIONS, Augmentation
from torchthaw.data.finishing import finish, is_unfinished
from torchthaw.data.loading import load_image_dataset
from torchthaw.data.views import ImageView, collate

KINDS = {
    "light": AUGMENTATIONS["light"],
    "erasing": Augmentation(random_erasing=0.7),
    "mixup": Augmentation(mixup=0.4),
    "cutmix": Augmentation(cutmix=1.0),
    "everything": Augmentation(policy="trivial_augment", random_erasing=0.5, mixup=0.4, cutmix=0.4),
}


def view_of(make_image_folder, augmentation, **settings):
    processor = TorchvisionImageProcessor(
        size={"shortest_edge": 36},
        crop_size={"height": 32, "width": 24},
        resample=PILImage.Resampling.BILINEAR,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        **settings,
    )
    return ImageView(load_image_dataset(make_image_folder(per_class=8))["train"], processor, augmentation, seed=3)


def batches(view, **options):
    return list(DataLoader(view, batch_size=10, collate_fn=collate, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_finished_batches_are_the_usual_ones(make_image_folder, kind):
    view = view_of(make_image_folder, KINDS[kind])
    later = view.left_unfinished()
    view.set_epoch(2)
    expected, raw = batches(view), batches(later, num_workers=2)
    assert len(raw) == len(expected) == 3
    for usual, batch in zip(expected, raw, strict=True):
        assert batch["pixel_values"].dtype == torch.uint8
        assert is_unfinished(batch)
        finished = finish(batch, later.transform.normalisation)
        assert finished.keys() == usual.keys()
        assert torch.equal(finished["pixel_values"], usual["pixel_values"])
        assert torch.equal(finished["labels"], usual["labels"])
        assert not is_unfinished(finished)
    if kind == "erasing":
        blank = (expected[0]["pixel_values"] == 0).all(1).flatten(1).any(1)
        assert 0 < int(blank.sum()) < 10


def test_processors_that_do_not_normalise(make_image_folder):
    view = view_of(make_image_folder, KINDS["everything"], do_normalize=False, rescale_factor=1 / 127.5)
    (usual, *_), (batch, *_) = batches(view), batches(view.left_unfinished())
    assert torch.equal(finish(batch, view.transform.normalisation)["pixel_values"], usual["pixel_values"])


def test_a_view_without_augmentation_stays_as_it_is(make_image_folder):
    view = view_of(make_image_folder, None)
    assert view.left_unfinished() is view


def test_rows_and_repeats_are_those_of_the_view(make_image_folder):
    view = view_of(make_image_folder, KINDS["mixup"])
    (sample,) = view.left_unfinished().__getitems__([(5, 1)])
    found = finish({key: value[None] for key, value in sample.items()}, view.transform.normalisation)
    assert torch.equal(found["pixel_values"][0], view[5, 1]["pixel_values"])
    assert not torch.equal(found["pixel_values"][0], view[5]["pixel_values"])
