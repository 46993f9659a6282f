import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from torchthaw.data.splitting import split_dataset
from torchthaw.errors import DataError


def dataset_of(times, labels=None, groups=None):
    """Images whose bytes are never decoded; paths count down, so that their order is not that of time."""
    labels = labels or [row % 2 for row in range(len(times))]
    features = Features(
        image=Image(decode=False), label=ClassLabel(names=["a", "b", "c"]), path=Value("string"), time=Value("float64")
    )
    columns = {
        "image": [{"bytes": f"image {row}".encode(), "path": None} for row in range(len(times))],
        "label": labels,
        "path": [f"{900 - row}.png" for row in range(len(times))],
        "time": [float(time) for time in times],
    }
    if groups is not None:
        features["group"] = Value("string")
        columns["group"] = list(groups)
    return DatasetDict(train=Dataset.from_dict(columns, features=features))


def times_of(splits):
    return {split: images["time"][:] for split, images in splits.items()}


def test_training_comes_before_validation_before_test(caplog):
    times = np.random.default_rng(0).permutation(100) * 3600.0
    splits = split_dataset(dataset_of(times), validation=0.15, test=10)
    found = times_of(splits)
    ordered = sorted(times)
    assert {split: sorted(values) for split, values in found.items()} == {
        "train": ordered[:75],
        "validation": ordered[75:90],
        "test": ordered[90:],
    }
    assert not caplog.records


@settings(max_examples=80, deadline=None)
@given(times=st.lists(st.integers(-5, 15), min_size=3, max_size=50).filter(lambda times: len(set(times)) >= 3))
def test_equal_times_stay_together_and_every_image_is_in_one_split(times):
    splits = split_dataset(dataset_of(times), validation=0.2, test=0.2)
    found = times_of(splits)
    assert max(found["train"]) < min(found["validation"])
    assert max(found["validation"]) < min(found["test"])
    assert sorted(value for values in found.values() for value in values) == sorted(times)
    # Each border is as near to where it should be as the moments allow, if each split keeps one.
    before = np.cumsum(np.unique(times, return_counts=True)[1])
    wanted = len(times) - 2 * round(0.2 * len(times))
    assert abs(len(found["train"]) - wanted) == np.abs(before[:-2] - wanted).min()


def test_a_burst_on_the_border_is_not_torn_apart_and_that_is_said(caplog):
    splits = split_dataset(dataset_of([*range(6), 6, 6, 6, 7]), validation=0.2)
    assert sorted(times_of(splits)["validation"]) == [7.0]
    assert "asked for" not in caplog.text
    splits = split_dataset(dataset_of([*range(4), *[4] * 6]), validation=0.2)
    assert len(splits["validation"]) == 6
    assert "has 6 of 10 images (0.6), and 0.2 was asked for: images of one time stay together" in caplog.text


def test_groups_stay_whole_from_their_first_image_on(caplog):
    # "early" begins first and is still there at the end; "late" begins late.
    groups = ["early", "middle", "middle", "middle", "late", "late", "late", "early"]
    dataset = dataset_of(range(8), groups=groups)
    splits = split_dataset(dataset, validation=0.3, by="time")
    assert set(splits["train"]["group"][:]) == {"early", "middle"}
    assert set(splits["validation"]["group"][:]) == {"late"}
    assert (
        "1 of the 5 images of train are not older than the first image of validation: groups stay whole" in caplog.text
    )


def test_classes_that_only_come_later_are_named(caplog):
    split_dataset(dataset_of(range(10), labels=[0] * 8 + [1, 2]), validation=0.2)
    assert "Split by time, not every class is in every split: train has none of 'b', 'c'" in caplog.text
    assert "validation has none of 'a'" in caplog.text


def test_a_given_split_that_is_older_is_said(caplog):
    dataset = dataset_of(range(10))
    dataset["test"] = dataset_of([3, 20])["train"]
    splits = split_dataset(dataset, validation=0.2)
    assert splits["test"]["time"][:] == [3.0, 20.0]
    assert "2 of the 2 images of validation are not older than the first image of test" in caplog.text


def test_images_without_time_are_named():
    dataset = dataset_of([1.0, float("nan"), 3.0, float("nan")])
    with pytest.raises(DataError) as caught:
        split_dataset(dataset, validation=0.25)
    assert "2 of 4 images have no time, so they cannot be split by it: '899.png', '897.png'" in str(caught.value)
    assert "split_by: image" in str(caught.value)
    assert len(split_dataset(dataset, validation=0.25, by="image")["validation"]) == 1


def test_fewer_moments_than_splits_are_refused():
    with pytest.raises(DataError, match=r"There are 2 different times for 3 splits \(train, validation, test\)"):
        split_dataset(dataset_of([1, 1, 2, 2]), validation=0.2, test=0.2)
    with pytest.raises(DataError, match=r"There are 1 groups that begin at different times for 2 splits"):
        split_dataset(dataset_of([1, 1, 2, 1], groups=["x", "x", "x", "y"]), validation=0.2, by="time")
