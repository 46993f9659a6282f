"""Which stages are kept."""

import math
from dataclasses import replace

import pytest

from torchthaw.errors import PlanError
from torchthaw.training.comparison import Comparison
from torchthaw.training.gate import GATES, decide


def comparison_of(before, after, *, p_value=0.5, metric="accuracy"):
    interval = None if p_value is None else (after - before - 0.01, after - before + 0.01)
    method = "no paired test for this metric" if p_value is None else "exact McNemar test, 9 images better and 3 worse"
    return Comparison(metric, before, after, after - before, interval, p_value, method, None, None)


NAN = math.nan


@pytest.mark.parametrize(
    ("before", "after", "p_value", "options", "best", "significant"),
    [
        (0.90, 0.91, 0.01, {}, True, True),
        (0.90, 0.91, 0.05, {}, True, False),
        (0.90, 0.91, 0.05, {"alpha": 0.1}, True, True),
        (0.90, 0.91, None, {}, True, False),
        (0.90, 0.90, 1.0, {}, False, False),
        (0.90, 0.90, 0.01, {}, False, False),
        (0.91, 0.90, 0.01, {}, False, False),
        (0.90, 0.91, 0.01, {"min_gain": 0.02}, False, False),
        (0.93, 0.95, 0.01, {"min_gain": 0.02}, True, True),  # 0.95 - 0.93 < 0.02 in floating point
        (0.90, 0.93, 0.20, {"min_gain": 0.02}, True, False),
        (0.40, 0.30, 0.01, {"greater_is_better": False}, True, True),
        (0.40, 0.30, 0.01, {"greater_is_better": False, "min_gain": 0.2}, False, False),
        (0.30, 0.40, 0.01, {"greater_is_better": False}, False, False),
        (0.40, 0.40, 0.01, {"greater_is_better": False}, False, False),
        (0.90, NAN, None, {}, False, False),
        (0.90, math.inf, None, {}, False, False),
        (0.90, -math.inf, None, {"greater_is_better": False}, False, False),
        (NAN, 0.10, None, {}, True, True),
        (NAN, 0.10, None, {"min_gain": 0.5}, True, True),
        (math.inf, 0.10, None, {"greater_is_better": False}, True, True),
        (NAN, NAN, None, {}, False, False),
    ],
)
def test_decision_table(before, after, p_value, options, best, significant):
    comparison = comparison_of(before, after, p_value=p_value)
    decisions = {gate: decide(gate, comparison, **options) for gate in GATES}
    assert {gate: one.accepted for gate, one in decisions.items()} == {
        "best": best,
        "significant": significant,
        "off": True,
    }
    for one in decisions.values():
        assert one.comparison is comparison
        assert ("not kept" in one.reason) is not one.accepted


def test_without_a_validation_before_a_stage_is_kept():
    for gate in GATES:
        decision = decide(gate, None, min_gain=0.1)
        assert decision.accepted
        assert "no validation before" in decision.reason
        assert decision.comparison is None


def test_there_is_no_going_back_to_an_untrained_head():
    for gate in GATES:
        for after in (0.25, 0.75, 0.8):
            decision = decide(gate, comparison_of(0.75, after, p_value=0.5), min_gain=0.1, from_new_head=True)
            assert decision.accepted
            assert "not kept" not in decision.reason
            assert ("the head was untrained before it" in decision.reason) is (gate != "off")
    assert not decide("best", comparison_of(0.75, NAN), from_new_head=True).accepted
    better = decide("best", comparison_of(0.75, 0.8), from_new_head=True)
    assert better == decide("best", comparison_of(0.75, 0.8))


@pytest.mark.parametrize(
    ("accepted", "after", "p_value", "options"),
    [
        (True, 0.91, 0.01, {}),
        (True, 0.90, 1.0, {}),
        (True, 0.89, 0.32, {}),
        (False, 0.89, 0.31, {}),
        (False, 0.89, None, {}),
        (False, NAN, None, {}),
        (False, NAN, 0.5, {}),
        (False, 0.89, 0.5, {"min_gain": 0.01}),
        (False, 0.89, 0.5, {"gate": "significant"}),
        (True, 0.91, 0.32, {"greater_is_better": False}),
        (False, 0.91, 0.31, {"greater_is_better": False}),
    ],
)
def test_a_tolerant_gate_keeps_what_is_no_worse_by_more_than_one_standard_error(accepted, after, p_value, options):
    gate = options.pop("gate", "best")
    decision = decide(gate, comparison_of(0.9, after, p_value=p_value), tolerant=True, **options)
    assert decision.accepted is accepted
    assert ("not kept" in decision.reason) is not accepted
    if accepted and after != 0.91:
        assert "no worse by more than one standard error, kept" in decision.reason


def test_the_reason_has_the_figures():
    reason = decide("best", replace(comparison_of(0.9281, 0.9477, p_value=0.25), interval=(-0.0065, 0.0392))).reason
    assert reason == (
        "validation accuracy 0.9281 -> 0.9477 (+0.0196, 95 % interval -0.0065 to 0.0392, p = 0.25): better, kept"
    )
    untested = decide("significant", comparison_of(0.5, 0.75, p_value=None, metric="roc_auc")).reason
    assert untested.startswith("validation roc_auc 0.5000 -> 0.7500 (+0.2500, no paired test for this metric): better")
    assert "cannot be tested" in untested
    small = decide("best", comparison_of(3e-5, 2e-5, p_value=1e-9, metric="loss"), greater_is_better=False).reason
    assert "loss 3.0e-05 -> 2.0e-05 (-1.0e-05, " in small
    assert "p < 0.001): better, kept" in small
    least = decide("best", comparison_of(0.9, 0.91), min_gain=0.02).reason
    assert least.endswith("better, but by less than the least gain of 0.02, not kept")


def test_an_unknown_gate_is_named():
    with pytest.raises(PlanError, match="unknown gate 'signifcant'.*Did you mean 'significant'"):
        decide("signifcant", None)
    with pytest.raises(PlanError, match="best, significant, off"):
        decide("none", comparison_of(0.1, 0.2))


def test_a_rounding_error_is_no_gain():
    for difference in (2e-16, -2e-16):
        comparison = replace(comparison_of(0.9, 0.9, p_value=0.01), difference=difference)
        assert not decide("best", comparison).accepted
        assert "no better" in decide("best", comparison).reason
        assert not decide("best", comparison, greater_is_better=False).accepted
