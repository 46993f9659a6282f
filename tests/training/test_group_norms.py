"""Gradient norms of layer groups: root mean squares over steps, and clipping that they leave as torch does it."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from torchthaw.training.gradients import clip_gradients
from torchthaw.training.group_norms import GroupNorms


def parameters_with_gradients(seed, count=7):
    torch.manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(number + 1, 3)) for number in range(count)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


@pytest.mark.parametrize("dtypes", [[torch.float32] * 7, [torch.float32] * 5 + [torch.float64] * 2])
@pytest.mark.parametrize("max_norm", [0.3, 1e6, math.inf])
def test_clipping_is_torchs_bit_for_bit(dtypes, max_norm):
    ours, theirs = [
        [nn.Parameter(p.detach().to(dtype)) for p, dtype in zip(parameters_with_gradients(1), dtypes, strict=True)]
        for _ in range(2)
    ]
    for mine, other, given in zip(ours, theirs, parameters_with_gradients(1), strict=True):
        mine.grad, other.grad = given.grad.to(mine.dtype).clone(), given.grad.to(other.dtype).clone()
    expected = nn.utils.clip_grad_norm_(theirs, max_norm)
    norm, norms = clip_gradients(ours, max_norm)
    if len(set(dtypes)) == 1:
        assert torch.equal(norm, expected)
    torch.testing.assert_close(norm.double(), expected.double())
    assert norms.shape == (7,)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=0 if len(set(dtypes)) == 1 else 1e-7, rtol=1e-6)


def groups_of(parameters):
    return [
        {"layer_group": "stem", "params": parameters[:2]},
        {"layer_group": "head", "params": parameters[2:5]},
        {"layer_group": "head", "params": parameters[5:]},
    ]


def steps_of(parameters, norms, number=3):
    """Adds some steps; returns the mean square of each group's norm, by numpy."""
    expected = np.zeros(2)
    for step in range(number):
        for parameter, other in zip(parameters, parameters_with_gradients(step), strict=True):
            parameter.grad = other.grad
        norms.add(parameters, clip_gradients(parameters, math.inf)[1])
        squares = np.array([float(parameter.grad.square().sum()) for parameter in parameters])
        expected += squares[:2].sum(), squares[2:].sum()
    return np.sqrt(expected / number)


def test_root_mean_squares_over_steps():
    parameters = parameters_with_gradients(0)
    norms = GroupNorms(groups_of(parameters))
    assert norms.take() == {}
    expected = steps_of(parameters, norms)
    assert norms.take() == pytest.approx({"stem": expected[0], "head": expected[1]}, rel=1e-5)
    assert norms.take() == {}, "it begins anew"


def test_going_on_from_a_checkpoint_is_exact():
    parameters = parameters_with_gradients(0)
    whole, first = GroupNorms(groups_of(parameters)), GroupNorms(groups_of(parameters))
    steps_of(parameters, whole, 2), steps_of(parameters, first, 2)
    second = GroupNorms(groups_of(parameters))
    second.load(first.state())
    steps_of(parameters, whole, 1), steps_of(parameters, second, 1)
    assert second.take() == whole.take()
    second.load({})
    assert second.take() == {}


def test_an_overflow_that_a_scaler_skips_counts_nothing():
    parameters = parameters_with_gradients(0)
    norms = GroupNorms(groups_of(parameters))
    parameters[0].grad[0, 0] = math.inf
    norms.add(parameters, clip_gradients(parameters, math.inf)[1])
    assert norms.take()["stem"] == pytest.approx(float(parameters[1].grad.norm()))
