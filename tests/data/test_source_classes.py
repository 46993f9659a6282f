"""Class names of images as classes of pretrained weights."""

import sys

import pytest
from torchvision.models import MobileNet_V2_Weights

from torchthaw.data.source_classes import match_classes
from torchthaw.errors import DataError

IMAGENET = MobileNet_V2_Weights.DEFAULT.meta["categories"]


def match(names, **options):
    return match_classes(names, IMAGENET, 1000, imagenet=True, **options)


def test_names_are_matched_whatever_their_case_and_blanks():
    names = ["bee", "Great_White_Shark", "black-and-gold garden spider", "tench"]
    found = match(names)
    assert [IMAGENET[index] for index in found[:2]] == ["bee", "great white shark"]
    assert found[3] == 0
    assert IMAGENET[found[2]].replace(" ", "-") == "black-and-gold-garden-spider"


def test_numbers_are_those_of_the_outputs_whatever_the_order_of_the_names():
    assert match(["0", "10", "2", "999"]) == [0, 10, 2, 999]
    assert match_classes(["1", "0"], None, 3) == [1, 0]
    assert match_classes(["1", "0"], ["1", "0"], 2) == [0, 1], "a name comes before a number"


def test_wordnet_ids_are_looked_up():
    pytest.importorskip("timm")
    found = match(["n01440764", "n02206856", "n02219486"])
    assert [IMAGENET[index] for index in found] == ["tench", "bee", "ant"]


def test_all_wordnet_ids_are_in_their_order_without_a_table(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.data.imagenet_info", None)
    ids = [f"n{number:08d}" for number in range(1000, 3000, 2)]
    assert match(list(reversed(ids))) == list(range(999, -1, -1))
    with pytest.raises(DataError, match=r"'n01440764' .* takes the table of timm \(pip install timm\)"):
        match(["n01440764"])


def test_wordnet_ids_are_those_of_imagenet_only():
    with pytest.raises(DataError, match="'n01440764'"):
        match_classes(["n01440764"], [f"class {number}" for number in range(1000)], 1000)


def test_other_names_can_be_told():
    found = match(["ants", "bees", "fish"], given={"ants": "ant", "bees": "n02206856", "fish": 1})
    assert [IMAGENET[index] for index in found] == ["ant", "bee", "goldfish"]
    assert match_classes(["3"], None, 5, given={3: 4}) == [4]


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["bee", "ants"], {}, r"class 'ants' of the images is none of the 1,000 .* Did you mean 'ant'.*\{ants: ant\}"),
        (["zzzz", "ants"], {}, "class 'zzzz' and 1 more"),
        (["1000"], {}, "class '1000'"),
        (["-1"], {}, "class '-1'"),
        (["x"], {"given": {"x": "bea"}}, r"class 'x' \(called 'bea' in forgetting.names\) .* Did you mean '"),
        (["ants"], {"given": {"ant": "ant"}}, "names has 'ant', which is no class of the images. Did you mean 'ants'"),
        (["n99999999"], {}, "none of the 1,000 classes"),
    ],
)
def test_what_is_no_class_is_named_with_what_is_near(names, options, message):
    with pytest.raises(DataError, match=message):
        match(names, **options)


def test_weights_without_names_say_so():
    with pytest.raises(
        DataError, match="'cat' of photos is none of the 10 classes of the file w.pth.* by number, 0 to 9"
    ):
        match_classes(["cat"], None, 10, what="photos", source="the file w.pth")


def test_a_name_that_fits_two_classes_is_not_guessed():
    with pytest.raises(DataError, match="'A B'"):
        match_classes(["A B"], ["a_b", "a-b"], 2)
    assert match_classes(["a-b"], ["a_b", "a-b"], 2) == [1]
