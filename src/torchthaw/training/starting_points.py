"""The starting point of a run: the backbone's weights before its first stage, which L2-SP and distances refer to."""

from typing import Any

import torch
from torch import nn

from torchthaw.errors import PlanError
from torchthaw.stages.starting_point import PullToStart, StartingPoint
from torchthaw.training import processes
from torchthaw.training.stage_pass import StagePassTrainer


class AnchoredTrainer(StagePassTrainer):
    """Remembers what the backbone was when the run began, and lets each stage's optimizer pull towards it if asked.

    That is what the model held when `train` was called: the pretrained weights, of a model that was fine-tuned before
    those of that fine-tuning. A run that is resumed must be given the same, of which checkpoints hold a digest.
    """

    _start: StartingPoint | None = None

    def distance_from_start(self) -> dict[str, Any] | None:
        """Returns how far the backbone has moved since the run began (see `StartingPoint.distances`).

        Returns:
            None if no run began, or a resumed one was given other weights than it began with.
        """
        if self._start is None:
            return None
        return self._start.distances(self.model, self.model.layer_groups())

    def _note_start(self) -> None:
        """Takes the weights that the model has now for the run's first ones."""
        self._start = self._take_start()

    def _start_digest(self) -> str | None:
        return None if self._start is None else self._start.digest

    def _find_start(self, digest: str | None) -> None:
        """Finds the first weights of a run that is to be resumed, before those of its checkpoint are loaded.

        Raises:
            PlanError: the model holds other ones, and there is something that pulls towards them.
        """
        known = (start for start in (self._start, self._take_start()) if start is not None)
        self._start = next((start for start in known if start.digest == digest), None)
        if processes.any_process(self._start is None) and self.args.l2_sp is not None:
            raise PlanError(
                f"l2_sp is {self.args.l2_sp:g}, which pulls towards the weights that the run began with, and the model "
                "that is to go on with it holds other ones; make it as for the start of the run, from the same "
                "weights: those of the checkpoint are loaded into it afterwards"
            )

    def _take_start(self) -> StartingPoint:
        groups = self.model.layer_groups()
        live = {name for stage in self.plan.stages for name in stage.live_groups(list(groups))}
        return StartingPoint.of(self.model, groups, live)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.args.l2_sp is not None:
            start = self._start or self._take_start()
            PullToStart(optimizer, {id(p): name for name, p in self.model.named_parameters()}, start.tensors)
        return optimizer
