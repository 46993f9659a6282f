"""Metrics of several labels per image, against scikit-learn."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn import metrics as sk

from torchthaw.errors import DataError
from torchthaw.evaluation.multilabel import choose_thresholds, compute_metrics, multilabel_metrics
from torchthaw.evaluation.multilabel_figures import FIGURES, decide, resampled, value_of

NAMES = ["ant", "bee", "cat", "dog", "elk"]


def drawn(seed, images=80, *, ties=False, signal=1.0):
    """Returns logits and labels: of the classes, one is rare, one is of all images, one of none."""
    random = np.random.default_rng(seed)
    labels = random.random((images, 5)) < [0.4, 0.2, 0.05, 1.0, 0.0]
    labels[0, 2] = True
    logits = random.normal(size=labels.shape) + signal * (labels - 0.5)
    return (np.round(logits, 1 if ties else 9)).astype(np.float32), labels


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_figures_are_scikit_learns(seed, ties):
    logits, labels = drawn(seed, ties=ties)
    limits = [0.5, 0.3, 0.7, 0.2, 0.6]
    found = multilabel_metrics(logits, labels, NAMES, thresholds=limits, seed=seed)
    json.dumps(found, allow_nan=False)
    scores = expit(logits)
    given = scores >= np.array(limits)
    occur = [0, 1, 2, 3]
    uneven = [0, 1, 2]
    expected = {
        "map": np.mean([sk.average_precision_score(labels[:, k], logits[:, k]) for k in occur]),
        "auroc": sk.roc_auc_score(labels[:, uneven], logits[:, uneven], average="macro"),
        "macro_f1": sk.f1_score(labels, given, labels=occur, average="macro"),
        "micro_f1": sk.f1_score(labels, given, average="micro"),
        "accuracy": sk.accuracy_score(labels, given),
        "balanced_accuracy": np.mean([sk.balanced_accuracy_score(labels[:, k], given[:, k]) for k in uneven]),
        "hamming_loss": sk.hamming_loss(labels, given),
        "loss": np.mean([sk.log_loss(labels[:, k], scores[:, k].astype(float), labels=[0, 1]) for k in range(5)]),
        "brier": ((expit(logits.astype(float)) - labels) ** 2).mean(),
    }
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-6), key
    assert found["num_images"] == 80
    for index, name in enumerate(NAMES):
        row, truth = found["per_class"][name], labels[:, index]
        parts = sk.precision_recall_fscore_support(truth, given[:, index], average="binary", zero_division=0)
        assert (row["precision"], row["recall"], row["f1"]) == pytest.approx(parts[:3])
        assert (row["support"], row["threshold"]) == (truth.sum(), limits[index])
    for name, area in (("ant", True), ("dog", False), ("elk", False)):
        assert (found["per_class"][name]["auroc"] is not None) == area
    assert found["per_class"]["elk"]["average_precision"] is None
    for key in ("map", "macro_f1", "accuracy"):
        low, high = found[f"{key}_interval"]
        assert 0 <= low <= high <= 1


def test_the_ends_of_the_scale():
    _, labels = drawn(0)
    perfect = multilabel_metrics(np.where(labels, 9.0, -9.0), labels, NAMES)
    assert [perfect[key] for key in ("map", "auroc", "macro_f1", "micro_f1", "accuracy")] == [1.0] * 5
    assert perfect["hamming_loss"] == 0
    assert perfect["ece"] < 1e-3
    wrong = multilabel_metrics(np.where(labels, -9.0, 9.0), labels, NAMES)
    assert (wrong["auroc"], wrong["macro_f1"], wrong["accuracy"], wrong["hamming_loss"]) == (0, 0, 0, 1)
    assert wrong["ece"] > 0.99
    tied = multilabel_metrics(np.zeros(labels.shape), labels, NAMES)
    assert tied["map"] == pytest.approx(labels.mean(0)[:4].mean()), "precision of ties is the share of the class"


def test_calibration_error_is_that_of_bins():
    logits, labels = drawn(5)
    probabilities, truth = expit(logits.astype(float)).ravel(), labels.ravel()
    error = 0.0
    for number in range(15):
        inside = (probabilities > number / 15) & (probabilities <= (number + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(probabilities[inside].mean() - truth[inside].mean())
    assert multilabel_metrics(logits, labels, NAMES)["ece"] == pytest.approx(error)


@pytest.mark.parametrize("ties", [False, True])
def test_weighted_figures_are_those_of_repeated_images(ties):
    logits, labels = drawn(3, ties=ties)
    counts = np.random.default_rng(0).multinomial(80, np.full(80, 1 / 80), size=5)
    for name, figure in FIGURES.items():
        by_weight = figure(logits, labels, counts.astype(float))
        by_hand = [value_of(figure, logits.repeat(row, axis=0), labels.repeat(row, axis=0)) for row in counts]
        np.testing.assert_allclose(by_weight, by_hand, rtol=1e-9, err_msg=name)


def test_resamples_come_in_parts_without_a_difference(monkeypatch):
    def values():
        return resampled(lambda weights: weights @ np.arange(6.0), 6, 2, seed=1, resamples=50)

    whole = values()
    monkeypatch.setattr("torchthaw.evaluation.multilabel_figures._CHUNK", 40)
    np.testing.assert_array_equal(values(), whole)


def test_intervals_over_groups_draw_whole_groups():
    logits, labels = (part.repeat(8, axis=0) for part in drawn(2, 40))
    groups = [f"g{row // 8}" for row in range(320)]
    by_image, by_group = (multilabel_metrics(logits, labels, NAMES, groups=which) for which in (None, groups))
    once = multilabel_metrics(logits[::8], labels[::8], NAMES)
    # Copies of an image say nothing new.
    assert by_group["map_interval"] == pytest.approx(once["map_interval"], abs=1e-9)
    for key in ("map_interval", "accuracy_interval"):
        assert np.diff(by_group[key]) > 1.5 * np.diff(by_image[key])
    assert by_group["interval_method"].endswith("bootstrap over groups")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 25), st.booleans())
def test_no_other_threshold_has_a_better_f1(seed, images, ties):
    logits, labels = drawn(seed, images, ties=ties)
    thresholds = choose_thresholds(logits, labels)
    chosen = decide(logits, thresholds)
    for k in range(5):
        if not labels[:, k].any():
            assert thresholds[k] == 0.5
            continue
        tried = np.unique(np.concatenate([expit(logits[:, k]), [0.0, 0.5, 1.0]])).astype(float)
        best = max(sk.f1_score(labels[:, k], expit(logits[:, k]) >= limit, zero_division=0) for limit in tried)
        assert sk.f1_score(labels[:, k], chosen[:, k], zero_division=0) == pytest.approx(best)
    assert all(0 <= limit <= 1 for limit in thresholds)


def test_thresholds_of_equal_f1_are_near_a_half():
    logits = np.log(np.array([[0.9], [0.8], [0.1], [0.05]]) / (1 - np.array([[0.9], [0.8], [0.1], [0.05]])))
    assert choose_thresholds(logits, np.array([[1], [1], [0], [0]])) == [pytest.approx(0.45)]


def test_the_trainer_gets_its_figures():
    logits, labels = drawn(7)
    found = compute_metrics(SimpleNamespace(predictions=(logits, None), label_ids=labels.astype(np.float32)))
    whole = multilabel_metrics(logits, labels, NAMES)
    assert found == pytest.approx({key: whole[key] for key in found})
    assert set(found) == {"map", "macro_f1", "micro_f1", "accuracy", "balanced_accuracy"}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(4, int), "one 0 or 1 for each image and class is needed: pass an array of shape \\(4, 2\\)"),
        (np.full((4, 2), 0.5), "Labels hold .*0.5.*measure without mixup"),
        (np.zeros((4, 2)), "None of the 4 images is of any class"),
    ],
)
def test_what_are_no_labels_is_refused(labels, message):
    with pytest.raises(DataError, match=message):
        multilabel_metrics(np.zeros((4, 2)), labels, ["a", "b"])
