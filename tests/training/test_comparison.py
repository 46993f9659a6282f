"""Paired tests against independent computations."""

import json
import math
from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import log_softmax
from scipy.stats import binom
from sklearn.metrics import accuracy_score, average_precision_score, balanced_accuracy_score, f1_score

from torchthaw.evaluation.evaluate_metric import ClassificationMetrics
from torchthaw.evaluation.metrics import classification_metrics
from torchthaw.training.comparison import Measured, compare, supports_test
from torchthaw.training.gate import decide

# scikit-learn warns of predictions of classes that do not occur, which are meant here.
pytestmark = pytest.mark.filterwarnings("ignore:y_pred contains classes")

TESTED = ("accuracy", "macro_f1", "balanced_accuracy", "loss")


def measured(metric, logits, labels):
    names = [f"class {number}" for number in range(logits.shape[1])]
    return Measured(classification_metrics(logits, labels, names, intervals=False)[metric], logits, labels)


def passes(metric, *, images=120, classes=4, skill=1.5, change=0.7, seed=0):
    """Two validation passes of a model with some skill, the later one a little different."""
    random = np.random.default_rng(seed)
    labels = random.integers(classes - 1, size=images)  # the last class has no images, but is predicted at times
    logits = random.normal(size=(images, classes))
    logits[np.arange(images), labels] += skill
    later = logits + change * random.normal(size=logits.shape)
    later[np.arange(images), labels] += 0.3
    return measured(metric, logits, labels), measured(metric, later, labels)


def of_right_and_wrong(wins, losses, *, both=10, neither=4):
    """Two passes of two classes with so many images that only the later or only the earlier pass gets right."""
    rights = [(False, True)] * wins + [(True, False)] * losses + [(True, True)] * both + [(False, False)] * neither
    labels = np.arange(len(rights)) % 2
    result = []
    for side in (0, 1):
        predicted = np.where([right[side] for right in rights], labels, 1 - labels)
        result.append(measured("accuracy", np.eye(2)[predicted], labels))
    return result


# The exact McNemar test


@pytest.mark.parametrize(
    ("wins", "losses", "p_value"),
    # By hand: twice the tail of a fair coin. 9 + 3: 2 (1 + 12 + 66 + 220) / 4096; 3 + 0: 2 / 8; 6 + 0: 2 / 64.
    [(9, 3, 598 / 4096), (3, 9, 598 / 4096), (3, 0, 0.25), (0, 6, 1 / 32), (5, 5, 1.0), (1, 0, 1.0), (0, 0, 1.0)],
)
def test_mcnemar_p_value_is_that_of_a_fair_coin(wins, losses, p_value):
    comparison = compare("accuracy", *of_right_and_wrong(wins, losses))
    assert comparison.p_value == pytest.approx(p_value, abs=1e-12)
    assert (comparison.wins, comparison.losses) == (wins, losses)
    assert comparison.difference == pytest.approx((wins - losses) / (wins + losses + 14))


def clopper_pearson(wins, trials):
    """The two shares at which the tail of the binomial distribution is 2.5 %, searched for."""
    low = 0.0 if wins == 0 else brentq(lambda share: binom.sf(wins - 1, trials, share) - 0.025, 0, 1, xtol=1e-14)
    high = 1.0 if wins == trials else brentq(lambda share: binom.cdf(wins, trials, share) - 0.025, 0, 1, xtol=1e-14)
    return low, high


@pytest.mark.parametrize(("wins", "losses"), [(9, 3), (3, 9), (4, 0), (0, 4), (1, 0), (40, 17)])
def test_mcnemar_interval_comes_from_the_share_of_wins(wins, losses):
    discordant, images = wins + losses, wins + losses + 14
    comparison = compare("accuracy", *of_right_and_wrong(wins, losses))
    expected = [discordant * (2 * limit - 1) / images for limit in clopper_pearson(wins, discordant)]
    assert comparison.interval == pytest.approx(expected, abs=1e-9)
    assert comparison.interval[0] <= comparison.difference <= comparison.interval[1]


