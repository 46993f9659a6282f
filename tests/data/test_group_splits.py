import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedGroupKFold

from torchthaw.data.group_allocation import assign_groups
from torchthaw.data.loading import load_image_dataset
from torchthaw.data.splitting import split_dataset
from torchthaw.errors import DataError


def dataset_of(labels, groups, contents=None, paths=None):
    """Images whose bytes are never decoded, so that any will do."""
    names = [chr(ord("a") + number) for number in range(max(labels) + 1)]
    features = Features(
        image=Image(decode=False), label=ClassLabel(names=names), path=Value("string"), group=Value("string")
    )
    contents = contents or [f"image {row}" for row in range(len(labels))]
    columns = {
        "image": [{"bytes": content.encode(), "path": None} for content in contents],
        "label": list(labels),
        "path": paths or [f"{row}.png" for row in range(len(labels))],
        "group": [str(group) for group in groups],
    }
    return DatasetDict(train=Dataset.from_dict(columns, features=features))


def groups_of(splits):
    return {split: set(images["group"][:]) for split, images in splits.items()}


def random_images(seed, num_groups, num_classes):
    """Labels and groups: groups of 1 to 30 images, each with classes of its own proportions."""
    random = np.random.default_rng(seed)
    labels, groups = [], []
    for group in range(num_groups):
        size = random.integers(1, 31)
        labels += random.choice(num_classes, size, p=random.dirichlet(np.full(num_classes, 0.3))).tolist()
        groups += [group] * size
    return np.unique(labels, return_inverse=True)[1], np.array(groups)


def cost_of(parts, labels, shares, missing):
    """What `assign_groups` makes small, computed from the images themselves."""
    classes = np.unique(labels)
    cost = 0.0
    for part, share in enumerate(shares):
        inside = labels[parts == part]
        cost += (len(inside) / len(labels) - share) ** 2 / share
        for label in classes:
            got = np.sum(inside == label) / np.sum(labels == label)
            cost += (got - share) ** 2 / share / len(classes) + missing[part] * (got == 0)
    return cost


def class_error(parts, labels, shares):
    """Mean difference between a class's share of a part and what it should be."""
    return np.mean(
        [
            abs(np.mean(parts[labels == label] == part) - share)
            for part, share in enumerate(shares)
            for label in np.unique(labels)
        ]
    )


images_in_groups = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=4, max_size=60).filter(
    lambda rows: len({group for _, group in rows}) >= 3 and len({label for label, _ in rows}) >= 2
)


@settings(max_examples=60, deadline=None)
@given(rows=images_in_groups, seed=st.integers(0, 3))
def test_no_group_is_in_two_splits_and_every_image_in_one(rows, seed):
    labels, groups = zip(*rows, strict=True)
    dataset = dataset_of(labels, groups)
    splits = split_dataset(dataset, validation=0.2, test=0.2, seed=seed)
    found = groups_of(splits)
    assert not found["train"] & found["validation"] | found["train"] & found["test"]
    assert not found["validation"] & found["test"]
    everything = [path for images in splits.values() for path in images["path"][:]]
    assert sorted(everything) == sorted(dataset["train"]["path"][:])
    assert all(len(images) for images in splits.values())


@settings(max_examples=60, deadline=None)
@given(rows=images_in_groups, cut=st.booleans())
def test_no_group_moved_and_no_two_exchanged_would_be_better(rows, cut):
    labels, groups = (np.unique(column, return_inverse=True)[1] for column in zip(*rows, strict=True))
    shares = [0.6, 0.25, 0.15] if cut else [1 / 3] * 3
    missing = np.full(3, 1 / len(set(labels)))
    if cut:
        missing[0] = 1000.0
    parts = assign_groups(groups, labels, shares, first_needs_all=cut)
    reached = cost_of(parts[groups], labels, shares, missing)
    for group in range(len(parts)):
        others = [(other, parts[other]) for other in range(len(parts)) if parts[other] != parts[group]]
        for other, part in others:
            for exchanged in (True, False):
                changed = parts.copy()
                changed[group] = part
                if exchanged:
                    changed[other] = parts[group]
                if len(set(changed)) == 3:
                    assert cost_of(changed[groups], labels, shares, missing) > reached - 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_close_to_the_best_of_all_assignments(seed):
    labels, groups = random_images(seed, num_groups=10, num_classes=3)
    shares, missing = [0.8, 0.2], [1000.0, 1 / 3]
    parts = assign_groups(groups, labels, shares, first_needs_all=True)
    every = ((np.arange(1, 2**10 - 1)[:, None] >> np.arange(10)) & 1)[:, groups]
    best = min(cost_of(each, labels, shares, missing) for each in every)
    assert cost_of(parts[groups], labels, shares, missing) <= best + 0.02


@pytest.mark.parametrize("num_classes", [2, 8])
def test_classes_come_out_at_least_as_even_as_with_scikit_learn(num_classes):
    ours, theirs = [], []
    for seed in range(8):
        labels, groups = random_images(seed, num_groups=60, num_classes=num_classes)
        first = next(StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(labels, labels, groups))[1]
        shares = [0.8, 0.2]
        parts = assign_groups(groups, labels, shares, first_needs_all=True)[groups]
        assert set(labels[parts == 0]) == set(labels)
        ours.append(class_error(parts, labels, shares))
        theirs.append(class_error(np.isin(np.arange(len(labels)), first).astype(int), labels, shares))
    assert np.mean(ours) <= np.mean(theirs)
    assert sum(our <= their for our, their in zip(ours, theirs, strict=True)) >= 6


