"""`torchthaw train`: from a recipe to the output folder."""

import json
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import transformers
import yaml
from datasets import Dataset

from torchthaw._version import __version__
from torchthaw.backbones.image_processing import TorchvisionImageProcessor
from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.backbones.registration import register_auto_classes
from torchthaw.console import Bar, Reporter
from torchthaw.data.views import ImageView
from torchthaw.errors import RecipeError
from torchthaw.evaluation.files import replacing
from torchthaw.evaluation.inference import predict_logits
from torchthaw.evaluation.metrics import classification_metrics
from torchthaw.evaluation.plots import plot_confusion_matrix, plot_curves, plot_learning_rates, plot_reliability
from torchthaw.evaluation.predictions import write_predictions
from torchthaw.preparation import (
    PreparedData,
    build_model,
    check_model,
    prepare_data,
    selection_metric,
    training_arguments,
)
from torchthaw.recipe import Recipe
from torchthaw.training import processes
from torchthaw.training.callbacks import ProgressCallback
from torchthaw.training.resume import differences, has_checkpoint
from torchthaw.training.trainer import ThawTrainer

# What may differ between a run and its continuation: it changes where and how fast, not what comes out.
_FREE_ON_RESUME = ("output", "num_workers")


def run_recipe(recipe: Recipe, reporter: Reporter, *, resume: bool = False) -> dict[str, Any]:
    """Trains, evaluates and saves what a recipe asks for.

    Started by `torchrun` or `accelerate launch`, all processes train, and the first one writes and evaluates.

    Args:
        recipe: The recipe.
        reporter: Where messages go.
        resume: Whether to go on with the run in the output folder, if it was interrupted; it ends exactly where it
            would have without the interruption.

    Returns:
        The content of `results.json`.

    Raises:
        ThawError: something that the recipe names does not exist or fit, or the output folder holds another run;
            nothing was written then, unless training itself failed.
    """
    started = time.monotonic()
    register_auto_classes()
    transformers.utils.logging.disable_progress_bar()
    processes.join()
    if not processes.is_main():
        reporter = Reporter(quiet=True)
    output = Path(recipe.output or f"thaw-{recipe.backbone}")
    if processes.on_main(lambda: _check_output(recipe, output, resume=resume)):
        reporter.say(f"{output} holds this run, complete; nothing is left to do")
        return json.loads((output / "results.json").read_text(encoding="utf-8"))
    check_model(recipe)
    data = prepare_data(recipe.data, seed=recipe.seed, reporter=reporter)
    metric = selection_metric(recipe, data)
    transformers.set_seed(recipe.seed)
    model, processor = build_model(recipe, data.class_names)
    trainer = _make_trainer(recipe, model, processor, data, metric, output)
    _announce(recipe, trainer, data, metric, reporter)
    if processes.is_main():
        output.mkdir(parents=True, exist_ok=True)
        _write(output / "recipe.yaml", recipe.to_yaml())
    _train(trainer, reporter, resume=resume)
    results = processes.on_main(lambda: _write_results(recipe, trainer, data, metric, output, reporter, started))
    _report(results, output, reporter)
    return results


