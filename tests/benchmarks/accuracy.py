"""Accuracy of plans on data folders: means over seeds with their spread, and paired differences from the first plan.

    python tests/benchmarks/accuracy.py --data ants=hymenoptera signs=sign-digits --weights FILE --seeds 0 1 2
    python tests/benchmarks/accuracy.py --data ants=hymenoptera --per-class 5 10 20 --plans staged head "full best"

Each run is the recipe of a user, from the data's audit to the best weights by validation macro F1; these are then
measured on the test images. A quarter of the images is cut off for that with the first seed, by the data's unit of
independence, so that all plans and seeds are measured on the same ones; a validation split that the data has is the
test split. What is left is cut into training and validation images by each seed. `--per-class` trains on so many images
of each class, and validates on half as many.

Plans are torchthaw's presets. Beside them are baselines of as many epochs: `full RATE` trains everything at one rate
with BatchNorm in training, `full best` is the one of `--rates` that validation prefers in each run, and `trainer` is
the stock Trainer with its defaults. Prints Markdown and writes JSON after every run; what it has is not run again.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset, DatasetDict
from sklearn.metrics import accuracy_score, f1_score

from torchthaw.console import Reporter
from torchthaw.data.split_list import DROP, SplitRow, write_split_list
from torchthaw.data.splitting import split_dataset
from torchthaw.data_preparation import PreparedData, load_data, prepare_data
from torchthaw.preparation import build_model
from torchthaw.recipe import Recipe, load_recipe
from torchthaw.single_run import Job, make_trainer
from torchthaw.training.datasets import as_view

PLANS = ("staged", "two_phase", "full", "partial", "head", "full best", "trainer")
METRICS = ("macro_f1", "accuracy", "seconds")
TEST_SHARE, VALIDATION_SHARE = 0.25, 0.2
QUIET = Reporter(quiet=True)


def recipe_of(options: argparse.Namespace, source: str, seed: int, plan: str) -> Recipe:
    settings: dict[str, Any] = {
        "backbone": options.backbone, "weights": options.weights, "image_size": options.size, "seed": seed,
        "metric": "macro_f1", "data": {"path": source}, "audit": "warn",
    }  # fmt: skip
    if plan.startswith("full "):
        stage = {"name": "all", "unfreeze": "all", "epochs": options.epochs, "learning_rate": float(plan.split()[1])}
        return load_recipe({**settings, "stages": [{**stage, "batch_norm": "train"}], "gate": "off"})
    return load_recipe({**settings, "plan": plan, "epochs": options.epochs})


def splits_of(options: argparse.Namespace, loaded: DatasetDict, seed: int, per_class: int | None) -> DatasetDict:
    """Returns training, validation and test images; the test images are the same for all seeds."""
    if "validation" in loaded:
        whole, test = loaded["train"], loaded["validation"]
    else:
        cut = split_dataset(loaded, validation=TEST_SHARE, seed=options.seeds[0])
        whole, test = cut["train"], cut["validation"]
    cut = split_dataset(DatasetDict(train=whole), validation=VALIDATION_SHARE, seed=seed)
    train, validation = cut["train"], cut["validation"]
    if per_class is not None:
        train, validation = few(train, per_class, seed), few(validation, max(2, per_class // 2), seed)
    return DatasetDict(train=train, validation=validation, test=test)


def few(images: Dataset, per_class: int, seed: int) -> Dataset:
    """Returns so many images of each class."""
    chosen: dict[int, list[int]] = {}
    shuffled = images.shuffle(seed=seed)
    for row, label in enumerate(shuffled["label"]):
        chosen.setdefault(label, []).append(row)
    return shuffled.select(sorted(row for rows in chosen.values() for row in rows[:per_class]))


def prepared(options: argparse.Namespace, source: str, seed: int, per_class: int | None) -> PreparedData:
    """Returns the images as a user's recipe gets them, unreadable ones left out."""
    everything = load_data(recipe_of(options, source, seed, "head").data)
    wanted = {path: DROP for images in everything.values() for path in images["path"]}
    for split, images in splits_of(options, everything, seed, per_class).items():
        wanted.update(dict.fromkeys(images["path"], split))
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder, "splits.csv")
        write_split_list(listed, [SplitRow(path, split) for path, split in wanted.items()])
        recipe = recipe_of(options, source, seed, "head").model_dump(mode="json", exclude_defaults=True)
        recipe["data"] = {**recipe["data"], "splits": str(listed), "on_bad_image": "drop"}
        return prepare_data(load_recipe(recipe), reporter=QUIET, features=False)


