"""Low-rank adapters on weights: where a layer's weight W is read, W + scale * B A is found.

An adapter acts on a weight, not on a layer. So it reaches the networks of torchvision that hand weights to functions
without calling the layer (Swin's attention, `nn.MultiheadAttention`), the parameters keep torchvision's names, nothing
ever writes to W, and what is validated is to the last bit what merging leaves.
"""

import functools
from collections.abc import Collection, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from torchthaw.stages.snapshots import Snapshot, take_snapshot


class LowRank(nn.Module):
    """The adapter of one weight. It belongs to the layer that holds the weight, and to no state_dict.

    Args:
        a: A, (rank, inputs).
        b: B, (outputs, rank).
        scale: What B A is multiplied by.
    """

    def __init__(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(b)
        self.scale = scale

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns W + scale * B A in the type of W, whatever autocast says."""
        with torch.autocast(weight.device.type, enabled=False):
            return (weight + (self.lora_B @ self.lora_A) * self.scale).to(weight.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Saves nothing: the layer saves its weight with the adapter merged."""


class Adapted(nn.Module):
    """What a layer is, beside its own class, while its weight has an adapter."""

    adapted = ""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        merged = getattr(self, self.adapted)
        destination[prefix + self.adapted] = merged if keep_vars else merged.detach()


Place = tuple[nn.Module, str]
"""A layer and the attribute of its weight."""


@functools.cache
def _adapted_class(kind: Hashable, attribute: str) -> type[nn.Module]:
    # A property comes before `nn.Module.__getattr__`, which finds the parameter itself.
    members = {"adapted": attribute, attribute: property(lambda layer: merged_weight((layer, attribute)))}
    own = cast(type[nn.Module], kind)
    return type(f"Adapted{own.__name__}", (Adapted, own), members)


def weight_at(place: Place) -> nn.Parameter:
    """Returns a layer's own weight, without its adapter."""
    layer, attribute = place
    weight = layer._parameters[attribute]
    assert weight is not None
    return weight


def merged_weight(place: Place) -> torch.Tensor:
    """Returns a layer's weight with its adapter."""
    layer, attribute = place
    adapter = layer._modules[_name(attribute)]
    assert isinstance(adapter, LowRank)
    return adapter.added_to(weight_at(place))


def put_on(place: Place, adapter: LowRank) -> None:
    """Puts an adapter on the weight of a layer that has none."""
    layer, attribute = place
    layer.add_module(_name(attribute), adapter.train(layer.training))
    layer.__class__ = _adapted_class(cast(Any, type(layer)), attribute)


def _name(attribute: str) -> str:
    return f"lora_{attribute}"


def adapted_weights(model: nn.Module) -> dict[str, Place]:
    """Returns the weights that have an adapter, by dotted name."""
    adapted = ((path, layer) for path, layer in model.named_modules() if isinstance(layer, Adapted))
    return {f"{path}.{layer.adapted}": (layer, layer.adapted) for path, layer in adapted}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns A and B of all adapters, by dotted name."""
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if isinstance(module, LowRank)
        for name, parameter in module.named_parameters()
    }


def with_adapted_weights(model: nn.Module, live: Collection[str]) -> tuple[str, ...]:
    """Returns names of what training changes, with the adapted weights in place of what their adapters hold."""
    own = adapter_parameters(model)
    return (*(name for name in live if name not in own), *adapted_weights(model))


@torch.no_grad()
def take_merged_snapshot(model: nn.Module, names: Collection[str]) -> Snapshot:
    """Copies the named parameters and buffers to the CPU; of weights that have an adapter, what they act as."""
    snapshot = take_snapshot(model, names)
    for name, place in adapted_weights(model).items():
        if name in snapshot:
            snapshot[name] = merged_weight(place).to("cpu", copy=True)
    return snapshot


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Writes into the weights what they act as, and takes the adapters off; without adapters, does nothing."""
    for place in adapted_weights(model).values():
        weight_at(place).copy_(merged_weight(place))
    take_off_adapters(model)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Lets a model do without its adapters while this lasts."""
    adapters = [(place, place[0]._modules[_name(place[1])]) for place in adapted_weights(model).values()]
    take_off_adapters(model)
    try:
        yield
    finally:
        for place, adapter in adapters:
            assert isinstance(adapter, LowRank)
            put_on(place, adapter)


def take_off_adapters(model: nn.Module) -> None:
    """Takes the adapters off; the weights are what they were before them."""
    for layer, attribute in adapted_weights(model).values():
        del layer._modules[_name(attribute)]
        # Behind the class made for it and `Adapted` comes its own.
        layer.__class__ = type(layer).__mro__[2]
