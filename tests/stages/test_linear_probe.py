"""The best linear head, against scikit-learn and the gradient of what it is to minimise."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, log_loss
from torch.nn import functional as F

from torchthaw.errors import TrainingError
from torchthaw.stages.linear_probe import DEFAULT_PENALTY, fit_linear_probe
from torchthaw.stages.logistic_regression import PENALTIES

# The reference is solved as far as rounding allows, of which scikit-learn warns.
pytestmark = pytest.mark.filterwarnings(
    "ignore::sklearn.exceptions.ConvergenceWarning", "ignore:.*line search:RuntimeWarning"
)

SHAPES = {"more images": (90, 12), "more features": (40, 150)}
WEIGHTS = torch.tensor([0.5, 3.0, 1.0, 1.5])
SHIFT = torch.tensor([0.4, -2.0, -0.3, 1.0])


def images(number, dimension, *, classes=4, spread=1.5, seed=0):
    """Features, far from 0 and of different scales, of uneven classes that overlap."""
    random = np.random.default_rng(seed)
    labels = random.choice(classes, number, p=np.arange(1, classes + 1) / sum(range(1, classes + 1)))
    centers = random.normal(size=(classes, dimension))
    scales = random.uniform(0.05, 2, dimension)
    features = (centers[labels] + spread * random.normal(size=(number, dimension))) * scales + 5
    return torch.from_numpy(features), torch.from_numpy(labels)


def standardised(features):
    centered = features.double() - features.double().mean(dim=0)
    return (centered / centered.square().mean().sqrt()).numpy()


def fit_by_scikit_learn(points, labels, penalty, weights=None):
    sample_weights = np.ones(len(labels)) if weights is None else weights.double().numpy()[labels]
    model = LogisticRegression(C=1 / (penalty * sample_weights.sum()), tol=1e-12, max_iter=20000, solver="newton-cg")
    return model.fit(points, labels, sample_weight=sample_weights)


def objective_and_gradient(fit, features, labels, weights=None, shift=None):
    """What is to be minimised, as the docstring has it, at a fitted head."""
    scale = (features.double() - features.double().mean(dim=0)).square().mean().sqrt()
    weight = (fit.weight.double() * scale).requires_grad_()
    bias = (fit.bias.double() + fit.weight.double() @ features.double().mean(dim=0)).requires_grad_()
    logits = torch.from_numpy(standardised(features)) @ weight.T + bias
    loss = F.cross_entropy(
        logits if shift is None else logits + shift, labels, None if weights is None else weights.double()
    )
    total = loss + fit.penalty / 2 * weight.square().sum()
    return loss.item(), torch.autograd.grad(total, [weight, bias])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["unweighted", "weighted"])
def test_head_and_probabilities_are_those_of_scikit_learn(shape, weights):
    features, labels = images(*shape)
    fit = fit_linear_probe(features, labels, 4, class_weights=weights)
    assert fit.weight.dtype == fit.bias.dtype == torch.float32
    points = standardised(features)
    expected = fit_by_scikit_learn(points, labels.numpy(), DEFAULT_PENALTY, weights)
    scale = (features - features.mean(dim=0)).square().mean().sqrt()
    np.testing.assert_allclose(fit.weight.double() * scale, expected.coef_, rtol=1e-4, atol=1e-5)
    probabilities = (features @ fit.weight.double().T + fit.bias.double()).softmax(dim=1)
    np.testing.assert_allclose(probabilities, expected.predict_proba(points), rtol=1e-4, atol=1e-6)
    log_p = np.log(expected.predict_proba(points))[np.arange(len(labels)), labels]
    each = torch.ones(4) if weights is None else weights
    assert fit.loss == pytest.approx(-np.average(log_p, weights=each[labels]), rel=1e-5)


def test_two_classes_have_a_row_each_and_half_the_penalty_of_scikit_learns_single_one():
    features, labels = images(60, 7, classes=2)
    fit = fit_linear_probe(features, labels, 2)
    # Rows v / 2 and -v / 2 have half the sum of squares of v.
    expected = fit_by_scikit_learn(standardised(features), labels.numpy(), DEFAULT_PENALTY / 2)
    probabilities = (features @ fit.weight.double().T + fit.bias.double()).softmax(dim=1)
    np.testing.assert_allclose(probabilities, expected.predict_proba(standardised(features)), rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["unweighted", "weighted"])
def test_no_gradient_is_left_with_a_shift_that_is_not_part_of_the_head(shape, weights):
    features, labels = images(*shape)
    fit = fit_linear_probe(features, labels, 4, class_weights=weights, shift=SHIFT)
    loss, gradients = objective_and_gradient(fit, features, labels, weights, SHIFT)
    assert max(gradient.abs().max() for gradient in gradients) < 1e-6
    assert fit.loss == pytest.approx(loss, rel=1e-5)
    _, without = objective_and_gradient(fit, features, labels, weights)
    assert max(gradient.abs().max() for gradient in without) > 1e-3


def test_the_solution_is_exact_at_the_weakest_penalty_of_separable_classes():
    features, labels = images(60, 80, spread=0.7)
    folds = np.arange(60) % 3
    fit = fit_linear_probe(features, labels, 4, folds=folds)
    assert fit.penalty == PENALTIES[-1]
    _, gradients = objective_and_gradient(fit, features, labels)
    # At this penalty, weights that are off by 1 % leave a gradient of 1e-7 of theirs.
    assert max(gradient.abs().max() for gradient in gradients) < 1e-8


@pytest.mark.parametrize("shape", [(150, 12), (80, 150)], ids=SHAPES)
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["unweighted", "weighted"])
def test_the_penalty_is_chosen_by_what_scikit_learn_has_on_held_out_images(shape, weights):
    features, labels = images(*shape, spread=3)
    # The last tenth is in no fold.
    folds = np.where(np.arange(len(labels)) < 0.9 * len(labels), np.arange(len(labels)) % 4, -1)
    fit = fit_linear_probe(features, labels, 4, folds=folds, class_weights=weights)

    points, ids = standardised(features), labels.numpy()
    in_folds = folds >= 0
    each = (torch.ones(4) if weights is None else weights).numpy()[ids]
    losses, errors, guesses = {}, {}, {}
    for penalty in fit.penalties:
        probabilities = np.zeros((len(ids), 4))
        for fold in range(4):
            train, held_out = in_folds & (folds != fold), folds == fold
            model = fit_by_scikit_learn(points[train], ids[train], penalty, weights)
            probabilities[held_out] = model.predict_proba(points[held_out])
        losses[penalty] = log_loss(ids[in_folds], probabilities[in_folds], sample_weight=each[in_folds])
        guesses[penalty] = probabilities[in_folds].argmax(axis=1)
        by_image = -np.log(probabilities[np.arange(len(ids)), ids][in_folds])
        shares = each[in_folds] / each[in_folds].sum()
        errors[penalty] = np.sqrt((shares**2 * (by_image - losses[penalty]) ** 2).sum())
    assert fit.penalties == pytest.approx(losses, rel=1e-4)
    best = min(losses, key=losses.get)
    assert fit.penalty == max(tried for tried in losses if losses[tried] <= losses[best] + errors[best])
    assert fit.penalty > best, "one standard error makes a difference"
    found = guesses[fit.penalty]
    assert fit.macro_f1 == pytest.approx(f1_score(ids[in_folds], found, average="macro"))
    assert fit.accuracy == pytest.approx((found == ids[in_folds]).mean())
    assert fit.images_held_out == in_folds.sum()
    # Images in no fold are part of the last fit.
    _, gradients = objective_and_gradient(fit, features, labels, weights)
    assert max(gradient.abs().max() for gradient in gradients) < 1e-6
    # Penalties from strong to weak, up to two rises in a row.
    tried, values = list(fit.penalties), list(losses.values())
    assert tried == list(PENALTIES[: len(tried)])
    rises = [later > earlier for earlier, later in itertools.pairwise(values)]
    assert rises[-2:] == [True, True]
    assert [True, True] not in [rises[place : place + 2] for place in range(len(rises) - 2)]


def test_the_shift_counts_in_the_held_out_loss_but_not_in_the_figures():
    features, labels = images(120, 10, spread=3)
    folds = np.arange(120) % 2
    fit = fit_linear_probe(features, labels, 4, folds=folds, shift=SHIFT)
    # A fit of the same objective on a fold; its images are standardised alike if they have the mean and scale of all.
    expected, found = 0.0, np.zeros(120, dtype=int)
    points = torch.from_numpy(standardised(features))
    for fold in range(2):
        train, held_out = folds != fold, folds == fold
        weight, bias = torch.zeros(4, 10, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
        parameters = [weight.requires_grad_(), bias.requires_grad_()]
        optimizer = torch.optim.LBFGS(parameters, max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

        def closure(train=train, weight=weight, bias=bias, optimizer=optimizer):
            optimizer.zero_grad()
            loss = F.cross_entropy(points[train] @ weight.T + bias + SHIFT, labels[train])
            loss = loss + fit.penalty / 2 * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        logits = (points[held_out] @ weight.T + bias).detach()
        expected += F.cross_entropy(logits + SHIFT, labels[held_out], reduction="sum").item() / 120
        found[held_out] = logits.argmax(dim=1)
    assert fit.penalties[fit.penalty] == pytest.approx(expected, rel=1e-4)
    assert fit.accuracy == pytest.approx((found == labels.numpy()).mean())
    assert fit.macro_f1 == pytest.approx(f1_score(labels, found, average="macro"))


def test_same_bits_again_and_no_random_state_is_touched():
    features, labels = images(70, 90)
    folds = np.arange(70) % 5
    fits = []
    for seed in (0, 1):
        torch.manual_seed(seed), np.random.seed(seed)
        states = torch.get_rng_state(), np.random.get_state()[1].copy()
        before = features.clone()
        fits.append(fit_linear_probe(features, labels, 4, folds=torch.from_numpy(folds), class_weights=WEIGHTS))
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (np.random.get_state()[1] == states[1]).all()
        assert torch.equal(features, before), "the caller's features are left alone"
    assert torch.equal(fits[0].weight, fits[1].weight)
    assert torch.equal(fits[0].bias, fits[1].bias)
    assert fits[0].penalties == fits[1].penalties


@pytest.mark.parametrize("folds", [None, np.full(40, -1), np.where(np.arange(40) < 20, 0, -1)])
def test_without_two_folds_the_penalty_is_the_default_and_nothing_is_known_of_held_out_images(folds):
    fit = fit_linear_probe(*images(40, 5), 4, folds=folds)
    assert fit.penalty == DEFAULT_PENALTY
    assert (fit.penalties, fit.macro_f1, fit.accuracy, fit.images_held_out) == ({}, None, None, 0)


@pytest.mark.parametrize("kind", ["no images", "no weight"])
def test_a_class_outside_the_fit_changes_no_other_and_is_nowhere_the_most_likely(kind):
    features, labels = images(60, 5)
    plain = fit_linear_probe(features, labels, 4)
    weights = None
    if kind == "no weight":
        # Images of a class that weighs nothing only move the mean.
        far = torch.cat([features, features[:2] - 1000])
        fit = fit_linear_probe(far, torch.cat([labels, torch.tensor([4, 4])]), 5, class_weights=torch.eye(5)[4] == 0)
    else:
        fit = fit_linear_probe(features, labels, 5, class_weights=weights, shift=torch.tensor([0, 0, 0, 0, -torch.inf]))
        torch.testing.assert_close(fit.weight[:4], plain.weight)
        torch.testing.assert_close(fit.bias[:4], plain.bias)
    assert not fit.weight[4].any()
    everywhere = torch.cat([features, 100 * torch.randn(500, 5, generator=torch.Generator().manual_seed(0)).double()])
    probabilities = (everywhere @ fit.weight.double().T + fit.bias.double()).softmax(dim=1)
    assert (probabilities.argmax(dim=1) != 4).all()
    assert (probabilities[:, 4] <= 1 / 60).all()


def test_held_out_images_of_a_class_that_is_not_trained_on_are_mistakes_and_not_in_the_loss():
    features, labels = images(60, 5, classes=3)
    folds = np.arange(60) % 2
    plain = fit_linear_probe(features, labels, 4, folds=folds)
    # One image of a fourth class: only the other fold's fit, which judges itself, has seen it.
    lone = fit_linear_probe(
        torch.cat([features, features[:1]]), torch.cat([labels, torch.tensor([3])]), 4, folds=np.append(folds, 0)
    )
    assert lone.images_held_out == 61
    assert np.isfinite(list(lone.penalties.values())).all()
    assert max(lone.penalties.values()) < 1.2 * max(plain.penalties.values())
    assert lone.accuracy <= 60 / 61
    assert lone.macro_f1 <= 0.75


def test_one_image_of_each_class():
    features = torch.eye(4)[:, :3] * 2
    fit = fit_linear_probe(features, torch.arange(4), 4, folds=[0, 0, 1, 1])
    assert (features @ fit.weight.T + fit.bias).argmax(dim=1).tolist() == [0, 1, 2, 3]
    # No fold trains on a class that it judges.
    assert (fit.penalty, fit.penalties, fit.accuracy, fit.images_held_out) == (DEFAULT_PENALTY, {}, None, 0)


@pytest.mark.parametrize("value", [0.0, 0.1, -12345.678])
def test_features_that_are_all_the_same_leave_the_shares_of_the_classes(value):
    labels = torch.tensor([0] * 30 + [1] * 15 + [2] * 5)
    fit = fit_linear_probe(torch.full((50, 6), value, dtype=torch.float64), labels, 3, folds=np.arange(50) % 5)
    assert not fit.weight.any()
    torch.testing.assert_close(fit.bias.softmax(dim=0), torch.tensor([0.6, 0.3, 0.1]))
    assert fit.penalty == PENALTIES[0], "of equal ones the strongest"
    assert fit.accuracy == 0.6
    assert fit.macro_f1 == pytest.approx(0.75 / 3)


def test_one_class_only():
    fit = fit_linear_probe(images(10, 4)[0], torch.ones(10, dtype=torch.int64), 3, folds=np.arange(10) % 2)
    assert not fit.weight.any()
    assert fit.bias.argmax() == 1
    assert fit.loss == 0
    assert fit.accuracy == fit.macro_f1 == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_features_are_computed_with_in_float64(dtype):
    features, labels = images(50, 20)
    narrow = fit_linear_probe(features.to(dtype), labels, 4, folds=np.arange(50) % 2)
    wide = fit_linear_probe(features.to(dtype).double(), labels, 4, folds=np.arange(50) % 2)
    assert torch.equal(narrow.weight, wide.weight)
    assert narrow.penalties == wide.penalties


def test_the_penalty_does_not_depend_on_the_unit_of_the_features():
    features, labels = images(80, 20, spread=3)
    one = fit_linear_probe(features, labels, 4, folds=np.arange(80) % 4)
    other = fit_linear_probe(1000 * features - 7, labels, 4, folds=np.arange(80) % 4)
    assert other.penalty == one.penalty
    torch.testing.assert_close(1000 * other.weight, one.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_features_that_are_not_finite_are_refused(value):
    features, labels = images(30, 5)
    features[3, 2] = features[8, 1] = features[8, 4] = value
    with pytest.raises(TrainingError, match=r"2 of 30 images are not finite.*float32 or bfloat16"):
        fit_linear_probe(features, labels, 4)


def test_images_without_any_weight_are_refused():
    features, labels = images(30, 5)
    with pytest.raises(TrainingError, match=r"30 images whose class weights sum to 0"):
        fit_linear_probe(features, labels, 4, class_weights=torch.zeros(4))
    with pytest.raises(TrainingError, match=r"0 images"):
        fit_linear_probe(features[:0], labels[:0], 4)
