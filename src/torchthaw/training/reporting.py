"""The trainer's reports: a folder with the model, its figures, plots and card."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from torchthaw.backbones.image_processing import TorchvisionImageProcessor
from torchthaw.data.label_sets import label_counts
from torchthaw.data.views import ImageView
from torchthaw.evaluation.augmented_predictions import check_test_time_augmentation
from torchthaw.evaluation.gallery import make_gallery
from torchthaw.evaluation.inference import predict_split
from torchthaw.evaluation.looks import describe_images, describe_look, digests_of, write_digests
from torchthaw.evaluation.multilabel import PER_CLASS, choose_thresholds
from torchthaw.evaluation.temperature import TemperatureScaling
from torchthaw.sharing.card import write_card
from torchthaw.sharing.report import write_report
from torchthaw.training import processes
from torchthaw.training.augmented_figures import AugmentedFigures
from torchthaw.training.datasets import as_view
from torchthaw.training.diagnosing import DiagnosingTrainer
from torchthaw.training.forgetting import SourceTask
from torchthaw.training.provenance import describe_recipe
from torchthaw.training.results import (
    ProgressBars,
    describe_environment,
    describe_model,
    draw_training,
    measure_views,
    measured_emissions,
    no_progress,
    prove_saved,
    read_audit,
    read_results,
    set_results_aside,
    write_results,
)


class ReportingTrainer(DiagnosingTrainer):
    """Measures the weights that a run ends with, and writes what is to be known of them beside them.

    Attributes:
        source_task: Images of the task that the weights were pretrained for, by which `save_run` measures what was
            forgotten of it; None does not.
    """

    source_task: SourceTask | None = None

    def save_run(
        self,
        folder: str | Path | None = None,
        *,
        test_dataset: Any = None,
        facts: Mapping[str, Any] | None = None,
        prove: bool = True,
        progress: ProgressBars = no_progress,
        started: float | None = None,
    ) -> dict[str, Any]:
        """Saves the model, measures what was saved, and writes it down: what `torchthaw train` leaves in its folder.

        The model and its image processor with the code to load them anywhere, `results.json`, `predictions/`,
        `plots/`, `report.html` and the model card, `README.md`. A new process without torchthaw loads the folder and
        must give the same logits. In a distributed run, all processes call this, and the first one works.

        Args:
            folder: Where to; None for the run's `output_dir`.
            test_dataset: Test images. They are read this once; leave them out until everything is chosen.
            facts: Further entries of `results.json`, such as `data`, `command` or `card` (see `CardOptions`).
            prove: Whether to load the folder in a new process.
            progress: Shows a bar: a function of a text and a number of images.
            started: When the work began, by `time.monotonic()`, for `seconds_total`; None counts the stages only.

        Returns:
            The content of `results.json`.

        Raises:
            SavedModelError: the folder gives something else than what was measured.
            PlanError: test-time augmentation by crops is asked for, and the test images cannot be cropped.
        """
        target = Path(folder or str(self.args.output_dir))
        test = as_view(test_dataset, self.model, self.processing_class, self.args, train=False)
        check_test_time_augmentation(self.args.tta, test)
        results = processes.on_main(lambda: self._save_run(target, test, facts or {}, prove, progress, started))
        if "calibration" in results:
            self.model.config.temperature = results["calibration"]["temperature"]
        return results

    def _save_run(
        self,
        folder: Path,
        test: Any = None,
        facts: Mapping[str, Any] | None = None,
        prove: bool = True,
        progress: ProgressBars = no_progress,
        started: float | None = None,
    ) -> dict[str, Any]:
        # A folder with results is a complete one, so they go first and come back last.
        earlier = set_results_aside(folder)
        self._settle_thresholds()
        scaling = None
        if self.args.calibrate == "temperature":
            scaling = TemperatureScaling(seed=self.args.seed)
            self.model.config.temperature = scaling.temperature
        self.model.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        outputs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        results = self._measure(folder, test, facts or {}, progress, scaling, outputs)
        if scaling is not None:
            self.model.config.temperature = scaling.temperature
            self.model.config.save_pretrained(folder)
        results |= _looks(earlier, results)
        gallery = make_gallery(self.model, self._views(test), outputs, read_audit(folder), folder)
        if prove:
            proof = prove_saved(folder, self.model, self._proof_view())
            results |= {} if proof is None else {"saved_folder": proof}
        if started is not None:
            results["seconds_total"] = round(time.monotonic() - started, 3)
        results |= {**measured_emissions(self.callback_handler.callbacks), **describe_environment()}
        draw_training(self.state.log_history, self.stage_records, folder)
        write_results(folder, results)
        write_report(folder, gallery)
        write_card(folder)
        return results

    def _measure(
        self,
        folder: Path,
        test: Any,
        facts: Mapping[str, Any],
        progress: ProgressBars,
        scaling: TemperatureScaling | None,
        outputs: dict[str, tuple[np.ndarray, np.ndarray]],
    ) -> dict[str, Any]:
        """Measures the weights of the model, and collects what else `results.json` holds but the environment."""
        views = self._views(test)
        measured = {split: view for split, view in views.items() if split != "train"}
        config, augmented = self.model.config, None
        if self.args.tta != "none":
            augmented = AugmentedFigures(
                self.args.tta, config.class_names, several_labels=config.several_labels, thresholds=config.thresholds
            )
        figures = measure_views(
            self.model,
            measured,
            folder,
            batch_size=self.args.per_device_eval_batch_size,
            num_workers=max(map(self.workers_for, measured.values()), default=0),
            collate_fn=self.data_collator,
            progress=progress,
            scaling=scaling,
            augmented=augmented,
            outputs=outputs,
        )
        # By content, since paths and splits may be others later.
        has_files = "test" in figures and isinstance(test, ImageView) and "path" in test.dataset.column_names
        digests = digests_of(test.dataset) if has_files else []
        if digests:
            write_digests(folder, digests)
        counts = {split: _counts(view) for split, view in views.items() if isinstance(view, ImageView)}
        sizes = {split: len(view) for split, view in views.items() if hasattr(view, "__len__")}
        given = dict(facts)
        data = {"splits": {split: {"counts": count} for split, count in counts.items()}, **given.pop("data", {})}
        for split, described in data.pop("origins", {}).items():
            data["splits"].setdefault(split, {}).update(described)
        records = self.stage_records
        return {
            "backbone": self.model.config.architecture,
            "weights": self.model.config.pretrained_weights,
            "seed": self.args.seed,
            "metric": self._metric_name(),
            **({"thresholds": self.args.thresholds} if self.model.config.several_labels else {}),
            "model": describe_model(folder, self.model, self.plan.name),
            "data": data,
            "num_images": sizes,
            "classes": self.model.config.class_names,
            **figures,
            **({"test_images": describe_images(digests)} if digests else {}),
            "recipe": {**describe_recipe(folder), **given.pop("recipe", {})},
            **({} if scaling is None else {"calibration": scaling.to_dict()}),
            **self._against_start(progress),
            **({} if augmented is None else {"tta": augmented.to_dict()}),
            "gate": {"gate": self.args.gate, "min_gain": self.args.min_gain, "on_reject": self.args.on_reject},
            "stages": [record.to_dict() for record in records],
            "diagnosis": [finding.to_dict() for finding in self.diagnose()],
            "seconds_total": round(sum(record.seconds for record in records), 3),
            **given,
        }

    def _against_start(self, progress: ProgressBars) -> dict[str, Any]:
        """Returns how far the backbone is from where it began, and what it forgot if that was asked for."""
        distance = self.distance_from_start()
        found: dict[str, Any] = {} if distance is None else {"distance_from_start": distance}
        if self.source_task is not None:
            found["forgetting"] = self.source_task.measure(
                self.model,
                cast(TorchvisionImageProcessor, self.processing_class),
                batch_size=self.args.per_device_eval_batch_size,
                num_workers=self.args.dataloader_num_workers or 0,
                progress=progress,
            )
        return found

    def _views(self, test: Any) -> dict[str, Any]:
        """Returns all images that there are by split."""
        views = {"train": self._train_data, "validation": self._validation_view(), "test": test}
        return {split: view for split, view in views.items() if view is not None}

    def _settle_thresholds(self) -> None:
        """Stores in the model what was asked for: from which probability on an image is given a class."""
        config, asked = self.model.config, self.args.thresholds
        view = self._validation_view()
        if not config.several_labels or asked == 0.5:
            return
        if asked != PER_CLASS:
            config.thresholds = [float(asked)] * config.num_labels
        elif view is not None:
            workers, size = self.workers_for(view), self.args.per_device_eval_batch_size
            config.thresholds = choose_thresholds(
                *predict_split(self.model, view, batch_size=size, num_workers=workers, collate_fn=self.data_collator)
            )

    def _proof_view(self) -> Any:
        """Returns images by which a saved folder is compared: for validation, or else for training, not augmented."""
        view = self._validation_view()
        if view is None and isinstance(self._train_data, ImageView):
            view = as_view(self._train_data.dataset, self.model, self.processing_class, self.args, train=False)
        return view

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        **options: Any,
    ) -> None:
        """Writes the model card into `output_dir`; `push_to_hub` does so before it uploads.

        The figures are of the weights that the model has now: they are measured, unless `save_run` has measured these
        weights there already.

        Args:
            language: Language of the class names, such as `en`.
            license: The model's licence; none is stated without it.
            tags: Further tags.
            model_name: The card's title.
            finetuned_from: Repository on the Hub of the model that training began with.
            tasks: Has no effect: the task is image classification.
            dataset_tags: Repositories on the Hub of the training data.
            dataset: Has no effect, as `dataset_args`.
            dataset_args: Has no effect.
            **options: Further fields of `CardOptions`.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        given = {
            "language": language,
            "license": license,
            "tags": _listed(tags),
            "title": model_name,
            "base_model": finetuned_from,
            "datasets": _listed(dataset_tags),
            **options,
        }
        given = {key: value for key, value in given.items() if value is not None}
        self.model.save_pretrained(folder)
        results = read_results(folder)
        if results is None or results["model"] != describe_model(folder, self.model, self.plan.name):
            self._save_run(folder, facts={"card": given})
        elif given:
            write_results(folder, {**results, "card": {**results.get("card", {}), **given}})
            write_card(folder)


def _looks(earlier: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how often test images were measured (`test_reads`), and a record of each time (`test_looks`)."""
    looks = {"test_reads": earlier.get("test_reads", 0), "test_looks": list(earlier.get("test_looks", []))}
    # Measuring the same images with the same weights again, after a crash, is no second look.
    if "test" in results and ("test" not in earlier or _measured(earlier) != _measured(results)):
        looks["test_reads"] += 1
        look = describe_look("train", results["test"], command=results.get("command"), recipe=results["recipe"])
        looks["test_looks"].append(look)
    return looks


def _measured(results: Mapping[str, Any]) -> Any:
    return results.get("model"), results.get("test_images")


def _counts(view: ImageView) -> dict[str, int]:
    return dict(zip(view.class_names, label_counts(view.dataset).tolist(), strict=True))


def _listed(value: str | list[str] | None) -> list[str] | None:
    return [value] if isinstance(value, str) else value
