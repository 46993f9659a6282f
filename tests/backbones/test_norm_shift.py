"""How far BatchNorm's statistics are from those that a network holds."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from torchthaw.backbones.norm_shift import statistics_shift


@pytest.fixture
def images():
    return torch.randn(24, 3, 9, 7, generator=torch.Generator().manual_seed(0)) * 2 + 1


@pytest.fixture
def network():
    """Six BatchNorm layers, the last two of which count."""
    torch.manual_seed(0)
    layers = [part for _ in range(6) for part in (nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())]
    return nn.Sequential(*layers).eval()


def inputs_of(network, images):
    """What each BatchNorm layer gets for all images at once."""
    found = []
    for layer in network:
        if isinstance(layer, nn.BatchNorm2d):
            found.append(images.detach().double().numpy())
        images = layer(images)
    return found


def test_it_is_the_mean_of_absolute_logarithms_over_the_last_third(network, images):
    expected = []
    for layer, values in list(zip(network[1::3], inputs_of(network, images), strict=True))[4:]:
        variances = values.transpose(1, 0, 2, 3).reshape(3, -1).var(axis=1)
        kept = layer.running_var.double().numpy()
        expected.append(np.abs(np.log((variances + layer.eps) / (kept + layer.eps))).mean())
    for size in (24, 7, 1):
        assert statistics_shift(network, images.split(size)) == pytest.approx(np.mean(expected), rel=1e-5)


def test_networks_own_images_have_none_and_scaled_variances_show(network, images):
    norms = network[1::3]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    # Layer by layer, since each one's inputs depend on the statistics of those before it.
    for norm in norms:
        norm.train()
        network(images)
        norm.eval()
        norm.momentum = 0.0
    # The variance that is kept is of samples, over n - 1.
    assert statistics_shift(network, [images]) == pytest.approx(0, abs=2e-3)
    norms[5].running_var *= math.e
    assert statistics_shift(network, [images]) == pytest.approx(0.5, abs=2e-3)
    norms[5].running_var[0] = 0  # a dead channel says nothing
    assert statistics_shift(network, [images]) == pytest.approx(0.5, abs=2e-3)


def test_the_network_stays_as_it_was(network, images):
    network.train()
    network[1].eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    statistics_shift(network, [images])
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_without_batch_norm_or_images_there_is_none(network, images):
    assert statistics_shift(network, []) is None
    assert statistics_shift(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), [images]) is None
