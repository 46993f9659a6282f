"""Depthwise convolutions in bfloat16: the gradients of the exact ones, and everything else left alone."""

import pytest
import torch
from torch import nn

from torchthaw.backbones import convolutions
from torchthaw.backbones.convolutions import convolve


def gradients(convolution, images, dtype, run):
    """Returns output and gradients, in double precision, of a convolution in a type."""
    convolution = nn.Conv2d(
        8, 8, convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation, 8,
        convolution.bias is not None,
    ).to(dtype)  # fmt: skip
    torch.manual_seed(1)
    for parameter in convolution.parameters():
        # What bfloat16 can hold, so that both compute with the same numbers.
        parameter.data.copy_(torch.randn(parameter.shape).bfloat16())
    pixels = images.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    output = run(convolution, pixels, convolution.weight, convolution.bias)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    sources = [pixels, *convolution.parameters()]
    return [output, *torch.autograd.grad((output * weights.to(dtype)).sum(), sources)]


def plainly(convolution, images, weight, bias):
    return convolution._conv_forward(images, weight, bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [(3, 2, 1, 1), (5, 1, 2, 1), (5, 2, 2, 1), ((3, 7), (1, 2), (1, 3), 1), (3, 2, 2, 2), (3, 1, 1, 1)],
)
def test_gradients_are_the_exact_ones_up_to_rounding(kernel, stride, padding, dilation, bias):
    images = torch.randn(4, 8, 13, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    convolution = nn.Conv2d(8, 8, kernel, stride, padding, dilation, 8, bias)
    exact = gradients(convolution, images, torch.float64, plainly)
    rounded = gradients(convolution, images, torch.bfloat16, plainly)
    ours = gradients(convolution, images, torch.bfloat16, convolve)
    assert len(ours) == (4 if bias else 3)
    for mine, plain, wanted in zip(ours, rounded, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        size = wanted.norm()
        error, usual = ((value.double() - wanted).norm() / size for value in (mine, plain))
        assert error < max(0.004, 1.1 * usual)


def test_gradients_of_images_keep_their_layout():
    # In another layout, each operation after it would take several times as long.
    images = torch.randn(2, 8, 12, 12).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    convolution = nn.Conv2d(8, 8, 3, 2, 1, groups=8).bfloat16()
    output = convolve(convolution, images, convolution.weight, convolution.bias)
    # The gradient of a leaf would be laid out anew.
    [gradient] = torch.autograd.grad(output, images, torch.randn_like(output))
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_only_gradients_that_are_asked_for_are_computed():
    images = torch.randn(2, 8, 12, 12).bfloat16()
    convolution = nn.Conv2d(8, 8, 5, 2, 2, groups=8).bfloat16()
    convolution.bias.requires_grad_(False)
    convolve(convolution, images, convolution.weight, convolution.bias).sum().backward()
    assert convolution.weight.grad is not None
    assert convolution.bias.grad is None
    convolution.weight.requires_grad_(False)
    images.requires_grad_()
    convolve(convolution, images, convolution.weight, convolution.bias).sum().backward()
    assert images.grad is not None


@pytest.mark.parametrize(
    ("convolution", "dtype", "trains"),
    [
        (nn.Conv2d(8, 8, 3, 2, 1, groups=8), torch.float32, True),
        (nn.Conv2d(8, 8, 3, 2, 1, groups=4), torch.bfloat16, True),
        (nn.Conv2d(8, 16, 3, 2, 1, groups=8), torch.bfloat16, True),
        (nn.Conv2d(8, 8, 3, 2, 1), torch.bfloat16, True),
        (nn.Conv2d(8, 8, 3, 1, 1, groups=8), torch.bfloat16, True),
        (nn.Conv2d(8, 8, 3, 1, "same", groups=8), torch.bfloat16, True),
        (nn.Conv2d(8, 8, 3, 2, 1, groups=8, padding_mode="reflect"), torch.bfloat16, True),
        (nn.Conv2d(8, 8, 3, 2, 1, groups=8), torch.bfloat16, False),
    ],
    ids=["float32", "grouped", "multiplied", "dense", "small", "same", "reflect", "without a graph"],
)
def test_what_is_fast_already_runs_as_it_is(convolution, dtype, trains, monkeypatch):
    monkeypatch.setattr(convolutions, "_Convolution", None)
    monkeypatch.setattr(convolutions, "_run", None)
    convolution = convolution.to(dtype)
    images = torch.randn(2, 8, 12, 12, dtype=dtype, requires_grad=trains)
    with torch.set_grad_enabled(trains):
        output = convolve(convolution, images, convolution.weight, convolution.bias)
    assert torch.equal(output, convolution(images))
