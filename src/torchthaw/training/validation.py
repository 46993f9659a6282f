"""Validation within a staged run: the weights that a stage proposes, and those that the run stands at."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from torchthaw.errors import PlanError, did_you_mean
from torchthaw.evaluation.arrays import NonFiniteLogitsError, log_softmax
from torchthaw.evaluation.multilabel_figures import log_loss
from torchthaw.stages.low_rank import take_merged_snapshot, with_adapted_weights
from torchthaw.training import processes
from torchthaw.training.arguments import ThawTrainingArguments
from torchthaw.training.comparison import ONE_STANDARD_ERROR, Measured, compare
from torchthaw.training.gradients import NonFiniteError
from torchthaw.training.guarded_steps import GuardedTrainer
from torchthaw.training.progress import Outcome, Progress


class ValidatingTrainer(GuardedTrainer):
    """Keeps the best validated weights of each stage, with what they were validated by."""

    args: ThawTrainingArguments
    _run_folder: Path
    _live_names: Collection[str] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._progress = Progress(run_id="")
        self._validated: dict[str, tuple[Any, Any]] = {}
        super().__init__(*args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, **{**kwargs, "metric_key_prefix": metric_key_prefix})
        self._validated[metric_key_prefix] = (output.predictions, output.label_ids)
        key = f"{metric_key_prefix}_loss"
        metrics = output.metrics or {}
        if key in metrics and self.compute_loss_func is None:
            # Trainer's mean counts the images double that fill up the last batch of several processes.
            exact = _mean_log_loss(output.predictions, output.label_ids, several=self.model.config.several_labels)
            metrics[key] = metrics[key] if exact is None else exact
        return output

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        at_start = skip_scheduler
        if at_start and (self.state.global_step > 0 or self._progress.kept is not None):
            return {}
        # Without SyncBatchNorm every process has statistics of its own; the first one's are what is saved.
        processes.share_buffers(self.model)
        try:
            metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler=skip_scheduler)
        except NonFiniteLogitsError as error:
            if at_start:
                raise
            raise NonFiniteError(f"at step {self.state.global_step} the validation broke: {error}") from error
        outcome = self._outcome(metrics)
        if at_start:
            self._progress.kept = outcome
        elif not _is_finite(outcome.measured.logits):
            # The user's own metrics may not mind: a broken model takes every image for the first class.
            raise NonFiniteError(f"at step {self.state.global_step} the validation gave logits that are not finite")
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        new = self._outcome(metrics)
        is_best_of_run = super()._determine_best_metric(metrics, trial)
        progress = self._progress
        best = progress.peak
        gained = best is None or math.isnan(best.measured.value) or self._is_better(new, best)
        progress.validations_without_gain = 0 if gained else progress.validations_without_gain + 1
        taken = gained or not self.args.load_best_model_at_end or self._is_as_good(new)
        if gained:
            progress.peak = Outcome(new.step, new.metrics, new.measured)
        if taken:
            new.weights = take_merged_snapshot(self.model, with_adapted_weights(self.model, self._live_names))
            progress.candidate = new
        patience = self.stage.patience if self.stage else None
        if patience is not None and progress.validations_without_gain >= patience:
            progress.stage_over = f"{patience} validations in a row without a better {self._metric_name()}"
            self.control.should_epoch_stop = True
        return is_best_of_run or taken

    def _is_as_good(self, new: Outcome) -> bool:
        """Whether later weights take the place of better ones, since by one standard error they are no worse.

        Never at the cost of what makes the stage better than the weights before it.
        """
        peak, before = self._progress.peak, None if self._progress.head_is_new else self._progress.kept
        if self.stage is None or self.stage.selection != "one_se" or peak is None:
            return False
        if before is not None and self._is_better(peak, before) and not self._is_better(new, before):
            return False
        p_value = compare(self._metric_name(), peak.measured, new.measured, seed=self.args.seed).p_value
        return p_value is not None and p_value >= ONE_STANDARD_ERROR

    def _is_better(self, new: Outcome, old: Outcome) -> bool:
        if self.args.greater_is_better:
            return new.measured.value > old.measured.value
        return new.measured.value < old.measured.value

    def _outcome(self, metrics: dict[str, float]) -> Outcome:
        key = self._metric_key()
        if key not in metrics:
            names = [name.removeprefix("eval_") for name in metrics]
            raise PlanError(
                f"metric_for_best_model is {self.args.metric_for_best_model!r}, but validation gives no {key!r}."
                f"{did_you_mean(key.removeprefix('eval_'), names)} There are {', '.join(names)}."
            )
        logits, labels = self._validated.get(key.removesuffix(f"_{self._metric_name()}"), (None, None))
        return Outcome(self.state.global_step, metrics, Measured(float(metrics[key]), logits, labels))

    def _metric_key(self) -> str:
        name = self.args.metric_for_best_model or "loss"
        return name if name.startswith("eval_") else f"eval_{name}"

    def _metric_name(self) -> str:
        """Returns the selection metric without the name of the validation set."""
        key = self._metric_key()
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else ()
        prefixes = [prefix for prefix in ("eval", *(f"eval_{name}" for name in sets)) if key.startswith(f"{prefix}_")]
        return key.removeprefix(f"{max(prefixes, key=len)}_")

    def _name_best(self) -> None:
        """Lets the state name the weights that the run stands at, which may not be those of the best epoch."""
        kept = self._progress.kept
        self.state.best_metric = kept.measured.value if kept else None
        self.state.best_global_step = kept.step if kept else None
        folder = self._run_folder / f"{PREFIX_CHECKPOINT_DIR}-{kept.step if kept else 0}"
        self.state.best_model_checkpoint = str(folder) if folder.is_dir() else None

    def _load_best_model(self) -> None:
        """Does nothing: after the last stage the model holds the weights that the gate has kept."""


def _is_finite(logits: Any) -> bool:
    return not isinstance(logits, np.ndarray) or logits.dtype.kind != "f" or bool(np.isfinite(logits).all())


def _mean_log_loss(logits: Any, labels: Any, *, several: bool) -> float | None:
    """Returns the mean (binary) cross entropy over images in nats; None for what are not classes of images."""
    if not (isinstance(logits, np.ndarray) and isinstance(labels, np.ndarray)):
        return None
    if several and labels.shape == logits.shape:
        return float(log_loss(logits, labels, np.ones((1, len(labels))))[0])
    if logits.ndim != 2 or labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(logits):
        return None
    losses = -log_softmax(logits.astype(np.float64))[np.arange(len(labels)), labels]
    return float(losses.mean())
