"""Counts, weights and draws of classes, against scikit-learn and torch."""

from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from sklearn.utils.class_weight import compute_class_weight
from torch.utils.data import WeightedRandomSampler

from torchthaw import TorchvisionImageProcessor, load_image_dataset
from torchthaw.data.augmentation import make_augmentation
from torchthaw.data.class_balance import class_counts, class_probabilities, count_weights, imbalance_ratio, label_bits
from torchthaw.data.class_sampler import ClassSampler
from torchthaw.data.views import ImageView

LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [400, 100, 25, 4]))


def test_counts_and_ratio():
    assert class_counts([0, 2, 2], 4).tolist() == [1, 0, 2, 0]
    assert imbalance_ratio(np.array([40, 8, 20])) == 5
    assert imbalance_ratio(np.array([40, 0])) == 40, "no images count as one"


def test_what_labels_say():
    counts = class_counts(LABELS, 5)
    assert label_bits(counts) == pytest.approx(len(LABELS) * entropy(counts / len(LABELS), base=2))
    assert label_bits(np.array([100, 100])) == pytest.approx(200)
    assert label_bits(np.array([7, 0])) == label_bits(np.array([0, 0])) == 0


def test_balanced_weights_are_those_of_scikit_learn():
    expected = compute_class_weight("balanced", classes=np.arange(4), y=LABELS)
    np.testing.assert_allclose(count_weights(class_counts(LABELS, 4), "balanced"), expected, rtol=1e-12)


def test_sqrt_weights_are_the_square_root_with_a_mean_over_images_of_one():
    balanced = compute_class_weight("balanced", classes=np.arange(4), y=LABELS)
    weights = count_weights(class_counts(LABELS, 4), "sqrt")
    np.testing.assert_allclose(weights / weights[0], np.sqrt(balanced / balanced[0]), rtol=1e-12)
    assert weights[LABELS].mean() == pytest.approx(1)


@pytest.mark.parametrize("kind", ["balanced", "sqrt"])
def test_a_class_without_images_has_no_weight_and_changes_no_other(kind):
    weights = count_weights(np.array([30, 0, 10]), kind)
    assert weights[1] == 0
    np.testing.assert_allclose(weights[[0, 2]], count_weights(np.array([30, 10]), kind))


@pytest.mark.parametrize(("kind", "power"), [("balanced", 0), ("sqrt", 0.5)])
def test_probabilities_are_powers_of_the_counts(kind, power):
    shares = class_probabilities(np.array([400, 100, 0, 4]), kind)
    expected = np.array([400**power, 100**power, 0, 4**power])
    np.testing.assert_allclose(shares, expected / expected.sum())


@pytest.mark.parametrize(("kind", "power"), [("balanced", 0), ("sqrt", 0.5)])
def test_classes_and_images_come_as_often_as_with_torchs_weighted_sampler(kind, power):
    counts = np.bincount(LABELS)
    weights = (counts ** (power - 1.0))[LABELS]
    torch.manual_seed(0)
    reference = np.array(list(WeightedRandomSampler(weights.tolist(), 40 * len(LABELS))))
    sampler, drawn = ClassSampler(LABELS, kind, seed=0), []
    for epoch in range(40):
        sampler.set_epoch(epoch)
        drawn.extend(sampler)
    assert len(drawn) == len(reference)
    ours, theirs = (np.bincount(LABELS[rows], minlength=4) / len(reference) for rows in (np.array(drawn), reference))
    expected = counts**power / (counts**power).sum()
    np.testing.assert_allclose(ours, expected, atol=0.015)
    np.testing.assert_allclose(theirs, expected, atol=0.015)
    # Within a class every image is as likely as another: the four of the smallest one.
    images = np.bincount(drawn, minlength=len(LABELS))[LABELS == 3]
    assert images.min() > 0.8 * images.mean()
    assert images.max() < 1.2 * images.mean()


def test_draws_are_a_pure_function_of_seed_stage_and_epoch():
    def draws(seed=0, stage=0, epoch=0, disturb=False):
        sampler = ClassSampler(LABELS, "sqrt", seed=seed, stage=stage)
        if disturb:
            np.random.seed(epoch), torch.manual_seed(epoch)
            list(sampler)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert draws() == draws(disturb=True)
    assert draws(epoch=3) == draws(epoch=3, disturb=True)
    assert len(draws()) == len(LABELS)
    different = [draws(), draws(seed=1), draws(stage=1), draws(epoch=1)]
    assert len({tuple(rows) for rows in different}) == 4


def test_repeats_count_earlier_draws_of_the_same_image():
    plain = list(ClassSampler(LABELS, "balanced", seed=0))
    pairs = list(ClassSampler(LABELS, "balanced", seed=0, with_repeats=True))
    assert [row for row, _ in pairs] == plain
    assert len(set(pairs)) == len(pairs), "no draw of an image is like another"
    most = Counter(plain).most_common(1)[0]
    assert [repeat for row, repeat in pairs if row == most[0]] == list(range(most[1]))


@pytest.mark.parametrize("augmentation", ["light", {"mixup": 1.0}])
def test_repeats_of_an_image_look_different_and_again_the_same(make_image_folder, augmentation):
    processor = TorchvisionImageProcessor.from_torchvision("shufflenet_v2_x0_5", weights=None, image_size=32)
    images = load_image_dataset(make_image_folder(per_class=3))["train"]

    def pixels(index):
        return ImageView(images, processor, make_augmentation(augmentation))[index]["pixel_values"]

    assert torch.equal(pixels((4, 0)), pixels(4))
    assert torch.equal(pixels((4, 2)), pixels((4, 2)))
    for one, another in ((0, 1), (1, 2), (0, 2)):
        assert not torch.equal(pixels((4, one)), pixels((4, another)))
    with pytest.raises(IndexError):
        pixels((9, 0))
