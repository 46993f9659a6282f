"""Saved models of all families, for exports."""

import torch
from torch import nn

from torchthaw import TorchvisionForImageClassification, TorchvisionImageProcessor

# Small inputs where the network takes them.
ONE_OF_EACH_FAMILY = {
    "alexnet": 64, "convnext_tiny": 32, "densenet121": 32, "efficientnet_b0": 32, "googlenet": 64, "inception_v3": 96,
    "maxvit_t": 224, "mnasnet0_5": 32, "mobilenet_v2": 32, "mobilenet_v3_small": 32, "regnet_y_400mf": 32,
    "resnet18": 32, "shufflenet_v2_x0_5": 32, "squeezenet1_1": 32, "swin_t": 32, "swin_v2_t": 32, "vgg11_bn": 32,
    "vit_b_16": 32,
}  # fmt: skip
CLASSES = ["ant", "bee", "häßlich <b>"]


def save(architecture, folder, size=None, **options):
    """Saves a model whose logits depend on the image, although it was never trained."""
    torch.manual_seed(0)
    weights = "builtin" if architecture == "shufflenet_v2_x0_5" else None
    model = TorchvisionForImageClassification.from_torchvision(
        architecture, weights, id2label=CLASSES, image_size=size, **options
    )
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    side = 224 if architecture == "maxvit_t" else 96
    with torch.no_grad():
        if norms and weights is None:
            model.train()(pixel_values=torch.randn(4, 3, side, side))
        for parameter in model.layer_groups()["head"].parameters.values():
            parameter.normal_(std=0.1)
    model.eval().save_pretrained(folder)
    TorchvisionImageProcessor.from_torchvision(architecture, None, image_size=size).save_pretrained(folder)
    return model
