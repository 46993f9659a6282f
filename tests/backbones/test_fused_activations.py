"""Activations that the convolution before them applies: where, with which values and gradients, and never over NaN."""

import copy
import math

import pytest
import torch
from torch import nn

from torchthaw import Stage, TorchvisionConfig, TorchvisionForImageClassification
from torchthaw.backbones import folding
from torchthaw.backbones.activations import FUSED
from torchthaw.backbones.borders import find_border
from torchthaw.backbones.conv_norm_pairs import find_pairs
from torchthaw.backbones.convolutions import _fused_kernel, convolve, takes_activation
from torchthaw.backbones.folding import put_on_fast_form
from torchthaw.stages.freezing import freeze_for_stage

pytestmark = pytest.mark.skipif(_fused_kernel() is None, reason="activations are fused on x86 processors alone")

RELUS = [nn.ReLU, nn.ReLU6]
DTYPES = [torch.float32, torch.bfloat16]
# Dense, depthwise, and depthwise with a stride: kernel, stride, padding, groups.
SHAPES = [(1, 1, 0, 1), (3, 1, 1, 8), (3, 2, 1, 8)]


def model_of(architecture, policy="eval"):
    torch.manual_seed(0)
    model = TorchvisionForImageClassification(TorchvisionConfig(architecture=architecture, num_labels=3))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.uniform_(-0.3, 0.3)
    freeze_for_stage(model, Stage("all", unfreeze="all"), policy)
    return model.train()


def images_of(size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def any_number_of_weights(monkeypatch):
    monkeypatch.setattr(folding, "_FEW_WEIGHTS", math.inf)


@pytest.fixture
def fused(monkeypatch):
    """The names of the activations that convolutions applied."""
    names = []

    def noting(convolution, images, weight, bias, activation=None):
        names.extend([] if activation is None else [activation.name])
        return convolve(convolution, images, weight, bias, activation)

    monkeypatch.setattr(folding, "convolve", noting)
    return names


@pytest.mark.parametrize(
    ("architecture", "in_training", "in_evaluation"),
    [
        ("mobilenet_v2", {"hardtanh": 35}, {"hardtanh": 35}),
        ("shufflenet_v2_x0_5", {"relu": 37}, {"relu": 37}),
        # Many weights.
        ("resnet18", {}, {}),
        # SiLU is as fast by itself.
        ("efficientnet_b0", {}, {}),
        # Hardswish's gradient needs its input.
        ("mobilenet_v3_small", {"relu": 5}, {"relu": 5, "hardswish": 18}),
        # Norms come before convolutions, but for the first.
        ("densenet121", {"relu": 59}, {"relu": 59}),
    ],
)
def test_each_family_has_its_own(architecture, in_training, in_evaluation, fused):
    model = model_of(architecture)
    put_on_fast_form(model)
    for expected, trains in ((in_training, True), (in_evaluation, False)):
        fused.clear()
        with torch.set_grad_enabled(trains):
            model(pixel_values=images_of())
        assert {name: fused.count(name) for name in set(fused)} == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", RELUS)
@pytest.mark.parametrize(("kernel", "stride", "padding", "groups"), SHAPES)
def test_values_and_gradients_are_those_of_two_modules(kernel, stride, padding, groups, kind, dtype):
    torch.manual_seed(0)
    convolution = nn.Conv2d(8, 8, kernel, stride, padding, groups=groups).to(dtype)
    convolution.weight.data *= 8
    images = (torch.randn(4, 8, 12, 12) * 3).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    sources = [images, convolution.weight, convolution.bias]
    own = convolve(convolution, *sources, FUSED[kind])
    plain = kind()(convolve(convolution, *sources))
    torch.testing.assert_close(own, plain)
    assert own.is_contiguous(memory_format=torch.channels_last)
    assert 0 < int((own == 0).sum()) < own.numel()
    weights = torch.randn_like(plain)
    for mine, expected in zip(
        torch.autograd.grad(own, sources, weights), torch.autograd.grad(plain, sources, weights), strict=True
    ):
        torch.testing.assert_close(mine, expected)


def test_a_smooth_one_is_as_near_as_rounding():
    kind = nn.Hardswish
    convolution = nn.Conv2d(8, 8, 3, padding=1)
    images = torch.randn(2, 8, 9, 9) * 3
    with torch.no_grad():
        own = convolve(convolution, images, convolution.weight, convolution.bias, FUSED[kind])
        torch.testing.assert_close(own, kind()(convolution(images)), rtol=1e-5, atol=1e-5)
        assert takes_activation(convolution, images, convolution.weight, FUSED[kind])
    assert not takes_activation(convolution, images, convolution.weight, FUSED[kind])


@pytest.mark.parametrize(
    ("convolution", "shape"),
    [
        (nn.Conv2d(8, 8, 3, padding="same"), (2, 8, 9, 9)),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), (2, 8, 9, 9)),
        (nn.Conv2d(8, 8, 3).double(), (2, 8, 9, 9)),
        (nn.Conv2d(8, 8, 3), (0, 8, 9, 9)),
        (nn.Conv2d(8, 8, 3), (8, 9, 9)),
    ],
    ids=["same", "reflect", "double", "no images", "no batch"],
)
def test_what_the_kernel_cannot_do_is_left_to_the_module(convolution, shape):
    images = torch.randn(shape, dtype=convolution.weight.dtype)
    assert not takes_activation(convolution, images, convolution.weight, FUSED[nn.ReLU])


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("architecture", ["mobilenet_v2", "resnet18", "mobilenet_v3_small"])
@pytest.mark.usefixtures("any_number_of_weights")
def test_a_network_trains_as_without(architecture, bfloat16, fused, monkeypatch):
    start, pixels, found = model_of(architecture), images_of(), []
    for able in (False, True):
        model = copy.deepcopy(start)
        put_on_fast_form(model)
        if not able:
            monkeypatch.setattr(folding, "takes_activation", lambda *_: False)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            torch.manual_seed(0)  # For dropout.
            loss = model(pixel_values=pixels, labels=torch.tensor([0, 2])).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
        assert bool(fused) == able
        monkeypatch.setattr(folding, "takes_activation", takes_activation)
    # Another kernel may take sums in another order.
    largest = max(float(value.norm()) for value in found[0])
    for plain, own in zip(*found, strict=True):
        assert float((own - plain).norm()) <= (0.1 if bfloat16 else 1e-4) * max(float(plain.norm()), largest / 100)


