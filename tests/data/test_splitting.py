import shutil
from collections import Counter
from fractions import Fraction

import pytest
from datasets import DatasetDict, IterableDatasetDict
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torchthaw.data.allocation import allocate
from torchthaw.data.loading import load_image_dataset
from torchthaw.data.splitting import describe_split, fold_dataset, split_dataset, split_unit
from torchthaw.errors import DataError


def paths(splits, split):
    return splits[split]["path"][:]


def class_counts(splits, split):
    return Counter(splits[split]["label"][:])


@example(counts=[3] * 6, validation=45, test=39)  # rounding up both shares of a class would take all of it
@settings(max_examples=200, deadline=None)
@given(
    counts=st.lists(st.integers(3, 200), min_size=1, max_size=30),
    validation=st.integers(0, 60),
    test=st.integers(1, 39),
)
def test_shares_are_exact_per_class_and_in_sum(counts, validation, test):
    shares = {"test": Fraction(test, 100), "validation": Fraction(validation, 100)}
    counts = dict(enumerate(counts))
    sizes = allocate(counts, shares)
    for label, count in counts.items():
        assert count - sum(sizes[split][label] for split in shares) >= 1
        for split, share in shares.items():
            assert abs(sizes[split][label] - share * count) < 1
    # Totals fall short only where the last training image of classes would have to go.
    full = [label for label, count in counts.items() if count - sum(sizes[split][label] for split in shares) == 1]
    for split, share in shares.items():
        short = round(share * sum(counts.values())) - sum(sizes[split].values())
        assert short == 0 or (0 < short <= len(full))


def test_largest_remainders_win():
    # Quotas 0.9, 1.5, 2.1: 4.5 in all, rounded to even.
    assert allocate({0: 3, 1: 5, 2: 7}, {"validation": Fraction(3, 10)}) == {"validation": {0: 1, 1: 1, 2: 2}}


def test_missing_splits_are_cut_stratified(make_image_folder):
    dataset = load_image_dataset(make_image_folder(("ant", "bee"), per_class=20))
    splits = split_dataset(dataset, validation=0.15, test=4)
    assert list(splits) == ["train", "validation", "test"]
    assert {split: class_counts(splits, split) for split in splits} == {
        "train": {0: 15, 1: 15},
        "validation": {0: 3, 1: 3},
        "test": {0: 2, 1: 2},
    }
    everything = [path for split in splits for path in paths(splits, split)]
    assert sorted(everything) == sorted(paths(dataset, "train"))
    assert paths(splits, "train") == sorted(paths(splits, "train"))


def test_the_choice_follows_content_and_seed_not_names_or_order(make_image_folder, tmp_path):
    root = make_image_folder(("ant", "bee"), per_class=12)
    renamed = tmp_path / "renamed"
    new_names = {}
    for file in root.rglob("*.png"):
        target = renamed / file.parent.name / f"{999 - int(file.stem)}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
        new_names[file.relative_to(root).as_posix()] = target.relative_to(renamed).as_posix()
    dataset = load_image_dataset(root)
    chosen = paths(split_dataset(dataset, seed=1), "validation")

    again = paths(split_dataset(load_image_dataset(renamed), seed=1), "validation")
    assert sorted(again) == sorted(new_names[path] for path in chosen)
    shuffled = DatasetDict(train=dataset["train"].shuffle(seed=3))
    assert sorted(paths(split_dataset(shuffled, seed=1), "validation")) == sorted(chosen)
    assert len({tuple(paths(split_dataset(dataset, seed=seed), "validation")) for seed in range(5)}) > 1


def test_given_splits_are_respected(make_image_folder):
    dataset = load_image_dataset(make_image_folder(splits=("train", "val", "test")))
    splits = split_dataset(dataset, validation=0.5, test=0.4)
    assert {split: paths(splits, split) for split in splits} == {split: paths(dataset, split) for split in dataset}

    only_test = load_image_dataset(make_image_folder(splits=("train", "test"), name="other"))
    splits = split_dataset(only_test, validation=1 / 3)
    assert paths(splits, "test") == paths(only_test, "test")
    assert class_counts(splits, "validation") == {0: 2, 1: 2, 2: 2}


def test_nothing_asked_nothing_cut(make_image_folder):
    dataset = load_image_dataset(make_image_folder())
    assert list(split_dataset(dataset, validation=0, test=0)) == ["train"]


def test_the_same_bytes_twice_are_split_the_same_every_time(make_image_folder):
    root = make_image_folder(("ant", "bee"), per_class=8)
    for number in range(8):
        shutil.copy(root / "ant" / f"{number:03d}.png", root / "ant" / f"copy{number}.png")
    first, second = (split_dataset(load_image_dataset(root), validation=0.25) for _ in range(2))
    assert paths(first, "validation") == paths(second, "validation")


def test_a_tiny_class_is_trained_on_first_and_what_it_lacks_is_said(make_image_folder, caplog):
    root = make_image_folder(("ant", "bee", "cat"), per_class=5)
    for number in range(1, 5):
        (root / "bee" / f"{number:03d}.png").unlink()
    splits = split_dataset(load_image_dataset(root), validation=0.3, test=0.3)
    assert class_counts(splits, "train")[1] == 1
    assert set(class_counts(splits, "validation")) == set(class_counts(splits, "test")) == {0, 2}
    assert "validation has none of 'bee'; test has none of 'bee'" in caplog.text