def test_mcnemar_interval_and_p_value_say_the_same():
    for wins, losses in product(range(9), repeat=2):
        comparison = compare("accuracy", *of_right_and_wrong(wins, losses))
        low, high = comparison.interval
        assert (low > 0 or high < 0) == (comparison.p_value < 0.05), (wins, losses)


def test_models_that_agree_differ_by_nothing():
    comparison = compare("accuracy", *of_right_and_wrong(0, 0))
    assert (comparison.difference, comparison.interval, comparison.p_value) == (0, (0, 0), 1)


def test_the_method_is_in_words():
    assert compare("accuracy", *of_right_and_wrong(9, 3)).method == "exact McNemar test, 9 images better and 3 worse"
    assert compare("accuracy", *of_right_and_wrong(1, 0)).method == "exact McNemar test, 1 image better and 0 worse"
    assert compare("macro_f1", *passes("macro_f1", images=153)).method == "paired bootstrap over 153 images"


# The paired bootstrap


def slow_bootstrap(metric, before, after, resamples, seed):
    """Index resamples, each scored by scikit-learn (or a plain mean), the same images for both passes."""
    random = np.random.default_rng(seed)
    labels, differences = before.labels, []
    for _ in range(resamples):
        chosen = random.integers(len(labels), size=len(labels))
        scores = []
        for logits in (before.logits, after.logits):
            truth, predicted = labels[chosen], logits.argmax(axis=1)[chosen]
            if metric == "macro_f1":
                score = f1_score(truth, predicted, labels=np.unique(truth), average="macro", zero_division=0)
            elif metric == "balanced_accuracy":
                score = np.mean([(predicted[truth == label] == label).mean() for label in np.unique(truth)])
            else:
                score = -log_softmax(logits, axis=1)[np.arange(len(labels)), labels][chosen].mean()
            scores.append(score)
        differences.append(scores[1] - scores[0])
    return np.array(differences)


@pytest.mark.parametrize("metric", ["macro_f1", "balanced_accuracy", "loss"])
def test_bootstrap_agrees_with_resampling_images_one_by_one(metric):
    before, after = passes(metric, images=60)
    comparison = compare(metric, before, after, resamples=8000)
    slow = slow_bootstrap(metric, before, after, 1000, seed=99)
    spread = slow.std()
    # Both are random: quantiles of 1000 draws vary by about 0.08 spreads, shares by about 0.01.
    assert comparison.interval == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.25 * spread)
    assert comparison.p_value == pytest.approx(2 * min((slow <= 0).mean(), (slow >= 0).mean()), abs=0.06)
    assert comparison.interval[1] - comparison.interval[0] == pytest.approx(3.9 * spread, rel=0.1)


def replayed_weights(before, after, resamples, seed):
    """The weight of each kind of image (class, earlier and later prediction) in the resamples that `compare` draws."""
    triples = list(
        zip(before.labels.tolist(), before.logits.argmax(1).tolist(), after.logits.argmax(1).tolist(), strict=True)
    )
    kinds = sorted(set(triples))
    shares = np.array([triples.count(kind) for kind in kinds]) / len(triples)
    random = np.random.default_rng(seed)
    return np.array(kinds), [random.multinomial(len(triples), shares) for _ in range(resamples)]


@pytest.mark.parametrize("metric", ["macro_f1", "balanced_accuracy"])
def test_bootstrap_equals_scikit_learn_on_the_same_weights(metric):
    before, after = passes(metric, images=40, seed=3)
    kinds, draws = replayed_weights(before, after, resamples=300, seed=5)
    differences = []
    for weights in draws:
        truth = kinds[:, 0]
        occurring = np.unique(truth[weights > 0])
        scores = []
        for column in (1, 2):
            if metric == "macro_f1":
                options = {"labels": occurring, "average": "macro", "zero_division": 0, "sample_weight": weights}
                scores.append(f1_score(truth, kinds[:, column], **options))
            else:
                drawn = weights > 0
                predicted = kinds[drawn, column]
                scores.append(balanced_accuracy_score(truth[drawn], predicted, sample_weight=weights[drawn]))
        differences.append(scores[1] - scores[0])
    differences = np.array(differences)
    comparison = compare(metric, before, after, seed=5, resamples=300)
    assert comparison.interval == pytest.approx(np.quantile(differences, [0.025, 0.975]), abs=1e-12)
    one_sided = min((differences <= 1e-12).mean(), (differences >= -1e-12).mean())
    assert comparison.p_value == pytest.approx(2 * one_sided, abs=1e-12)


