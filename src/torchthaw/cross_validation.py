"""`cv: 5` in a recipe: a run for each fold, what they say together, and a model of all their images if asked.

Data is loaded, checked and cut into folds once. Each fold is a run of its own in `OUTPUT/folds/1`, `2` ..., with the
recipe's seed, so that it begins with the same new head; its best epochs and the stages that are kept are chosen on its
own validation images. Test images are in no fold.
"""

import dataclasses
import gc
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from datasets import Dataset, DatasetDict

from torchthaw.console import Reporter
from torchthaw.console.run_progress import RunPart
from torchthaw.data.splitting import fold_dataset
from torchthaw.data_preparation import PreparedData, prepare_data
from torchthaw.errors import RecipeError, TrainingError
from torchthaw.evaluation.folds import fold_figures, pool_folds, stage_votes
from torchthaw.preparation import training_arguments
from torchthaw.recipe import Recipe
from torchthaw.run_console import announce, figures_line, report
from torchthaw.single_run import (
    RECIPE_FILE,
    Job,
    make_trainer,
    recipe_facts,
    train_and_save,
    write_audit,
    write_recipe,
)
from torchthaw.stages import auto
from torchthaw.training import processes
from torchthaw.training.completion import METRIC_SCHEDULES, check_data
from torchthaw.training.results import describe_environment, read_results, write_results
from torchthaw.user_errors import as_user_error

FOLDS = "folds"
EXPECTED = (
    "No validation images were left for the final model: what to expect of it are the figures of cross-validation, "
    "which are of models that were trained on fewer images."
)


def prepare_images(recipe: Recipe, reporter: Reporter, *, features: bool = True) -> PreparedData:
    """Loads, checks and splits the images of a recipe; for a cross-validation, given validation images join training.

    Raises:
        DataError: the data cannot be read or does not fit.
        RecipeError: a stage follows the validation metric, which the final model of a cross-validation has not got.
    """
    if recipe.cv is None:
        return prepare_data(recipe, reporter=reporter, features=features)
    _check_schedules(recipe)
    return prepare_data(recipe, reporter=reporter, features=features, needs_validation=False)


def _check_schedules(recipe: Recipe) -> None:
    for stage in recipe.stage_plan().stages if recipe.cv_final else ():
        if stage.schedule in METRIC_SCHEDULES:
            raise RecipeError(
                f"stage {stage.name!r} has the schedule {stage.schedule}, which follows the validation metric, but "
                "the final model of a cross-validation has no validation images; write another schedule such as "
                "cosine, or cv_final: false"
            )


def make_folds(recipe: Recipe, data: PreparedData, metric: str) -> list[PreparedData]:
    """Cuts the training images into folds, without the test images, and checks that each can be trained on.

    Args:
        recipe: With `cv`.
        data: Without a validation split.
        metric: What chooses the best weights.

    Raises:
        ThawError: there are too few images or groups for so many folds, or for the batch size.
    """
    assert recipe.cv is not None
    images = DatasetDict({"train": data.splits["train"]})
    folds = []
    made = fold_dataset(images, folds=recipe.cv, seed=recipe.seed, by=recipe.data.split_by, together=data.together)
    for number, splits in enumerate(made, start=1):
        with as_user_error():
            arguments = training_arguments(
                recipe, num_images=len(splits["train"]), metric=metric, folder=Path("stages")
            )
            check_data(arguments, splits["train"])
        origins = {
            "train": {"origin": "the other folds", "share": None},
            "validation": {"origin": f"fold {number} of {recipe.cv}", "share": None},
        }
        folds.append(dataclasses.replace(data, splits=splits, origins=origins))
    return folds


def cross_validate(job: Job, reporter: Reporter) -> dict[str, Any]:
    """Runs all folds, and the final model if the recipe asks for one.

    Folds that are complete in the output folder are not run again if the job is to be resumed.

    Args:
        job: Its recipe has `cv`, its data no validation split.
        reporter: Where messages go.

    Returns:
        The content of `results.json`: with a final model, what it is for any run; in any case `cross_validation`.

    Raises:
        ThawError: there are too few images, a completed fold is of other images, or no stage is left for the final
            model.
    """
    recipe, output = job.recipe, job.output
    folds = make_folds(recipe, job.data, job.metric)
    results = []
    seconds: dict[str, float] = {}
    for number, fold in enumerate(folds, start=1):
        folder = output / FOLDS / str(number)
        part = RunPart(f"fold {number}/{recipe.cv}", seconds)
        fold_job = dataclasses.replace(job, data=fold, output=folder, started=time.monotonic(), part=part)
        results.append(_run_fold(fold_job, number, output, reporter))
        # A trainer refers to itself; the next one shall find its memory free.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    summary = processes.on_main(lambda: _summarize(job, results))
    _show(summary, reporter)
    document = processes.on_main(lambda: _document(job, results, summary))
    if recipe.cv_final:
        return _run_final(job, summary, reporter)
    reporter.say(
        f"No model was trained on all images; those of the folds are in {output / FOLDS}. For one, write: "
        f"torchthaw train {output / RECIPE_FILE} --resume --set cv_final=true"
    )
    if "test" in job.data.splits:
        reporter.say(f"The {len(job.data.splits['test'])} test images were not used; they are for the final model.")
    return document


