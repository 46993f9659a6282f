"""The weights of the backbone that a run began with: how far they moved since, and what pulls them back (L2-SP)."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchthaw.stages.freezing import Group
from torchthaw.stages.proof import digest, relative_changes
from torchthaw.stages.rates import HEAD
from torchthaw.stages.snapshots import Snapshot, take_snapshot


@dataclass(frozen=True)
class StartingPoint:
    """Parameters of the backbone as they were before the first stage of a run.

    Attributes:
        tensors: Copies on the CPU of the parameters that some stage may train, by name.
        digest: Of their names and bytes.
    """

    tensors: Snapshot
    digest: str

    @classmethod
    def of(cls, model: nn.Module, groups: Mapping[str, Group], live: Collection[str]) -> "StartingPoint":
        """Copies the parameters of the live groups, without the head, whose start means nothing.

        Args:
            model: The model, before it is trained.
            groups: Its layer groups.
            live: Names of the groups that some stage trains.
        """
        names = [name for group in groups if group in live and group != HEAD for name in groups[group].parameters]
        tensors = take_snapshot(model, names)
        state = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(tensors.items()):
            state.update(f"{name}\0{digest(tensor)}\0".encode())
        return cls(tensors, state.hexdigest())

    def distances(self, model: nn.Module, groups: Mapping[str, Group]) -> dict[str, Any]:
        """Returns how far the backbone is from here: L2 norm of the difference over that of the start.

        Returns:
            `groups`: the figure of each layer group but the head; `backbone`: that of all these parameters together.
        """
        backbone = {name: group for name, group in groups.items() if name != HEAD}
        whole = _Whole({name: p for group in backbone.values() for name, p in group.parameters.items()})
        moved = relative_changes(self.tensors, model, {**backbone, "": whole})
        return {"backbone": moved.pop(""), "groups": moved}


@dataclass(frozen=True)
class _Whole:
    """Several groups as one."""

    parameters: Mapping[str, nn.Parameter]

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return {}


class PullToStart:
    """Pulls weights towards where they started, at each step of an optimizer, before it moves them: L2-SP.

    `w <- w - lr * l2_sp * (w - start)`, with the rate and the `l2_sp` of the weight's optimizer group: the decoupled
    weight decay of AdamW (Loshchilov and Hutter, 2019) with the starting point in the place of the origin, as the
    penalty of Li, Grandvalet and Davoine (2018, Explicit Inductive Bias for Transfer Learning with Convolutional
    Networks) asks. It is no part of the loss: there AdamW would divide it by the size of the gradients, so that its
    strength would hardly matter, and clipping and the scaling of fp16 would take it for a gradient. With plain SGD it
    is the step that the penalty in the loss would make.

    Args:
        optimizer: With the key `l2_sp` in groups that are pulled (see `param_groups`).
        names: Name of each parameter of these groups by its `id`.
        start: Where they started, by name, on any device.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: Mapping[int, str], start: Snapshot) -> None:
        self._start = {
            id(parameter): start[names[id(parameter)]]
            for group in optimizer.param_groups
            if group.get("l2_sp")
            for parameter in group["params"]
        }
        optimizer.register_step_pre_hook(self)

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, _args: Any, _options: Any) -> None:
        """Pulls the weights that have a gradient."""
        # Where an optimizer asks the scaler of fp16 for it, this says whether the step is to be skipped.
        skipped = getattr(optimizer, "found_inf", None)
        for group in optimizer.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not group.get("l2_sp") or not weights:
                continue
            share = group["lr"] * group["l2_sp"]
            targets = [self._target(weight) for weight in weights]
            if skipped is None and not isinstance(share, torch.Tensor):
                torch._foreach_lerp_(weights, targets, share)
                continue
            # Numbers on the device, which are not waited for.
            share = torch.as_tensor(share, device=weights[0].device, dtype=weights[0].dtype)
            if skipped is not None:
                share = share * (1 - skipped.to(share))
            ways = torch._foreach_sub(targets, weights)
            torch._foreach_mul_(ways, share)
            torch._foreach_add_(weights, ways)

    def _target(self, weight: torch.Tensor) -> torch.Tensor:
        target = self._start[id(weight)]
        if target.device != weight.device or target.dtype != weight.dtype:
            # Moved once, where the weight is by now.
            target = self._start[id(weight)] = target.to(weight.device, weight.dtype)
        return target
