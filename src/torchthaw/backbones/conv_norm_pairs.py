"""Finds the convolutions of a network whose output goes to a BatchNorm and nowhere else, with the activation after."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .activations import FUSED
from .anatomy import family_of, smallest_image
from .modeling import TorchvisionPreTrainedModel


@dataclass(frozen=True)
class Pair:
    """A convolution and the BatchNorm after it, with the activation in place after that, if there is one."""

    convolution: nn.Conv2d
    norm: nn.BatchNorm2d
    activation: nn.Module | None = None


Layer = TypeVar("Layer", bound=nn.Module)

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

# Smaller images leave feature maps of one pixel, where padding is all that a convolution sees.
_SMALLEST_PROBE = 32
# A wrong pair is off by as much as the activations themselves; rounding is far below this.
_TOLERANCE = 0.02


def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what a BatchNorm in eval mode multiplies each channel by, and what it adds then.

    Returns:
        `s = gamma / sqrt(var + eps)` and `beta - mean * s`, both (channels,) and float32 at least.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    exact = torch.promote_types(norm.running_var.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(exact) + norm.eps)
    if norm.weight is not None:
        scale = norm.weight * scale
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else norm.bias + shift


def apply_scale(
    convolution: nn.Conv2d, scale: torch.Tensor, shift: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the kernel of one convolution that does what this one and a norm after it do; gradients reach this one's.

    With W and b of the convolution, that is `W * s` and `b * s + t` (Jacob et al. 2018, Quantization and Training of
    Neural Networks for Efficient Integer-Arithmetic-Only Inference, section 3.2).

    Args:
        convolution: The convolution.
        scale: s of `scale_and_shift`.
        shift: t of it.
        dtype: The type of the result.

    Returns:
        Weight, (out channels, in channels / groups, height, width), and bias, (out channels,).
    """
    own = convolution.weight
    # As a matrix, so that its gradient has the layout of the weight, which DistributedDataParallel asks for.
    weight = (own.flatten(1) * scale[:, None]).view(own.shape)
    bias = shift if convolution.bias is None else shift + convolution.bias * scale
    return weight.to(dtype), bias.to(dtype)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of just this class, not a subclass or parametrized, without hooks or a forward of its own."""
    return type(module) is kind and "forward" not in vars(module) and not any(vars(module)[name] for name in HOOKS)


@torch.inference_mode(False)
@torch.no_grad()
def find_pairs(model: TorchvisionPreTrainedModel) -> list[Pair]:
    """Returns the pairs of a convolution and the BatchNorm after it that could be computed as one convolution.

    The network runs once on a small image. In a pair, each module ran once, the norm got the very tensor that the
    convolution gave, unchanged, nothing else read that tensor, and one convolution gives the same result. An activation
    is in it that works in place on the very tensor that the norm gave, which nothing read before. Modules that are not
    plain (see `is_plain`) are in no pair. Random state, modes, statistics and hooks of the model stay as they are, and
    its hooks are not called.
    """
    convolutions = [m for m in model.backbone.modules() if is_plain(m, nn.Conv2d)]
    norms = [m for m in model.backbone.modules() if is_plain(m, nn.BatchNorm2d) and m.running_mean is not None]
    if not convolutions or not norms:
        return []
    activations = [m for m in model.backbone.modules() if any(is_plain(m, kind) for kind in FUSED)]
    uses = _Uses()
    calls: dict[nn.Module, int] = {}
    candidates: list[tuple[_Output[nn.Conv2d], nn.BatchNorm2d]] = []
    activated: dict[nn.BatchNorm2d, nn.Module] = {}

    def after_convolution(module: nn.Conv2d, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        uses.outputs[id(output)] = _Output(module, inputs[0], output)

    def after_norm(module: nn.BatchNorm2d, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        found = uses.outputs.get(id(inputs[0]))
        if found is not None and _same(found, module, output):
            candidates.append((found, module))
        uses.normed[id(output)] = _Output(module, inputs[0], output)

    def after_activation(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        found = uses.normed.pop(id(inputs[0]), None)
        if found is not None and output is inputs[0] and found.uses == 1:
            activated[found.module] = module

    with without_hooks(model.backbone), _everything_in_eval_mode(model.backbone):
        for convolution in convolutions:
            convolution.register_forward_hook(after_convolution)
        for norm in norms:
            norm.register_forward_hook(after_norm)
        for activation in activations:
            activation.register_forward_hook(after_activation)
        # The heads that only training uses run in a root that trains, with all modules in it in eval mode.
        model.backbone.training = True
        with uses:
            try:
                model.backbone(_probe(model))
            except (RuntimeError, ValueError):
                # A module of the user's that needs images of another size; without a probe there are no pairs.
                return []
    return [
        Pair(found.module, norm, activated.get(norm))
        for found, norm in candidates
        if found.uses == calls[found.module] == calls[norm] == 1
    ]


@dataclass
class _Output(Generic[Layer]):
    """What a layer gave, and how many operations read it."""

    module: Layer
    images: torch.Tensor
    tensor: torch.Tensor
    uses: int = 0


class _Uses(TorchFunctionMode):
    """Counts the operations that make a tensor from one of the watched outputs, or write to it."""

    def __init__(self) -> None:
        super().__init__()
        # Each holds its tensor, so that no later tensor gets the same id.
        self.outputs: dict[int, _Output[nn.Conv2d]] = {}
        self.normed: dict[int, _Output[nn.BatchNorm2d]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(True for _ in _tensors(result)):
            for tensor in _tensors((args, kwargs)):
                for watched in (self.outputs, self.normed):
                    if id(tensor) in watched:
                        watched[id(tensor)].uses += 1
        return result


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _same(found: _Output[nn.Conv2d], norm: nn.BatchNorm2d, output: torch.Tensor) -> bool:
    weight, bias = apply_scale(found.module, *scale_and_shift(norm), found.module.weight.dtype)
    folded = found.module._conv_forward(found.images, weight, bias)
    # Where mean and bias cancel, rounding shows in the result as large as they are.
    size = output.abs().amax() + bias.abs().amax()
    return not bool((folded - output).abs().amax() > _TOLERANCE * size)


def _probe(model: TorchvisionPreTrainedModel) -> torch.Tensor:
    config = model.config
    family = family_of(config.architecture)
    size = max(smallest_image(config.architecture), _SMALLEST_PROBE)
    if family.fixed_size:
        size = config.image_size or 224
    elif config.aux_logits:
        size = max(size, family.auxiliary_minimum)
    first = next(model.backbone.parameters())
    waves = torch.arange(3 * size * size, device=first.device, dtype=torch.float32).sin()
    return waves.to(first.dtype).reshape(1, 3, size, size)


@contextlib.contextmanager
def without_hooks(root: nn.Module) -> Iterator[None]:
    """While this lasts, the modules have no hooks; what is registered meanwhile is gone after it."""
    own = {module: {name: vars(module)[name] for name in HOOKS} for module in root.modules()}
    try:
        for module, hooks in own.items():
            vars(module).update({name: type(value)() for name, value in hooks.items()})
        yield
    finally:
        for module, hooks in own.items():
            vars(module).update(hooks)


@contextlib.contextmanager
def _everything_in_eval_mode(root: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in root.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
