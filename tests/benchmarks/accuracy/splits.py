"""Training, validation and test images of a seed: one cut, or one for each fold."""

import argparse
import functools
import sys
import tempfile
from pathlib import Path

from datasets import Dataset, DatasetDict, concatenate_datasets

from torchthaw.console import Reporter
from torchthaw.data.audit.audit import audit_dataset
from torchthaw.data.split_list import DROP, SplitRow, write_split_list
from torchthaw.data.splitting import fold_dataset, split_dataset
from torchthaw.data_preparation import PreparedData, load_data, prepare_data
from torchthaw.recipe import DataRecipe, load_recipe

TEST_SHARE, VALIDATION_SHARE = 0.25, 0.2
QUIET = Reporter(quiet=True)

Cut = PreparedData


def cuts(options: argparse.Namespace, source: str, seed: int, per_class: int | None) -> list[Cut]:
    """Returns the images as a user's recipe gets them, unreadable ones left out: once, or for each fold."""
    everything, images = load(source, options.without_copies)
    return [prepared(options, source, everything, splits) for splits in splits_of(options, images, seed, per_class)]


@functools.cache
def load(source: str, without_copies: bool) -> tuple[tuple[str, ...], DatasetDict]:
    """Returns the paths of all images, and the images that are used."""
    images = load_data(DataRecipe(path=source))
    paths = tuple(path for split in images.values() for path in split["path"])
    if without_copies:
        images = DatasetDict({split: images[split] for split in ("train", "validation") if split in images})
        left_out = copies(images)
        print(f"{source}: {len(left_out)} copies of {len(paths)} images are left out", file=sys.stderr, flush=True)
        images = DatasetDict(
            {
                split: rows.select([row for row, path in enumerate(rows["path"]) if path not in left_out])
                for split, rows in images.items()
            }
        )
    return paths, images


def copies(images: DatasetDict) -> set[str]:
    """Returns paths so that of each set of copies one image is left, or none if their labels differ."""
    known = {
        path: (split == "train", path, label)
        for split, rows in images.items()
        for path, label in zip(rows["path"], rows["label"], strict=True)
    }
    left_out: set[str] = set()
    for alike in audit_dataset(images).copies:
        # Held-out images are worth more than training images.
        first, *others = sorted(alike, key=known.__getitem__)
        left_out.update(others)
        if len({known[path][2] for path in alike}) > 1:
            left_out.add(first)
    return left_out


def splits_of(options: argparse.Namespace, images: DatasetDict, seed: int, per_class: int | None) -> list[DatasetDict]:
    """Returns training, validation and test images, of each fold if there are folds."""
    given = DatasetDict({split: images[split] for split in ("train", "validation") if split in images})
    if options.folds:
        tests = [(fold["train"], fold["validation"]) for fold in fold_dataset(given, folds=options.folds, seed=seed)]
    elif "validation" in given and not options.test_by_seed:
        tests = [(given["train"], given["validation"])]
    else:
        whole = concatenate_datasets(list(given.values())) if options.test_by_seed else given["train"]
        test_seed = seed if options.test_by_seed else options.seeds[0]
        cut = split_dataset(DatasetDict(train=whole), validation=TEST_SHARE, seed=test_seed)
        tests = [(cut["train"], cut["validation"])]
    found = []
    for rest, test in tests:
        cut = split_dataset(DatasetDict(train=rest), validation=VALIDATION_SHARE, seed=seed)
        train, validation = cut["train"], cut["validation"]
        if per_class is not None:
            train, validation = few(train, per_class, seed), few(validation, max(2, per_class // 2), seed)
        found.append(DatasetDict(train=train, validation=validation, test=test))
    return found


def few(images: Dataset, per_class: int, seed: int) -> Dataset:
    """Returns so many images of each class."""
    chosen: dict[int, list[int]] = {}
    shuffled = images.shuffle(seed=seed)
    for row, label in enumerate(shuffled["label"]):
        chosen.setdefault(label, []).append(row)
    return shuffled.select(sorted(row for rows in chosen.values() for row in rows[:per_class]))


def prepared(options: argparse.Namespace, source: str, everything: tuple[str, ...], splits: DatasetDict) -> Cut:
    wanted = dict.fromkeys(everything, DROP)
    for split, images in splits.items():
        wanted.update(dict.fromkeys(images["path"], split))
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder, "splits.csv")
        write_split_list(listed, [SplitRow(path, split) for path, split in wanted.items()])
        recipe = {
            "backbone": options.backbone, "weights": options.weights, "image_size": options.size, "plan": "head",
            "data": {"path": source, "splits": str(listed), "on_bad_image": "drop"},
        }  # fmt: skip
        return prepare_data(load_recipe(recipe), reporter=QUIET, features=False)