def broken(what, model, pixels):
    """Puts one NaN somewhere."""
    if what == "image":
        pixels[1, 2, 30, 30] = math.nan
    elif what == "weight":
        model.backbone.features[3].conv[0][0].weight.data[5, 3] = math.nan
    elif what == "statistics":
        model.backbone.features[3].conv[0][1].running_mean[5] = math.nan
    return pixels


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("what", ["image", "weight", "statistics"])
def test_nan_comes_through(what, trains, fused):
    model, plain = model_of("mobilenet_v2"), model_of("mobilenet_v2")
    put_on_fast_form(model)
    with torch.set_grad_enabled(trains):
        assert torch.isfinite(model(pixel_values=images_of()).logits).all()
        fused.clear()
        found = [m(pixel_values=broken(what, m, images_of())).logits for m in (model, plain)]
    assert not fused
    assert torch.isnan(found[1]).any()
    assert torch.equal(torch.isnan(found[0]), torch.isnan(found[1]))


@pytest.mark.parametrize("architecture", ["mobilenet_v2", "densenet121"])
def test_statistics_that_training_spoilt_are_noticed(architecture, fused):
    model, spoilt = model_of(architecture, "train"), images_of()
    put_on_fast_form(model)
    model.eval()
    with torch.no_grad():
        assert torch.isfinite(model(pixel_values=images_of()).logits).all()
        assert fused
        spoilt[0] = math.nan
        model.train()(pixel_values=spoilt)
        fused.clear()
        assert torch.isnan(model.eval()(pixel_values=images_of()).logits).all()
    assert not fused


def test_nan_at_a_border_comes_through(fused):
    model = model_of("mobilenet_v2")
    freeze_for_stage(model, Stage("last block", unfreeze=1), "eval")
    put_on_fast_form(model)
    border = find_border(model, ["stage4", "head"], images_of())
    values = border.prefix(images_of())
    with border.resumed():
        fused.clear()
        assert torch.isfinite(model(pixel_values=values).logits).all()
        assert fused
        fused.clear()
        values[0, 0, 0, 0] = math.nan
        assert torch.isnan(model(pixel_values=values).logits[0]).all()
        assert not fused


@pytest.mark.usefixtures("any_number_of_weights")
def test_a_module_that_runs_in_several_places_is_spared_where_its_work_is_done(fused):
    # Each block's ReLU runs after the first norm, whose convolution does it, and after the sum with the shortcut.
    model, plain = model_of("resnet18").eval(), model_of("resnet18").eval()
    put_on_fast_form(model)
    with torch.no_grad():
        found = model(pixel_values=images_of()).logits
        torch.testing.assert_close(found, plain(pixel_values=images_of()).logits, rtol=1e-3, atol=1e-4)
    assert fused == ["relu"] * 9


@pytest.mark.usefixtures("any_number_of_weights")
def test_a_hook_on_an_activation_sees_what_it_would_see(fused):
    model, seen = model_of("resnet18").eval(), []
    put_on_fast_form(model)
    relu = model.backbone.layer1[0].relu
    handle = relu.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    with torch.no_grad():
        model(pixel_values=images_of())
    assert len(fused) == 8
    assert len(seen) == 2
    assert all((values < 0).any() for values in seen)
    handle.remove()


def test_only_an_activation_in_place_of_what_nothing_else_read_is_in_a_pair():
    def with_activations(model):
        return sum(pair.activation is not None for pair in find_pairs(model))

    model = model_of("mobilenet_v2")
    assert with_activations(model) == 35
    model.backbone.features[3].conv[0][2] = nn.ReLU6(inplace=False)
    model.backbone.features[4].conv[0][2].register_forward_hook(lambda *_: None)
    model.backbone.features[5].conv[0][2] = nn.ELU(inplace=True)
    assert with_activations(model) == 32

    class ReadBefore(nn.Sequential):
        def forward(self, images):
            values = self[1](self[0](images))
            return values.mean() * 0 + self[2](values)

    block = model.backbone.features[6].conv[0]
    model.backbone.features[6].conv[0] = ReadBefore(*block)
    assert with_activations(model) == 31


@pytest.mark.parametrize("policy", ["train", "freeze_affine"])
def test_behind_a_norm_that_trains_activations_are_their_own(policy, fused):
    model = model_of("mobilenet_v2", policy)
    put_on_fast_form(model)
    model(pixel_values=images_of())
    assert not fused
    model.eval()
    with torch.no_grad():
        model(pixel_values=images_of())
    assert len(fused) == 35