def test_nothing_is_said_where_every_class_is_everywhere(make_image_folder, caplog):
    split_dataset(load_image_dataset(make_image_folder()), validation=0.2, test=0.2)
    assert not caplog.records


def test_an_empty_split_is_refused(make_image_folder):
    dataset = load_image_dataset(make_image_folder(per_class=2))
    with pytest.raises(DataError, match=r"validation \(0.05 of 6 images\) would be empty.*larger share"):
        split_dataset(dataset, validation=0.05)
    single = load_image_dataset(make_image_folder(per_class=1, name="single"))
    with pytest.raises(DataError, match=r"validation \(0.5 of 3 images\) would be empty"):
        split_dataset(single, validation=0.5)


def with_columns(dataset, **columns):
    train = dataset["train"]
    for name, values in columns.items():
        train = train.add_column(name, values)
    return DatasetDict(train=train)


def test_auto_is_by_group_then_time_then_image(make_image_folder):
    dataset = load_image_dataset(make_image_folder(("ant", "bee"), per_class=8))
    times = [float(row) for row in range(16)]
    groups = [str(row % 4) for row in range(16)]
    for columns, unit in (
        ({}, "image"),
        ({"time": times}, "time"),
        ({"group": groups}, "group"),
        ({"time": times, "group": groups}, "group"),
    ):
        data = with_columns(dataset, **columns)
        assert split_unit(data) == unit
        assert describe_split(data)[0] == unit
        chosen = paths(split_dataset(data, validation=0.25), "validation")
        assert chosen == paths(split_dataset(data, validation=0.25, by=unit), "validation")
        assert split_unit(data, "image") == "image"
    both = with_columns(dataset, time=times, group=groups)
    assert split_unit(both, "time") == "time"
    assert "seed 7" in describe_split(both, seed=7)[1]
    assert describe_split(both, by="time") != describe_split(with_columns(dataset, time=times), by="time")


def test_what_cannot_be_split_by_is_refused(make_image_folder):
    dataset = load_image_dataset(make_image_folder())
    for split in (split_dataset, fold_dataset):
        with pytest.raises(DataError, match=r"by='groups' is unknown; write one of auto, .* Did you mean 'group'"):
            split(dataset, by="groups")
        with pytest.raises(DataError, match=r"by='group' needs to know the group .* Pass group="):
            split(dataset, by="group")
        with pytest.raises(DataError, match=r"by='time' needs to know the time .* Pass time=.*exif"):
            split(dataset, by="time")
        streams = IterableDatasetDict(train=dataset["train"].to_iterable_dataset())
        with pytest.raises(DataError, match="streamed data set cannot be split"):
            split(streams)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": 1.5}, "validation=1.5 leaves none"),
        ({"validation": 18}, "validation=18 leaves none"),
        ({"validation": -0.1}, "validation=-0.1 does not work"),
        ({"validation": float("nan")}, "validation=nan does not work"),
        ({"test": True}, "test=True does not work"),
        ({"test": "0.2"}, "test='0.2' does not work"),
        ({"validation": 0.5, "test": 0.5}, "together leave none of the 18"),
    ],
)
def test_impossible_shares_are_refused(make_image_folder, options, message):
    with pytest.raises(DataError) as caught:
        split_dataset(load_image_dataset(make_image_folder()), **options)
    assert message in str(caught.value)


def test_without_training_images_nothing_can_be_cut(make_image_folder):
    dataset = load_image_dataset(make_image_folder())
    with pytest.raises(DataError, match=r"no training split to cut from; the data set has \['test'\]"):
        split_dataset(DatasetDict(test=dataset["train"]))


def test_copies_are_kept_together_where_images_are_split_one_by_one(make_image_folder):
    dataset = load_image_dataset(make_image_folder(per_class=20))
    paths = dataset["train"]["path"]
    together = [paths[0:3], [paths[21], paths[45]], paths[50:52]]
    for seed in range(5):
        cut = split_dataset(dataset, validation=0.2, test=0.2, seed=seed, together=together)
        where = {path: split for split, rows in cut.items() for path in rows["path"]}
        assert sorted(where) == sorted(paths)
        assert all(len({where[path] for path in copies}) == 1 for copies in together)
        assert {split: len(rows) for split, rows in cut.items()} == {"train": 36, "validation": 12, "test": 12}
        assert cut["train"].column_names == dataset["train"].column_names
        folds = fold_dataset(dataset, folds=4, seed=seed, together=together)
        assert sorted(path for fold in folds for path in fold["validation"]["path"]) == sorted(paths)
        for fold in folds:
            inside = set(fold["validation"]["path"])
            assert all(len(inside & set(copies)) in (0, len(copies)) for copies in together)
    grouped = dataset["train"].add_column("group", [path.split("/")[1] for path in paths])
    by_group = split_dataset(DatasetDict(train=grouped), validation=0.2, together=together)
    assert not set(by_group["train"]["group"]) & set(by_group["validation"]["group"])
