"""Freezing and parameter groups on the real architectures, one of each family."""

import pytest
import torch
from torch import nn

from torchthaw import Stage, TorchvisionConfig, TorchvisionForImageClassification, param_groups
from torchthaw.stages.freezing import freeze_for_stage

ONE_OF_EACH_FAMILY = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5",
    "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t",
    "swin_v2_t", "vgg11_bn", "vit_b_16",
]  # fmt: skip


def on_meta(architecture):
    with torch.device("meta"):
        return TorchvisionForImageClassification(TorchvisionConfig(architecture=architecture, num_labels=3))


@pytest.mark.parametrize("architecture", ONE_OF_EACH_FAMILY)
def test_only_weights_of_linear_maps_and_convolutions_decay(architecture):
    model = on_meta(architecture)
    stage = Stage("all", learning_rate=1e-3, layer_decay=0.5, weight_decay=0.1)
    freeze_for_stage(model, stage, "train")
    groups = param_groups(model, model.layer_groups(), stage)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())

    expected = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and "cpb_mlp" not in name:
            expected.add(id(module.weight))
        if isinstance(module, nn.MultiheadAttention):
            expected.add(id(module.in_proj_weight))
    assert {id(p) for group in groups if group["weight_decay"] for p in group["params"]} == expected


@pytest.mark.parametrize("architecture", ONE_OF_EACH_FAMILY)
def test_the_last_block_trains_and_everything_before_it_stays_in_eval_mode(architecture):
    model = on_meta(architecture)
    frozen = freeze_for_stage(model, Stage("s", unfreeze=1, learning_rate=1e-3), "eval")
    groups = model.layer_groups()
    live = list(groups)[-2:]
    assert list(frozen.groups) == list(groups)[:-2]
    for mode in (True, False, True):
        model.train(mode)
    for name, group in groups.items():
        for module in (m for root in group.modules.values() for m in root.modules()):
            if name not in live or isinstance(module, nn.BatchNorm2d):
                assert not module.training, f"{name}: {type(module).__name__}"
        if name not in live:
            assert not any(p.requires_grad for p in group.parameters.values())
    assert all(p.requires_grad for p in groups["head"].parameters.values())
