"""Accuracy of plans on data folders: means over seeds with their spread, and paired differences from one of the plans.

    python tests/benchmarks/accuracy/run.py --data ants=hymenoptera signs=sign-digits --weights FILE --seeds 0 1 2
    python tests/benchmarks/accuracy/run.py --data ants=hymenoptera --per-class 5 10 20 --plans staged head "full best"
    python tests/benchmarks/accuracy/run.py --data ants=hymenoptera --weights FILE --test-by-seed --reference fastai \\
        --plans staged fastai 'flat={"stages": [{"name": "a", "unfreeze": "all", "epochs": 7, "learning_rate": 1e-4}]}'
    python tests/benchmarks/accuracy/run.py --data mri=brain-mri-yesno --without-copies --folds 5 --seeds 0 1 2

Each run is the recipe of a user, from the data's audit to the best weights by validation macro F1; these are then
measured on the test images. A quarter of the images is cut off for that with the first seed, by the data's unit of
independence (groups.csv is read), so that all plans and seeds are measured on the same ones; a validation split that
the data has is the test split. What is left is cut into training and validation images by each seed. So the spread over
seeds is that of training and of the training images, and says nothing of other test images:

- `--test-by-seed` cuts off another test quarter with each seed, from the training and validation images that the data
  has, taken together. The quarters of different seeds overlap, and so do the training images: the spread contains the
  test sample, but is somewhat too small for that of new data, as is the standard error of differences.
- `--folds` tests every image once for each seed, by a model that has seen nothing of its fold. Predictions of all folds
  are measured as one set, seconds are summed, `full best` chooses in each fold. Seeds then share all test images.

`--without-copies` first removes what the audit finds to be the same picture, exactly or nearly: one image of each set
stays (a held-out one rather than a training one), none where their labels differ. Otherwise copies stay, and may be
on both sides. `--per-class` trains on so many images of each class, and validates on half as many.

Plans are torchthaw's presets, or NAME={keys of a recipe in JSON}, which replace those of the run, by dotted key if need
be; explicit stages take the place of its plan and epochs. Beside them are baselines of as many epochs: `full RATE`
trains everything at one rate with BatchNorm in training, `full best` is the one of `--rates` that validation prefers in
each run, `trainer` is the stock Trainer with its defaults and torchthaw's augmentation, and `fastai` is fastai's
`fine_tune` with its defaults (see fastai_plan.py) in an environment of its own. These last two keep their last weights
and use validation images for nothing, torchthaw keeps the best. Seconds are of training, without the audit; plans that
come later find on the disk what torchthaw cached for earlier ones.

Prints Markdown, and writes JSON after every run: settings, and a row for each data set, seed and plan. What a file has
is not run again, and a file of other settings is refused, as is another first seed where this chose the test images.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import transformers
from plans import BASELINES, PLANS, Outcome, fastai_python, recipe_of, run
from splits import Cut, cuts
from tables import figures, tables

from torchthaw.errors import ThawError


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--plans", nargs="+", default=list(PLANS), metavar="PLAN", help="Names, or NAME={JSON}.")
    parser.add_argument("--reference", metavar="PLAN", help="What differences are from; the first plan by default.")
    parser.add_argument("--rates", nargs="+", default=["1e-4", "3e-4", "1e-3"], help="Of `full best`.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--test-by-seed", action="store_true", help="Each seed cuts off its own test quarter.")
    parser.add_argument("--folds", type=int, help="Folds for each seed, each tested once.")
    parser.add_argument("--without-copies", action="store_true", help="Removes exact and near duplicates first.")
    parser.add_argument("--per-class", type=int, nargs="+", help="Training images of each class; all by default.")
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--weights", default="DEFAULT")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=7)
    cache = Path(tempfile.gettempdir(), "torchthaw-benchmark-environments")
    parser.add_argument("--environments", type=Path, default=cache, help="Gets an environment for fastai.")
    parser.add_argument("--output", type=Path, default=Path("accuracy.json"))
    options = parser.parse_args()
    if options.folds is not None and options.folds < 2:
        parser.error(f"--folds {options.folds} does not work; write at least 2")
    if options.folds and options.per_class:
        parser.error("--per-class goes without --folds: folds test every image, so that none are left out of training")
    if options.folds and options.test_by_seed:
        parser.error("--test-by-seed goes without --folds: each seed makes its own folds, and all images are tested")
    if any("=" not in entry for entry in options.data):
        parser.error("--data takes NAME=FOLDER, such as ants=hymenoptera")
    options.data = dict(entry.split("=", 1) for entry in options.data)
    try:
        options.plans = dict(map(plan_of, options.plans))
        for plan in options.plans:
            if plan not in BASELINES:
                recipe_of(options, next(iter(options.data.values())), 0, plan)
    except (ThawError, ValueError) as error:
        parser.error(f"--plans: {error}")
    options.reference = options.reference or next(iter(options.plans))
    if options.reference not in options.plans:
        parser.error(f"--reference {options.reference!r} is none of the plans: {', '.join(options.plans)}")
    return options


def plan_of(text: str) -> tuple[str, dict[str, Any]]:
    """Returns the name of a plan, and the keys of a recipe that it stands for.

    Raises:
        ValueError: it cannot be read, or changes what all plans have to share.
    """
    name, separator, keys = text.partition("={")
    if not separator:
        return text, {}
    if name in BASELINES or name.startswith("full "):
        raise ValueError(f"{name!r} is a baseline's name; write another before the keys")
    try:
        found = json.loads("{" + keys)
    except json.JSONDecodeError as error:
        raise ValueError(f"{text!r} is not NAME={{JSON}}: {error}") from error
    shared = [key for key in found if key.split(".")[0] in ("data", "seed", "cv", "cv_final", "output", "push")]
    if shared:
        raise ValueError(f"{name!r} changes {', '.join(shared)}, which all plans share; leave it out")
    return name, found


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what rows of one file have in common: each entry that two runs both have must be the same."""
    own_tests = options.test_by_seed or options.folds
    return {
        "backbone": options.backbone,
        "weights": Path(options.weights).name,
        "size": options.size,
        "epochs": options.epochs,
        "test_by_seed": options.test_by_seed,
        "folds": options.folds,
        "without_copies": options.without_copies,
        "test_seed": None if own_tests else options.seeds[0],
        **({"rates": options.rates} if "full best" in options.plans else {}),
        **{f"plan {plan}": keys for plan, keys in options.plans.items()},
        **{f"data {label}": Path(source).name for label, source in options.data.items()},
    }


