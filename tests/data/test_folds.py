import warnings
from collections import Counter

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, StratifiedKFold, TimeSeriesSplit

from torchthaw.data.group_allocation import assign_groups
from torchthaw.data.splitting import fold_dataset
from torchthaw.errors import DataError


def dataset_of(labels, groups=None, times=None, contents=None):
    """Images whose bytes are never decoded, so that any will do."""
    names = [chr(ord("a") + number) for number in range(max(labels) + 1)]
    features = Features(image=Image(decode=False), label=ClassLabel(names=names), path=Value("string"))
    contents = contents or [f"image {row}" for row in range(len(labels))]
    columns = {
        "image": [{"bytes": content.encode(), "path": None} for content in contents],
        "label": [int(label) for label in labels],
        "path": [f"{row}.png" for row in range(len(labels))],
    }
    if groups is not None:
        features["group"] = Value("string")
        columns["group"] = [str(group) for group in groups]
    if times is not None:
        features["time"] = Value("float64")
        columns["time"] = [float(time) for time in times]
    return DatasetDict(train=Dataset.from_dict(columns, features=features))


def rows_of(fold, split):
    return [int(path.removesuffix(".png")) for path in fold[split]["path"][:]]


def class_spread(parts, labels):
    """Mean over classes of how far its shares of the folds are spread."""
    return np.mean([np.std(np.bincount(parts[labels == label], minlength=5)) for label in np.unique(labels)])


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 25), min_size=2, max_size=5), folds=st.integers(2, 6), seed=st.integers(0, 3))
def test_stratified_folds_are_as_even_as_can_be(counts, folds, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    if len(labels) < folds:
        return
    made = fold_dataset(dataset_of(labels), folds=folds, seed=seed)
    validated = [rows_of(fold, "validation") for fold in made]
    assert sorted(row for rows in validated for row in rows) == list(range(len(labels)))
    for fold, rows in zip(made, validated, strict=True):
        assert sorted(rows + rows_of(fold, "train")) == list(range(len(labels)))
    sizes = [len(rows) for rows in validated]
    assert max(sizes) - min(sizes) <= 1
    for label in range(len(counts)):
        of_class = [int((labels[rows] == label).sum()) for rows in validated]
        assert max(of_class) - min(of_class) <= 1


def test_class_counts_of_folds_are_those_of_scikit_learn():
    labels = np.repeat([0, 1, 2], [23, 11, 6])
    made = fold_dataset(dataset_of(labels), folds=5)
    theirs = [np.bincount(labels[rows]) for _, rows in StratifiedKFold(5).split(labels, labels)]
    ours = [np.bincount(labels[rows_of(fold, "validation")]) for fold in made]
    for label in range(3):
        assert sorted(counts[label] for counts in ours) == sorted(counts[label] for counts in theirs)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 8)), min_size=8, max_size=60).filter(
        lambda rows: len({group for _, group in rows}) >= 4 and len({label for label, _ in rows}) >= 2
    )
)
def test_no_group_is_in_training_and_validation(rows):
    labels, groups = zip(*rows, strict=True)
    made = fold_dataset(dataset_of(labels, groups=groups), folds=4)
    assert sorted(row for fold in made for row in rows_of(fold, "validation")) == list(range(len(labels)))
    for fold in made:
        assert not set(fold["train"]["group"][:]) & set(fold["validation"]["group"][:])
        assert len(fold["validation"]) + len(fold["train"]) == len(labels)


@pytest.mark.parametrize("num_classes", [2, 6])
def test_group_folds_are_at_least_as_even_as_those_of_scikit_learn(num_classes):
    ours, theirs, sizes, plain_sizes = [], [], [], []
    for seed in range(8):
        random = np.random.default_rng(seed)
        labels, groups = [], []
        for group in range(50):
            size = random.integers(1, 25)
            labels += random.choice(num_classes, size, p=random.dirichlet(np.full(num_classes, 0.4))).tolist()
            groups += [group] * size
        labels, groups = np.array(labels), np.array(groups)
        parts = assign_groups(groups, labels, [0.2] * 5)[groups]
        stratified, plain = np.zeros_like(labels), np.zeros_like(labels)
        for number, (_, rows) in enumerate(StratifiedGroupKFold(5).split(labels, labels, groups)):
            stratified[rows] = number
        for number, (_, rows) in enumerate(GroupKFold(5).split(labels, labels, groups)):
            plain[rows] = number
        ours.append(class_spread(parts, labels))
        theirs.append(class_spread(stratified, labels))
        assert ours[-1] <= class_spread(plain, labels)
        sizes.append(np.ptp(np.bincount(parts)))
        plain_sizes.append(np.ptp(np.bincount(stratified)))
    assert np.mean(ours) <= np.mean(theirs)
    assert sum(our <= their for our, their in zip(ours, theirs, strict=True)) >= 6
    assert np.mean(sizes) <= np.mean(plain_sizes)


