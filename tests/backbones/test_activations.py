"""Activations: a ReLU6 in place with the same gradients and no copy, and those that a convolution has done already."""

import pytest
import torch
from torch import nn

from torchthaw import TorchvisionConfig, TorchvisionForImageClassification
from torchthaw.backbones.activations import FastActivation, spare
from torchthaw.backbones.folding import put_on_fast_form

RELU6 = nn.ReLU6(inplace=True)
VALUES = [-1.0, -0.0, 0.0, 1e-30, 3.0, 5.9999995, 6.0, 6.5, float("inf"), float("-inf"), float("nan")]


def results(activation, values):
    """Returns the output, the gradient of the input, and the addresses of what the activation kept for it."""
    leaf = values.clone().requires_grad_()
    before = leaf * 1
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = activation(before)
    weights = torch.arange(1, out.numel() + 1, dtype=out.dtype).view_as(out)
    (gradient,) = torch.autograd.grad(out, leaf, weights)
    return out.detach(), gradient, kept


def bits(values):
    return values.contiguous().view(torch.int16 if values.element_size() == 2 else torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_relu6(dtype):
    random = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 4
    values = torch.cat([torch.tensor(VALUES), random]).to(dtype)
    expected, gradient, _ = results(RELU6, values)
    found, own, _ = results(FastActivation(RELU6), values)
    assert torch.equal(bits(found), bits(expected))
    assert torch.equal(own.nan_to_num(-7), gradient.nan_to_num(-7))
    assert 0 < int((own == 0).sum()) < len(own)


def test_only_the_output_is_kept():
    values = torch.randn(64)
    copied, _, usual = results(RELU6, values)
    out, _, kept = results(FastActivation(RELU6), values)
    assert kept == [out.data_ptr()]
    assert usual != [copied.data_ptr()], "where PyTorch keeps no copy either, none of this is needed"


def test_it_works_in_place_as_relu6_does():
    values = (torch.randn(8).requires_grad_() * 9).clone()
    FastActivation(RELU6)(values)
    assert values.max() <= 6
    assert values.min() >= 0


def test_without_gradients_and_not_in_place_it_is_the_module_itself():
    values = torch.tensor([-1.0, 7.0])
    assert torch.equal(FastActivation(nn.ReLU6())(values.requires_grad_()), torch.tensor([0.0, 6.0]))
    assert values.tolist() == [-1, 7], "not in place"
    with torch.no_grad():
        assert FastActivation(RELU6)(values).tolist() == [0, 6]
    assert values.tolist() == [0, 6]


def test_what_is_done_already_is_handed_on_once():
    first, other = FastActivation(nn.Hardswish()), FastActivation(nn.Hardswish())
    values = spare(first.module, torch.tensor([-1.0, 1.0]))
    assert torch.equal(other(values), nn.Hardswish()(values)), "it was done for another module"
    assert first(values) is values
    assert torch.equal(first(values), nn.Hardswish()(values)), "on its own result it works like any other"


def test_the_fast_form_brings_it_and_takes_it_away():
    model = TorchvisionForImageClassification(TorchvisionConfig(architecture="mobilenet_v2"))
    places = [module for module in model.modules() if type(module) is nn.ReLU6]
    form = put_on_fast_form(model)
    assert len(places) == 35
    assert all(isinstance(vars(module)["forward"], FastActivation) for module in places)
    form.remove()
    assert not any("forward" in vars(module) for module in model.modules())
