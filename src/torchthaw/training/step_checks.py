"""What is known of a step that may have to be refused, and how a device refuses it while nobody waits for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


class DeviceFlag:
    """A truth value on a device, which is read without waiting for what the device was asked for after it.

    Args:
        flag: A boolean scalar.
    """

    def __init__(self, flag: torch.Tensor) -> None:
        self._value, self._arrived = flag, None
        if flag.is_cuda:
            # Only memory that is pinned is copied to while the host goes on.
            self._value = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._value.copy_(flag, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(flag.device))

    def __bool__(self) -> bool:
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._value)


@dataclass(frozen=True)
class TakenStep:
    """An optimizer step of which it may not be known yet whether its loss and gradients were finite.

    Attributes:
        broken: Whether they were not, in any process.
        batches: Loss and inputs of the batches whose gradients it took together.
        parameters: Those with a gradient.
        norms: The norm of each gradient, shape (parameters,), before clipping.
        rates: Learning rate of each group of the optimizer.
        loss_before: Sum of the training loss since it was logged, without that of these batches.
        number: Of the optimizer steps of the run before it.
        epoch: Of the run before it.
    """

    broken: DeviceFlag
    batches: list[tuple[torch.Tensor, Any]]
    parameters: Sequence[nn.Parameter]
    norms: torch.Tensor
    rates: list[float]
    loss_before: torch.Tensor
    number: int
    epoch: float


def can_leave_out(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer leaves out a step by itself where `leave_out` says so: the fused ones do.

    Args:
        optimizer: One of torch's, or accelerate's wrapper of it.
    """
    return all(group.get("fused") for group in optimizer.param_groups)


def leave_out(optimizer: torch.optim.Optimizer, broken: torch.Tensor) -> None:
    """Lets the next step change nothing, state included, if a flag is set; nothing waits for the device.

    Args:
        optimizer: One that `can_leave_out`.
        broken: A boolean scalar on the device of the parameters.
    """
    # The way in which `torch.amp.GradScaler` tells fused optimizers that a gradient overflowed.
    vars(getattr(optimizer, "optimizer", optimizer))["found_inf"] = broken.float()