def final_recipe(
    recipe: Recipe,
    stages: Sequence[Mapping[str, Any]],
    policies: Mapping[str, str],
    shares: Mapping[str, float],
) -> Recipe:
    """Returns the recipe of the final model: without validation, the stages and their lengths are those of the folds.

    Args:
        recipe: With `cv`.
        stages: What `stage_votes` gives.
        policies: BatchNorm policy of each stage in the folds: more images must not turn `auto` into another one.
        shares: Likewise of the weights of stages in the mixtures with those before them (WiSE-FT).

    Returns:
        The recipe with the stages that at least half of the folds kept, one that the probe added there included, each
        as long as the median (rounded up) of its best epochs, or steps where it is counted in steps, in the folds that
        kept it; the gate is off.

    Raises:
        TrainingError: there is no such stage.
    """
    votes = {vote["name"]: vote for vote in stages}
    kept = []
    for stage in auto.with_added(recipe.stage_plan().stages, set(votes), head_rate=recipe.learning_rate):
        vote = votes.get(stage.name)
        if vote is None or 2 * sum(vote["kept"]) < len(vote["kept"]):
            continue
        length: dict[str, Any] = {"epochs": max(1, math.ceil(median(vote["best_epochs"])))}
        if stage.steps is not None:
            length = {"steps": max(1, math.ceil(median(vote["best_steps"])))}
        policy = stage.batch_norm
        # Where the probe chose to train BatchNorm, that of the final model chooses again, as it belongs to a new head.
        if policy == "auto" and not (stage.by_probe and policies[stage.name] == "train"):
            policy = cast(Any, policies[stage.name])
        share = shares.get(stage.name) if stage.wise_ft is None else stage.wise_ft
        kept.append(dataclasses.replace(stage, patience=None, batch_norm=policy, wise_ft=share, **length))
    if not kept:
        raise TrainingError(
            "no stage was kept by at least half of the folds, so there is nothing to train a final model by; the "
            "figures of the folds stand in results.json. Write cv_final: false, other rates, or gate: off"
        )
    plan = dataclasses.replace(recipe.stage_plan(), stages=tuple(kept))
    return recipe.model_copy(
        update={
            "plan": None,
            "epochs": None,
            "stages": tuple(plan.to_dict()["stages"]),
            "gate": "off",
            "cv": None,
            "cv_final": False,
        }
    )


def _run_fold(job: Job, number: int, output: Path, reporter: Reporter) -> dict[str, Any]:
    recipe, folder = job.recipe, job.output
    digest = _digest(job.data.splits)
    complete = processes.on_main(lambda: _complete_results(folder, digest))
    name = f"fold {number} of {recipe.cv}"
    if complete is not None:
        reporter.say(f"{name} is complete; it is not run again")
        return complete
    trainer = make_trainer(job)
    if number == 1:
        announce(job, trainer, reporter)
    sizes = ", ".join(f"{len(images)} {split}" for split, images in job.data.splits.items())
    reporter.say(f"{name}: {sizes}")
    resume = job.resume and processes.on_main(lambda: (folder / RECIPE_FILE).is_file())
    # Only here, where all has been checked; and before the fold's, so that the output folder is known as this run's.
    write_recipe(recipe, output)
    write_audit(job.data, output)
    write_audit(job.data, folder)
    write_recipe(recipe, folder, comment=f"{name.capitalize()} of the cross-validation that this recipe asks for.")
    return train_and_save(
        dataclasses.replace(job, resume=resume),
        trainer,
        reporter,
        facts={"fold": {"number": number, "of": recipe.cv, "images": digest}},
        # The final model's folder is made in the same way, and is proved.
        prove=False,
    )


def _complete_results(folder: Path, digest: str) -> dict[str, Any] | None:
    """Returns the results of a fold that is complete; None if it is not.

    Raises:
        RecipeError: it is of other images.
    """
    results = read_results(folder)
    if results is None or not (folder / "README.md").is_file():
        return None
    if results.get("fold", {}).get("images") != digest:
        raise RecipeError(
            f"{folder} holds a complete fold, but of other images than there are now; the folds of a cross-validation "
            "must be of the same data. Pass another --output to begin anew, or put the images back"
        )
    return results


