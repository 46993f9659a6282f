"""One training run with prepared data, from a new head to a saved and measured folder."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers

from torchthaw.console import Reporter
from torchthaw.console.profile_table import report_profile
from torchthaw.console.run_progress import RunPart, RunProgressCallback
from torchthaw.data_preparation import PreparedData
from torchthaw.evaluation.files import replacing
from torchthaw.preparation import build_model, training_arguments
from torchthaw.recipe import Recipe
from torchthaw.source_tasks import source_task
from torchthaw.training import processes
from torchthaw.training.callbacks import DiagnosisCallback
from torchthaw.training.profiling import ProfileCallback
from torchthaw.training.provenance import git_state
from torchthaw.training.results import AUDIT_FILE
from torchthaw.training.resume import has_checkpoint
from torchthaw.training.trainer import ThawTrainer

RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class Job:
    """A run to be done.

    Attributes:
        recipe: What to train, and how.
        data: The images; without a validation split every stage keeps its last weights.
        metric: What chooses the best weights.
        output: Folder of the results.
        command: The command line that asked for it, for the model card.
        resume: Whether to go on from the last whole checkpoint in `output`.
        started: When the work began, by `time.monotonic()`.
        profile: Whether to find out what bounds the speed of each stage.
        recipe_file: The file that the recipe was read from; None for one that comes with torchthaw.
        part: What the run is of a larger one, for the progress bar.
    """

    recipe: Recipe
    data: PreparedData
    metric: str
    output: Path
    command: str | None = None
    resume: bool = False
    started: float = field(default_factory=time.monotonic)
    profile: bool = False
    recipe_file: Path | None = None
    part: RunPart = field(default_factory=RunPart)


def make_trainer(job: Job) -> ThawTrainer:
    """Makes the model with a new head, which depends on the recipe's seed alone, and its trainer; writes nothing.

    Raises:
        ThawError: backbone, weights, settings and data do not fit together.
    """
    transformers.set_seed(job.recipe.seed)
    model, processor = build_model(job.recipe, job.data.class_names, several_labels=job.data.several_labels)
    splits = job.data.splits
    trainer = ThawTrainer(
        model=model,
        args=training_arguments(
            job.recipe,
            num_images=len(splits["train"]),
            metric=job.metric,
            folder=job.output / "stages",
            validates="validation" in splits,
        ),
        train_dataset=splits["train"],
        eval_dataset=splits.get("validation"),
        processing_class=processor,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if job.data.audit is not None:
        trainer.suspicious_labels = job.data.audit.suspicious_labels
    trainer.source_task = source_task(job.recipe)
    return trainer


def train_and_save(
    job: Job, trainer: ThawTrainer, reporter: Reporter, *, facts: Mapping[str, Any] | None = None, prove: bool = True
) -> dict[str, Any]:
    """Trains, measures the best weights, the test images included, and saves.

    Args:
        job: The run.
        trainer: What `make_trainer` gave for it.
        reporter: Where messages go.
        facts: Further entries of `results.json`.
        prove: Whether to load the folder in a new process.

    Returns:
        The content of `results.json`.
    """
    profiler = ProfileCallback(job.output) if job.profile else None
    _train(job, trainer, reporter, profiler=profiler)
    if profiler is not None:
        report_profile(profiler, reporter)
    return trainer.save_run(
        job.output,
        test_dataset=job.data.splits.get("test"),
        facts={**recipe_facts(job), **(facts or {})},
        prove=prove,
        progress=reporter.progress,
        started=job.started,
    )


def recipe_facts(job: Job) -> dict[str, Any]:
    """Returns what `results.json` says of the recipe and the data, beside what the trainer knows."""
    recipe, data = job.recipe, job.data
    return {
        "metric": job.metric,
        "data": {
            "source": recipe.data.path or recipe.data.name,
            "hub": recipe.data.name is not None,
            "revision": data.revision,
            "origins": data.origins,
            "split_by": data.split_by,
            "method": data.split_method,
        },
        "dropped_images": [{"path": bad.path, "reason": bad.reason} for bad in data.bad_images],
        "command": job.command,
        "recipe": {} if job.recipe_file is None else git_state(job.recipe_file),
        "card": recipe.card.model_dump(mode="json", exclude_defaults=True),
    }


def write_recipe(recipe: Recipe, folder: Path, *, comment: str = "") -> None:
    """Writes the resolved recipe into the folder of a run, below lines of comment."""
    if processes.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / RECIPE_FILE, "".join(f"# {line}\n" for line in comment.splitlines()) + recipe.to_yaml())


def write_audit(data: PreparedData, folder: Path) -> None:
    """Writes what the audit found into the folder of a run."""
    if data.audit is not None and processes.is_main():
        _write(folder / AUDIT_FILE, json.dumps(data.audit.to_dict(), indent=2))


def _train(job: Job, trainer: ThawTrainer, reporter: Reporter, *, profiler: ProfileCallback | None) -> None:
    goes_on = job.resume and processes.on_main(lambda: has_checkpoint(Path(str(trainer.args.output_dir))))
    if job.resume and not goes_on:
        reporter.say("No whole checkpoint was left, so the run starts from the beginning.")
    progress = RunProgressCallback(reporter, job.part)
    trainer.add_callback(progress)
    trainer.add_callback(DiagnosisCallback(trainer.diagnose, reporter.say))
    if profiler is not None:
        trainer.add_callback(profiler)
    trainer.on_frozen_progress = progress.computing
    with progress.shown():
        trainer.train(resume_from_checkpoint=goes_on or None)


def _write(file: Path, text: str) -> None:
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
