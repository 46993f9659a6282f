"""Steps of the Trainer that refuse what would spoil the weights: missing and non-finite gradients."""

import math
from typing import Any

import torch
from torch import nn

from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.stages.plan import Stage
from torchthaw.stages.proof import check_gradients
from torchthaw.training import processes
from torchthaw.training.gradients import (
    NonFiniteError,
    broken_parameters,
    broken_rows,
    clip_gradients,
    explain_non_finite,
)
from torchthaw.training.group_norms import GroupNorms
from torchthaw.training.step_checks import DeviceFlag, TakenStep, can_leave_out, leave_out
from torchthaw.training.timing import TimedTrainer


class GuardedTrainer(TimedTrainer):
    """Checks the first gradients of a stage, and every step's loss and gradient norm, before the optimizer's step.

    A GPU would stand still if it were waited for in every step. There a fused optimizer leaves out a step that is not
    finite by itself, and what it did is asked for one step later, or before something is logged, validated or saved.
    """

    model: TorchvisionForImageClassification
    stage: Stage | None = None
    _gradients_checked = False
    _unsettled: TakenStep | None = None

    def _prepare_checks(self) -> None:
        """Begins anew, at the start of a stage."""
        self._gradients_checked = False
        # Made with the stage's optimizer.
        self._group_norms: GroupNorms | None = None
        # Loss and inputs of the batches whose gradients the next optimizer step takes together.
        self._batches: list[tuple[torch.Tensor, Any]] = []
        self._unsettled = None

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self._gradients_checked and self.stage is not None:
            # Processes that reduce other gradients than each other would wait forever.
            trainable = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
            processes.check_same_names(trainable, f"what trains in stage {self.stage.name!r}")
        if not self._batches:
            self._loss_before_step = self._tr_loss.clone()
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._batches.append((loss, inputs))
        return loss

    def _unlogged_loss(self) -> float:
        """Returns the sum of the training loss since it was logged, without that of a step that was not made."""
        return (self._loss_before_step if self._batches else self._tr_loss).item()

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        return self._checked_norm(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self._checked_norm(model, math.inf) if grad_norm is None else grad_norm

    def _checked_norm(self, model: nn.Module, max_norm: float) -> torch.Tensor:
        """Clips; stops the stage before a step that would spoil the weights."""
        assert self.stage is not None
        self._settle()
        if not self._gradients_checked:
            check_gradients(self.model, self.stage.name)
            self._gradients_checked = True
        self.accelerator.unscale_gradients()
        with_gradient = [p for p in model.parameters() if p.grad is not None]
        norm, norms = clip_gradients(with_gradient, max_norm)
        self._last_norm = norm
        losses = [loss for loss, _ in self._batches]
        finite = torch.isfinite(torch.stack(losses)).all()
        # With fp16 the scaler skips steps whose gradients overflow, and lowers its scale: that is no failure.
        if self.accelerator.scaler is None:
            finite = finite & torch.isfinite(norm)
        broken = processes.anywhere(~finite)
        self._unsettled = TakenStep(
            broken=DeviceFlag(broken),
            batches=self._batches,
            parameters=with_gradient,
            norms=norms,
            rates=[group["lr"] for group in self.create_optimizer().param_groups],
            loss_before=self._loss_before_step,
            number=self.state.global_step,
            epoch=self.state.epoch,
        )
        if self._settles_later():
            leave_out(self.create_optimizer(), broken)
        else:
            self._settle()
        # For callbacks, on the device; not a field of TrainerState, whose saved form other code reads back strictly.
        vars(self.state).update(step_losses=losses)
        self._batches = []
        return norm

    def _settles_later(self) -> bool:
        """Whether the device is left alone, since the optimizer leaves out a step that is not finite."""
        on_gpu = self.args.device.type == "cuda"
        return on_gpu and self.accelerator.scaler is None and can_leave_out(self.create_optimizer())

    def _settle(self) -> None:
        """Asks what became of the last step, and ends the stage if it was not finite, as it was before that step."""
        taken, self._unsettled = self._unsettled, None
        if taken is None:
            return
        if taken.broken:
            self.state.global_step, self.state.epoch = taken.number, taken.epoch
            self._batches, self._loss_before_step = taken.batches, taken.loss_before
            raise NonFiniteError(self._why_broken(taken))
        self._norms_of_groups().add(taken.parameters, taken.norms)

    def _run_epoch(self, **options: Any) -> None:  # type: ignore[override]  # called with keywords only
        super()._run_epoch(**options)
        self._settle()

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log or self.control.should_save or self.control.should_evaluate:
            self._settle()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _norms_of_groups(self) -> GroupNorms:
        if self._group_norms is None:
            self._group_norms = GroupNorms(self.create_optimizer().param_groups)
        return self._group_norms

    def _why_broken(self, taken: TakenStep) -> str:
        """Returns the same explanation in all processes: of the one with the broken image, or else the broken loss."""
        assert self.stage is not None
        losses = [loss.item() for loss, _ in taken.batches]
        first = next((number for number, loss in enumerate(losses) if not math.isfinite(loss)), len(losses) - 1)
        loss, inputs = losses[first], taken.batches[first][1]
        groups = zip(self.create_optimizer().param_groups, taken.rates, strict=True)
        text = explain_non_finite(
            what="a gradient is not finite" if math.isfinite(loss) else f"the loss became {loss}",
            stage=self.stage.name,
            step=taken.number + 1,
            optimizer_groups=[{**group, "lr": rate} for group, rate in groups],
            broken=broken_parameters(taken.parameters, taken.norms),
            inputs=inputs,
        )
        found = processes.gather((bool(broken_rows(inputs)), not math.isfinite(loss), text))
        rank = max(range(len(found)), key=lambda rank: found[rank][:2])
        return found[rank][2] + (f" (process {rank})" if len(found) > 1 else "")