def test_a_clear_gain_has_the_least_p_value_that_so_many_resamples_can_show():
    before, after = passes("macro_f1", images=200, skill=0.2, change=0)
    after.logits[np.arange(200), after.labels] += 5
    after = measured("macro_f1", after.logits, after.labels)
    comparison = compare("macro_f1", before, after, resamples=400)
    assert comparison.p_value == 1 / 401
    assert comparison.interval[0] > 0.3


@pytest.mark.parametrize("metric", TESTED)
def test_the_same_pass_twice_is_no_difference(metric):
    before, _ = passes(metric)
    comparison = compare(metric, before, before)
    assert (comparison.difference, comparison.interval, comparison.p_value) == (0, (0, 0), 1)
    assert (comparison.wins, comparison.losses) == (0, 0)


@pytest.mark.parametrize("metric", TESTED)
def test_before_and_after_swap_sides(metric):
    before, after = passes(metric)
    there, back = compare(metric, before, after), compare(metric, after, before)
    assert there.difference == -back.difference != 0
    assert (there.wins, there.losses) == (back.losses, back.wins)
    assert there.interval == pytest.approx([-limit for limit in reversed(back.interval)], abs=0.01)
    assert there.p_value == pytest.approx(back.p_value, abs=0.05)


def test_exact_ties_are_ties_though_floating_point_differs():
    random = np.random.default_rng(24)
    classes = int(random.integers(3, 7))
    labels = np.repeat(np.arange(classes), random.integers(2, 6))
    guesses = [(random.random(len(labels)) < 0.7, random.integers(classes, size=len(labels))) for _ in range(2)]
    before, after = (
        measured("balanced_accuracy", np.eye(classes)[np.where(right, labels, guess)], labels)
        for right, guess in guesses
    )
    kinds, draws = replayed_weights(before, after, resamples=2000, seed=0)

    def recall(weights, column):
        of_class = [(kinds[:, 0] == label, kinds[:, column] == label) for label in range(classes)]
        recalls = [
            Fraction(int(weights[of & found].sum()), int(weights[of].sum()))
            for of, found in of_class
            if weights[of].sum()
        ]
        return sum(recalls) / len(recalls)

    exact = [recall(weights, 2) - recall(weights, 1) for weights in draws]
    assert sum(difference == 0 for difference in exact) > 100
    expected = 2 * min(sum(one <= 0 for one in exact), sum(one >= 0 for one in exact)) / 2000
    assert compare("balanced_accuracy", before, after).p_value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", TESTED)
def test_the_seed_alone_decides_the_bootstrap(metric):
    before, after = passes(metric)
    np.random.seed(0)
    torch.manual_seed(0)
    state = np.random.get_state()[1].copy()
    first = compare(metric, before, after, seed=1)
    assert (np.random.get_state()[1] == state).all()
    np.random.random(7)
    assert compare(metric, before, after, seed=1) == first
    other = compare(metric, before, after, seed=2)
    assert (other == first) is (metric == "accuracy")


@pytest.mark.parametrize("metric", TESTED)
def test_the_order_of_the_images_does_not_matter(metric):
    before, after = passes(metric)
    order = np.random.default_rng(7).permutation(len(before.labels))
    mixed = [replace(one, logits=one.logits[order], labels=one.labels[order]) for one in (before, after)]
    assert compare(metric, *mixed) == compare(metric, before, after)


