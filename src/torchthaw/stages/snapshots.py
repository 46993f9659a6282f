"""The part of a model that a stage can change, copied and put back."""

from collections.abc import Collection, Mapping

import torch
from torch import nn

Snapshot = dict[str, torch.Tensor]


def live_names(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of what training may change: trainable parameters, and buffers of modules in training mode.

    Call it in training mode (`model.train()`), so that the modules which stay in eval mode show.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for module_name, module in model.named_modules():
        if module.training:
            prefix = f"{module_name}." if module_name else ""
            names.extend(prefix + name for name, _ in module.named_buffers(recurse=False))
    return tuple(names)


def take_snapshot(model: nn.Module, names: Collection[str]) -> Snapshot:
    """Copies the named parameters and buffers to the CPU."""
    tensors = all_tensors(model)
    return {name: tensors[name].detach().to("cpu", copy=True) for name in names}


@torch.no_grad()
def put_back(model: nn.Module, snapshot: Mapping[str, torch.Tensor]) -> None:
    """Writes a snapshot into the model, in place."""
    tensors = all_tensors(model)
    for name, saved in snapshot.items():
        tensors[name].copy_(saved)


def all_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns parameters and buffers (those too that are not saved) by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
