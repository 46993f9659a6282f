import json
import warnings

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from transformers import EvalPrediction

from torchthaw.errors import DataError
from torchthaw.evaluation.calibration import reliability_bins
from torchthaw.evaluation.intervals import score_intervals
from torchthaw.evaluation.metrics import classification_metrics, compute_metrics, prediction_metrics
from torchthaw.evaluation.ranking import one_vs_rest_auroc, top_k_accuracy

NAMES = ["ant", "bee", "cat", "dog"]


def draw(num_images, num_classes=4, seed=0, signal=1.5, dtype=np.float32):
    random = np.random.default_rng(seed)
    labels = random.integers(0, num_classes, num_images)
    logits = random.normal(size=(num_images, num_classes))
    logits[np.arange(num_images), labels] += signal
    return logits.astype(dtype), labels


def names_of(logits):
    return [f"class {index}" for index in range(logits.shape[1])]


def by_hand(logits, labels):
    """Every metric by counting, image by image and class by class."""
    predicted = [int(np.argmax(row)) for row in logits]
    labels = [int(label) for label in labels]
    pairs = list(zip(labels, predicted, strict=True))
    per_class = []
    for index in range(logits.shape[1]):
        hits = sum(label == index == guess for label, guess in pairs)
        support, taken = labels.count(index), predicted.count(index)
        precision = hits / taken if taken else 0.0
        recall = hits / support if support else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        per_class.append({"precision": precision, "recall": recall, "f1": f1, "support": support, "auroc": None})
    present = [scores for scores in per_class if scores["support"]]
    probabilities = softmax(logits.astype(np.float64), axis=1)
    ece = 0.0
    for bin_number in range(15):
        low, high = bin_number / 15, (bin_number + 1) / 15
        inside = [i for i, row in enumerate(probabilities) if low < row.max() <= high]
        if inside:
            accuracy = sum(labels[i] == predicted[i] for i in inside) / len(inside)
            confidence = sum(probabilities[i].max() for i in inside) / len(inside)
            ece += len(inside) / len(labels) * abs(accuracy - confidence)
    log_probabilities = log_softmax(logits.astype(np.float64), axis=1)
    top5 = [
        label in sorted(range(len(row)), key=lambda index: (-row[index], index))[:5]
        for row, label in zip(logits.tolist(), labels, strict=True)
    ]
    areas = {}
    for index in set(labels):
        own = [row[index] for row, label in zip(log_probabilities, labels, strict=True) if label == index]
        others = [row[index] for row, label in zip(log_probabilities, labels, strict=True) if label != index]
        wins = [(a > b) + (a == b) / 2 for a in own for b in others]
        areas[index] = sum(wins) / len(wins) if wins else None
    for index, area in areas.items():
        per_class[index]["auroc"] = area
    known = [area for area in areas.values() if area is not None]
    if logits.shape[1] == 2:
        known = [areas[1]] if len(areas) == 2 else []
    brier = [
        sum((p - (index == label)) ** 2 for index, p in enumerate(row))
        for row, label in zip(probabilities, labels, strict=True)
    ]
    return {
        "weighted_f1": sum(scores["f1"] * scores["support"] for scores in per_class) / len(labels),
        "top5_accuracy": sum(top5) / len(top5),
        "auroc": sum(known) / len(known) if known else None,
        "brier": sum(brier) / len(brier),
        "confusion_matrix": [
            [pairs.count((row, column)) for column in range(logits.shape[1])] for row in range(logits.shape[1])
        ],
        "accuracy": sum(label == guess for label, guess in pairs) / len(pairs),
        "macro_f1": sum(scores["f1"] for scores in present) / len(present),
        "balanced_accuracy": sum(scores["recall"] for scores in present) / len(present),
        "loss": -sum(log_probabilities[i, label] for i, label in enumerate(labels)) / len(labels),
        "ece": ece,
        "per_class": per_class,
    }


def one_hot(ids, num_classes, size=4.0):
    return size * np.eye(num_classes, dtype=np.float32)[np.asarray(ids)]


