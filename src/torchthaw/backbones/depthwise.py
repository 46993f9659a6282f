"""Depthwise convolutions in bfloat16 on CPUs, with gradients by kernels that are fast there."""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

# oneDNN has fast kernels in bfloat16 for gradients of a depthwise kernel up to this side.
_LARGEST_KERNEL = 3


def convolve(
    convolution: nn.Conv2d, images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Runs a convolution with another weight and bias, of the type that it computes in.

    On CPUs, oneDNN computes two gradients of depthwise convolutions in bfloat16 by reference code: that of the images
    where there is a stride (10 to 80 times as slow as in float32), that of kernels of more than 3 x 3 (2 to 4 times).
    These alone are computed in float32 here, which is also closer to the exact ones.

    Args:
        convolution: Says stride, padding, dilation and groups.
        images: (N, in channels, height, width).
        weight: As `convolution.weight`.
        bias: As `convolution.bias`.
    """
    if not _has_slow_gradient(convolution, images, weight):
        return convolution._conv_forward(images, weight, bias)
    stride = convolution.stride, convolution.padding, convolution.dilation
    return _Depthwise.apply(images.to(weight.dtype), weight, bias, *stride)


def _has_slow_gradient(convolution: nn.Conv2d, images: torch.Tensor, weight: torch.Tensor) -> bool:
    depthwise = 1 < convolution.groups == convolution.in_channels == convolution.out_channels
    if not depthwise or weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return False
    if not torch.is_grad_enabled() or convolution.padding_mode != "zeros" or isinstance(convolution.padding, str):
        return False
    strided = images.requires_grad and max(convolution.stride) > 1
    large = weight.requires_grad and max(convolution.kernel_size) > _LARGEST_KERNEL
    return strided or large


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution whose slow gradients are computed in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        images: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
    ) -> torch.Tensor:
        ctx.save_for_backward(images, weight)
        ctx.options = stride, padding, dilation
        return torch.nn.functional.conv2d(images, weight, bias, stride, padding, dilation, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        stride, padding, dilation = ctx.options
        exact = gradient.float()

        def gradients(exactly: bool, wanted: list[bool]) -> tuple[torch.Tensor, ...]:
            sources = [gradient, images, weight]
            if exactly:
                # Without a gradient of the weight, of the images only shape and layout count.
                pixels = images.float() if wanted[1] else torch.empty_like(images, dtype=torch.float32)
                sources = [exact, pixels, weight.float()]
            return torch.ops.aten.convolution_backward(
                *sources, [len(weight)], stride, padding, dilation, False, [0, 0], len(weight), wanted
            )

        needs_images, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        of_images = of_weight = of_bias = None
        if needs_images:
            of_images = gradients(max(stride) > 1, [True, False, False])[0].to(images.dtype)
        if needs_weight or needs_bias:
            large = max(weight.shape[2:]) > _LARGEST_KERNEL
            _, of_weight, of_bias = gradients(large, [False, True, True])
            of_weight, of_bias = of_weight.to(weight.dtype), of_bias.to(weight.dtype)
        return of_images, of_weight, of_bias if needs_bias else None, None, None, None
