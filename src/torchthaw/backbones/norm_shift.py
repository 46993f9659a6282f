"""How far images are from those that a backbone was pretrained on, by the statistics of its BatchNorm layers."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# Channels whose pretrained variance is no more than this many times what BatchNorm adds to it are all but dead.
_LEAST_VARIANCE = 100


@torch.no_grad()
def statistics_shift(network: nn.Module, batches: Iterable[Tensor]) -> float | None:
    """Returns how far the variances of activations are from the pretrained ones, in the last third of BatchNorm layers.

    Early layers shift with contrast and sharpness, late ones with what is to be seen. That BatchNorm's statistics tell
    data sets apart is the observation behind AdaBN (Li et al., "Revisiting Batch Normalization For Practical Domain
    Adaptation", 2017).

    Args:
        network: In eval mode while it is measured, and left in the mode that it is in.
        batches: Images as the network takes them, (N, 3, height, width) each.

    Returns:
        The mean over layers of the mean over channels of |ln(variance / pretrained variance)|; None where there are no
        images, or fewer than three BatchNorm layers.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    late = norms[len(norms) - len(norms) // 3 :]
    sums: dict[nn.Module, Tensor] = {norm: torch.zeros(2, norm.num_features, dtype=torch.float64) for norm in late}
    counts: dict[nn.Module, int] = dict.fromkeys(late, 0)

    def add(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        values = inputs[0].detach().float().transpose(0, 1).flatten(1)
        sums[norm] += torch.stack([values.sum(1), values.square().sum(1)]).double().cpu()
        counts[norm] += values.shape[1]

    hooks = [norm.register_forward_pre_hook(add) for norm in late]
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        for batch in batches:
            network(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    found = [_shift(norm, sums[norm] / counts[norm]) for norm in late if counts[norm]]
    return sum(found) / len(found) if found else None


def _shift(norm: _BatchNorm, moments: Tensor) -> float:
    """Returns the shift of one layer, from the first and second moment of its inputs, (2, channels)."""
    before = norm.running_var.double().cpu()  # type: ignore[union-attr]
    now = (moments[1] - moments[0].square()).clamp(min=0)
    alive = before > _LEAST_VARIANCE * norm.eps
    if not alive.any():
        return 0.0
    ratios = (now[alive] + norm.eps) / (before[alive] + norm.eps)
    return float(ratios.log().abs().mean())
