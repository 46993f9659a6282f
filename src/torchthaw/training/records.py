"""What is known about each stage after it ran."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class StageRecord:
    """Result of one stage, as it stands in `results.json`.

    Attributes:
        name: The stage's name.
        epochs: Epochs that were run, in full or in part.
        steps: Optimizer steps that were made.
        seconds: Wall time, validation and checkpoints included.
        train_images_per_second: Training images over the time of the whole stage.
        trainable_parameters: Number of trainable scalars.
        best_metric: Best validation value of the selection metric within the stage; None without validation.
        best_step: Optimizer steps of the stage up to that; None also if it lies in a try that broke down.
        best_epoch: The same in epochs of the stage, a fraction where validation came within an epoch.
        learning_rates: Peak rate of each live layer group.
        batch_norm: BatchNorm policy of live groups.
        accepted: Whether the run went on from this stage's weights.
        reason: Why it was accepted or not.
        comparison: The selection metric before and after on the same validation images, with the paired difference,
            its 95 % interval and p-value; None where nothing was measured before.
        changes: How far each layer group moved: L2 norm of the change over that before, up to the stage's best epoch.
        frozen_unchanged: Whether every frozen tensor was bit-identical at the end.
        ended_early: Why the stage was shorter than planned; None if it was not.
        step_images_per_second: Training images over the time of training steps, their data included; of the process
            that ended the stage.
        data_wait_share: Share of that time that went by waiting for data.
        peak_memory_mb: Peak memory of the process up to the stage's end in MiB; with CUDA, of the GPU in the stage.
        frozen_part: How the frozen part was computed: its `border` (the first module behind it), its `dtype` for
            training images (validation computes in the model's own), and the splits of which it was `cached`; empty
            where all of the model ran.
        live_dtype: What the part that trains was computed in; None where that was left to the model's own code.
        train_accuracy: `balanced_accuracy` of the stage's last weights on at most 200 training images without
            augmentation, and their `class_counts`; measured only where validation is no better than chance, which
            leaves open why.
        average: Which average of weights the stage handed on: its `kind` (`ema` or `swa`), the `updates` that were made
            to it, and with `ema` the `decay` of the last one; None where the weights were not averaged.
        wise_ft: Where the stage's best weights were mixed with those before it: `alpha`, the share of the stage's, and
            the validation `metric` of each share that was tried; `best_metric` and `comparison` are of the mixture.
        probe: Where the head was fitted by logistic regression: the `penalty` that was chosen, the `loss` on all
            training images, and `macro_f1` and `accuracy` on those of them that were held out in turn, and their number
            (`held_out_images`); both None where nothing could be held out.
        selection: Which of its validated weights the stage proposed; see `Stage`.
        chosen: Why a stage with `by_probe` had the rates that it had.
    """

    name: str
    epochs: int
    steps: int
    seconds: float
    train_images_per_second: float
    trainable_parameters: int
    best_metric: float | None
    learning_rates: dict[str, float]
    batch_norm: str
    accepted: bool
    reason: str
    comparison: dict[str, Any] | None = None
    changes: dict[str, float] = field(default_factory=dict)
    frozen_unchanged: bool = True
    ended_early: str | None = None
    best_step: int | None = None
    best_epoch: float | None = None
    step_images_per_second: float | None = None
    data_wait_share: float | None = None
    peak_memory_mb: float | None = None
    frozen_part: dict[str, Any] = field(default_factory=dict)
    live_dtype: str | None = None
    train_accuracy: dict[str, Any] | None = None
    average: dict[str, Any] | None = None
    wise_ft: dict[str, Any] | None = None
    probe: dict[str, Any] | None = None
    selection: str = "best"
    chosen: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the record as plain data."""
        return asdict(self)
