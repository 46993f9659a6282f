"""Builds torchvision's networks, and adapts their final layers, state_dicts and memory."""

import contextlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.models import MNASNet
from torchvision.ops import StochasticDepth

from .anatomy import family_of
from .configuration import TorchvisionConfig


def build_network(config: TorchvisionConfig) -> nn.Module:
    """Builds torchvision's network for a configuration, with random weights, on the current default device."""
    family = family_of(config.architecture)
    options = network_options(config)
    with _PlainNumbers() if family.name == "regnet" else contextlib.nullcontext():
        network: nn.Module = torchvision.models.get_model(config.architecture, weights=None, **options)
    if config.stochastic_depth is not None:
        _scale_stochastic_depth(network, config.stochastic_depth)
    return network


def network_options(config: TorchvisionConfig) -> dict[str, Any]:
    """Returns what torchvision's builder takes beside the name of the network."""
    family = family_of(config.architecture)
    options: dict[str, Any] = {"num_classes": config.num_labels}
    if config.dropout is not None:
        options[str(family.dropout)] = config.dropout
    if family.auxiliary:
        options |= {"aux_logits": config.aux_logits, "transform_input": config.transform_input, "init_weights": True}
    if family.fixed_size and config.image_size is not None:
        size = config.image_size
        options |= {"image_size": size} if family.name == "vit" else {"input_size": (size, size)}
    return options


def with_version(state_dict: Mapping[str, Any], network: nn.Module, prefix: str = "") -> Mapping[str, Any]:
    """Adds the version that MNASNet asks for to a state_dict which has lost it, as in a safetensors file."""
    if not isinstance(network, MNASNet) or hasattr(state_dict, "_metadata"):
        return state_dict
    versioned = OrderedDict(state_dict)
    versioned._metadata = {prefix: {"version": network._version}}  # type: ignore[attr-defined]
    return versioned


def align_memory(module: nn.Module) -> None:
    """Moves tensors that are mapped from a file to memory that begins at a multiple of 64 bytes, as torch's own does.

    The vector instructions of the CPU sum in another order elsewhere, which changes the last bits of a result.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


class _PlainNumbers(TorchFunctionMode):
    """Keeps the numbers that RegNet computes its widths with on the CPU and in float32.

    torchvision computes them with tensors, which the `meta` device cannot and bfloat16 as default type gets wrong.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.arange:
            kwargs |= {"device": "cpu", "dtype": torch.float32}
        elif func is torch.tensor and isinstance(args[0], list):  # A plain number is a statistic of BatchNorm.
            kwargs |= {"device": "cpu"}
        return func(*args, **kwargs)


def _scale_stochastic_depth(network: nn.Module, probability: float) -> None:
    """Sets the probability of the last block, and in proportion that of the others."""
    layers = [module for module in network.modules() if isinstance(module, StochasticDepth)]
    deepest = max(layer.p for layer in layers)
    for layer in layers:
        layer.p *= probability / deepest


def like(layer: nn.Module, outputs: int) -> nn.Module:
    """Returns a fresh layer of the same kind, type and device with another number of outputs."""
    assert isinstance(layer, nn.Linear | nn.Conv2d), type(layer)
    options: dict[str, Any] = {
        "bias": layer.bias is not None,
        "device": layer.weight.device,
        "dtype": layer.weight.dtype,
    }
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, outputs, **options).train(layer.training)
    assert layer.kernel_size == (1, 1), layer
    return nn.Conv2d(layer.in_channels, outputs, kernel_size=1, **options).train(layer.training)