@pytest.mark.parametrize(("count", "folds"), [(6, 5), (23, 3), (40, 5), (101, 2)])
def test_folds_in_time_are_those_of_scikit_learn(count, folds):
    times = np.random.default_rng(count).permutation(count) * 60.0
    order = np.argsort(times)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = fold_dataset(dataset_of([row % 2 for row in range(count)], times=times), folds=folds)
    for fold, (train, validation) in zip(made, TimeSeriesSplit(folds).split(order), strict=True):
        assert rows_of(fold, "train") == sorted(order[train])
        assert rows_of(fold, "validation") == sorted(order[validation])


def test_folds_in_time_keep_equal_times_and_groups_together():
    times = [0, 1, 1, 1, 2, 2, 3, 4, 4, 4, 5, 6]
    for fold in fold_dataset(dataset_of([0, 1] * 6, times=times), folds=3):
        assert max(fold["train"]["time"][:]) < min(fold["validation"]["time"][:])
    groups = ["x", "y", "y", "z", "z", "x", "u", "u", "v", "w", "v", "w"]
    for fold in fold_dataset(dataset_of([0, 1] * 6, times=range(12), groups=groups), folds=3, by="time"):
        assert not set(fold["train"]["group"][:]) & set(fold["validation"]["group"][:])


def test_order_and_names_of_files_change_nothing_and_seeds_do():
    labels, contents = [0, 1] * 12, [f"image {row}" for row in range(24)]
    groups = [row // 3 for row in range(24)]
    order = np.random.default_rng(0).permutation(24)
    shuffled = [values[row] for values in (labels, contents, groups) for row in order]
    for unit in ("image", "group"):

        def chosen(dataset, seed=0, unit=unit):
            folds = fold_dataset(dataset, folds=4, seed=seed, by=unit)
            return [sorted(image["bytes"] for image in fold["validation"]["image"][:]) for fold in folds]

        first = chosen(dataset_of(labels, groups=groups, contents=contents))
        again = chosen(
            dataset_of(shuffled[:24], groups=[f"new {group}" for group in shuffled[48:]], contents=shuffled[24:48])
        )
        assert first == again
        assert first != chosen(dataset_of(labels, groups=groups, contents=contents), seed=1)


def test_given_validation_images_take_part_and_test_images_do_not():
    dataset = dataset_of([0, 1] * 10)
    parts = dataset["train"]
    given_splits = DatasetDict(
        train=parts.select(range(10)), validation=parts.select(range(10, 16)), test=parts.select(range(16, 20))
    )
    made = fold_dataset(given_splits, folds=4)
    assert sorted(row for fold in made for row in rows_of(fold, "validation")) == list(range(16))
    assert all(rows_of(fold, "test") == [16, 17, 18, 19] for fold in made)
    assert all("test" not in fold for fold in fold_dataset(dataset, folds=4))


def test_classes_too_small_for_all_folds_are_named(caplog):
    made = fold_dataset(dataset_of([0] * 12 + [1] * 2 + [2]), folds=3)
    holder = next(number for number, fold in enumerate(made, start=1) if 2 in fold["validation"]["label"][:])
    assert f"no train images of 'c' in {holder}" in caplog.text
    lacking = [str(number) for number, fold in enumerate(made, start=1) if 1 not in fold["validation"]["label"][:]]
    assert f"no validation images of 'b' in {', '.join(lacking)}" in caplog.text
    assert Counter(len(fold["validation"]) for fold in made) == {5: 3}


@pytest.mark.parametrize("folds", [1, 0, -2, 2.5, True, "5"])
def test_impossible_numbers_of_folds_are_refused(folds):
    with pytest.raises(DataError, match=r"does not work; write a whole number of at least 2"):
        fold_dataset(dataset_of([0, 1] * 5), folds=folds)


def test_more_folds_than_there_is_to_share_out_are_refused():
    with pytest.raises(DataError, match="There are 4 images for 5 folds"):
        fold_dataset(dataset_of([0, 1] * 2))
    with pytest.raises(DataError, match="There are 2 groups for 5 folds"):
        fold_dataset(dataset_of([0, 1] * 5, groups=[row // 5 for row in range(10)]))
    with pytest.raises(DataError, match="There are 5 different times for 6 stretches"):
        fold_dataset(dataset_of([0, 1] * 5, times=[row // 2 for row in range(10)]))
