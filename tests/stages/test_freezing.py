"""Frozen is frozen, in any loop; weight decay goes by the kind of parameter."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from torchthaw.errors import PlanError, TrainingError
from torchthaw.stages.freezing import freeze_for_stage, resolve_batch_norm
from torchthaw.stages.param_groups import param_groups
from torchthaw.stages.plan import Stage
from torchthaw.stages.proof import check_unchanged, frozen_fingerprints


@dataclass
class Group:
    modules: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]


class TinyNet(nn.Module):
    """Two convolutional blocks and a head, with names that hide their norms."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.two = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)
        self.held = ()

    def forward(self, x):
        return self.head(self.two(self.one(x)).mean((2, 3)))

    def layer_groups(self):
        return {
            name: Group({name: module}, {f"{name}.{n}": p for n, p in module.named_parameters()})
            for name, module in self.named_children()
        }

    def hold_in_eval(self, names):
        self.held = tuple(names)

    def train(self, mode=True):
        super().train(mode)
        for name in self.held:
            self.get_submodule(name).eval()
        return self


def take_steps(model, stage, steps=3):
    optimizer = torch.optim.AdamW(param_groups(model, model.layer_groups(), stage))
    for _ in range(steps):
        model.train()
        loss = model(torch.randn(8, 3, 8, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before, model):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}


@pytest.mark.parametrize(
    ("unfreeze", "policy", "moves"),
    [
        ("head", "eval", {"head"}),
        (1, "eval", {"two.0", "head"}),
        (1, "freeze_affine", {"two.0", "two.1 statistics", "head"}),
        (1, "train", {"two.0", "two.1", "two.1 statistics", "head"}),
        ("all", "eval", {"one.0", "two.0", "head"}),
    ],
)
def test_only_what_is_unfrozen_moves(unfreeze, policy, moves):
    torch.manual_seed(0)
    model = TinyNet()
    stage = Stage("s", unfreeze=unfreeze, learning_rate=1e-2)
    freeze_for_stage(model, stage, policy)
    before = snapshot(model)
    take_steps(model, stage)

    def place(name):
        module, _, tensor = name.rpartition(".")
        return f"{module} statistics" if tensor.startswith(("running", "num_batches")) else module

    assert {place(name) for name in changed(before, model)} == moves


def test_frozen_groups_compute_as_in_inference():
    model = TinyNet()
    freeze_for_stage(model, Stage("s", unfreeze=1, learning_rate=1e-3), "train")
    model.train()
    assert not model.one[3].training, "dropout of a frozen group stays off"
    assert not model.one[1].training
    assert model.two[1].training


def test_frozen_groups_keep_their_dropout_if_the_stage_says_so_but_never_their_statistics():
    model = TinyNet()
    stage = Stage("s", unfreeze=1, learning_rate=1e-2, frozen_dropout=True)
    freeze_for_stage(model, stage, "train")
    model.train()
    assert model.one[3].training, "dropout of a frozen group stays active"
    assert not model.one[1].training
    assert model.two[1].training
    before = snapshot(model)
    take_steps(model, stage)
    assert not any(name.startswith("one") for name in changed(before, model))


def test_unfreezing_again_sets_everything_free():
    model = TinyNet()
    freeze_for_stage(model, Stage("a", unfreeze="head", learning_rate=1e-3), "eval")
    freeze_for_stage(model, Stage("b", learning_rate=1e-3), "train")
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.train().modules())


def test_a_stage_in_which_nothing_can_train_is_refused():
    class OnlyNorm(TinyNet):
        def __init__(self):
            super().__init__()
            self.two = nn.Sequential(nn.BatchNorm2d(4))

    with pytest.raises(PlanError, match="nothing can train under batch_norm: eval"):
        freeze_for_stage(OnlyNorm(), Stage("s", unfreeze="two", learning_rate=1e-3), "eval")


@pytest.mark.parametrize(
    ("policy", "images", "batch", "resolved"),
    [
        ("auto", 500, 64, "eval"),
        ("auto", 50_000, 8, "eval"),
        ("auto", 50_000, 64, "train"),
        ("auto", None, 64, "train"),
        ("freeze_affine", 500, 4, "freeze_affine"),
    ],
)
def test_auto_keeps_statistics_for_small_data_or_batches(policy, images, batch, resolved):
    assert resolve_batch_norm(policy, num_images=images, batch_size=batch) == resolved


def test_decay_goes_to_weights_only_and_every_parameter_is_in_one_group():
    model = TinyNet()
    stage = Stage("s", learning_rate=1.0, layer_decay=0.1, weight_decay=0.5)
    freeze_for_stage(model, stage, "train")
    groups = param_groups(model, model.layer_groups(), stage)
    assert [(g["name"], pytest.approx(g["lr"]), g["weight_decay"]) for g in groups] == [
        ("one/decay", 0.01, 0.5),
        ("one/no_decay", 0.01, 0.0),
        ("two/decay", 0.1, 0.5),
        ("two/no_decay", 0.1, 0.0),
        ("head/decay", 1.0, 0.5),
        ("head/no_decay", 1.0, 0.0),
    ]
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(model.one[0].weight), id(model.two[0].weight), id(model.head.weight)}
    listed = [id(p) for g in groups for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())


def test_proof_names_a_frozen_tensor_that_moved():
    model = TinyNet()
    freeze_for_stage(model, Stage("s", unfreeze="head", learning_rate=1e-3), "eval")
    before = frozen_fingerprints(model.train())
    assert "one.1.running_mean" in before
    check_unchanged(before, model, "s")
    model.one[1].running_mean += 1e-6
    with pytest.raises(TrainingError, match=r"stage 's' changed 1 frozen tensors: one\.1\.running_mean"):
        check_unchanged(before, model, "s")
