"""`torchthaw evaluate`: figures of a saved model, and a record of each look at the test images of its run."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, Image
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from torchthaw.console import Reporter
from torchthaw.cross_validation import prepare_images
from torchthaw.data.bad_images import check_images
from torchthaw.data.grouping import NO_GROUPS
from torchthaw.data.views import ImageView
from torchthaw.data_preparation import load_data
from torchthaw.errors import DataError, SharingError, did_you_mean
from torchthaw.evaluation.augmented_predictions import predict_augmented
from torchthaw.evaluation.looks import count_test_images, describe_look, digests_of, read_digests
from torchthaw.recipe import DataRecipe, load_recipe
from torchthaw.sharing.card import write_card
from torchthaw.sharing.report import REPORT_FILE, write_report
from torchthaw.training.augmented_figures import AugmentedFigures
from torchthaw.training.results import RESULTS_FILE, read_results, write_results
from torchthaw.use import load_on_device


def evaluate_saved(
    source: str,
    data: str | None,
    split: str,
    *,
    group: str | None = None,
    batch_size: int = 32,
    again: bool = False,
    tta: str = "none",
    command: str | None = None,
    reporter: Reporter,
) -> dict[str, Any]:
    """Measures a saved model on one split of labelled images; labels are matched to its classes by name.

    Args:
        source: A folder or Hub repository that torchthaw saved.
        data: The images; None takes those of the recipe in the folder, cut into splits as for training.
        split: Which of them.
        group: What belongs together in `data`, as in a recipe's `data: {group: ...}`; intervals are then over groups.
            The run's own images have the groups of its recipe.
        batch_size: Images at once.
        again: Whether to go on if these are the run's test images, and to record that in its `results.json`.
        tta: Test-time augmentation, as in a recipe; the figures are then with it.
        command: The command line, for the record.
        reporter: Where messages go.

    Returns:
        What `classification_metrics` (or `multilabel_metrics`) gives, with `model`, `data` and `split`; `temperature`
        where scores are calibrated; `tta` with `method`, `views` and the paired `differences` from the plain scores, by
        metric, where it was asked for; and `test_reads`, how often they were measured, where these are the run's test
        images.

    Raises:
        DataError: the data has no such split, or a class that the model does not know; or they are the run's test
            images, and `again` is not given, or the folder cannot be written to; or `group` is given without `data`.
        PlanError: the model's image processor leaves nothing to crop for `tta`.
    """
    model, processor = load_on_device(source)
    names = model.config.class_names
    images = _images(source, data, split, names, group, several=model.config.several_labels)
    run = _run_of(source)
    if run is None and not Path(source).is_dir():
        reporter.say(f"The results of {source} could not be had, so nobody knows whether these are its test images.")
    found = 0 if run is None else _test_images_among(run, source, data, split, images)
    if found:
        _check_look(source, f"{data or 'the data'} ({split})", len(images), found, again)
    checked, _ = check_images(images, progress=reporter.draws)
    with reporter.progress(f"evaluating {split}", len(checked)) as bar:
        logits, labels = predict_augmented(
            model, ImageView(checked, processor), tta, batch_size=batch_size, on_progress=bar.update
        )
    config = model.config
    augmented = AugmentedFigures(tta, names, several_labels=config.several_labels, thresholds=config.thresholds)
    groups = checked["group"][:] if "group" in checked.column_names else None
    figures = augmented.measure(split, logits, labels, groups, compared=tta != "none")
    document = {"model": source, "data": data, "split": split, **figures}
    if tta != "none":
        described = augmented.to_dict()
        document["tta"] = {key: value for key, value in described.items() if key != split}
    if model.config.temperature != 1:
        document["temperature"] = model.config.temperature
    if found:
        document["test_reads"] = _record(source, figures, command, reporter)
    return document


def _images(
    source: str, data: str | None, split: str, names: list[str], group: str | None, *, several: bool
) -> Dataset:
    if data is not None:
        problem_type = "multi_label" if several else "single_label"
        section = DataRecipe(path=data, group=group or NO_GROUPS)
        splits = load_data(section, class_names=names, problem_type=problem_type)
    else:
        if group is not None:
            raise DataError(
                f"--group {group} is for images of --data; the run's own images have the groups of its recipe. Pass "
                "--data FOLDER too, or leave --group out"
            )
        file = Path(source) / "recipe.yaml"
        if not file.is_file():
            raise DataError(f"{source} has no recipe.yaml to take images from; pass --data FOLDER")
        recipe = load_recipe(yaml.safe_load(file.read_text(encoding="utf-8")))
        # The audit was told when the run was made; here it only gives the same splits.
        prepared = prepare_images(recipe, Reporter(quiet=True), features=False)
        splits = prepared.splits
        if prepared.class_names != names:
            raise DataError(
                f"the data of {file} has other classes than the model now: {', '.join(prepared.class_names[:10])}; "
                "pass --data FOLDER"
            )
    if split not in splits:
        raise DataError(
            f"{data or 'the run'} has no split {split!r}.{did_you_mean(split, splits)} It has {', '.join(splits)}; "
            f"pass --split {next(iter(splits))}"
        )
    return splits[split].cast_column("image", Image(decode=False))


def _run_of(source: str) -> dict[str, Any] | None:
    """Returns the results of the run that made a model, as far as they can be had."""
    if Path(source).is_dir():
        return read_results(Path(source))
    try:
        file = hf_hub_download(source, RESULTS_FILE)
        results = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, HfHubHTTPError):
        return None
    return results if isinstance(results, dict) else None


def _test_images_among(run: Mapping[str, Any], source: str, data: str | None, split: str, images: Dataset) -> int:
    if "test_images" in run:
        return count_test_images(run, read_digests(Path(source)), digests_of(images))
    # Made before images were recorded, or of a script: known by name only.
    origin = run.get("data", {}).get("source")
    same = data is None or (origin is not None and Path(data).resolve() == Path(origin).resolve())
    return len(images) if "test" in run and split == "test" and same else 0


def _check_look(source: str, what: str, number: int, found: int, again: bool) -> None:
    """Refuses a look at the test images that is not asked for, or that could not be recorded."""
    if not again:
        raise DataError(
            f"{found} of the {number} images of {what} are test images of {source}, which its run measured once, after "
            "everything was chosen: the figures are in its results.json. Whoever chooses by them spoils them. Add "
            "--again to measure them once more; results.json and the card will say so"
        )
    if not Path(source).is_dir():
        raise DataError(
            f"{source} is a repository on the Hub, in which a second look at its test images could not be recorded; "
            f"download it (hf download {source} --local-dir FOLDER), evaluate the folder, and push it"
        )
    try:
        with tempfile.TemporaryFile(dir=source):
            pass
    except OSError as error:
        raise DataError(
            f"a second look at the test images of {source} has to be recorded in its {RESULTS_FILE}, and the folder "
            f"cannot be written to ({error.strerror}); make it writable, or evaluate a copy"
        ) from error


def _record(source: str, figures: Mapping[str, Any], command: str | None, reporter: Reporter) -> int:
    """Records a look in the run's folder before anybody sees the figures; returns the number of looks so far."""
    folder = Path(source)
    # Read again: another evaluation may have ended in the meantime.
    results = read_results(folder) or {}
    look = describe_look("evaluate", figures, command=command, recipe=results.get("recipe"))
    reads = int(results.get("test_reads", 1)) + 1
    write_results(folder, {**results, "test_reads": reads, "test_looks": [*results.get("test_looks", []), look]})
    for name, write in (("README.md", write_card), (REPORT_FILE, write_report)):
        if (folder / name).is_file():
            try:
                write(folder)
            except SharingError as error:
                reporter.say(f"{name} does not say so yet: {error}")
    reporter.say(f"The test images of {source} have now been measured {reads} times; {RESULTS_FILE} says so.")
    return reads
