"""Networks without their widest layers, which are most of their weights and no part of what a test is about."""

import itertools

from torch import nn

# The layers of the classifier that are narrowed, and the features that the first one takes.
_WIDE = {"alexnet": ((1, 4, 6), 9216), "vgg11_bn": ((0, 3, 6), 25088)}
_WIDTH = 16


def narrow(model):
    """Replaces the wide classifiers of AlexNet and VGG, in place; returns the model."""
    layers, features = _WIDE.get(model.config.architecture, ((), 0))
    classifier = getattr(model.backbone, "classifier", None)
    widths = (features, *[_WIDTH] * (len(layers) - 1), model.config.num_labels)
    for layer, pair in zip(layers, itertools.pairwise(widths), strict=bool(layers)):
        classifier[layer] = nn.Linear(*pair)
    return model
