"""The fast form that a model wears while it trains or evaluates: frozen BatchNorm folded into convolutions.

In eval mode BatchNorm multiplies and shifts each channel by constants, which the convolution before it can do by
itself: `conv(x, W * s) + t` is the same function of x and W with the same gradients, and saves the passes over the
activations, forward and backward, and the memory for them. Parameters, names and state_dict stay as they are.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from .activations import FUSED, FastActivation, spare
from .anatomy import family_of
from .conv_norm_pairs import HOOKS, Pair, apply_scale, find_pairs, is_plain, scale_and_shift
from .convolutions import convolve, is_traced, takes_activation
from .modeling import TorchvisionPreTrainedModel

Value = TypeVar("Value")

# Of networks with more, activations are a small part of the time, and looking through the weights costs what fused ones
# save (ResNet-18 and 50: neither faster nor slower).
_FEW_WEIGHTS = 10_000_000


class FastForm:
    """A model's fast form, to be taken off again.

    Attributes:
        folded: Number of pairs of convolution and BatchNorm that training computes as one convolution.
    """

    def __init__(self, model: TorchvisionPreTrainedModel, folded: int) -> None:
        self.model = model
        self.folded = folded

    def remove(self) -> None:
        """Takes the fast form off: the modules run as their classes say again."""
        take_off_fast_form(self.model)


def put_on_fast_form(model: TorchvisionPreTrainedModel) -> FastForm:
    """Makes a model compute the same function faster, until the form is taken off; call it after freezing.

    - A BatchNorm that follows a convolution is folded into it in each forward pass that finds it in eval mode and asks
      no gradient for its affine parameters. So those that a stage holds in eval mode are folded in training too, the
      others in evaluation only. Weights that a gradient is asked for are folded in each pass, all others once, and
      again when they have changed.
    - On x86, such a convolution of a network of few weights also applies the activation in place that follows (see
      `convolve`), in training where the gradient can be told from its output, as ReLU's and ReLU6's can.
    - Images go in channels_last where that is faster (see `prefers_channels_last`); parameters keep their layout.
    - Under autocast the final layer computes in the type of its weights: it costs next to nothing, and logits rounded
      to bfloat16 would tie. Depthwise convolutions get gradients that are fast in bfloat16 too, and a ReLU6 in place
      one that needs no copy of its input.

    What the form adds lies in the modules as their own `forward`: nothing in state_dict or in what is saved, and
    copies of the model wear a form of their own. A convolution, norm or activation with hooks, a parametrization, or a
    class or `forward` of the user's is left alone. Take the form off before modules are replaced.

    Args:
        model: The model, with `requires_grad` and `hold_in_eval` as the stage wants them. A form that it wears already
            is replaced.
    """
    take_off_fast_form(model)
    held = {part for name in model.held_in_eval for part in model.get_submodule(name).modules()}
    folded = 0
    pairs = find_pairs(model)
    entry = _Entry(model.backbone)
    activations = {module for module in model.backbone.modules() if is_plain(module, nn.ReLU6)}
    for pair in pairs:
        forward = _FoldedConvolution(pair, entry)
        vars(pair.convolution)["forward"] = forward
        vars(pair.norm)["forward"] = _FoldedNorm(forward)
        folded += pair.norm in held and not _asks_gradient(pair.norm)
        if pair.activation is not None:
            activations.add(pair.activation)
    final = model.backbone.get_submodule(family_of(model.config.architecture).final_layer)
    if any(is_plain(final, kind) for kind in (nn.Linear, nn.Conv2d)):
        vars(final)["forward"] = _FinalLayer(final)
    for activation in activations:
        vars(activation)["forward"] = FastActivation(activation)
    if prefers_channels_last(model.config.architecture):
        model.backbone.register_forward_pre_hook(entry)
    return FastForm(model, folded)


def take_off_fast_form(model: TorchvisionPreTrainedModel) -> None:
    """Takes off the fast form that a model wears, if any; also that of a copy, which has no `FastForm` of its own."""
    for module in model.backbone.modules():
        if isinstance(vars(module).get("forward"), _OWN):
            del vars(module)["forward"]
    hooks = model.backbone._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, _Entry)]:
        del hooks[key]


def prefers_channels_last(architecture: str) -> bool:
    """Whether a network is faster on images in the memory format channels_last: all that go on convolving.

    Swin and ViT only cut the image into patches by a convolution. Elsewhere the format is kept from layer to layer, and
    convolution kernels of CPUs and of CUDA's tensor cores compute in it without reordering: in float32 0.94
    to 2.0 times as fast on a CPU, in bfloat16 1.0 to 2.9 times.
    """
    return family_of(architecture).name not in ("swin", "vit")


class _Entry:
    """Lays out what comes into a network as channels_last, and looks whether it and all weights are finite.

    Fused activations make zero of NaN. Short of sums beyond the largest number, it comes from what is not finite.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.weights = [t for t in (*backbone.parameters(), *backbone.buffers()) if t.is_floating_point()]
        self.fuses = sum(tensor.numel() for tensor in self.weights) <= _FEW_WEIGHTS
        # The address and version at which each was found to be finite.
        self.seen: list[tuple[int, int] | None] = [None] * len(self.weights)
        self.trained = False
        # For the whole pass, so that what is recomputed in backward is computed in the same way.
        self.finite = False

    def __call__(self, backbone: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        images, *others = inputs
        if images.ndim == 4 and images.device.type in ("cpu", "cuda"):
            images = images.contiguous(memory_format=torch.channels_last)
        # Elsewhere nothing is fused, and asking would wait for the device.
        asked = self.fuses and images.device.type == "cpu" and not is_traced()
        # Training changes statistics and weights in ways that their versions do not show.
        changed = backbone.training or self.trained
        self.trained = backbone.training
        self.finite = asked and _is_finite(images) and self._weights_are_finite(changed)
        return (images, *others)

    def _weights_are_finite(self, changed: bool) -> bool:
        for number, tensor in enumerate(self.weights):
            now = None if tensor.is_inference() else (tensor.data_ptr(), tensor._version)
            if changed or now is None or now != self.seen[number] or tensor.requires_grad:
                if not _is_finite(tensor):
                    self.seen[number] = None
                    return False
                self.seen[number] = now
        return True


def _is_finite(values: torch.Tensor) -> bool:
    """Whether all values are finite, by their sum, which may be wrong only where they are huge."""
    return math.isfinite(values.detach().sum().item())


class _FoldedConvolution:
    """The forward of a convolution that does the work of the BatchNorm, and the activation, after it too."""

    def __init__(self, pair: Pair, entry: _Entry) -> None:
        self.convolution = pair.convolution
        self.norm = pair.norm
        self.activation = pair.activation
        self.entry = entry
        self.scaling: _Kept[tuple[torch.Tensor, torch.Tensor]] = _Kept()
        self.kernel: _Kept[tuple[torch.Tensor, torch.Tensor]] = _Kept()

    def folds(self) -> bool:
        """Whether a forward pass that runs now folds the norm."""
        norm, convolution = self.norm, self.convolution
        if norm.training or norm._buffers["running_mean"] is None:
            return False
        if torch.is_grad_enabled() and _asks_gradient(norm):
            return False
        # A hook before the convolution sees what it always sees, others see what folding changes.
        seen = convolution._forward_hooks or convolution._backward_hooks or convolution._backward_pre_hooks
        return not (seen or _has_hooks(norm))

    def forget(self) -> None:
        """Drops what is kept: training changes a BatchNorm's statistics in ways that tensors do not show."""
        self.scaling = _Kept()
        self.kernel = _Kept()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        convolution, activation = self.convolution, self.activation
        if not self.folds():
            return type(convolution).forward(convolution, images)
        weight, bias = self._kernel()
        if activation is None or not self.entry.finite or _has_hooks(activation):
            return convolve(convolution, images, weight, bias)
        fused = FUSED[type(activation)]
        if not takes_activation(convolution, images, weight, fused):
            return convolve(convolution, images, weight, bias)
        return spare(activation, convolve(convolution, images, weight, bias, fused))

    def _kernel(self) -> tuple[torch.Tensor, torch.Tensor]:
        convolution, norm, dtype = self.convolution, self.norm, _computing_dtype(self.convolution)
        of_norm = [norm.weight, norm.bias, norm.running_mean, norm.running_var]

        def compute() -> tuple[torch.Tensor, torch.Tensor]:
            scaling = self.scaling.get(of_norm, lambda: scale_and_shift(norm))
            return apply_scale(convolution, *scaling, dtype)

        return self.kernel.get([*of_norm, convolution.weight, convolution.bias], compute, dtype)


class _FinalLayer:
    """The forward of the final layer, which autocast does not round."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        dtype = next(self.layer.parameters()).dtype
        with torch.autocast(features.device.type, enabled=False):
            return type(self.layer).forward(self.layer, features.to(dtype))


class _FoldedNorm:
    """The forward of a BatchNorm whose work the convolution before it does."""

    def __init__(self, folded: _FoldedConvolution) -> None:
        self.folded = folded

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if self.folded.folds():
            return images
        norm = self.folded.norm
        if norm.training:
            self.folded.forget()
        return type(norm).forward(norm, images)


class _Kept(Generic[Value]):
    """A value that is computed anew when a tensor that it comes from has changed; copies and pickles begin empty.

    Tensors that training changes are never trusted: not every optimizer counts up the version of what it writes to.
    """

    def __init__(self) -> None:
        self._value: Value | None = None
        self._seen: list[Any] = []
        # They hold the memory of the tensors, so that no other tensor gets the same address.
        self._aliases: list[torch.Tensor] = []

    def __reduce__(self) -> tuple[type["_Kept[Value]"], tuple[()]]:
        return type(self), ()

    def get(
        self, sources: Sequence[torch.Tensor | None], compute: Callable[[], Value], variant: object = None
    ) -> Value:
        tensors = [tensor for tensor in sources if tensor is not None]
        seen = [variant]
        for tensor in tensors:
            if tensor.requires_grad or tensor.is_inference():
                return compute()
            seen += (tensor.data_ptr(), tensor._version, tensor.dtype)
        if self._value is None or seen != self._seen:
            # A tensor made in inference mode could not be used in training later.
            with torch.inference_mode(False), torch.no_grad():
                self._value = compute()
                self._aliases = [tensor.detach() for tensor in tensors]
            self._seen = seen
        return self._value


_OWN = (_FoldedConvolution, _FoldedNorm, _FinalLayer, FastActivation)


def _has_hooks(module: nn.Module) -> bool:
    own = vars(module)
    return any(own[name] for name in HOOKS)


def _computing_dtype(convolution: nn.Conv2d) -> torch.dtype:
    """Returns the type in which a convolution runs, which autocast may choose."""
    weight = convolution.weight
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def _asks_gradient(norm: nn.BatchNorm2d) -> bool:
    return any(parameter is not None and parameter.requires_grad for parameter in norm._parameters.values())
