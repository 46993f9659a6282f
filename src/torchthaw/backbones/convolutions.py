"""Convolutions on CPUs that do the work of the activation after them, with gradients by kernels that are fast there."""

import platform
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .activations import Activation

# Stride, padding, dilation, groups.
_Options = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]

# oneDNN has fast kernels in bfloat16 for gradients of a depthwise kernel up to this side.
_LARGEST_KERNEL = 3


def convolve(
    convolution: nn.Conv2d,
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: Activation | None = None,
) -> torch.Tensor:
    """Runs a convolution with another weight and bias, of the type that it computes in.

    With an activation, oneDNN applies it to each value that it has just computed, which saves two passes over them. It
    is the same up to rounding, but that ReLU and ReLU6 make zero of NaN.

    On CPUs, oneDNN computes two gradients of depthwise convolutions in bfloat16 by reference code: that of the images
    where there is a stride (10 to 80 times as slow as in float32), that of kernels of more than 3 x 3 (2 to 4 times).
    The first is computed as the convolution that it is, of gradients with zeros between them; the second in float32.

    Args:
        convolution: Says stride, padding, dilation and groups.
        images: (N, in channels, height, width).
        weight: As `convolution.weight`.
        bias: As `convolution.bias`.
        activation: What to apply to the result; only where `takes_activation` says so.
    """
    if activation is None and not _has_slow_gradient(convolution, images, weight):
        return convolution._conv_forward(images, weight, bias)
    images = images.to(weight.dtype)
    padding = cast(tuple[int, ...], convolution.padding)
    options = convolution.stride, padding, convolution.dilation, convolution.groups
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (images, weight, bias)):
        result: torch.Tensor = _Convolution.apply(images, weight, bias, activation, options)
        return result
    return _run(images, weight, bias, activation, options)


def takes_activation(
    convolution: nn.Conv2d, images: torch.Tensor, weight: torch.Tensor, activation: Activation
) -> bool:
    """Whether `convolve` can apply an activation to the result here."""
    if images.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    if _fused_kernel() is None or not torch.backends.mkldnn.enabled:
        return False
    if convolution.padding_mode != "zeros" or isinstance(convolution.padding, str):
        return False
    # An empty batch, or one image without a batch.
    if images.ndim != 4 or not images.numel() or is_traced():
        return False
    return activation.gradient is not None or not torch.is_grad_enabled()


def is_traced() -> bool:
    """Whether this pass is only to record what a network does."""
    return torch.jit._trace.is_tracing() or torch.compiler.is_compiling()


@cache
def _fused_kernel() -> Any:
    # Not public: torch.compile's own way to oneDNN, which has kernels of its own for these processors.
    if not torch.backends.mkldnn.is_available() or platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    kernel = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
    return getattr(kernel, "default", None)


def _has_slow_gradient(convolution: nn.Conv2d, images: torch.Tensor, weight: torch.Tensor) -> bool:
    depthwise = 1 < convolution.groups == convolution.in_channels == convolution.out_channels
    if not depthwise or weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return False
    if not torch.is_grad_enabled() or convolution.padding_mode != "zeros" or isinstance(convolution.padding, str):
        return False
    strided = images.requires_grad and max(convolution.stride) > 1
    large = weight.requires_grad and max(convolution.kernel_size) > _LARGEST_KERNEL
    return strided or large


def _run(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: Activation | None,
    options: _Options,
) -> torch.Tensor:
    stride, padding, dilation, groups = options
    if activation is None:
        return F.conv2d(images, weight, bias, stride, padding, dilation, groups)
    result: torch.Tensor = _fused_kernel()(
        images, weight, bias, padding, stride, dilation, groups, activation.name, activation.limits, ""
    )
    return result


class _Convolution(torch.autograd.Function):
    """A convolution, with the activation after it if any, whose slow gradients are computed in a faster way."""

    @staticmethod
    def forward(
        ctx: Any,
        images: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        activation: Activation | None,
        options: _Options,
    ) -> torch.Tensor:
        output = _run(images, weight, bias, activation, options)
        ctx.activation, ctx.options = activation, options
        ctx.save_for_backward(images, weight, *([] if activation is None else [output]))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, weight, *output = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        if output:
            gradient = ctx.activation.gradient(gradient, *output)
        wanted = list(ctx.needs_input_grad[:3])
        slow = weight.dtype == torch.bfloat16 and 1 < groups == len(weight) == images.shape[1]
        of_images = None
        if slow and wanted[0] and max(stride) > 1:
            of_images = _gradient_of_images(gradient, weight, images, stride, padding, dilation)
            wanted[0] = of_images is None
        sources = [gradient, images, weight]
        if slow and wanted[1] and max(weight.shape[2:]) > _LARGEST_KERNEL:
            sources = [source.float() for source in sources]
        found: Sequence[torch.Tensor | None] = [None, None, None]
        if any(wanted):
            found = torch.ops.aten.convolution_backward(
                *sources, [len(weight)], stride, padding, dilation, False, [0, 0], groups, wanted
            )
        of_others = [
            value.to(weight.dtype) if value is not None and asked else None
            for value, asked in zip(found, wanted, strict=True)
        ]
        return (of_images if of_others[0] is None else of_others[0], *of_others[1:], None, None)


def _gradient_of_images(
    gradient: torch.Tensor,
    weight: torch.Tensor,
    images: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> torch.Tensor | None:
    """Returns the gradient of a strided depthwise convolution's images; None if there are more padding than kernel.

    It is the convolution, without a stride, of the gradient with `stride - 1` zeros between its values, by the kernel
    turned around (Dumoulin and Visin 2016, A Guide to Convolution Arithmetic for Deep Learning, section 4.6).
    """
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    around = [r - p for r, p in zip(reach, padding, strict=True)]
    if min(around) < 0:
        return None
    size = [n + 2 * p - r for n, p, r in zip(images.shape[2:], padding, reach, strict=True)]
    spread = torch.empty(
        (*images.shape[:2], *size), dtype=gradient.dtype, memory_format=torch.channels_last
    ).zero_()  # fmt: skip
    spread[:, :, :: stride[0], :: stride[1]] = gradient
    return F.conv2d(spread, weight.flip(2, 3), None, 1, around, dilation, len(weight))