def test_rows_names_of_images_and_names_of_groups_change_nothing():
    labels, groups = random_images(0, num_groups=30, num_classes=3)
    dataset = dataset_of(labels, groups)
    contents = [f"image {row}" for row in range(len(labels))]
    expected = {image["bytes"] for image in split_dataset(dataset, validation=0.2, seed=4)["validation"]["image"][:]}
    order = np.random.default_rng(1).permutation(len(labels))
    renamed = dataset_of(
        labels[order].tolist(),
        [f"patient {99 - group}" for group in groups[order]],
        contents=[contents[row] for row in order],
        paths=[f"{row}.jpg" for row in range(len(labels))],
    )
    again = {image["bytes"] for image in split_dataset(renamed, validation=0.2, seed=4)["validation"]["image"][:]}
    assert again == expected
    choices = {
        frozenset(groups_of(split_dataset(dataset, validation=0.2, seed=seed))["validation"]) for seed in range(4)
    }
    assert len(choices) > 1


def test_a_class_of_one_group_is_trained_on_and_missed_elsewhere(caplog):
    labels = [0, 0, 1, 1] * 10 + [2] * 6
    groups = [row // 4 for row in range(40)] + [10] * 6
    splits = split_dataset(dataset_of(labels, groups), validation=0.2, test=0.2)
    assert "10" in groups_of(splits)["train"]
    assert "validation has none of 'c'; test has none of 'c'" in caplog.text


def test_training_has_every_class_though_the_sizes_then_come_out_otherwise(caplog):
    # By size, the second group were the validation images; but it alone has the third class.
    labels = [0, 1] * 40 + [0, 1, 2, 2] * 5
    splits = split_dataset(dataset_of(labels, [0] * 80 + [1] * 20), validation=0.2)
    assert groups_of(splits) == {"train": {"1"}, "validation": {"0"}}
    assert "has 80 of 100 images (0.8), and 0.2 was asked for" in caplog.text


def test_a_class_of_three_groups_is_in_every_split():
    labels = [0, 0, 0, 1] * 20 + [2] * 9
    groups = [row // 4 for row in range(80)] + [20 + row // 3 for row in range(9)]
    splits = split_dataset(dataset_of(labels, groups), validation=0.2, test=0.2)
    assert all(2 in set(images["label"][:]) for images in splits.values())


def test_two_groups_make_two_splits_and_no_third(caplog):
    labels = [0, 1] * 10
    dataset = dataset_of(labels, [0] * 12 + [1] * 8)
    splits = split_dataset(dataset, validation=0.15)
    assert groups_of(splits) == {"train": {"0"}, "validation": {"1"}}
    assert "The validation split has 8 of 20 images (0.4), and 0.15 was asked for: whole groups" in caplog.text
    with pytest.raises(
        DataError, match=r"There are 2 groups for 3 splits \(train, .*none may be empty.*split_by: image"
    ):
        split_dataset(dataset, validation=0.15, test=0.15)


def test_each_split_gets_a_group_however_small_its_share():
    splits = split_dataset(dataset_of([0, 1] * 15, [row // 10 for row in range(30)]), validation=0.05, test=0.05)
    assert {split: len(images) for split, images in splits.items()} == {"train": 10, "validation": 10, "test": 10}


def test_given_splits_stay_and_groups_are_cut_from_training_alone():
    labels, groups = random_images(0, num_groups=20, num_classes=2)
    dataset = dataset_of(labels, groups)
    dataset["test"] = dataset["train"].select(range(10))
    splits = split_dataset(dataset, validation=0.2, test=0.5)
    assert splits["test"]["path"][:] == dataset["test"]["path"][:]
    assert len(splits["train"]) + len(splits["validation"]) == len(labels)


def test_an_image_without_group_is_named():
    dataset = dataset_of([0, 1, 0], ["x", "y", "z"])
    train = dataset["train"].remove_columns("group").add_column("group", ["x", None, "z"])
    with pytest.raises(DataError, match=r"1 of 3 images have no group: '1.png'"):
        split_dataset(DatasetDict(train=train))


def test_many_groups_and_classes_are_fast_and_even():
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(20000), 3)
    labels = random.integers(0, 100, len(groups))
    shares = [0.7, 0.15, 0.15]
    parts = assign_groups(groups, labels, shares, first_needs_all=True)[groups]
    assert class_error(parts, labels, shares) < 0.002


def test_students_of_real_data(shared_data):
    dataset = load_image_dataset(shared_data / "sign-digits")
    splits = split_dataset(dataset, validation=0.15, test=0.15)
    found = groups_of(splits)
    assert not found["train"] & found["validation"] | found["train"] & found["test"]
    assert not found["validation"] & found["test"]
    labels = np.array(dataset["train"]["label"][:])
    for split, share in (("train", 0.7), ("validation", 0.15), ("test", 0.15)):
        got = np.bincount(splits[split]["label"][:]) / np.bincount(labels)
        assert np.abs(got - share).max() < 0.01
