"""Proof that what a stage froze did not move: fingerprints of frozen tensors before and after."""

import hashlib

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchthaw.errors import TrainingError


def frozen_fingerprints(model: nn.Module) -> dict[str, str]:
    """Returns a digest of every frozen parameter, and of the statistics of every BatchNorm kept in eval mode.

    Call it in training mode (`model.train()`), so that the modules which stay in eval mode show.
    """
    digests = {name: _digest(p) for name, p in model.named_parameters() if not p.requires_grad}
    for module_name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and not module.training:
            for buffer_name, buffer in module.named_buffers(recurse=False):
                digests[f"{module_name}.{buffer_name}"] = _digest(buffer)
    return digests


def check_unchanged(before: dict[str, str], model: nn.Module, stage_name: str) -> None:
    """Compares the tensors fingerprinted before a stage with what they are now.

    Raises:
        TrainingError: a frozen parameter or statistic changed; the names are in the message.
    """
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    moved = [name for name, digest in before.items() if _digest(now[name]) != digest]
    if moved:
        raise TrainingError(
            f"stage {stage_name!r} changed {len(moved)} frozen tensors: {', '.join(moved[:5])}"
            f"{' ...' if len(moved) > 5 else ''}. Something other than the stage's optimizer writes to the model: "
            "look for callbacks or hooks that update weights, or that put frozen modules into training mode."
        )


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8)
    return hashlib.blake2b(data.numpy().tobytes(), digest_size=16).hexdigest()
