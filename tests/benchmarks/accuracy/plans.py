"""Trains one plan on one cut of the data, and predicts its validation and test images."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset
from sklearn.metrics import f1_score

from torchthaw.data_preparation import PreparedData, selection_metric
from torchthaw.preparation import build_model
from torchthaw.recipe import Recipe, load_recipe
from torchthaw.single_run import Job, make_trainer
from torchthaw.training.datasets import as_view

PLANS = ("staged", "two_phase", "full", "partial", "head", "full best", "trainer")
# Not made by a recipe.
BASELINES = ("full best", "trainer", "fastai")
# Of the baselines; torchthaw chooses by the number of images.
USUAL_BATCH = 32
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        seconds: Of training.
        labels: By split: the classes of the images.
        predicted: By split: what the kept weights say.
    """

    seconds: float
    labels: dict[str, list[int]]
    predicted: dict[str, list[int]]


def recipe_of(options: argparse.Namespace, source: str, seed: int, plan: str) -> Recipe:
    settings: dict[str, Any] = {
        "backbone": options.backbone, "weights": options.weights, "image_size": options.size, "seed": seed,
        "metric": "macro_f1", "data": {"path": source}, "audit": "warn",
    }  # fmt: skip
    if plan.startswith("full "):
        stage = {"name": "all", "unfreeze": "all", "epochs": options.epochs, "learning_rate": float(plan.split()[1])}
        plain = {"stages": [{**stage, "batch_norm": "train"}], "gate": "off", "batch_size": USUAL_BATCH}
        return load_recipe({**settings, **plain})
    keys = options.plans.get(plan)
    if not keys:
        return load_recipe({**settings, "plan": plan, "epochs": options.epochs})
    # Explicit stages say themselves how long they are.
    return load_recipe(settings if "stages" in keys else {**settings, "epochs": options.epochs}, keys)


def run(options: argparse.Namespace, source: str, seed: int, plan: str, data: PreparedData) -> Outcome:
    """Trains one plan and predicts validation and test images."""
    if plan == "full best":
        runs = [run(options, source, seed, f"full {rate}", data) for rate in options.rates]
        best = max(runs, key=lambda found: macro_f1(found, "validation"))
        return Outcome(sum(found.seconds for found in runs), best.labels, best.predicted)
    if plan == "fastai":
        return run_fastai(options, source, seed, data)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if plan == "trainer":
            trainer = stock_trainer(options, source, seed, data, folder)
        else:
            recipe = fitting(recipe_of(options, source, seed, plan), data)
            trainer = make_trainer(Job(recipe, data, selection_metric(recipe, data), Path(folder)))
        trainer.train()
        outcome = Outcome(time.perf_counter() - started, {}, {})
        for split in ("validation", "test"):
            images = trainer.eval_dataset if split == "validation" else data.splits[split]
            if plan == "trainer" and split == "test":
                images = as_view(images, trainer.model, trainer.processing_class, trainer.args, train=False)
            output = trainer.predict(images)
            outcome.labels[split] = output.label_ids.tolist()
            outcome.predicted[split] = output.predictions.argmax(1).tolist()
    return outcome


def macro_f1(outcome: Outcome, split: str) -> float:
    return float(f1_score(outcome.labels[split], outcome.predicted[split], average="macro"))


def fitting(recipe: Recipe, data: PreparedData) -> Recipe:
    """Returns the recipe with batches of at most a quarter of the training images."""
    images = len(data.splits["train"])
    return recipe.model_copy(update={"batch_size": min(recipe.images_per_step(images), images // 4)})


def stock_trainer(
    options: argparse.Namespace, source: str, seed: int, data: PreparedData, folder: str
) -> transformers.Trainer:
    """Returns the stock Trainer with its defaults, and the images augmented as torchthaw does."""
    transformers.set_seed(seed)
    recipe = fitting(recipe_of(options, source, seed, f"full {options.rates[0]}"), data)
    model, processor = build_model(recipe, data.class_names)
    ours = make_trainer(Job(recipe, data, "macro_f1", Path(folder)))
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=folder, num_train_epochs=options.epochs, per_device_train_batch_size=recipe.batch_size,
            seed=seed, save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True,
            remove_unused_columns=False, label_names=["labels"],
        ),
        train_dataset=ours.train_dataset, eval_dataset=ours.eval_dataset, processing_class=processor,
        data_collator=ours.data_collator,
    )  # fmt: skip


def fastai_python(options: argparse.Namespace) -> tuple[Path | None, str | None]:
    """Returns the Python of an environment with fastai, or why there is none."""
    sys.path.append(str(HERE.parent / "against_peers"))
    from environments import CannotInstallError, environment

    if options.backbone != "mobilenet_v2" or not Path(options.weights).is_file():
        return None, "it is only set up for --backbone mobilenet_v2 with --weights FILE"
    if options.epochs < 2:
        return None, "its fine_tune takes --epochs 2 or more"
    try:
        return environment("fastai", options.environments), None
    except CannotInstallError as error:
        return None, str(error)


def run_fastai(options: argparse.Namespace, source: str, seed: int, data: PreparedData) -> Outcome:
    """Lets fastai_plan.py train and predict in its own environment."""
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "weights": str(Path(options.weights).resolve()), "size": options.size, "epochs": options.epochs,
            "seed": seed, "classes": len(data.class_names),
            "batch_size": fitting(recipe_of(options, source, seed, f"full {options.rates[0]}"), data).batch_size,
            "images": {split: files(images, Path(folder)) for split, images in data.splits.items()},
        }  # fmt: skip
        given, made = Path(folder, "job.json"), Path(folder, "made.json")
        given.write_text(json.dumps(job), encoding="utf-8")
        command = [options.python, "-W", "ignore", HERE / "fastai_plan.py", given, made]
        subprocess.run([str(part) for part in command], check=True, cwd=folder, stdout=subprocess.DEVNULL)
        found = json.loads(made.read_text(encoding="utf-8"))
    labels = {split: list(data.splits[split]["label"]) for split in ("validation", "test")}
    return Outcome(found["seconds"], labels, found["predicted"])


def files(images: Dataset, folder: Path) -> list[tuple[str, int]]:
    """Returns the file and class of each image; an image that is in a table gets a file."""
    found = []
    for image, path, label in zip(images["image"], images["path"], images["label"], strict=True):
        file = image["path"]
        if image["bytes"] is not None:
            file = str(folder / f"{len(list(folder.iterdir()))}{Path(path).suffix}")
            Path(file).write_bytes(image["bytes"])
        found.append((str(Path(file).resolve()), label))
    return found
