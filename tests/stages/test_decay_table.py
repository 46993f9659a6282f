"""Weight decay over all classifiers of torchvision: every parameter is classified anew, by the type of its owner."""

import functools

import pytest
import torch
from torch import nn
from torchvision.models.convnext import CNBlock
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2
from torchvision.models.vision_transformer import Encoder, VisionTransformer
from torchvision.ops.misc import FrozenBatchNorm2d

from torchthaw import Stage, TorchvisionConfig, TorchvisionForImageClassification, param_groups
from torchthaw.backbones.anatomy import family_of, list_architectures
from torchthaw.stages.freezing import freeze_for_stage

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, FrozenBatchNorm2d)
MAPS = {"weight": (nn.Linear, nn.Conv2d), "in_proj_weight": (nn.MultiheadAttention,)}
# Parameters that a module owns besides the weights and biases of its layers.
OTHERS = {
    (VisionTransformer, "class_token"): "token",
    (Encoder, "pos_embedding"): "position embedding",
    (ShiftedWindowAttention, "relative_position_bias_table"): "position bias",
    (ShiftedWindowAttentionV2, "logit_scale"): "scale",
    (RelativePositionalMultiHeadAttention, "relative_position_bias_table"): "position bias",
    (CNBlock, "layer_scale"): "scale",
}


def kinds_of(model):
    """What each parameter is, by name."""
    position_networks = {
        layer
        for module in model.modules()
        if isinstance(module, ShiftedWindowAttentionV2)
        for layer in module.cpb_mlp.modules()
    }
    kinds = {}
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            if isinstance(module, NORMS):
                kind = "norm"
            elif name in ("bias", "in_proj_bias"):
                kind = "bias"
            elif module in position_networks:
                kind = "position bias"  # as in the optimizer of Swin V2's authors (arXiv 2111.09883)
            elif isinstance(module, MAPS.get(name, ())):
                kind = "weight"
            else:
                kind = OTHERS[type(module), name]
            kinds[f"{path}.{name}"] = kind
    return kinds


@functools.cache
def kinds_and_decayed(architecture):
    options = {"aux_logits": True} if family_of(architecture).auxiliary else {}
    with torch.device("meta"):
        config = TorchvisionConfig(architecture=architecture, num_labels=3, **options)
        model = TorchvisionForImageClassification(config)
    stage = Stage("all", learning_rate=1e-3, layer_decay=0.75, weight_decay=0.05)
    freeze_for_stage(model, stage, "train")
    groups = param_groups(model, model.layer_groups(), stage)
    listed = [id(p) for group in groups for p in group["params"]]
    assert all(p.requires_grad for p in model.parameters())
    assert sorted(listed) == sorted(id(p) for p in model.parameters()), "each parameter is in exactly one group"
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    return kinds_of(model), decayed


@pytest.mark.parametrize("architecture", list_architectures())
def test_weights_of_linear_maps_and_convolutions_decay_and_nothing_else(architecture):
    kinds, decayed = kinds_and_decayed(architecture)
    assert decayed == {name for name, kind in kinds.items() if kind == "weight"}


@pytest.mark.parametrize(
    ("architecture", "counts"),
    [
        ("resnet50", {"norm": 2 * 53, "bias": 1, "weight": 54}),
        ("efficientnet_b0", {"norm": 2 * 49}),
        ("mobilenet_v2", {"norm": 2 * 52}),
        ("vit_b_16", {"norm": 2 * 25, "token": 1, "position embedding": 1}),
        ("convnext_tiny", {"norm": 2 * 23, "scale": 18}),
        ("swin_t", {"position bias": 12}),
        ("swin_v2_t", {"position bias": 2 * 12, "scale": 12}),
        ("maxvit_t", {"position bias": 22}),
    ],
)
def test_the_table_sees_what_there_is(architecture, counts):
    kinds, _ = kinds_and_decayed(architecture)
    found = list(kinds.values())
    assert {kind: found.count(kind) for kind in counts} == counts