@pytest.mark.parametrize("metric", TESTED)
def test_half_precision_and_small_integers_count_as_they_are(metric):
    small = [measured(metric, one.logits.astype(np.float16), one.labels.astype(np.int32)) for one in passes(metric)]
    large = [replace(one, logits=one.logits.astype(np.float64), labels=one.labels.astype(np.int64)) for one in small]
    assert compare(metric, *small) == compare(metric, *large)


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "balanced_accuracy"])
def test_metrics_are_those_of_the_evaluation(metric):
    # A value that is not the metric of the logits has no paired test, so that these two must agree.
    before, after = passes(metric, classes=5, images=40)
    computed = ClassificationMetrics().compute(predictions=after.logits.argmax(1), references=after.labels)
    assert computed["macro_f1"] != pytest.approx(f1_score(after.labels, after.logits.argmax(1), average="macro"), 1e-3)
    later = Measured(computed[metric], after.logits, after.labels)
    assert compare(metric, before, later).p_value is not None
    assert compare(metric, before, replace(later, value=computed[metric] + 0.001)).p_value is None


# Where there is no paired test


@pytest.mark.parametrize(
    ("spoil", "method"),
    [
        (lambda one: replace(one, logits=None), "logits and labels were not kept"),
        (lambda one: replace(one, labels=None), "logits and labels were not kept"),
        (lambda one: replace(one, logits=one.logits[:-1], labels=one.labels[:-1]), "same number of images and classes"),
        (lambda one: replace(one, logits=one.logits[:, :-1]), "same number of images and classes"),
        (lambda one: replace(one, labels=np.roll(one.labels, 1)), "same labels"),
        (lambda one: replace(one, logits=np.where(one.logits > 3, np.nan, one.logits)), "not finite"),
        (lambda one: replace(one, value=100 * one.value), "accuracy of the logits is 0.6500, not 65.0000"),
    ],
)
def test_passes_that_do_not_fit_have_no_test(spoil, method):
    before, after = passes("accuracy")
    comparison = compare("accuracy", before, spoil(after))
    assert (comparison.interval, comparison.p_value, comparison.wins, comparison.losses) == (None,) * 4
    assert comparison.method.startswith("no paired test: ")
    assert method in comparison.method
    assert comparison.difference == spoil(after).value - before.value


@pytest.mark.parametrize(
    "labels",
    [
        np.eye(4, dtype=int)[np.arange(120) % 4],
        np.linspace(0, 1, 120),
        np.full(120, -100),
        np.full(120, 4),
        np.arange(119) % 4,
    ],
    ids=["several per image", "numbers", "ignored", "no such class", "too few"],
)
def test_labels_that_are_not_one_class_per_image_have_no_test(labels):
    before, after = (replace(one, labels=labels) for one in passes("accuracy"))
    comparison = compare("accuracy", before, after)
    assert comparison.p_value is None
    assert comparison.method.startswith("no paired test: ")


def test_no_images_have_no_test():
    empty = Measured(math.nan, np.zeros((0, 3)), np.zeros(0, dtype=int))
    assert compare("accuracy", empty, empty).p_value is None


def test_another_metric_has_no_test_but_a_difference():
    comparison = compare("roc_auc", *(replace(one, value=one.value / 2) for one in passes("accuracy")))
    assert comparison.method == "no paired test for this metric"
    assert (comparison.interval, comparison.p_value) == (None, None)
    assert comparison.difference == comparison.after - comparison.before != 0


def test_a_loss_with_label_smoothing_is_not_taken_for_cross_entropy():
    before, after = passes("loss")
    assert compare("loss", before, replace(after, value=after.value * 1.003)).p_value is not None
    assert compare("loss", before, replace(after, value=after.value * 1.03)).p_value is None


def test_supports_test():
    assert [name for name in (*TESTED, "roc_auc", "eval_accuracy") if supports_test(name)] == list(TESTED)


@pytest.mark.parametrize("metric", TESTED)
def test_everything_can_be_written_as_json(metric):
    comparison = compare(metric, *passes(metric))
    decision = decide("best", comparison, greater_is_better=metric != "loss")
    data = json.loads(json.dumps(decision.to_dict(), allow_nan=False))
    assert data["accepted"] is decision.accepted
    assert data["reason"] == decision.reason
    assert data["comparison"]["interval"] == list(comparison.interval)
    assert data["comparison"]["p_value"] == comparison.p_value
    assert data["comparison"]["wins"] == comparison.wins