def run(options: argparse.Namespace, source: str, seed: int, plan: str, data: PreparedData) -> dict[str, float]:
    """Trains one plan and measures it on validation and test images."""
    if plan == "full best":
        runs = [run(options, source, seed, f"full {rate}", data) for rate in options.rates]
        best = max(runs, key=lambda found: found["validation_macro_f1"])
        return {**best, "seconds": sum(found["seconds"] for found in runs)}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if plan == "trainer":
            trainer = stock_trainer(options, source, seed, data, folder)
        else:
            job = Job(fitting(recipe_of(options, source, seed, plan), data), data, "macro_f1", Path(folder))
            trainer = make_trainer(job)
        trainer.train()
        seconds = time.perf_counter() - started
        figures: dict[str, float] = {"seconds": seconds}
        for split, prefix in (("validation", "validation_"), ("test", "")):
            images = trainer.eval_dataset if split == "validation" else data.splits[split]
            if plan == "trainer" and split == "test":
                images = as_view(images, trainer.model, trainer.processing_class, trainer.args, train=False)
            output = trainer.predict(images)
            predicted = output.predictions.argmax(1)
            figures[f"{prefix}macro_f1"] = float(f1_score(output.label_ids, predicted, average="macro"))
            figures[f"{prefix}accuracy"] = float(accuracy_score(output.label_ids, predicted))
    return figures


def fitting(recipe: Recipe, data: PreparedData) -> Recipe:
    """Returns the recipe with batches of at most a quarter of the training images."""
    return recipe.model_copy(update={"batch_size": min(recipe.batch_size, len(data.splits["train"]) // 4)})


def stock_trainer(
    options: argparse.Namespace, source: str, seed: int, data: PreparedData, folder: str
) -> transformers.Trainer:
    """Returns the stock Trainer with its defaults, and the images augmented as torchthaw does."""
    transformers.set_seed(seed)
    recipe = fitting(recipe_of(options, source, seed, "full"), data)
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


def tables(results: list[dict[str, Any]], plans: list[str]) -> str:
    """Returns mean and standard deviation over the seeds, and the paired difference from the first plan."""
    lines = []
    for metric in METRICS:
        lines += [f"\n{metric}\n", f"| | {' | '.join(plans)} |", f"|---|{'---|' * len(plans)}"]
        for name in dict.fromkeys(row["name"] for row in results):
            values = {
                plan: {row["seed"]: row[metric] for row in results if (row["name"], row["plan"]) == (name, plan)}
                for plan in plans
            }
            lines.append(f"| {name} | {' | '.join(cell(values[plans[0]], values[plan]) for plan in plans)} |")
    return "\n".join(lines)


def cell(reference: dict[int, float], found: dict[int, float]) -> str:
    """Returns mean ± deviation, and (mean paired difference ± its standard error)."""
    if not found:
        return "-"
    values = list(found.values())
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    text = f"{statistics.mean(values):.3f}{spread}"
    pairs = [found[seed] - reference[seed] for seed in found if seed in reference]
    if found is reference or not pairs:
        return text
    error = f" ± {statistics.stdev(pairs) / len(pairs) ** 0.5:.3f}" if len(pairs) > 1 else ""
    return f"{text} ({statistics.mean(pairs):+.3f}{error})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--plans", nargs="+", default=list(PLANS))
    parser.add_argument("--rates", nargs="+", default=["1e-4", "3e-4", "1e-3"], help="Of `full best`.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--per-class", type=int, nargs="+", help="Training images of each class; all by default.")
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--weights", default="DEFAULT")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("accuracy.json"))
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    results = json.loads(options.output.read_text()) if options.output.exists() else []
    done = {(row["name"], row["seed"], row["plan"]) for row in results}
    for per_class in options.per_class or [None]:
        for entry in options.data:
            label, source = entry.split("=", 1)
            name = label if per_class is None else f"{label}, {per_class} a class"
            for seed in options.seeds:
                plans = [plan for plan in options.plans if (name, seed, plan) not in done]
                data = prepared(options, source, seed, per_class) if plans else None
                for plan in plans:
                    results.append({"name": name, "seed": seed, "plan": plan, **run(options, source, seed, plan, data)})
                    print(json.dumps(results[-1]), flush=True)
                    options.output.write_text(json.dumps(results, indent=2) + "\n")
    print(tables(results, options.plans))


if __name__ == "__main__":
    main()