def _digest(splits: Mapping[str, Dataset]) -> str:
    """Returns a digest of the names and labels of the images in each split."""
    state = hashlib.blake2b(digest_size=16)
    for split, images in splits.items():
        for path, label in zip(images["path"], images["label"], strict=True):
            state.update(f"{split}\0{path}\0{label}\0".encode("utf-8", "surrogateescape"))
    return state.hexdigest()


def _summarize(job: Job, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns `cross_validation` of `results.json`; writes predictions and plots of all folds together."""
    folders = [job.output / FOLDS / str(number) for number in range(1, len(results) + 1)]
    figures = fold_figures([fold["validation"] for fold in results])
    return {
        "folds": len(results),
        "split_by": job.data.split_by,
        "metric": job.metric,
        "mean": figures[job.metric]["mean"],
        "std": figures[job.metric]["std"],
        "figures": figures,
        "pooled": pool_folds(
            folders,
            job.data.class_names,
            job.output,
            groups=_groups(job.data.splits["train"]),
            # `per_class` is not for cross-validation.
            threshold=float(job.recipe.thresholds),
        ),
        "num_images": [fold["num_images"] for fold in results],
        "stages": stage_votes([fold["stages"] for fold in results]),
        "batch_norm": {stage["name"]: stage["batch_norm"] for fold in results for stage in fold["stages"]},
        # By which the final model is mixed; not where validation chose the share, which it has none for.
        "wise_ft": {
            stage["name"]: stage["wise_ft"]["alpha"]
            for fold in results
            for stage in fold["stages"]
            if stage.get("wise_ft") and not job.recipe.wise_ft
        },
    }


def _groups(images: Dataset) -> dict[str, str | None] | None:
    """Returns the group of each image by its path; None where groups are not known."""
    return dict(zip(images["path"], images["group"], strict=True)) if "group" in images.column_names else None


def _document(job: Job, results: Sequence[Mapping[str, Any]], summary: dict[str, Any]) -> dict[str, Any]:
    """Writes and returns `results.json` of the folds together."""
    facts = recipe_facts(job)
    data = facts.pop("data")
    sizes = {split: len(images) for split, images in job.data.splits.items()}
    document = {
        **{key: results[0][key] for key in ("backbone", "weights", "seed", "classes", "gate")},
        "num_images": sizes,
        "data": {**data, "splits": data.pop("origins")},
        **facts,
        "cross_validation": summary,
        "stages": [],
        "test_reads": 0,
        "seconds_total": round(time.monotonic() - job.started, 3),
        **describe_environment(),
    }
    # Results of a final model that were all but complete remember how often the test images were read.
    if "model" not in (read_results(job.output) or {}):
        write_results(job.output, document)
    return document


def _run_final(job: Job, summary: dict[str, Any], reporter: Reporter) -> dict[str, Any]:
    recipe = final_recipe(job.recipe, summary["stages"], summary["batch_norm"], summary["wise_ft"])
    resume = job.resume and processes.on_main(lambda: (job.output / "stages").is_dir())
    final = dataclasses.replace(job, recipe=recipe, resume=resume, part=RunPart("final model"))
    trainer = make_trainer(final)
    reporter.say("The final model is trained on the images of all folds.")
    announce(final, trainer, reporter)
    # What was asked for, if it has changed since the folds.
    write_recipe(job.recipe, job.output)
    results = train_and_save(
        final, trainer, reporter, facts={"cross_validation": summary, "expected_from": "cross_validation"}
    )
    report(final, results, reporter)
    reporter.say(EXPECTED)
    return results


def _show(summary: Mapping[str, Any], reporter: Reporter) -> None:
    figures = summary["figures"]
    first, named = ("map", "mAP") if "map" in figures else ("accuracy", "accuracy")
    stages = summary["stages"]
    rows = []
    for fold, sizes in enumerate(summary["num_images"]):
        kept = [stage["name"] for stage in stages if stage["kept"][fold]]
        shown = [f"{figures[name]['values'][fold]:.4f}" for name in (first, "macro_f1")]
        rows.append((str(fold + 1), f"{sizes['validation']:,}", *shown, ", ".join(kept) or "none"))
    spread = [f"{figures[name]['mean']:.4f} ± {figures[name]['std']:.4f}" for name in (first, "macro_f1")]
    rows.append(("mean ± std", "", *spread, ""))
    reporter.table(
        f"cross-validation, {summary['folds']} folds by {summary['split_by']}",
        ("fold", "validation images", named, "macro F1", "stages kept"),
        rows,
    )
    reporter.say(f"all folds together: {figures_line(summary['pooled'])}")