def _check_output(recipe: Recipe, output: Path, *, resume: bool) -> bool:
    """Checks that the output folder is free, or holds this run; returns whether that is complete already."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    another = f"pass another one, such as --output {output}-2, or remove it"
    saved = output / "recipe.yaml"
    if not saved.is_file():
        raise RecipeError(
            f"the output folder {output} exists and is not empty, and torchthaw never overwrites anything; {another}"
        )
    if not resume:
        raise RecipeError(
            f"the output folder {output} holds a run, and torchthaw never overwrites one; add --resume to go on with "
            f"it if it was interrupted; else {another}"
        )
    was, now = yaml.safe_load(saved.read_text(encoding="utf-8")), recipe.model_dump(mode="json")
    for key in _FREE_ON_RESUME:
        was.pop(key, None), now.pop(key, None)
    different = "".join(f"\n  - {line}" for line in differences(was, now))
    if different:
        raise RecipeError(
            f"{output} holds a run of another recipe:{different}\nTo go on with that run, write: "
            f"torchthaw train {saved} --resume; else {another}"
        )
    return (output / "results.json").is_file()


def _write_results(
    recipe: Recipe,
    trainer: ThawTrainer,
    data: PreparedData,
    metric: str,
    output: Path,
    reporter: Reporter,
    started: float,
) -> dict[str, Any]:
    processor = trainer.processing_class
    assert isinstance(processor, TorchvisionImageProcessor)
    results = {
        "backbone": recipe.backbone,
        "weights": recipe.weights,
        "seed": recipe.seed,
        "metric": metric,
        "num_images": {split: len(images) for split, images in data.splits.items()},
        "dropped_images": [{"path": bad.path, "reason": bad.reason} for bad in data.bad_images],
        "classes": data.class_names,
        **_evaluate_splits(recipe, trainer.model, processor, data, output, reporter),
        "gate": {"gate": recipe.gate, "min_gain": recipe.min_gain, "on_reject": recipe.on_reject},
        "stages": [record.to_dict() for record in trainer.stage_records],
        "seconds_total": round(time.monotonic() - started, 3),
        "peak_memory_mb": _peak_memory_mb(),
        "versions": _versions(),
    }
    trainer.model.save_pretrained(output)
    processor.save_pretrained(output)
    _draw_training(trainer, output)
    # Last, so that a folder with results is a complete one.
    _write(output / "results.json", json.dumps(results, indent=2))
    return results


def _make_trainer(
    recipe: Recipe,
    model: TorchvisionForImageClassification,
    processor: TorchvisionImageProcessor,
    data: PreparedData,
    metric: str,
    output: Path,
) -> ThawTrainer:
    arguments = training_arguments(recipe, metric=metric, folder=output / "stages")
    trainer = ThawTrainer(
        model=model,
        args=arguments,
        train_dataset=data.splits["train"],
        eval_dataset=data.splits["validation"],
        processing_class=processor,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _train(trainer: ThawTrainer, reporter: Reporter, *, resume: bool) -> None:
    goes_on = resume and processes.on_main(lambda: has_checkpoint(Path(str(trainer.args.output_dir))))
    if resume and not goes_on:
        reporter.say("No whole checkpoint was left, so the run starts from the beginning.")
    with reporter.progress("training", 1) as bar:
        trainer.add_callback(ProgressCallback(bar.update, reporter.say))
        trainer.train(resume_from_checkpoint=goes_on or None)


def _evaluate_splits(
    recipe: Recipe,
    model: TorchvisionForImageClassification,
    processor: TorchvisionImageProcessor,
    data: PreparedData,
    output: Path,
    reporter: Reporter,
) -> dict[str, Any]:
    """Measures the best weights on validation and, this once, on test images; writes predictions and plots."""
    results: dict[str, Any] = {}
    for split in ("validation", "test"):
        if split not in data.splits:
            continue
        images = data.splits[split]
        with reporter.progress(f"evaluating {split}", len(images)) as bar:
            logits = evaluation_logits(model, processor, images, recipe.batch_size, recipe.num_workers, bar)
        labels = np.asarray(images["label"])
        results[split] = classification_metrics(logits, labels, data.class_names, seed=recipe.seed)
        write_predictions(output / "predictions" / f"{split}.jsonl", images["path"], labels, logits, data.class_names)
        plots = output / "plots"
        plot_confusion_matrix(labels, logits.argmax(1), data.class_names, plots / f"confusion_{split}.png")
        probabilities = torch.from_numpy(logits).softmax(-1).numpy()
        plot_reliability(probabilities, labels, plots / f"reliability_{split}.png")
    return results


def evaluation_logits(
    model: TorchvisionForImageClassification,
    processor: TorchvisionImageProcessor,
    images: Dataset,
    batch_size: int,
    num_workers: int,
    bar: Bar,
) -> np.ndarray:
    """Computes the logits of a split, shape (images, classes), with a progress bar."""
    view = ImageView(images, processor)
    return predict_logits(model, view, batch_size=batch_size, num_workers=num_workers, on_progress=bar.update)


def _draw_training(trainer: ThawTrainer, output: Path) -> None:
    borders = []
    start = 0
    for record in trainer.stage_records:
        end = start + record.epochs
        borders.append({"name": record.name, "start_epoch": start, "end_epoch": end, "accepted": record.accepted})
        start = end
    plot_curves(trainer.state.log_history, borders, output / "plots" / "curves.png")
    plot_learning_rates(trainer.state.log_history, borders, output / "plots" / "learning_rates.png")


def _announce(recipe: Recipe, trainer: ThawTrainer, data: PreparedData, metric: str, reporter: Reporter) -> None:
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
    reporter.table(
        f"plan: {trainer.plan.name}, best weights by validation {metric}",
        ("stage", "trains", "length", "learning rates", "BatchNorm"),
        rows,
    )
    reporter.say(
        f"Frozen groups run as in inference: BatchNorm statistics, dropout and stochastic depth. Gate: {recipe.gate}."
    )


def _report(results: Mapping[str, Any], output: Path, reporter: Reporter) -> None:
    metric = results["metric"]
    reporter.table(
        "what each stage reached",
        ("stage", "epochs", "trained parameters", "seconds", f"best validation {metric}", "kept"),
        [
            (
                stage["name"],
                stage["epochs"],
                f"{stage['trainable_parameters']:,}",
                f"{stage['seconds']:.1f}",
                "-" if stage["best_metric"] is None else f"{stage['best_metric']:.4f}",
                "yes" if stage["accepted"] else "no",
            )
            for stage in results["stages"]
        ],
    )
    for split in ("validation", "test"):
        if split in results:
            figures = results[split]
            low, high = figures["accuracy_interval"]
            reporter.say(
                f"{split}: accuracy {figures['accuracy']:.4f} (95 % interval {low:.3f} to {high:.3f}), "
                f"macro F1 {figures['macro_f1']:.4f}, {figures['num_images']} images"
            )
    reporter.say(f"saved to {output}; use it with pipeline('image-classification', model={str(output)!r})")


def _write(file: Path, text: str) -> None:
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _peak_memory_mb() -> float:
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return round(memory.peak_wset / 2**20, 1)  # type: ignore[attr-defined]
    import resource  # Unix only

    # Kilobytes on Linux, bytes on macOS.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def _versions() -> dict[str, str]:
    packages = ("torch", "torchvision", "transformers", "datasets", "accelerate", "scikit-learn", "pillow")
    python = ".".join(str(part) for part in sys.version_info[:3])
    return {"torchthaw": __version__, "python": python, **{name: metadata.version(name) for name in packages}}
