"""WiSE-FT at the end of stages: their best weights mixed with those before them, by a share that is given or validated.

Wortsman et al., "Robust fine-tuning of zero-shot models" (CVPR 2022). There the way begins at a zero-shot classifier;
here at the weights before the stage, whose head an earlier stage has trained.
"""

import dataclasses
import math
from typing import Any

import torch

from torchthaw.evaluation.arrays import NonFiniteLogitsError
from torchthaw.stages.averages import average_weights, interpolate
from torchthaw.stages.low_rank import without_adapters
from torchthaw.stages.snapshots import put_back, take_snapshot
from torchthaw.training import processes
from torchthaw.training.averaging import AveragingTrainer
from torchthaw.training.random_states import random_states_kept
from torchthaw.training.records import StageRecord

# Shares of the stage's best weights that are tried. Weights of the share 1 have been validated in the stage.
ALPHAS = (0.2, 0.4, 0.6, 0.8, 1.0)


class MixingTrainer(AveragingTrainer):
    """Lets a stage that trains more than the head propose a mixture of its weights and those before it."""

    def _shares(self) -> tuple[float, ...]:
        """Returns the shares of the stage's weights that are tried; none where nothing is mixed."""
        assert self.stage is not None
        if self.stage.trains_head_alone or self._progress.head_is_new:
            return ()
        if self.stage.wise_ft is not None:
            return () if self.stage.wise_ft == 1 else (self.stage.wise_ft,)
        # Another head is on no way from the one before.
        return ALPHAS if self.args.wise_ft and not self.stage.new_head else ()

    def _mix(self, ignore_keys: list[str] | None) -> dict[str, Any] | None:
        """Makes the best mixture what the stage proposes; of equal ones that with the most of the stage's weights.

        Statistics of BatchNorm that the stage has trained are mixed as weights are, though those of a mixture are not
        the mixture of those: such a mixture may score less than it could. The stage's own weights are among those that
        are compared, unless the stage gives the share, which is then compared with no other.

        Returns:
            What a record says of it; None if there was nothing to mix, or only a head that nothing had trained.
        """
        progress = self._progress
        candidate = progress.candidate
        if not self._shares() or candidate is None or candidate.weights is None:
            return None
        outcomes = {1.0: candidate}
        sign = 1.0 if self.args.greater_is_better else -1.0

        def score(alpha: float, weights: dict[str, torch.Tensor]) -> float:
            if alpha not in outcomes:
                put_back(self.model, weights)
                try:
                    outcome = self._outcome(self._validate_quietly(ignore_keys))
                except NonFiniteLogitsError:
                    return math.nan
                outcomes[alpha] = dataclasses.replace(outcome, step=candidate.step, weights=weights)
            return sign * outcomes[alpha].measured.value

        # What comes after must be the same if the run is resumed from the stage's last checkpoint.
        with without_adapters(self.model), random_states_kept():
            last = take_snapshot(self.model, candidate.weights)
            alpha, scores = interpolate(progress.before, candidate.weights, self._shares(), score)
            put_back(self.model, last)
        alpha = processes.share(alpha)
        if alpha not in outcomes:
            return None  # The only share gives logits that are not finite, and the stage's own weights do not.
        progress.candidate = outcomes[alpha]
        values = {f"{share:g}": sign * found if math.isfinite(found) else None for share, found in scores.items()}
        return {"alpha": alpha, "metric": values}

    def _mix_unvalidated(self) -> dict[str, Any] | None:
        """Mixes the last weights of a stage without validation by the share that it gives; else as `_mix`."""
        shares, before = self._shares(), self._progress.before
        if self._progress.candidate is not None or len(shares) != 1:
            return None
        put_back(self.model, average_weights([take_snapshot(self.model, before), before], [shares[0], 1 - shares[0]]))
        return {"alpha": shares[0], "metric": {}}

    def _validate_quietly(self, ignore_keys: list[str] | None) -> dict[str, float]:
        """Validates the model's weights on all sets; callbacks and logs, which follow training, are not told."""
        sets = self.eval_dataset
        names = {f"eval_{name}": name for name in sets} if isinstance(sets, dict) else {"eval": None}
        handler = self.callback_handler
        callbacks, handler.callbacks = handler.callbacks, []
        metrics: dict[str, float] = {}
        try:
            for prefix, name in names.items():
                found = self.evaluation_loop(
                    self.get_eval_dataloader(name),
                    description="Evaluation",
                    prediction_loss_only=True if self.compute_metrics is None else None,
                    ignore_keys=ignore_keys,
                    metric_key_prefix=prefix,
                )
                metrics.update(found.metrics or {})
        finally:
            handler.callbacks = callbacks
        return metrics


def note_mixture(record: StageRecord, mixed: dict[str, Any] | None) -> None:
    """Writes into a stage's record what its mixture is."""
    record.wise_ft = mixed
    if mixed is not None and mixed["alpha"] != 1:
        record.reason += (
            f"; WiSE-FT took {100 * mixed['alpha']:g} % of the stage's weights and the rest of those before"
        )
