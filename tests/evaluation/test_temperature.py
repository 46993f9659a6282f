"""Temperature scaling: the fitted temperature is the best one, and where none can be told, nothing is changed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.model_selection import KFold

from torchthaw.errors import DataError
from torchthaw.evaluation.temperature import (
    HIGHEST,
    LOWEST,
    TemperatureScaling,
    cross_fitted,
    fit_temperature,
    scaled,
)


def drawn(seed: int, images: int = 200, classes: int = 4, sharpness: float = 3.0):
    """Logits whose labels are drawn from their softmax at a temperature of `sharpness`."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(images, classes)) * 4
    labels = np.array([random.choice(classes, p=row) for row in softmax(logits / sharpness, axis=1)])
    return logits.astype(np.float32), labels


def log_loss(logits, labels, temperature=1.0):
    return -log_softmax(logits.astype(np.float64) / temperature, axis=1)[np.arange(len(labels)), labels].mean()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(30, 300), st.integers(2, 12), st.floats(0.4, 4))
def test_the_temperature_is_that_of_the_least_log_loss(seed, images, classes, sharpness):
    logits, labels = drawn(seed, images, classes, sharpness)
    fit = fit_temperature(logits, labels)
    found = minimize(lambda x: log_loss(logits, labels, np.exp(x[0])), [0.0], method="L-BFGS-B", tol=1e-12)
    best = float(np.exp(found.x[0]))
    if fit.problem is None:
        assert fit.temperature == pytest.approx(best, rel=1e-3)
        assert log_loss(logits, labels, fit.temperature) <= found.fun + 1e-9
    else:
        assert not LOWEST < best < HIGHEST


def test_it_finds_what_labels_were_drawn_with():
    assert fit_temperature(*drawn(0, images=20_000, sharpness=2.5)).temperature == pytest.approx(2.5, rel=0.03)
    assert fit_temperature(*drawn(0, images=20_000, sharpness=1.0)).temperature == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize(
    ("logits", "labels", "bound"),
    [
        ([[9.0, 0.0], [0.0, 9.0]], [0, 1], "0.1 or below"),
        ([[0.5, 0.0]], [0], "0.1 or below"),
        ([[9.0, 0.0], [0.0, 9.0]], [1, 0], "10 or above"),
        ([[3.0, 3.0], [1.0, 1.0]], [0, 1], "0.1 or below"),
    ],
    ids=["all right", "one image", "all wrong", "nothing to tell by"],
)
def test_images_that_do_not_tell_change_nothing_and_it_is_said(logits, labels, bound):
    fit = fit_temperature(np.asarray(logits), np.asarray(labels))
    assert fit.temperature == 1
    assert bound in str(fit.problem)
    scaling = TemperatureScaling()
    given_ = np.asarray(logits, dtype=np.float32)
    assert scaling("validation", given_, np.asarray(labels)).tobytes() == given_.tobytes()
    told = scaling.to_dict()
    assert told["temperature"] == 1
    assert bound in told["problem"]
    assert told["loss"]["validation"]["before"] == told["loss"]["validation"]["after"]
    assert "cross_fitted" not in told["loss"]["validation"]


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(DataError, match="not finite"):
        fit_temperature([[np.nan, 1.0]], [0])
    with pytest.raises(DataError, match="names no class"):
        fit_temperature([[0.0, 1.0]], [2])


def test_scaling_is_torchs_division_and_keeps_every_prediction():
    logits, _ = drawn(1)
    for temperature in (0.37, 1.0, 1.7, 3.3333):
        expected = (torch.from_numpy(logits) / temperature).numpy()
        assert scaled(logits, temperature).tobytes() == expected.tobytes()
        assert (scaled(logits, temperature).argmax(1) == logits.argmax(1)).all()


def test_cross_fitting_scales_each_part_by_the_others():
    logits, labels = drawn(2, images=50)
    result = cross_fitted(logits, labels, seed=3)
    for rest, part in KFold(5, shuffle=True, random_state=3).split(labels):
        of_rest = fit_temperature(logits[rest], labels[rest]).temperature
        assert np.allclose(result[part], logits[part] / of_rest, rtol=1e-6)


def test_the_temperature_is_of_the_validation_images_alone():
    validation, test = drawn(3), drawn(4, sharpness=0.5)
    scaling = TemperatureScaling()
    scaling("validation", *validation)
    fitted = scaling.temperature
    after = scaling("test", *test)
    assert scaling.temperature == fitted == fit_temperature(*validation).temperature
    assert np.allclose(after, test[0] / fitted, rtol=1e-6)
    told = scaling.to_dict()
    for split, (logits, labels) in {"validation": validation, "test": test}.items():
        truth = np.eye(4)[labels]
        for when, temperature in (("before", 1), ("after", fitted)):
            scores = softmax(logits.astype(float) / temperature, axis=1)
            assert told["loss"][split][when] == pytest.approx(log_loss(logits, labels, temperature), rel=1e-5)
            assert told["brier"][split][when] == pytest.approx(((scores - truth) ** 2).sum(1).mean(), rel=1e-5)
    assert told["ece"]["validation"]["after"] < told["ece"]["validation"]["before"]
    assert told["num_images"] == 200
    with pytest.raises(AssertionError, match="before validation"):
        TemperatureScaling()("test", *test)