def test_values_that_json_cannot_hold_become_null():
    data = decide("best", compare("accuracy", Measured(0.5, None, None), Measured(np.float32("nan"), None, None)))
    data = json.loads(json.dumps(data.to_dict(), allow_nan=False))
    assert (data["comparison"]["after"], data["comparison"]["difference"]) == (None, None)
    assert data["comparison"]["before"] == 0.5
    assert decide("off", None).to_dict()["comparison"] is None


# Several labels per image


def label_sets(seed=0, images=90, gain=0.8):
    """Returns labels, and logits of an earlier and a later model."""
    random = np.random.default_rng(seed)
    labels = (random.random((images, 4)) < [0.5, 0.3, 0.2, 0.1]).astype(np.float32)
    before = random.normal(size=labels.shape).astype(np.float32) + labels
    after = before + gain * (labels - 0.5) + 0.3 * random.normal(size=labels.shape)
    return labels, before, after.astype(np.float32)


def set_score(metric, labels, logits):
    chosen = 1 / (1 + np.exp(-logits)) >= 0.5
    present = labels.any(axis=0)
    if metric == "map":
        return average_precision_score(labels[:, present], logits[:, present], average="macro")
    if metric == "accuracy":
        return accuracy_score(labels, chosen)
    if metric == "loss":
        return np.mean(np.logaddexp(0, logits.astype(float)) - logits * labels)
    average = metric.removesuffix("_f1")
    columns = np.flatnonzero(present) if average == "macro" else None
    return f1_score(labels, chosen, average=average, labels=columns, zero_division=0)


@pytest.mark.parametrize("metric", ["map", "macro_f1", "micro_f1", "accuracy", "loss"])
def test_label_sets_are_compared_on_the_same_images(metric):
    labels, *logits = label_sets()
    values = [float(set_score(metric, labels, part)) for part in logits]
    measured = [Measured(value, part, labels) for value, part in zip(values, logits, strict=True)]
    made = compare(metric, *measured, seed=1)
    assert made.difference == pytest.approx(values[1] - values[0])
    low, high = made.interval
    assert low < made.difference <= high, "all of the differing images got better"
    assert made.p_value < 0.05, "the later model is better by construction"
    assert decide("significant", made, greater_is_better=metric != "loss").accepted
    right = [((1 / (1 + np.exp(-part)) >= 0.5) == labels).all(axis=1) for part in logits]
    assert (made.wins, made.losses) == ((right[1] & ~right[0]).sum(), (right[0] & ~right[1]).sum())
    if metric in ("map", "macro_f1"):
        random, differences = np.random.default_rng(5), []
        for _ in range(300):
            rows = random.integers(len(labels), size=len(labels))
            differences.append(np.subtract(*(set_score(metric, labels[rows], part[rows]) for part in logits[::-1])))
        assert made.interval == pytest.approx(np.quantile(differences, [0.025, 0.975]), abs=0.03)
    order = np.random.default_rng(0).permutation(len(labels))
    turned = [Measured(value, part[order], labels[order]) for value, part in zip(values, logits, strict=True)]
    assert compare(metric, *turned, seed=1) == made, "the order of the images has no say"


def test_label_sets_without_a_change_are_a_tie_and_others_are_not_compared():
    labels, before, after = label_sets()
    value = float(set_score("map", labels, before))
    same = compare("map", Measured(value, before, labels), Measured(value, before, labels))
    assert (same.difference, same.interval, same.p_value) == (0, (0, 0), 1)
    assert not decide("best", same).accepted
    other = Measured(value, after, 1 - labels)
    assert "do not have the same images and labels" in compare("map", Measured(value, before, labels), other).method
    wrong = Measured(0.123, after, labels)
    assert "map of the logits is" in compare("map", Measured(value, before, labels), wrong).method
    broken = Measured(value, np.full_like(after, np.nan), labels)
    assert "not finite" in compare("map", Measured(value, before, labels), broken).method
    assert "for this metric" in compare("hamming_loss", Measured(value, before, labels), wrong).method
