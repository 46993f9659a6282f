"""How far a staged run has come: what a checkpoint holds beside what `Trainer` saves, so that a run goes on exactly."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from torchthaw.evaluation.files import replacing
from torchthaw.stages.averages import WeightAverage
from torchthaw.stages.snapshots import Snapshot
from torchthaw.training.comparison import Measured
from torchthaw.training.records import StageRecord

STATE_FILE = "stage_state.json"
TENSORS_FILE = "stage_state.safetensors"
_SNAPSHOTS = ("before", "adapters")
_OUTCOMES = ("kept", "candidate", "peak")


@dataclass
class Outcome:
    """Weights that were validated: the run's as it stands, or what a stage proposes.

    Attributes:
        step: Optimizer step of the run after which they were validated.
        metrics: All validation metrics, as `Trainer` names them.
        measured: The selection metric with the logits and labels that it was computed from.
        weights: What the stage can change, as it was then; None for weights that the model held before the stage.
    """

    step: int
    metrics: dict[str, float]
    measured: Measured
    weights: Snapshot | None = None


@dataclass
class Progress:
    """Place of a run in its plan.

    Attributes:
        run_id: Name of the run, which its checkpoints bear.
        start_digest: Of the weights that the run began with; see `StartingPoint`.
        head_is_new: Whether the head is as it was drawn, so that there is nothing to go back to.
        stage_index: The stage that runs.
        stage_start_step: Optimizer steps of the run before this stage.
        stage_start_epoch: First epoch of this stage, counted over the run.
        epoch: The epoch that runs, counted over the run.
        epoch_start_step: Optimizer steps before it.
        epoch_over: Whether all steps of the epoch are done.
        epoch_stopped: Whether the epoch was to end after the last step, whichever that was in it.
        stage_seconds: Time that earlier processes spent on this stage.
        lower_rates: Whether the stage runs again at lower rates, after a loss that was not finite.
        failures: What broke in the tries before.
        stage_over: Why the stage is to end before its planned length; None if it is not.
        run_over: Whether a callback has stopped the run.
        validations_without_gain: Validations since the stage's best.
        loss_sum: Sum of the training loss over the steps of the run that were logged.
        unlogged_loss: Sum over the steps since.
        last_logged_step: The last step whose loss was logged.
        last_grad_norm: Norm of the gradient in the last step, before clipping.
        group_norms: What is gathered of the layer groups' gradient norms since the loss was logged.
        last_learning_rate: The optimizer's first learning rate in the last step.
        last_rates: All of them, as they are logged.
        frozen_part: How the stage's frozen part is computed; see `StageRecord`.
        live_dtype: What the part that trains is computed in; None before that is chosen.
        fingerprints: Digests of what the stage keeps frozen.
        records: The stages that are done.
        before: What the stage can change, as it was before it.
        kept: The validated weights that the stage started from; None if they were not validated.
        candidate: The validated weights that this stage would propose.
        peak: The best validation of this stage, without weights; that of `candidate` unless the stage's `selection`
            prefers later ones.
        average: The running average of the stage's weights; None if there is none. In a checkpoint the averages are the
            model's weights, and what training goes on from stands here.
        adapters: What the stage's adapters hold; in a checkpoint only.
        probe: What the stage's linear probe found; see `StageRecord`.
        probe_macro_f1: Macro F1 on held-out training images of the run's last linear probe.
        shift: Of BatchNorm's statistics; see `torchthaw.backbones.norm_shift`. None before it is measured.
    """

    run_id: str
    start_digest: str | None = None
    head_is_new: bool = False
    stage_index: int = 0
    stage_start_step: int = 0
    stage_start_epoch: int = 0
    epoch: int = 0
    epoch_start_step: int = 0
    epoch_over: bool = False
    epoch_stopped: bool = False
    stage_seconds: float = 0.0
    lower_rates: bool = False
    failures: list[str] = field(default_factory=list)
    stage_over: str | None = None
    run_over: bool = False
    validations_without_gain: int = 0
    loss_sum: float = 0.0
    unlogged_loss: float = 0.0
    last_logged_step: int = 0
    last_grad_norm: float | None = None
    group_norms: dict[str, Any] = field(default_factory=dict)
    last_learning_rate: float | None = None
    last_rates: dict[str, float] = field(default_factory=dict)
    frozen_part: dict[str, Any] = field(default_factory=dict)
    live_dtype: str | None = None
    fingerprints: dict[str, str] = field(default_factory=dict)
    records: list[StageRecord] = field(default_factory=list)
    before: Snapshot = field(default_factory=dict)
    kept: Outcome | None = None
    candidate: Outcome | None = None
    peak: Outcome | None = None
    average: WeightAverage | None = None
    adapters: Snapshot = field(default_factory=dict)
    probe: dict[str, Any] | None = None
    probe_macro_f1: float | None = None
    shift: float | None = None

    def start_stage(self, index: int, *, step: int, epoch: int) -> None:
        """Moves on to a stage, or back to its start."""
        self.stage_index = index
        self.stage_start_step = self.epoch_start_step = step
        self.stage_start_epoch = self.epoch = epoch
        self.epoch_over = False
        self.stage_seconds = 0.0
        self.lower_rates = False
        self.failures = []
        self.stage_over = None
        self.validations_without_gain = 0
        self.frozen_part = {}
        self.live_dtype = None
        self.candidate = self.peak = None
        self.average = None
        self.probe = None

    def save(self, folder: Path, identity: dict[str, Any]) -> None:
        """Writes everything into a checkpoint's folder.

        Args:
            folder: The checkpoint.
            identity: What the run is of (see `resume.identity_of`).
        """
        tensors = {f"{key}/{name}": tensor for key in _SNAPSHOTS for name, tensor in getattr(self, key).items()}
        plain = vars(self).keys() - {*_SNAPSHOTS, *_OUTCOMES}
        state = {key: value for key, value in vars(self).items() if key in plain}
        if self.average is not None:
            state["average"] = {key: getattr(self.average, key) for key in ("kind", "decay", "updates")}
            tensors.update({f"trained/{name}": tensor for name, tensor in self.average.replaced.items()})
        state["records"] = [record.to_dict() for record in self.records]
        for key in _OUTCOMES:
            outcome = getattr(self, key)
            state[key] = None if outcome is None else _describe(outcome)
            if outcome is not None:
                tensors.update({f"{key}/{name}": tensor for name, tensor in _tensors_of(outcome).items()})
        save_file(tensors, folder / TENSORS_FILE)
        with replacing(folder / STATE_FILE) as temporary:
            temporary.write_text(json.dumps({"identity": identity, "progress": state}, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Progress":
        """Reads what `save` wrote."""
        state = read_state(folder)["progress"]
        tensors = load_file(folder / TENSORS_FILE)
        state["records"] = [StageRecord(**record) for record in state["records"]]
        for key in _OUTCOMES:
            state[key] = None if state[key] is None else _outcome(state[key], _below(tensors, key))
        if state["average"] is not None:
            state["average"] = WeightAverage(**state["average"], replaced=_below(tensors, "trained"))
        return cls(before=_below(tensors, "before"), adapters=_below(tensors, "adapters"), **state)


def read_state(folder: Path) -> dict[str, Any]:
    """Returns the plain data of a checkpoint: the run's `identity` and its `progress`."""
    return json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))


