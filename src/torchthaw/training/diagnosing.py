"""The trainer's diagnosis: what it knows of a run, handed to the rules of `torchthaw.training.diagnosis`."""

from typing import Any

import numpy as np
import torch

from torchthaw.data.views import ImageView
from torchthaw.data.workers import available_cores
from torchthaw.evaluation.inference import predict_split
from torchthaw.stages.plan import StagePlan
from torchthaw.training import processes
from torchthaw.training.datasets import as_view
from torchthaw.training.diagnosis import Course, Finding, diagnose, wants_training_accuracy
from torchthaw.training.pushing import PushingTrainer

# The standard error of an accuracy of so many images is at most 0.036, and they cost a second or a few.
_TRAINING_IMAGES = 200


class DiagnosingTrainer(PushingTrainer):
    """Says in words what the curves of its run show.

    Attributes:
        suspicious_labels: Number of images whose labels an audit finds suspicious, and of those that it looked at
            (`AuditReport.suspicious_labels`); None where that is not known.
    """

    suspicious_labels: tuple[int, int] | None = None
    _loading: int | None = None

    def diagnose(self) -> list[Finding]:
        """Says what the curves of the run, or of its stages so far, show; see `torchthaw.training.diagnosis`.

        Returns:
            The findings, the gravest first; none for several labels an image.
        """
        return [] if self.model.config.several_labels else diagnose(self._course())

    def _course(self) -> Course:
        view, train = self._validation_view(), self._train_data
        num_classes = self.model.config.num_labels
        return Course(
            log=self.state.log_history,
            records=self.stage_records,
            class_counts=_class_counts(view, num_classes),
            num_classes=num_classes,
            over=self.stage is None,
            plan=StagePlan.from_dict(self.args.plan),  # type: ignore[arg-type]  # settled by the arguments
            learning_rate=self.args.learning_rate,
            augmentation=self.args.augmentation,  # type: ignore[arg-type]  # likewise
            optimizer=str(getattr(self.args.optim, "value", self.args.optim)),
            label_smoothing=self.args.label_smoothing_factor,
            num_workers=self._processes_that_load(),
            cores=available_cores(),
            image_size=train.processor.crop_size["height"] if isinstance(train, ImageView) else None,
            suspicious_labels=self.suspicious_labels,
        )

    def _processes_that_load(self) -> int:
        if self._loading is None:
            # Once, since the best number is found by reading some images.
            self._loading = 0 if self._train_data is None else self.workers_for(self._train_data)
        return self._loading

    def _accuracy_on_training_images(self) -> dict[str, Any] | None:
        """Measures the weights of a stage that, by its validations, learned nothing; see `StageRecord`."""
        train = self._train_data
        if not isinstance(train, ImageView) or self.model.config.several_labels:
            return None
        return processes.on_main(lambda: self._measure_training_images(train))

    def _measure_training_images(self, train: ImageView) -> dict[str, Any] | None:
        if not wants_training_accuracy(self._course(), self._progress.stage_index):
            return None
        # Drawn, since data is often sorted by class.
        rows = np.random.default_rng(self.args.seed).permutation(len(train))[:_TRAINING_IMAGES]
        chosen = train.dataset.select(np.sort(rows))
        view = as_view(chosen, self.model, self.processing_class, self.args, train=False)
        # A loader draws a seed: what comes after must not depend on whether this was measured.
        with torch.random.fork_rng(devices=[]):
            logits, labels = predict_split(
                self.model, view, batch_size=self.args.per_device_eval_batch_size, num_workers=self.workers_for(view)
            )
        right = logits.argmax(axis=1) == labels
        classes = [right[labels == label] for label in range(self.model.config.num_labels)]
        return {
            "balanced_accuracy": round(float(np.mean([found.mean() for found in classes if len(found)])), 4),
            "class_counts": [len(found) for found in classes],
        }

    def _validation_view(self) -> Any:
        """Returns the validation images; of several sets the one that the best weights are chosen by."""
        if not isinstance(self.eval_dataset, dict):
            return self.eval_dataset
        key = self._metric_key()
        named = [name for name in self.eval_dataset if key.startswith(f"eval_{name}_")]
        return self.eval_dataset[named[0] if named else next(iter(self.eval_dataset))]


def _class_counts(view: Any, num_classes: int) -> list[int]:
    if not isinstance(view, ImageView):
        return []
    counts: list[int] = np.bincount(np.asarray(view.dataset["label"]), minlength=num_classes).tolist()
    return counts