EDGE_CASES = {
    "random": draw(200),
    "float16": draw(50, seed=1, dtype=np.float16),
    "a class without images": (draw(60, seed=2)[0], draw(60, seed=2)[1] % 3),
    "a class without images or predictions": (one_hot([0, 1, 1, 2], 4), np.array([0, 1, 2, 2])),
    "one class only in labels": (draw(40, seed=3)[0], np.full(40, 2)),
    "one class in the model": (np.ones((5, 1), dtype=np.float32), np.zeros(5, dtype=int)),
    "one image": (np.array([[0.1, 0.4]]), np.array([0])),
    "perfect": (one_hot([0, 1, 2, 3, 3], 4), np.array([0, 1, 2, 3, 3])),
    "all wrong": (one_hot([1, 2, 3, 0, 0], 4), np.array([0, 1, 2, 3, 3])),
    "ties": (np.zeros((6, 3), dtype=np.float32), np.array([0, 1, 2, 0, 1, 2])),
    "more classes than half the images": (draw(30, 25, seed=4)[0], draw(30, 25, seed=4)[1]),
    "extreme": (np.array([[3e4, -3e4], [3e4, -3e4]]), np.array([0, 1])),
}


@pytest.mark.parametrize("case", EDGE_CASES)
def test_every_metric_equals_counting_by_hand(case):
    logits, labels = EDGE_CASES[case]
    names = names_of(logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = classification_metrics(logits, labels, names)
    expected = by_hand(logits, labels)
    for key in ("accuracy", "macro_f1", "weighted_f1", "balanced_accuracy", "auroc", "loss", "ece", "brier"):
        assert metrics[key] == pytest.approx(expected[key], abs=1e-12), key
    assert metrics["confusion_matrix"] == expected["confusion_matrix"]
    assert metrics.get("top5_accuracy") == (expected["top5_accuracy"] if logits.shape[1] > 5 else None)
    assert list(metrics["per_class"]) == names
    for name, scores in zip(names, expected["per_class"], strict=True):
        assert metrics["per_class"][name] == pytest.approx(scores, abs=1e-12)
    assert metrics["num_images"] == len(labels)
    assert json.loads(json.dumps(metrics)) == metrics


@pytest.mark.parametrize("case", ["random", "a class without images", "all wrong", "one class only in labels"])
def test_averages_equal_those_of_scikit_learn(case):
    logits, labels = EDGE_CASES[case]
    predicted, present = logits.argmax(1), np.unique(labels)
    metrics = classification_metrics(logits, labels, NAMES)
    macro_f1 = sklearn.metrics.f1_score(labels, predicted, labels=present, average="macro", zero_division=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        balanced_accuracy = sklearn.metrics.balanced_accuracy_score(labels, predicted)
    assert metrics["accuracy"] == sklearn.metrics.accuracy_score(labels, predicted)
    assert metrics["macro_f1"] == pytest.approx(macro_f1, abs=1e-12)
    assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy, abs=1e-12)
    probabilities = softmax(logits.astype(np.float64), axis=1)
    log_loss = sklearn.metrics.log_loss(labels, probabilities, labels=np.arange(4))
    assert metrics["loss"] == pytest.approx(log_loss, abs=1e-12)
    assert metrics["confusion_matrix"] == sklearn.metrics.confusion_matrix(labels, predicted, labels=range(4)).tolist()


def test_ranks_and_areas_equal_those_of_scikit_learn():
    logits, labels = draw(300, 12, seed=5)
    probabilities = softmax(logits.astype(np.float64), axis=1)
    metrics = classification_metrics(logits, labels, names_of(logits))
    assert metrics["top5_accuracy"] == pytest.approx(sklearn.metrics.top_k_accuracy_score(labels, logits, k=5))
    area = sklearn.metrics.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    assert metrics["auroc"] == pytest.approx(area, abs=1e-12)
    logits, labels = draw(300, 2, seed=6, signal=0.5)
    metrics = classification_metrics(logits, labels, ["no", "yes"])
    probabilities = softmax(logits.astype(np.float64), axis=1)
    assert metrics["auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(labels, probabilities[:, 1]), abs=1e-9)
    # scikit-learn counts the second class alone.
    score = 2 * sklearn.metrics.brier_score_loss(labels, probabilities[:, 1])
    assert metrics["brier"] == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize("case", EDGE_CASES)
def test_figures_of_classes_equal_those_of_scikit_learn(case):
    logits, labels = EDGE_CASES[case]
    ids, predicted = np.arange(logits.shape[1]), logits.argmax(1)
    metrics = classification_metrics(logits, labels, names_of(logits), intervals=False)
    report = sklearn.metrics.precision_recall_fscore_support(labels, predicted, labels=ids, zero_division=0)
    for index, figures in enumerate(metrics["per_class"].values()):
        expected = [float(column[index]) for column in report]
        assert [figures[key] for key in ("precision", "recall", "f1", "support")] == pytest.approx(expected)
        own = labels == index
        if own.all() or not own.any():
            assert figures["auroc"] is None
        else:
            scores = log_softmax(logits.astype(np.float64), axis=1)[:, index]
            # Of two classes the difference decides: where both round to 0 or 1, there are no ties in it.
            area = sklearn.metrics.roc_auc_score(own, scores)
            assert figures["auroc"] == pytest.approx(area, abs=1e-12 if len(ids) > 2 else 1e-3)
    weighted = sklearn.metrics.f1_score(labels, predicted, labels=ids, average="weighted", zero_division=0)
    assert metrics["weighted_f1"] == pytest.approx(weighted, abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 11])
def test_the_k_of_top_k_can_be_chosen(k):
    logits, labels = draw(200, 12, seed=8)
    logits = np.round(logits + np.random.default_rng(0).random(logits.shape) * 1e-3, 4)
    metrics = classification_metrics(logits, labels, names_of(logits), intervals=False, top_k=k)
    expected = sklearn.metrics.top_k_accuracy_score(labels, logits, k=k, labels=range(12))
    assert metrics[f"top{k}_accuracy"] == pytest.approx(expected)
    assert [key for key in metrics if key.startswith("top")] == [f"top{k}_accuracy"]


def test_the_k_of_all_classes_says_nothing():
    assert not [key for key in classification_metrics(*draw(20), NAMES, top_k=4) if key.startswith("top")]


def test_intervals_are_over_groups_where_these_are_known():
    logits, labels = draw(60)
    groups = [f"patient {number % 12}" for number in range(60)]
    metrics = classification_metrics(logits, labels, NAMES, groups=groups)
    expected = score_intervals(labels, logits.argmax(1), groups)
    found = metrics["accuracy_interval"], metrics["macro_f1_interval"], metrics["interval_method"]
    assert found == expected
    assert metrics["interval_method"] == "mid-P with a jackknife over 12 groups"
    assert classification_metrics(logits, labels, NAMES)["interval_method"] == "mid-P over 60 images"


def test_figures_without_scores_are_the_same():
    logits, labels = draw(60)
    metrics = classification_metrics(logits, labels, NAMES)
    without = prediction_metrics(logits.argmax(1), labels, NAMES)
    assert metrics.keys() - without.keys() == {"auroc", "loss", "ece", "brier"}
    for figures in metrics["per_class"].values():
        del figures["auroc"]
    assert without == {key: metrics[key] for key in without}


@settings(max_examples=30, deadline=None)
@given(num_images=st.integers(2, 60), num_classes=st.integers(2, 6), seed=st.integers(0, 10**6))
def test_ranks_depend_on_the_order_of_scores_alone(num_images, num_classes, seed):
    random = np.random.default_rng(seed)
    labels = random.integers(0, num_classes, num_images)
    # Few values, so that there are ties.
    scores = random.integers(0, 5, (num_images, num_classes)) / 4
    areas = one_vs_rest_auroc(scores, labels)
    if num_classes > 2:
        assert one_vs_rest_auroc(np.exp(3 * scores) - 7, labels) == areas
    turned = one_vs_rest_auroc(-scores, labels)
    assert [None if area is None else 1 - area for area in turned] == pytest.approx(areas)
    shares = [top_k_accuracy(scores, labels, k) for k in range(1, num_classes + 1)]
    assert shares == sorted(shares)
    assert shares[0] == (scores.argmax(1) == labels).mean()
    assert shares[-1] == 1
    assert [top_k_accuracy(np.exp(scores), labels, k) for k in range(1, num_classes + 1)] == shares


@settings(max_examples=30, deadline=None)
@given(num_images=st.integers(1, 60), num_classes=st.integers(2, 6), seed=st.integers(0, 10**6))
def test_being_sure_costs_nothing_where_right_and_most_where_wrong(num_images, num_classes, seed):
    logits, labels = draw(num_images, num_classes, seed)
    sure = classification_metrics(200 * np.eye(num_classes)[labels], labels, names_of(logits), intervals=False)
    assert [sure[key] for key in ("loss", "ece", "brier")] == pytest.approx([0, 0, 0], abs=1e-12)
    wrong = 200 * np.eye(num_classes)[(labels + 1) % num_classes]
    worst = classification_metrics(wrong, labels, names_of(logits), intervals=False)
    assert [worst[key] for key in ("loss", "ece", "brier")] == pytest.approx([200, 1, 2], abs=1e-9)


def test_the_matrix_of_many_classes_is_left_out():
    logits, labels = draw(50, 101, seed=7)
    assert "confusion_matrix" not in classification_metrics(logits, labels, names_of(logits))


def test_a_class_without_images_does_not_lower_macro_f1():
    logits, labels = one_hot([0, 1, 1], 4), np.array([0, 1, 1])
    assert classification_metrics(logits, labels, NAMES)["macro_f1"] == 1.0


def test_loss_stays_finite_where_float32_probabilities_underflow():
    metrics = classification_metrics(np.array([[500.0, 0.0]], dtype=np.float32), [1], ["ant", "bee"])
    assert metrics["loss"] == 500.0


@pytest.mark.parametrize("edge", [3, 6, 9, 12])
def test_confidence_on_a_bin_edge_belongs_to_the_lower_bin(edge):
    rest = (1 - edge / 15) / 12
    probabilities = np.array([[edge / 15, *[rest] * 12]])
    count, confidence, accuracy = reliability_bins(probabilities, np.array([0]))
    assert np.flatnonzero(count).tolist() == [edge - 1]
    assert (confidence[edge - 1], accuracy[edge - 1]) == (edge / 15, 1.0)


def test_intervals_can_be_left_out():
    assert not [key for key in classification_metrics(*draw(9), NAMES, intervals=False) if "interval" in key]


@settings(max_examples=30, deadline=None)
@given(num_images=st.integers(1, 60), num_classes=st.integers(1, 8), seed=st.integers(0, 10**6))
def test_order_of_images_and_of_classes_and_offsets_do_not_matter(num_images, num_classes, seed):
    logits, labels = draw(num_images, num_classes, seed, dtype=np.float64)
    random = np.random.default_rng(seed)
    images, classes = random.permutation(num_images), random.permutation(num_classes)
    offsets = random.normal(size=(num_images, 1))
    names = np.array(names_of(logits))
    metrics = classification_metrics(logits, labels, names, intervals=False)
    mixed = classification_metrics(
        (logits + offsets)[images][:, classes], np.argsort(classes)[labels][images], names[classes], intervals=False
    )
    per_class = {name: pytest.approx(value) for name, value in metrics.pop("per_class").items()}
    assert mixed.pop("per_class") == per_class
    matrix = np.array(metrics.pop("confusion_matrix"))
    assert np.array_equal(mixed.pop("confusion_matrix"), matrix[np.ix_(classes, classes)])
    assert mixed == pytest.approx(metrics, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(num_images=st.integers(1, 60), num_classes=st.integers(1, 8), seed=st.integers(0, 10**6))
def test_values_are_in_range_and_agree_with_each_other(num_images, num_classes, seed):
    logits, labels = draw(num_images, num_classes, seed)
    metrics = classification_metrics(logits, labels, names_of(logits))
    for key in ("accuracy", "macro_f1", "weighted_f1", "balanced_accuracy", "ece", "top5_accuracy", "auroc"):
        assert 0 <= (metrics.get(key) or 0) <= 1
    assert 0 <= metrics["brier"] <= 2
    assert np.trace(metrics["confusion_matrix"]) == round(metrics["accuracy"] * num_images)
    assert metrics["loss"] >= 0
    assert sum(scores["support"] for scores in metrics["per_class"].values()) == num_images
    hits = sum(scores["recall"] * scores["support"] for scores in metrics["per_class"].values())
    assert hits == pytest.approx(metrics["accuracy"] * num_images)
    low, high = metrics["accuracy_interval"]
    assert 0 <= low <= metrics["accuracy"] <= high <= 1
    low, high = metrics["macro_f1_interval"]
    assert 0 <= low <= high <= 1


@pytest.mark.parametrize(
    ("logits", "labels", "names", "message"),
    [
        (np.array([[0, np.nan], [1, 2], [np.inf, 0]]), [0, 1, 0], ["a", "b"], "logits of 2 of 3 images are not finite"),
        (np.zeros((2, 2)), [0, 2], ["a", "b"], "label 2 .* there are 2 classes, so labels go from 0 to 1"),
        (np.zeros((2, 2)), [0, -1], ["a", "b"], "label -1 .* names no class"),
        (np.zeros((2, 2)), [0], ["a", "b"], "1 labels for 2 images"),
        (np.zeros((2, 2)), [0.5, 1.0], ["a", "b"], "type float64, but one integer class id per image"),
        (np.zeros((2, 2)), [0, 1], ["a"], "1 class names for 2 columns"),
        (np.zeros((2, 2)), [0, 1], ["a", "a"], "'a' stands for more than one class"),
        (np.zeros((0, 2)), [], ["a", "b"], "no images to evaluate"),
        (np.zeros(3), [0, 1, 1], ["a", "b"], r"shape \(3,\) .* pass an array of shape \(images, classes\)"),
    ],
)
def test_what_does_not_fit_is_named(logits, labels, names, message):
    with pytest.raises(DataError, match=message):
        classification_metrics(logits, labels, names)


@pytest.mark.parametrize("top_k", [0, -3])
def test_a_k_below_one_is_refused(top_k):
    with pytest.raises(DataError, match=f"top_k={top_k} does not work"):
        classification_metrics(*draw(5), NAMES, top_k=top_k)


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="2 groups for 5 images"):
        classification_metrics(*draw(5), NAMES, groups=["a", "b"])


def test_compute_metrics_takes_what_trainer_hands_over():
    logits, labels = draw(70)
    metrics = classification_metrics(logits, labels, NAMES)
    expected = {key: metrics[key] for key in ("accuracy", "macro_f1", "balanced_accuracy")}
    soft = 0.6 * np.eye(4)[labels] + 0.4 * np.eye(4)[(labels + 1) % 4]
    hidden = np.zeros((70, 2, 3))
    assert compute_metrics(EvalPrediction(logits, labels)) == pytest.approx(expected)
    assert compute_metrics(EvalPrediction((logits, hidden), labels)) == pytest.approx(expected)
    assert compute_metrics(EvalPrediction(logits, soft)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.array([[np.nan, 1.0]]), np.array([0]), "logits of 1 of 1 images are not finite"),
        (np.zeros((2, 2)), np.array([0, -100]), "label -100"),
        (np.zeros(2), np.array([0, 1]), "one row per image"),
    ],
)
def test_compute_metrics_refuses_what_it_cannot_measure(logits, labels, message):
    with pytest.raises(DataError, match=message):
        compute_metrics(EvalPrediction(logits, labels))
