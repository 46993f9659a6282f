"""Proof of what a stage did: frozen tensors did not move, trainable ones got a gradient, and how far they went."""

import hashlib
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchthaw.errors import TrainingError
from torchthaw.stages.freezing import Group
from torchthaw.stages.snapshots import all_tensors


def frozen_fingerprints(model: nn.Module) -> dict[str, str]:
    """Returns a digest of every frozen parameter, and of the statistics of every BatchNorm kept in eval mode.

    Call it in training mode (`model.train()`), so that the modules which stay in eval mode show.
    """
    digests = {name: digest(p) for name, p in model.named_parameters() if not p.requires_grad}
    for module_name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and not module.training:
            for buffer_name, buffer in module.named_buffers(recurse=False):
                digests[f"{module_name}.{buffer_name}"] = digest(buffer)
    return digests


def check_unchanged(before: Mapping[str, str], model: nn.Module, stage_name: str) -> None:
    """Compares the tensors fingerprinted before a stage with what they are at its end.

    Raises:
        TrainingError: a frozen parameter or statistic changed; the names are in the message.
    """
    tensors = all_tensors(model)
    moved = [name for name, fingerprint in before.items() if digest(tensors[name]) != fingerprint]
    if moved:
        raise TrainingError(
            f"stage {stage_name!r} changed {len(moved)} frozen tensors: {_some(moved)}. Something other than the "
            "stage's optimizer writes to the model: look for callbacks or hooks that update weights, or that put "
            "frozen modules into training mode."
        )


def check_gradients(model: nn.Module, stage_name: str) -> None:
    """Checks, after the first backward pass of a stage, that every trainable parameter has a gradient.

    Raises:
        TrainingError: some have none, so that they would never learn; their names are in the message.
    """
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if missing:
        raise TrainingError(
            f"stage {stage_name!r} trains {len(missing)} parameters that the loss does not reach: {_some(missing)}. "
            "They got no gradient in the first step: a forward pass that skips or detaches them is the usual cause. "
            "Leave their layer group out of unfreeze, or use them in forward."
        )


def relative_changes(
    before: Mapping[str, torch.Tensor], model: nn.Module, groups: Mapping[str, Group]
) -> dict[str, float]:
    """Returns how far each layer group's parameters moved: the L2 norm of the change over that before it.

    Args:
        before: Copies of the parameters that could change; a group with none of them did not move.
        model: The model as it is after the stage.
        groups: The model's layer groups.
    """
    after = dict(model.named_parameters())
    result = {}
    for group_name, group in groups.items():
        moved = total = 0.0
        for name in group.parameters:
            total += _squares(before.get(name, after[name]))
            if name in before:
                moved += _squares(after[name].detach().cpu() - before[name])
        result[group_name] = (moved / total) ** 0.5 if total else 0.0
    return result


def digest(tensor: torch.Tensor) -> str:
    """Returns a digest of a tensor's bytes."""
    data = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8)
    return hashlib.blake2b(data.numpy().tobytes(), digest_size=16).hexdigest()


def _squares(tensor: torch.Tensor) -> float:
    return float(tensor.detach().double().square().sum())


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
