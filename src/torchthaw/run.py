"""`torchthaw train`: from a recipe to the output folder."""

import json
import time
from pathlib import Path
from typing import Any

import yaml

from torchthaw.backbones.registration import register_auto_classes
from torchthaw.console import Reporter, hide_loading_bars
from torchthaw.console.library_messages import said_once
from torchthaw.cross_validation import cross_validate, prepare_images
from torchthaw.data_preparation import selection_metric
from torchthaw.errors import RecipeError
from torchthaw.preparation import check_model
from torchthaw.recipe import Recipe
from torchthaw.run_console import announce, report
from torchthaw.sharing.hub import check_branch, check_repo_id, find_token, push_folder
from torchthaw.single_run import (
    RECIPE_FILE,
    Job,
    make_trainer,
    train_and_save,
    write_audit,
    write_recipe,
)
from torchthaw.source_tasks import source_task
from torchthaw.training import processes
from torchthaw.training.resume import differences

# What may differ between a run and its continuation: it changes where and how fast, not what comes out.
# A cross-validation may get its final model later.
_FREE_ON_RESUME = ("output", "num_workers", "report_to", "card", "push", "cv_final")


def run_recipe(
    recipe: Recipe,
    reporter: Reporter,
    *,
    resume: bool = False,
    command: str | None = None,
    profile: bool = False,
    recipe_file: Path | None = None,
) -> dict[str, Any]:
    """Trains, evaluates and saves what a recipe asks for.

    Started by `torchrun` or `accelerate launch`, all processes train, and the first one writes and evaluates.

    Args:
        recipe: The recipe.
        reporter: Where messages go.
        resume: Whether to go on with the run in the output folder, if it was interrupted; it ends exactly where it
            would have without the interruption.
        command: The command line that asked for it, for the model card.
        profile: Whether to find out what bounds the speed of each stage; see `ProfileCallback`.
        recipe_file: The file that the recipe was read from, whose commit is recorded.

    Returns:
        The content of `results.json`.

    Raises:
        ThawError: something that the recipe names does not exist or fit, or the output folder holds another run;
            nothing was written then, unless training itself failed.
    """
    started = time.monotonic()
    register_auto_classes()
    processes.join()
    if not processes.is_main():
        reporter = Reporter(quiet=True)
    hide_loading_bars(downloads=not reporter.draws)
    with said_once(reporter):
        return _run_recipe(
            recipe, reporter, resume=resume, command=command, profile=profile, recipe_file=recipe_file, started=started
        )


def _run_recipe(
    recipe: Recipe,
    reporter: Reporter,
    *,
    resume: bool,
    command: str | None,
    profile: bool,
    recipe_file: Path | None,
    started: float,
) -> dict[str, Any]:
    output = Path(recipe.output or f"thaw-{recipe.backbone}")
    if processes.on_main(lambda: _check_output(recipe, output, resume=resume)):
        reporter.say(f"{output} holds this run, complete; nothing is left to train")
        _push(recipe, output, reporter)
        return json.loads((output / "results.json").read_text(encoding="utf-8"))
    check_model(recipe)
    # Here, so that a mistake in it shows before all images are looked at.
    source_task(recipe)
    _check_push(recipe)
    data = prepare_images(recipe, reporter)
    job = Job(recipe, data, selection_metric(recipe, data), output, command, resume, started, profile, recipe_file)
    results = _run(job, reporter) if recipe.cv is None else cross_validate(job, reporter)
    _push(recipe, output, reporter)
    return results


def _run(job: Job, reporter: Reporter) -> dict[str, Any]:
    trainer = make_trainer(job)
    announce(job, trainer, reporter)
    write_recipe(job.recipe, job.output)
    write_audit(job.data, job.output)
    results = train_and_save(job, trainer, reporter)
    report(job, results, reporter)
    return results


def _check_output(recipe: Recipe, output: Path, *, resume: bool) -> bool:
    """Checks that the output folder is free, or holds this run; returns whether that is complete already."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    another = f"pass another one, such as --output {output}-2, or remove it"
    saved = output / RECIPE_FILE
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
    has_model = recipe.cv is None or recipe.cv_final
    return (output / "results.json").is_file() and (not has_model or (output / "README.md").is_file())


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