def _below(tensors: dict[str, torch.Tensor], prefix: str) -> Snapshot:
    # Copied, since the memory that safetensors maps is not aligned as torch's own is.
    return {
        name.removeprefix(f"{prefix}/"): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(f"{prefix}/")
    }


def _describe(outcome: Outcome) -> dict[str, Any]:
    return {
        "step": outcome.step,
        "metrics": outcome.metrics,
        "value": outcome.measured.value,
        "has_weights": outcome.weights is not None,
    }


def _tensors_of(outcome: Outcome) -> Snapshot:
    arrays = {"logits": outcome.measured.logits, "labels": outcome.measured.labels}
    # Copied, since safetensors refuses tensors that share memory, as those of `candidate` and `peak` may.
    measured = {
        f"measured/{name}": torch.from_numpy(np.array(array, order="C"))
        for name, array in arrays.items()
        if array is not None
    }
    return {**measured, **{f"weights/{name}": tensor for name, tensor in (outcome.weights or {}).items()}}


def _outcome(description: dict[str, Any], tensors: Snapshot) -> Outcome:
    measured = {name: tensor.numpy() for name, tensor in _below(tensors, "measured").items()}
    return Outcome(
        step=description["step"],
        metrics=description["metrics"],
        measured=Measured(description["value"], measured.get("logits"), measured.get("labels")),
        weights=_below(tensors, "weights") if description["has_weights"] else None,
    )
