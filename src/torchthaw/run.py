"""`torchthaw train`: from a recipe to the output folder."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
import yaml

from torchthaw.backbones.image_processing import TorchvisionImageProcessor
from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.backbones.registration import register_auto_classes
from torchthaw.console import Reporter, hide_loading_bars
from torchthaw.errors import RecipeError
from torchthaw.evaluation.files import replacing
from torchthaw.preparation import (
    PreparedData,
    build_model,
    check_model,
    prepare_data,
    selection_metric,
    training_arguments,
)
from torchthaw.recipe import Recipe
from torchthaw.sharing.hub import check_branch, check_repo_id, find_token, push_folder
from torchthaw.training import processes
from torchthaw.training.callbacks import ProgressCallback
from torchthaw.training.resume import differences, has_checkpoint
from torchthaw.training.trainer import ThawTrainer

# What may differ between a run and its continuation: it changes where and how fast, not what comes out.
_FREE_ON_RESUME = ("output", "num_workers", "report_to", "card", "push")


def run_recipe(
    recipe: Recipe, reporter: Reporter, *, resume: bool = False, command: str | None = None
) -> dict[str, Any]:
    """Trains, evaluates and saves what a recipe asks for.

    Started by `torchrun` or `accelerate launch`, all processes train, and the first one writes and evaluates.

    Args:
        recipe: The recipe.
        reporter: Where messages go.
        resume: Whether to go on with the run in the output folder, if it was interrupted; it ends exactly where it
            would have without the interruption.
        command: The command line that asked for it, for the model card.

    Returns:
        The content of `results.json`.

    Raises:
        ThawError: something that the recipe names does not exist or fit, or the output folder holds another run;
            nothing was written then, unless training itself failed.
    """
    started = time.monotonic()
    register_auto_classes()
    hide_loading_bars()
    processes.join()
    if not processes.is_main():
        reporter = Reporter(quiet=True)
    output = Path(recipe.output or f"thaw-{recipe.backbone}")
    if processes.on_main(lambda: _check_output(recipe, output, resume=resume)):
        reporter.say(f"{output} holds this run, complete; nothing is left to train")
        _push(recipe, output, reporter)
        return json.loads((output / "results.json").read_text(encoding="utf-8"))
    check_model(recipe)
    _check_push(recipe)
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
    results = _save(recipe, trainer, data, metric, reporter, output=output, command=command, started=started)
    _report(results, output, reporter)
    _push(recipe, output, reporter)
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
    return (output / "results.json").is_file() and (output / "README.md").is_file()


def _save(
    recipe: Recipe,
    trainer: ThawTrainer,
    data: PreparedData,
    metric: str,
    reporter: Reporter,
    *,
    output: Path,
    command: str | None,
    started: float,
) -> dict[str, Any]:
    facts = {
        "metric": metric,
        "data": {
            "source": recipe.data.path or recipe.data.name,
            "hub": recipe.data.name is not None,
            "revision": data.revision,
            "origins": data.origins,
            "split_by": "image",
            "method": f"stratified by class, chosen by the images' content and seed {recipe.seed}",
        },
        "dropped_images": [{"path": bad.path, "reason": bad.reason} for bad in data.bad_images],
        "command": command,
        "card": recipe.card.model_dump(mode="json", exclude_defaults=True),
    }
    return trainer.save_run(
        output, test_dataset=data.splits.get("test"), facts=facts, progress=reporter.progress, started=started
    )


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


def _check_push(recipe: Recipe) -> None:
    """Finds out before hours of training that a push at their end could not work."""
    if recipe.push.repo is not None:
        check_repo_id(recipe.push.repo)
        check_branch(recipe.push.revision)
        find_token(None, "Nothing was trained; leave out --push to train without the Hub, and push later")


def _push(recipe: Recipe, output: Path, reporter: Reporter) -> None:
    push = recipe.push
    if push.repo is None or not processes.is_main():
        return
    pushed = push_folder(output, push.repo, private=push.private, revision=push.revision, say=reporter.say)
    reporter.say(f"pushed to {pushed.url}, commit {pushed.commit}")


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
