"""Transformers of torchvision's own classes that train in milliseconds, for tests and the processes that they start."""

from functools import partial

import torch
from torch import nn
from torchvision.models import ConvNeXt, SwinTransformer, VisionTransformer
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.swin_transformer import PatchMerging, PatchMergingV2, SwinTransformerBlockV2

from torchthaw import TorchvisionConfig, TorchvisionForImageClassification

SIZE = 32


def _vit(classes, **options):
    return VisionTransformer(
        image_size=SIZE, patch_size=16, num_layers=3, num_heads=2, hidden_dim=24, mlp_dim=48, num_classes=classes,
        **options,
    )  # fmt: skip


def _swin(classes, **options):
    return SwinTransformer(
        patch_size=[4, 4], embed_dim=12, depths=[1, 1, 2, 1], num_heads=[2, 2, 2, 2], window_size=[4, 4],
        num_classes=classes, **{"downsample_layer": PatchMerging, **options},
    )  # fmt: skip


def _convnext(classes, **options):
    return ConvNeXt([CNBlockConfig(12, 24, 1), CNBlockConfig(24, 36, 1), CNBlockConfig(36, 48, 1),
                     CNBlockConfig(48, None, 1)], num_classes=classes, **options)  # fmt: skip


NETWORKS = {
    "vit_b_16": _vit,
    "swin_t": _swin,
    "swin_v2_t": partial(_swin, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
    "convnext_tiny": _convnext,
}


def small_model(architecture, class_names=("ant", "bee", "cat"), seed=0, **options):
    """A model of random weights that is smaller than its architecture's; torchvision's options, such as dropout."""
    size = {"image_size": SIZE} if architecture == "vit_b_16" else {}
    config = TorchvisionConfig(architecture=architecture, id2label=list(class_names), **size)
    with torch.device("meta"):
        model = TorchvisionForImageClassification(config)
    torch.manual_seed(seed)
    model.backbone = NETWORKS[architecture](len(class_names), **options)
    head = model.backbone.get_submodule(
        {"vit_b_16": "heads.head", "convnext_tiny": "classifier.2"}.get(architecture, "head")
    )
    # ViT's is 0, which would let no gradient through.
    nn.init.normal_(head.weight, std=0.1)
    return model.eval()
