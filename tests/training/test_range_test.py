"""What is read off the curve of a range test, on curves of known shape."""

import numpy as np
import pytest

from torchthaw.stages.plan import Stage
from torchthaw.training.range_test import has_diverged, read_curve
from torchthaw.training.rate_lines import scaled_rate, stage_line


def curve(*, fall_at, steps=100, noise=0.03, seed=0, lowest=1e-6, highest=10.0, start=0.7, end=0.1, diverge=100.0):
    """A loss that falls around a rate, and explodes at `diverge` times that; cut where a test would end."""
    rates = np.geomspace(lowest, highest, steps)
    decades = np.log10(rates / fall_at)
    losses = start - (start - end) / (1 + np.exp(-4 * decades)) + np.exp(5 * (decades - np.log10(diverge)))
    losses += noise * np.random.default_rng(seed).standard_normal(steps)
    over = next((n for n in range(1, steps + 1) if has_diverged(losses[:n], steps)), steps)
    return rates[:over], losses[:over], steps


@pytest.mark.parametrize("fall_at", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("steps", [40, 100, 400])
def test_the_suggestion_is_where_the_loss_falls_fastest(fall_at, steps):
    found = [read_curve(*curve(fall_at=fall_at, steps=steps, seed=seed)).suggestion for seed in range(20)]
    assert None not in found
    # Half a decade around it, and in the middle of many within a fifth of one.
    assert all(fall_at / 3.2 < rate < fall_at * 3.2 for rate in found)
    assert abs(np.log10(np.median(found) / fall_at)) < 0.2


@pytest.mark.parametrize("steps", [20, 100])
def test_noise_alone_suggests_nothing(steps):
    rates = np.geomspace(1e-6, 10, steps)
    random = np.random.default_rng(0)
    draws = [random.normal(0.3, 0.1, size=(500, steps)), random.exponential(0.1, size=(500, steps))]
    readings = [read_curve(rates, losses, steps) for losses in np.concatenate(draws)]
    assert sum(reading.suggestion is not None for reading in readings) < 0.01 * len(readings)
    silent = next(reading for reading in readings if reading.suggestion is None)
    assert "nowhere falls by more than its own noise" in silent.sentence


def test_a_loss_that_only_rises_says_from_where_on():
    rates, losses, steps = curve(fall_at=1e-2, start=0.2, end=0.2, diverge=1.0)
    reading = read_curve(rates, losses, steps)
    assert reading.suggestion is None
    assert "rises from" in reading.sentence
    assert 1e-3 < float(reading.sentence.split("rises from ")[1].split()[0]) < 2e-2


def test_single_outliers_change_the_suggestion_little():
    rates, losses, steps = curve(fall_at=1e-3, noise=0.02)
    plain = read_curve(rates, losses, steps)
    spoiled = losses.copy()
    spoiled[[30, 70]] = 1e6
    found = read_curve(rates, spoiled, steps)
    assert found.suggestion is not None
    assert abs(np.log10(found.suggestion / plain.suggestion)) < 0.4


def test_a_narrow_valley_keeps_its_distance_from_the_minimum():
    rates = np.geomspace(1e-6, 10, 100)
    losses = np.where(rates < 1e-3, 0.7, 0.1)
    reading = read_curve(rates, losses, 100)
    assert reading.suggestion <= reading.minimum / 3 * 1.05


def test_a_range_that_begins_too_high_says_so():
    reading = read_curve(*curve(fall_at=1e-3, lowest=9e-4, highest=1.0, noise=0.01))
    assert reading.suggestion is None
    assert "begin lower" in reading.sentence


def test_a_loss_that_is_never_finite_suggests_nothing_and_says_why():
    reading = read_curve(np.array([1e-6]), np.array([np.inf]), 100, "a picture is broken")
    assert reading.suggestion is None
    assert "broke down within 1 steps" in reading.sentence
    assert "a picture is broken" in reading.sentence
    # After some steps of a healthy curve, the rest is read.
    rates, losses, steps = curve(fall_at=1e-3, diverge=1e9)
    losses[60:] = np.inf
    assert 3e-4 < read_curve(rates[:61], losses[:61], steps).suggestion < 3e-3


def test_rates_keep_their_form_and_their_ratios():
    assert scaled_rate(Stage("a", learning_rate=3e-4, layer_decay=0.3), 2.0) == 6e-4
    assert scaled_rate(Stage("a", learning_rate={"head": 3e-4, "backbone": 1e-4}), 2.0) == {
        "head": 6e-4, "backbone": 2e-4,
    }  # fmt: skip
    assert scaled_rate(Stage("a", learning_rate="1e-5..1e-3"), 0.5) == "5e-06..0.0005"


def test_a_line_of_a_recipe_has_what_the_stage_says_and_the_familys_decay():
    written = Stage("a: #1", unfreeze=["head", "layer4"], epochs=2, batch_norm="eval")
    full = Stage("a: #1", unfreeze=["head", "layer4"], epochs=2, learning_rate=3e-4, layer_decay=0.3)
    line = stage_line(written, full, 1e-3)
    assert line == (
        "- {name: 'a: #1', unfreeze: [head, layer4], epochs: 2, batch_norm: eval, learning_rate: 0.001, "
        "layer_decay: 0.3}"
    )
