"""Activation maps: of every family, in the right place, and by the formula where there is one."""

import numpy as np
import pytest
import torch

from torchthaw import TorchvisionForImageClassification
from torchthaw.backbones.anatomy import FAMILIES, list_architectures
from torchthaw.evaluation.activation_maps import activation_layer, activation_maps

NAMES = ["ant", "bee", "cat", "dog"]
# Architecture, side of the image, rows and columns of the last map.
NETWORKS = [
    ("resnet18", 128, (4, 4)),
    ("densenet121", 128, (4, 4)),
    ("squeezenet1_1", 128, (7, 7)),
    ("convnext_tiny", 128, (4, 4)),
    ("swin_t", 128, (4, 4)),
    ("swin_v2_t", 128, (4, 4)),
    ("maxvit_t", 224, (7, 7)),
    ("vit_b_32", 256, (8, 8)),
]


def make_model(architecture, size):
    torch.manual_seed(0)
    model = TorchvisionForImageClassification.from_torchvision(architecture, None, id2label=NAMES, image_size=size)
    # ViT's head starts at zero, from which no gradient comes.
    if architecture.startswith("vit"):
        torch.nn.init.normal_(model.backbone.heads.head.weight, std=0.02)
    return model


def planted(size):
    """A uniform image, and four with a noisy square in one quarter each."""
    images = torch.zeros(5, 3, size, size)
    side = size // 4
    square = 3 * torch.randn(3, side, side, generator=torch.Generator().manual_seed(1))
    places = [(row, column) for row in range(2) for column in range(2)]
    for image, (row, column) in zip(images[1:], places, strict=True):
        top, left = row * size // 2 + side // 2, column * size // 2 + side // 2
        image[:, top : top + side, left : left + side] = square
    return images, places


def strongest_quarter(change):
    rows, columns = change.shape
    sums = [
        [change[: rows // 2, : columns // 2].sum(), change[: rows // 2, -(columns // 2) :].sum()],
        [change[-(rows // 2) :, : columns // 2].sum(), change[-(rows // 2) :, -(columns // 2) :].sum()],
    ]
    return tuple(int(place) for place in np.unravel_index(np.argmax(sums), (2, 2)))


@pytest.mark.parametrize(("architecture", "size", "cells"), NETWORKS, ids=[name for name, *_ in NETWORKS])
def test_maps_have_the_shape_of_the_last_feature_map_and_change_where_the_image_does(architecture, size, cells):
    model = make_model(architecture, size)
    images, places = planted(size)
    maps = [activation_maps(model, images, torch.full((5,), index)) for index in range(len(NAMES))]
    assert all(found.shape == (5, *cells) for found in maps)
    assert all(np.isfinite(found).all() and (found >= 0).all() for found in maps)
    # What is negative is cut off, so that a change may be missing in the map of one class, but not in all.
    changes = [np.abs(found[1:] - found[0]) / (found.max() + 1e-12) for found in maps]
    candidates = [*changes, sum(changes)]
    assert any([strongest_quarter(change) for change in each] == places for each in candidates)


@pytest.mark.parametrize("architecture", ["resnet18", "shufflenet_v2_x0_5", "mobilenet_v2"])
def test_maps_equal_class_activation_maps_where_global_pooling_is_followed_by_one_layer(architecture):
    model = make_model(architecture, 96)
    images = torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 2, 3])
    found = activation_maps(model, images, classes)

    features = []
    feature_map = {"resnet18": "layer4", "shufflenet_v2_x0_5": "conv5", "mobilenet_v2": "features"}[architecture]
    hook = model.backbone.get_submodule(feature_map).register_forward_hook(lambda *args: features.append(args[2]))
    with torch.no_grad():
        model(pixel_values=images)
    hook.remove()
    [last] = [module for module in model.backbone.modules() if isinstance(module, torch.nn.Linear)]
    # Zhou et al. (2016): the feature map weighted by the weights of the class; the mean is over all cells.
    expected = torch.einsum("nc,nchw->nhw", last.weight[classes], features[0]).clamp_min(0) / (3 * 3)
    assert expected.max() > 0
    assert found == pytest.approx(expected.detach().numpy(), rel=1e-3, abs=1e-6)


def test_a_frozen_model_is_left_as_it_was():
    model = make_model("resnet18", 64).requires_grad_(False).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode(False):
        maps = activation_maps(model, torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))
    assert maps.shape == (2, 2, 2)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_every_family_has_a_layer_for_maps():
    for family in FAMILIES:
        architecture = next(name for name in list_architectures() if name.startswith(family.prefixes))
        with torch.device("meta"):
            model = TorchvisionForImageClassification.from_torchvision(architecture, None, id2label=NAMES)
        assert activation_layer(model) in dict(model.named_modules())


def test_vit_maps_do_not_come_from_where_only_the_class_token_counts():
    model = make_model("vit_b_32", 64)
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert any(activation_maps(model, images, torch.tensor([index])).any() for index in range(4))
