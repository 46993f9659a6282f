"""Activations that cost less: done by the convolution before them, or without a copy kept for their gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_LOW, _HIGH = 0.0, 6.0
_MARK = "_activated_for"


@dataclass(frozen=True)
class Activation:
    """An activation that a convolution's kernel can apply to what it computes.

    Attributes:
        name: oneDNN's name for it in PyTorch.
        limits: Its parameters.
        gradient: Makes the gradient of its input of the gradient of its output and its output; None where the output
            does not tell.
    """

    name: str
    limits: tuple[float, ...] = ()
    gradient: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None


def _of_relu(gradient: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.ops.aten.threshold_backward(gradient, output, _LOW)
    return found


def _of_relu6(gradient: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.ops.aten.hardtanh_backward(gradient, output, _LOW, _HIGH)
    return found


FUSED: dict[type[nn.Module], Activation] = {
    nn.ReLU: Activation("relu", gradient=_of_relu),
    nn.ReLU6: Activation("hardtanh", (_LOW, _HIGH), _of_relu6),
    nn.Hardswish: Activation("hardswish"),
}
"""By their modules, the activations that are faster in a convolution; SiLU is not."""


def spare(activation: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """Marks values as those that an activation would give, so that it hands them on."""
    vars(values)[_MARK] = activation
    return values


class FastActivation:
    """The forward of an activation that hands on what a convolution has done for it, and of a ReLU6 in place.

    PyTorch clones the input of a ReLU6 in place for its gradient. The output tells as well where values were cut off,
    and the next convolution keeps it anyway: the same gradient, bit for bit, without the copy.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        module = self.module
        if vars(values).get(_MARK) is module:
            # A module may run again on what it gave.
            del vars(values)[_MARK]
            return values
        keeps_copy = isinstance(module, nn.ReLU6) and module.inplace
        if not keeps_copy or not torch.is_grad_enabled() or not values.requires_grad:
            return type(module).forward(module, values)
        return _ReLU6.apply(values)


class _ReLU6(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        values = F.hardtanh_(values, _LOW, _HIGH)
        ctx.mark_dirty(values)
        ctx.save_for_backward(values)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (values,) = ctx.saved_tensors
        return _of_relu6(gradient, values)
