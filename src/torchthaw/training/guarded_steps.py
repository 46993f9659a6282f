"""Steps of the Trainer that refuse what would spoil the weights: missing and non-finite gradients."""

import math
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.stages.plan import Stage
from torchthaw.stages.proof import check_gradients
from torchthaw.training import processes
from torchthaw.training.gradients import NonFiniteError, clip_gradients, explain_non_finite


class GuardedTrainer(Trainer):
    """Checks the first gradients of a stage, and every step's loss and gradient norm, before the optimizer's step."""

    model: TorchvisionForImageClassification
    stage: Stage | None = None
    _gradients_checked = False

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._last_loss, self._last_inputs = loss, inputs
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        return self._checked_norm(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self._checked_norm(model, math.inf) if grad_norm is None else grad_norm

    def _checked_norm(self, model: nn.Module, max_norm: float) -> torch.Tensor:
        """Clips; stops the stage before a step that would spoil the weights."""
        assert self.stage is not None
        if not self._gradients_checked:
            check_gradients(self.model, self.stage.name)
            self._gradients_checked = True
        self.accelerator.unscale_gradients()
        self._last_norm = norm = clip_gradients(model.parameters(), max_norm)
        # With fp16 the scaler skips steps whose gradients overflow, and lowers its scale: that is no failure.
        scaled = self.accelerator.scaler is not None
        broken_loss = not bool(torch.isfinite(self._last_loss).all())
        if processes.any_process(broken_loss or not (scaled or bool(torch.isfinite(norm)))):
            raise NonFiniteError(
                explain_non_finite(
                    what=f"the loss became {self._last_loss.item()}" if broken_loss else "a gradient is not finite",
                    stage=self.stage.name,
                    step=self.state.global_step + 1,
                    optimizer_groups=self.create_optimizer().param_groups,
                    inputs=self._last_inputs,
                )
            )
        return norm
