"""Gradient norms of layer groups, gathered on the device and read where the loss is logged."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn


class GroupNorms:
    """Root mean square, over the optimizer steps since it was last taken, of each layer group's gradient norm.

    A norm that is not finite counts as 0: a step that a scaler of half precision skips says nothing of the gradients.

    Args:
        optimizer_groups: Groups of the optimizer, each with its `layer_group`, from the input to the head.
    """

    def __init__(self, optimizer_groups: Sequence[Mapping[str, Any]]) -> None:
        self._names = list(dict.fromkeys(group["layer_group"] for group in optimizer_groups))
        self._group_of = {
            id(parameter): self._names.index(group["layer_group"])
            for group in optimizer_groups
            for parameter in group["params"]
        }
        self._members: torch.Tensor | None = None
        self._membership: list[int] = []
        self._squares: torch.Tensor | None = None
        self._steps = 0

    def add(self, parameters: Sequence[nn.Parameter], norms: torch.Tensor) -> None:
        """Adds a step; nothing waits for the device.

        Args:
            parameters: Those with a gradient.
            norms: The norm of each, shape (parameters,), before clipping.
        """
        membership = [self._group_of[id(parameter)] for parameter in parameters]
        if self._members is None or membership != self._membership:
            # Moved once, since a copy to the device may wait for it.
            members = torch.zeros(len(self._names), len(membership))
            members[membership, range(len(membership))] = 1
            self._members, self._membership = members.to(norms.device), membership
        squares = torch.where(torch.isfinite(norms), norms.float(), 0.0).square()
        # Not a scattered sum, whose order is left to chance on GPUs.
        sums = (self._members * squares).sum(dim=1)
        self._squares = sums if self._squares is None else self._squares.to(sums.device) + sums
        self._steps += 1

    def take(self) -> dict[str, float]:
        """Returns the figure of each group and begins anew; empty if there was no step. Waits for the device."""
        if self._squares is None or not self._steps:
            return {}
        norms = (self._squares / self._steps).sqrt().tolist()
        self._squares, self._steps = None, 0
        return dict(zip(self._names, norms, strict=True))

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint holds of it, as plain data. Waits for the device."""
        squares = [] if self._squares is None else self._squares.tolist()
        return {"steps": self._steps, "squares": squares}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` gave."""
        squares = state.get("squares")
        self._squares = torch.tensor(squares) if squares else None
        self._steps = state.get("steps", 0)