def read(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings and rows of a file, if it is there; stops where its rows were made with other settings."""
    if not file.exists():
        return {"settings": settings, "rows": []}
    found = json.loads(file.read_text())
    if not isinstance(found, dict):
        sys.exit(f"{file} does not say with what settings it was made; write another --output")
    before = found["settings"]
    other = [
        f"{key}: {before[key]!r} there, {value!r} here"
        for key, value in settings.items()
        if key in before and before[key] != value
    ]
    if other:
        sys.exit(f"{file} was made with other settings, and its rows would not compare; write another --output:\n  "
                 + "\n  ".join(other))  # fmt: skip
    return {**found, "settings": {**before, **settings}}


def without_fastai(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the plans, without fastai if it cannot be had."""
    options.python, reason = fastai_python(options) if "fastai" in options.plans else (None, None)
    if reason is not None:
        print(f"fastai is left out: {reason}", file=sys.stderr, flush=True)
    return {plan: keys for plan, keys in options.plans.items() if plan != "fastai" or options.python is not None}


def main() -> None:
    options = parse()
    transformers.utils.logging.set_verbosity_error()
    results = read(options.output, settings_of(options))
    done = {(row["name"], row["seed"], row["plan"]) for row in results["rows"]}
    available = without_fastai(options)
    for per_class in options.per_class or [None]:
        for label, source in options.data.items():
            name = label if per_class is None else f"{label}, {per_class} a class"
            for seed in options.seeds:
                plans = [plan for plan in available if (name, seed, plan) not in done]
                parts: list[Cut] = cuts(options, source, seed, per_class) if plans else []
                for plan in plans:
                    outcomes: list[Outcome] = [run(options, source, seed, plan, data) for data in parts]
                    row = {"name": name, "seed": seed, "plan": plan, **figures(outcomes)}
                    results["rows"].append(row)
                    print(json.dumps(row), flush=True)
                    options.output.write_text(json.dumps(results, indent=2) + "\n")
    print(tables(results["rows"], list(options.plans), options.reference))


if __name__ == "__main__":
    main()
