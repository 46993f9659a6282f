"""The pull towards the weights that a run began with, and the distance from them, against what is computed by hand."""

import copy

import pytest
import torch
from torch import nn

from torchthaw import Stage, TorchvisionConfig, TorchvisionForImageClassification, param_groups
from torchthaw.stages.starting_point import PullToStart, StartingPoint

RATE, PULL = 0.05, 2.0


def pulled(kind, weight, **options):
    """Returns a function that makes a step of a pulled optimizer with a gradient."""
    groups = [{"params": [weight], "lr": RATE, "weight_decay": 0.0, "l2_sp": PULL}]
    optimizer = kind(groups, **options)
    PullToStart(optimizer, {id(weight): "w"}, {"w": weight.detach().clone()})

    def step(gradient):
        weight.grad = gradient
        optimizer.step()

    return optimizer, step


OPTIMIZERS = [
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.AdamW, {"foreach": False}),
    (torch.optim.SGD, {"momentum": 0.9}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_each_step_goes_a_share_of_the_way_back_and_then_the_optimizers_own(kind, options):
    start = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    weight, expected = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    _, step = pulled(kind, weight, **options)
    plain = kind([expected], lr=RATE, weight_decay=0.0, **options)
    for number in range(6):
        gradient = torch.randn(7, 5, generator=torch.Generator().manual_seed(number + 1))
        step(gradient.clone())
        with torch.no_grad():
            expected -= RATE * PULL * (expected - start)
        expected.grad = gradient
        plain.step()
        torch.testing.assert_close(weight.data, expected.data, rtol=0, atol=1e-6)
    assert (weight - start).abs().max() > 0.05


def test_with_the_origin_as_start_it_is_the_weight_decay_of_adamw():
    weight, expected = (nn.Parameter(torch.full((4, 4), 0.5)) for _ in range(2))
    groups = [{"params": [weight], "lr": RATE, "weight_decay": 0.0, "l2_sp": 0.3}]
    ours = torch.optim.AdamW(groups, fused=True)
    PullToStart(ours, {id(weight): "w"}, {"w": torch.zeros(4, 4)})
    theirs = torch.optim.AdamW([expected], lr=RATE, weight_decay=0.3, fused=True)
    for _ in range(5):
        weight.grad, expected.grad = torch.ones(4, 4), torch.ones(4, 4)
        ours.step(), theirs.step()
    torch.testing.assert_close(weight.data, expected.data, rtol=0, atol=1e-7)


def test_rates_may_be_tensors_and_weights_without_gradient_stay():
    weight, other = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    groups = [{"params": [weight, other], "lr": torch.tensor(RATE), "l2_sp": PULL}]
    optimizer = torch.optim.SGD(groups)
    PullToStart(optimizer, {id(weight): "w", id(other): "o"}, {"w": torch.zeros(3, 3), "o": torch.zeros(3, 3)})
    weight.grad = torch.zeros(3, 3)
    optimizer.step()
    torch.testing.assert_close(weight.data, torch.full((3, 3), 1 - RATE * PULL))
    assert torch.equal(other.data, torch.ones(3, 3))


def test_a_step_that_the_scaler_skips_within_the_optimizer_does_not_pull():
    weight = nn.Parameter(torch.zeros(3, 3))
    optimizer, step = pulled(torch.optim.AdamW, weight, fused=True)
    step(torch.ones(3, 3))
    before = weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for gradient, moves in ((torch.inf, False), (1.0, True)):
        optimizer.zero_grad()
        scaler.scale((weight * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(weight.detach(), before) is not moves
    with torch.no_grad():
        by_hand = before - RATE * PULL * before
    # The second step of Adam with gradients of 1 has length 1.
    torch.testing.assert_close(weight.data, by_hand - RATE, rtol=0, atol=1e-5)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TorchvisionForImageClassification(TorchvisionConfig(architecture="mobilenet_v3_small", num_labels=3))


def test_what_is_pulled_is_what_would_decay_without_the_head(model):
    stage = Stage("all", learning_rate=1e-3, weight_decay=0.1)
    groups = model.layer_groups()
    plain = {group["name"]: group for group in param_groups(model, groups, stage)}
    ours = {group["name"]: group for group in param_groups(model, groups, stage, l2_sp=0.5)}
    assert list(ours) == list(plain)
    for name, group in ours.items():
        assert [id(p) for p in group["params"]] == [id(p) for p in plain[name]["params"]]
        is_pulled = name.endswith("/decay") and not name.startswith("head/")
        assert group.get("l2_sp") == (0.5 if is_pulled else None)
        assert group["weight_decay"] == (0.1 if name == "head/decay" else 0.0)
    assert "classifier/decay" in ours, "a hidden layer of the classifier is pretrained, too"
    assert all("l2_sp" not in group for group in plain.values())


def test_distances_are_the_norm_of_the_difference_over_that_of_the_start(model):
    groups = model.layer_groups()
    begin = copy.deepcopy(model)
    start = StartingPoint.of(model, groups, ("stage1", "classifier", "head"))
    with torch.no_grad():
        for name in ("stage1", "classifier", "head"):
            for number, parameter in enumerate(groups[name].parameters.values()):
                parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    found = start.distances(model, groups)

    def flat(of, chosen):
        parameters = dict(of.named_parameters())
        return torch.cat(
            [parameters[name].detach().flatten().double() for g in chosen for name in groups[g].parameters]
        )

    assert list(found["groups"]) == [name for name in groups if name != "head"]
    for name, distance in found["groups"].items():
        before, after = flat(begin, [name]), flat(model, [name])
        assert distance == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-5)
        assert (distance > 0) == (name in ("stage1", "classifier"))
    names = list(found["groups"])
    expected = (flat(model, names) - flat(begin, names)).norm() / flat(begin, names).norm()
    assert found["backbone"] == pytest.approx(float(expected), rel=1e-5)


def test_the_digest_tells_other_weights(model):
    groups = model.layer_groups()
    first = StartingPoint.of(model, groups, ("stage1",))
    with torch.no_grad():
        model.backbone.classifier[3].weight.add_(1)
    assert StartingPoint.of(model, groups, ("stage1",)).digest == first.digest, "the head has no start"
    with torch.no_grad():
        next(iter(groups["stage1"].parameters.values())).view(-1)[0].add_(1e-3)
    assert StartingPoint.of(model, groups, ("stage1",)).digest != first.digest
