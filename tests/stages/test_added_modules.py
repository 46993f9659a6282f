"""What users add to a model trains with the head, obeys the BatchNorm policy, and is frozen with the head."""

import pytest
import torch
from torch import nn

from torchthaw import Stage, TorchvisionConfig, TorchvisionForImageClassification, param_groups
from torchthaw.stages.freezing import freeze_for_stage

ADDED = {
    "extra.weight",
    "extra.bias",
    "scale",
    "backbone.adapter.weight",
    "backbone.adapter.bias",
    "backbone.fc.0.weight",
    "backbone.fc.0.bias",
}
STATISTICS = {f"backbone.adapter.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


def extended_model():
    """A ResNet with layers and a parameter at its root, a norm within the backbone, and a longer head."""
    torch.manual_seed(0)
    model = TorchvisionForImageClassification(TorchvisionConfig(architecture="resnet18", num_labels=3))
    model.extra = nn.Linear(3, 3)
    model.scale = nn.Parameter(torch.ones(3))
    model.backbone.adapter = nn.BatchNorm2d(512)
    model.backbone.fc = nn.Sequential(nn.Linear(512, 8), nn.ReLU(), nn.Linear(8, 3))
    model.backbone.layer4.register_forward_hook(lambda module, args, output: model.backbone.adapter(output))
    model.backbone.register_forward_hook(lambda module, args, output: model.scale * model.extra(output))
    return model


def changed_by_training(model, stage, policy):
    """Names of the tensors that three steps of a hand-written loop change."""
    freeze_for_stage(model, stage, policy)
    optimizer = torch.optim.AdamW(param_groups(model, model.layer_groups(), stage))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(3):
        model.train()
        model(torch.randn(4, 3, 32, 32), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}


HEAD = (ADDED - {"backbone.adapter.weight", "backbone.adapter.bias"}) | {"backbone.fc.2.weight", "backbone.fc.2.bias"}


@pytest.mark.parametrize(
    ("policy", "norm_moves"),
    [
        ("train", {"backbone.adapter.weight", "backbone.adapter.bias", *STATISTICS}),
        ("freeze_affine", STATISTICS),
        ("eval", set()),
    ],
)
def test_they_train_with_the_head_and_obey_the_batch_norm_policy(policy, norm_moves):
    model = extended_model()
    stage = Stage("head", unfreeze="head", learning_rate=1e-2)
    assert changed_by_training(model, stage, policy) == HEAD | norm_moves


def test_they_are_frozen_with_the_head():
    model = extended_model()
    stage = Stage("layer4", unfreeze=["layer4"], learning_rate={"backbone": 1e-3})
    moved = changed_by_training(model, stage, "train")
    assert moved == {name for name in model.state_dict() if name.startswith("backbone.layer4.")}
    assert not model.train().backbone.adapter.training
    assert not model.extra.training


def test_every_trainable_parameter_is_in_one_optimizer_group_at_the_rate_of_the_head():
    model = extended_model()
    stage = Stage("all", learning_rate=1.0, layer_decay=0.1, weight_decay=0.5)
    freeze_for_stage(model, stage, "train")
    groups = param_groups(model, model.layer_groups(), stage)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    rate_of = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    rates = {name: rate_of[id(p)] for name, p in model.named_parameters() if name in ADDED}
    matrices = {"extra.weight", "backbone.fc.0.weight"}
    assert rates == {name: (1.0, 0.5 if name in matrices else 0.0) for name in ADDED}
