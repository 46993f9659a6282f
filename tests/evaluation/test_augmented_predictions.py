"""Test-time augmentation gives the mean over views of a hand-written loop, and leaves plain scores as they are."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import expit, softmax
from torchvision.transforms import functional as F

from torchthaw import TorchvisionForImageClassification, TorchvisionImageProcessor, load_image_dataset
from torchthaw.data.views import ImageView
from torchthaw.errors import PlanError
from torchthaw.evaluation.augmented_predictions import (
    check_test_time_augmentation,
    mean_prediction,
    predict_augmented,
)
from torchthaw.evaluation.inference import predict_split

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def views_by_hand(file, method, *, resized=37, side=32):
    """The views of a file by torchvision's functions on pictures, the centre first."""
    picture = F.resize(Image.open(file).convert("RGB"), [resized])
    crops = [F.center_crop(picture, [side, side])]
    if method in ("five_crop", "ten_crop"):
        crops += F.five_crop(picture, [side, side])[:4]
    if method in ("flip", "ten_crop"):
        crops += [F.hflip(crop) for crop in crops]
    return torch.stack([F.normalize(F.to_tensor(crop), MEAN, STD) for crop in crops])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = TorchvisionForImageClassification.from_torchvision(
        "shufflenet_v2_x0_5", weights="builtin", id2label=["ant", "bee", "cat"]
    )
    # A new head gives every image nearly the same.
    model.backbone.fc.weight.data.mul_(20)
    return model.eval()


def new_view(folder, **settings):
    processor = TorchvisionImageProcessor.from_torchvision("shufflenet_v2_x0_5", None, image_size=32)
    images = load_image_dataset(folder)["train"]
    return ImageView(images, processor.with_settings(**settings) if settings else processor)


@pytest.mark.parametrize(("method", "number"), [("none", 1), ("flip", 2), ("five_crop", 5), ("ten_crop", 10)])
def test_views_are_those_of_a_hand_written_loop(model, make_image_folder, method, number):
    folder = make_image_folder()
    view = new_view(folder)
    logits, labels = predict_augmented(model, view, method, batch_size=5)
    files = [folder / name for name in view.dataset["path"]]
    with torch.inference_mode():
        expected = torch.stack([model(pixel_values=views_by_hand(file, method)).logits for file in files], dim=1)
    assert logits.shape == (number, 18, 3)
    assert np.allclose(logits, expected.numpy(), atol=1e-4)
    assert len(np.unique(logits.round(4), axis=0)) == number, "no two views look the same"
    plain, plain_labels = predict_split(model, view, batch_size=5)
    assert np.array_equal(logits[0], plain)
    assert np.array_equal(labels, plain_labels)
    mean = mean_prediction(logits, several_labels=False)
    assert np.allclose(softmax(mean, axis=1), softmax(expected.numpy(), axis=2).mean(0), atol=1e-5)
    sigmoids = expit(mean_prediction(logits, several_labels=True))
    assert np.allclose(sigmoids, expit(expected.numpy()).mean(0), atol=1e-5)
    if method == "none":
        assert np.array_equal(mean, plain)


def test_very_sure_scores_stay_finite_and_ordered():
    logits = np.array([[[300.0, -300.0, 0.0]], [[300.0, -300.0, 100.0]]], np.float32)
    one = mean_prediction(logits, several_labels=False)
    assert np.isfinite(one).all()
    assert one[0].argsort().tolist() == [1, 2, 0]
    several = mean_prediction(logits, several_labels=True)
    assert np.isfinite(several).all()
    assert several[0, 0] == pytest.approx(300, abs=1)
    # The mean of 0.5 and all but 1.
    assert expit(several[0, 2]) == pytest.approx(0.75)


def test_views_of_tensors_may_be_mirrored(model):
    generator = torch.Generator().manual_seed(0)
    samples = [
        {"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": torch.tensor(i % 3)} for i in range(4)
    ]
    logits, _ = predict_augmented(model, samples, "flip")
    pixels = torch.stack([sample["pixel_values"] for sample in samples])
    with torch.inference_mode():
        assert np.allclose(logits[1], model(pixel_values=F.hflip(pixels)).logits.numpy(), atol=1e-5)
    with pytest.raises(PlanError, match=r"tta is 'ten_crop', but the images come as tensors.*tta='flip'"):
        predict_augmented(model, samples, "ten_crop")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_center_crop": False}, "does not both resize and crop"),
        ({"do_resize": False}, "does not both resize and crop"),
        ({"size": {"height": 40, "width": 30}}, "resizes to .*, less than its crop"),
    ],
)
def test_crops_need_a_processor_that_leaves_something_to_crop(make_image_folder, settings, message):
    view = new_view(make_image_folder(), **settings)
    check_test_time_augmentation("flip", view)
    with pytest.raises(PlanError, match=message):
        check_test_time_augmentation("five_crop", view)


def test_an_unknown_method_is_named_with_the_closest():
    with pytest.raises(PlanError, match="unknown tta 'tencrop'. Did you mean 'ten_crop'"):
        check_test_time_augmentation("tencrop", None)
