import subprocess
import sys
from pathlib import Path

import pytest

import torchthaw
from torchthaw.data.augmentation import AUGMENTATIONS, Augmentation, make_augmentation
from torchthaw.errors import ThawError


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"crop_scale": (0.5, 0.2)}, "crop_scale=(0.5, 0.2) does not work; write two numbers [low, high]"),
        ({"crop_scale": (0.0, 1.0)}, "0 < low <= high <= 1"),
        ({"crop_scale": (0.5, 1.5)}, "0 < low <= high <= 1"),
        ({"crop_scale": 0.5}, "crop_scale=0.5"),
        ({"crop_ratio": (-1, 2)}, "crop_ratio=(-1, 2)"),
        ({"horizontal_flip": 1.5}, "horizontal_flip=1.5 does not work; write a number from 0 to 1"),
        ({"vertical_flip": -0.1}, "vertical_flip=-0.1"),
        ({"random_erasing": True}, "random_erasing=True"),
        ({"color_jitter": "strong"}, "color_jitter='strong'"),
        ({"mixup": -1}, "mixup=-1 does not work; write a number of at least 0"),
        ({"cutmix": float("nan")}, "cutmix=nan"),
        ({"policy": "randaugment"}, "policy='randaugment' is unknown"),
        ({"policy": "randaugment"}, "Did you mean 'rand_augment'"),
    ],
)
def test_values_out_of_range_are_refused(fields, expected):
    with pytest.raises(ThawError) as caught:
        Augmentation(**fields)
    assert expected in str(caught.value)


def test_presets_grow_stronger_and_none_is_the_evaluation_view():
    assert list(AUGMENTATIONS) == ["none", "light", "medium", "strong"]
    assert AUGMENTATIONS["none"] is None
    assert AUGMENTATIONS["light"] == Augmentation()
    assert not AUGMENTATIONS["medium"].mixes
    assert AUGMENTATIONS["strong"].mixes


def test_augmentations_by_name_by_fields_and_back():
    assert make_augmentation("strong") is AUGMENTATIONS["strong"]
    assert make_augmentation({"crop_scale": [0.5, 1]}) == Augmentation(crop_scale=(0.5, 1.0))
    assert make_augmentation(AUGMENTATIONS["medium"].to_dict()) == AUGMENTATIONS["medium"]
    with pytest.raises(ThawError, match=r"Did you mean 'strong'"):
        make_augmentation("stron")
    with pytest.raises(ThawError, match=r"unknown key 'mixupp'. Did you mean 'mixup'"):
        make_augmentation({"mixupp": 1})


def test_no_torch_is_needed_to_read_an_augmentation():
    source = str(Path(torchthaw.__file__).parents[1])
    code = (
        f"import sys; sys.path.insert(0, {source!r}); sys.argv = ['torchthaw']; import torchthaw.data.augmentation; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
