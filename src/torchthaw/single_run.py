"""One training run with prepared data, from a new head to a saved and measured folder."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers

from torchthaw.auditing import AUDIT_FILE
from torchthaw.console import Reporter
from torchthaw.data_preparation import PreparedData
from torchthaw.evaluation.files import replacing
from torchthaw.preparation import build_model, training_arguments
from torchthaw.recipe import Recipe
from torchthaw.training import processes
from torchthaw.training.bottlenecks import PARTS
from torchthaw.training.callbacks import DiagnosisCallback, ProgressCallback
from torchthaw.training.diagnosis import Finding
from torchthaw.training.profiling import ProfileCallback
from torchthaw.training.provenance import git_state
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
            job.recipe, metric=job.metric, folder=job.output / "stages", validates="validation" in splits
        ),
        train_dataset=splits["train"],
        eval_dataset=splits.get("validation"),
        processing_class=processor,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if job.data.audit is not None:
        trainer.suspicious_labels = job.data.audit.suspicious_labels
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
    _train(trainer, reporter, resume=job.resume, profiler=profiler)
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


def announce(job: Job, trainer: ThawTrainer, reporter: Reporter) -> None:
    """Says what will be trained on what, and shows the plan."""
    recipe, data = job.recipe, job.data
    sizes = ", ".join(f"{len(images)} {split}" for split, images in data.splits.items())
    reporter.say(f"{recipe.backbone} ({recipe.weights or 'random weights'}), {len(data.class_names)} classes, {sizes}")
    groups = list(trainer.model.layer_groups())
    rows = []
    for stage in trainer.plan.stages:
        rates = stage.learning_rates(groups)
        shown = (
            f"{min(rates.values()):.1e} - {max(rates.values()):.1e}" if len(rates) > 1 else f"{rates[groups[-1]]:.1e}"
        )
        length = f"{stage.steps} steps" if stage.steps else f"{stage.epochs} epochs"
        rows.append((stage.name, " ".join(rates), length, shown, trainer.batch_norm_policy(stage)))
    chosen = f"best weights by validation {job.metric}" if "validation" in data.splits else "no validation"
    reporter.table(
        f"plan: {trainer.plan.name}, {chosen}", ("stage", "trains", "length", "learning rates", "BatchNorm"), rows
    )
    reporter.say(
        f"Frozen groups run as in inference: BatchNorm statistics, dropout and stochastic depth. Gate: {recipe.gate}."
    )
    for sentence in trainer.balance.sentences(job.metric):
        reporter.say(sentence)


def report(results: Mapping[str, Any], output: Path, reporter: Reporter) -> None:
    """Says what came out."""
    metric = results["metric"]
    reporter.table(
        "what each stage reached",
        (
            "stage",
            "epochs",
            "trained parameters",
            "seconds",
            "images/s",
            "waiting for data",
            "peak memory",
            f"best validation {metric}",
            "kept",
        ),
        [
            (
                stage["name"],
                stage["epochs"],
                f"{stage['trainable_parameters']:,}",
                f"{stage['seconds']:.1f}",
                _shown(stage["step_images_per_second"], ".0f"),
                _shown(stage["data_wait_share"], ".0%"),
                _shown(stage["peak_memory_mb"], ",.0f", " MiB"),
                "-" if stage["best_metric"] is None else f"{stage['best_metric']:.4f}",
                "yes" if stage["accepted"] else "no",
            )
            for stage in results["stages"]
        ],
    )
    for stage in results["stages"]:
        for sentence in filter(None, (_on_frozen_part(stage), _on_live_part(stage))):
            reporter.say(sentence)
    for finding in results.get("diagnosis", ()):
        reporter.say(Finding(**finding).sentence)
    for split in ("validation", "test"):
        if split in results:
            reporter.say(f"{split}: {figures_line(results[split])}")
    reporter.say(f"saved to {output}; use it with pipeline('image-classification', model={str(output)!r})")


def figures_line(figures: Mapping[str, Any]) -> str:
    """Writes the figures of a split in a line: accuracy first, or where images may have several labels mAP."""
    several = "map" in figures
    key, name = ("map", "mAP") if several else ("accuracy", "accuracy")
    (low, high), method = figures[f"{key}_interval"], figures["interval_method"]
    more = f", all labels right {figures['accuracy']:.4f}" if several else ""
    return (
        f"{name} {figures[key]:.4f} (95 % interval {low:.3f} to {high:.3f}, {method}), "
        f"macro F1 {figures['macro_f1']:.4f}{more}, {figures['num_images']} images"
    )


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _on_frozen_part(stage: Mapping[str, Any]) -> str | None:
    """Says what a stage saved by what it kept frozen."""
    frozen = stage["frozen_part"]
    if not frozen:
        return None
    cached = " and ".join(frozen["cached"])
    what = f"computed once for {cached} images" if cached else "computed without a graph, anew for each batch"
    dtype = "float32" if frozen["dtype"] == "float32" else f"{frozen['dtype']} (for training)"
    return f"{stage['name']}: frozen layers up to {frozen['border']} in {dtype}, {what}"


def _on_live_part(stage: Mapping[str, Any]) -> str | None:
    """Says what a stage trained in, where that is not what the weights are in."""
    if stage["live_dtype"] in (None, "float32"):
        return None
    return f"{stage['name']}: what trains is computed in {stage['live_dtype']}, weights and head in float32"


def report_profile(profiler: ProfileCallback, reporter: Reporter) -> None:
    """Says where the time of the stages went, and what would change it."""
    if not profiler.stages:
        return
    reporter.table(
        "where the time of a training step goes",
        ("stage", "ms a step", "images/s", *PARTS, "largest operator", "steps of the stage"),
        [
            (
                stage["name"],
                f"{1000 * stage['step_seconds']:.1f}",
                f"{stage['images_per_second']:.0f}",
                *(f"{stage['shares'][part]:.0%}" for part in PARTS),
                stage["top_operators"][0]["name"] if stage["top_operators"] else "-",
                f"{stage['in_steps']:.0%}",
            )
            for stage in profiler.stages
        ],
    )
    for stage in profiler.stages:
        advice = "" if stage["advice"] is None else f". In the recipe: {stage['advice']}"
        reporter.say(f"{stage['sentence']}{advice}")
    reporter.say(f"traces and figures: {profiler.folder}; open a trace at https://ui.perfetto.dev")


def _train(trainer: ThawTrainer, reporter: Reporter, *, resume: bool, profiler: ProfileCallback | None) -> None:
    goes_on = resume and processes.on_main(lambda: has_checkpoint(Path(str(trainer.args.output_dir))))
    if resume and not goes_on:
        reporter.say("No whole checkpoint was left, so the run starts from the beginning.")
    with reporter.progress("training", 1) as bar:
        trainer.add_callback(ProgressCallback(bar.update, reporter.say))
        trainer.add_callback(DiagnosisCallback(trainer.diagnose, reporter.say))
        if profiler is not None:
            trainer.add_callback(profiler)
        trainer.train(resume_from_checkpoint=goes_on or None)


def _write(file: Path, text: str) -> None:
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
