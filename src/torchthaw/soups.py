"""`torchthaw soup`: averages of saved runs, chosen on the validation images that the runs have in common."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from torch import nn

from torchthaw.backbones.configuration import TorchvisionConfig
from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.console import Reporter
from torchthaw.data.bad_images import check_images
from torchthaw.data.label_sets import has_label_sets
from torchthaw.data.views import ImageView
from torchthaw.data_preparation import load_data, prepare_data
from torchthaw.errors import DataError, SharingError
from torchthaw.evaluation.inference import best_device, predict_split
from torchthaw.evaluation.looks import count_test_images, digests_of, read_digests
from torchthaw.evaluation.metrics import classification_metrics
from torchthaw.evaluation.multilabel import multilabel_metrics
from torchthaw.recipe import DataRecipe, Recipe, load_recipe
from torchthaw.sharing.card import write_card
from torchthaw.sharing.saved_models import load_saved
from torchthaw.sharing.soup import Soup, greedy_soup, uniform_soup, wise_ft
from torchthaw.training.results import read_results

METRICS = ("accuracy", "macro_f1", "balanced_accuracy", "map", "micro_f1")


def make_soup(
    runs: Sequence[str],
    output: str,
    *,
    reporter: Reporter,
    start: str | None = None,
    uniform: bool = False,
    data: str | None = None,
    split: str = "validation",
    metric: str = "accuracy",
    batch_size: int = 32,
) -> dict[str, Any]:
    """Averages runs (greedily, or all of them), or with `start` goes from there to the one run, and saves the best.

    Args:
        runs: Output folders of runs.
        output: A folder to make.
        reporter: Where messages go.
        start: Weights or a saved model that the way begins at (WiSE-FT).
        uniform: Whether to average all runs, better or not.
        data: Images to choose on; None takes the validation images of the runs' recipe.
        split: Split of `data`.
        metric: What is compared: `accuracy`, `macro_f1` or `balanced_accuracy`; where images may have several labels,
            also `map` or `micro_f1`.
        batch_size: Images at once.

    Returns:
        What `soup.json` says, with `metric` and `output`.

    Raises:
        SharingError: the runs cannot be averaged, or have no validation images in common.
        DataError: the data cannot be read, or has no such split.
    """
    if start is not None and len(runs) != 1:
        raise SharingError(f"--start goes with one run, the fine-tuned model; there are {len(runs)}: {', '.join(runs)}")
    if Path(output).exists():
        raise SharingError(f"{output} exists, and torchthaw never overwrites anything; pass another --output")
    model, processor = load_saved(runs[0])
    images = _validation_images(runs, data, split, model.config, reporter)
    view, tried = ImageView(images, processor), 0
    several = model.config.several_labels
    if not several and metric in ("map", "micro_f1"):
        raise SharingError(f"--metric {metric} is for models of several labels per image; write macro_f1 or accuracy")
    if has_label_sets(images) != several:
        kinds = ("one label", "several labels")
        raise SharingError(
            f"the images have {kinds[not several]} each, and the models give {kinds[several]}; pass --data with images "
            "that are labelled as the models are"
        )

    def score(candidate: TorchvisionForImageClassification) -> float:
        nonlocal tried
        tried += 1
        device: Any = best_device()
        nn.Module.to(candidate, device)
        with reporter.progress(f"measuring mixture {tried}", len(images)) as bar:
            logits, labels = predict_split(candidate, view, batch_size=batch_size, on_progress=bar.update)
        measure = multilabel_metrics if several else classification_metrics
        return float(measure(logits, labels, candidate.config.class_names, intervals=False)[metric])

    if start is not None:
        soup = wise_ft(start, runs[0], score)
    else:
        soup = (uniform_soup if uniform else greedy_soup)(runs, score)
    described = soup.save(output)
    write_card(output)
    _report(soup, metric, len(images), output, reporter)
    if soup.calibrated:
        reporter.say(f"The scores of {', '.join(soup.calibrated)} were calibrated; those of the average are not.")
    return {**described, "metric": metric, "num_images": len(images), "output": output}


def _validation_images(
    runs: Sequence[str], data: str | None, split: str, config: TorchvisionConfig, reporter: Reporter
) -> Dataset:
    if data is not None:
        kind = "multi_label" if config.several_labels else "single_label"
        splits = load_data(DataRecipe(path=data, group="none"), class_names=config.class_names, problem_type=kind)
        if split not in splits:
            raise DataError(
                f"{data} has no split {split!r}; it has {', '.join(splits)}. Pass --split, or leave out --data to take "
                "the validation images of the runs' recipe"
            )
        for run in runs:
            _refuse_test_images(run, splits[split])
        return check_images(splits[split], progress=reporter.draws)[0]
    recipes = [_recipe(run) for run in runs]
    first = recipes[0]
    for run, recipe in zip(runs[1:], recipes[1:], strict=True):
        if recipe.data != first.data:
            raise SharingError(
                f"{runs[0]} and {run} were trained on other data, so there may be no image that neither has trained "
                "on; pass --data FOLDER with validation images of both"
            )
    # The audit was told when the runs were made; here it only gives the same splits.
    prepared = prepare_data(first, reporter=Reporter(quiet=True), features=False)
    cut = prepared.origins["validation"]["origin"] != "given"
    if cut and any(recipe.seed != first.seed for recipe in recipes):
        raise SharingError(
            "the runs have cut off their validation images with other seeds, so that one run was trained on what "
            "another one holds back; pass --data FOLDER with validation images of all, or give the data a validation "
            "split and train again"
        )
    return prepared.splits["validation"]


def _refuse_test_images(run: str, images: Dataset) -> None:
    folder = Path(run)
    if folder.is_dir() and count_test_images(read_results(folder) or {}, read_digests(folder), digests_of(images)):
        raise SharingError(
            f"these images are test images of {run}, and an average that is chosen by them has no honest test left; "
            "pass validation images"
        )


def _recipe(run: str) -> Recipe:
    file = Path(run) / "recipe.yaml"
    if not file.is_file():
        raise SharingError(f"{run} has no recipe.yaml to take the validation images from; pass --data FOLDER")
    return load_recipe(yaml.safe_load(file.read_text(encoding="utf-8")))


def _report(soup: Soup, metric: str, num_images: int, output: str, reporter: Reporter) -> None:
    rows = [
        (
            f"{step['alpha']:g} fine-tuned" if "alpha" in step else " + ".join(step["tried"]),
            f"{step['score']:.4f}",
            {True: "yes", False: "no", None: ""}[step.get("kept")],
        )
        for step in soup.steps
    ]
    reporter.table(f"{metric} on {num_images} validation images", ("mixture", metric, "kept"), rows)
    shares = ", ".join(f"{share:.3g} of {name}" for name, share in soup.ingredients.items())
    reporter.say(f"saved to {output}: {shares}; validation {metric} {soup.score:.4f}")
