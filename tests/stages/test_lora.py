"""Low-rank adapters: which weights get one, what they compute, and that torchvision's weights stay as they are."""

import builtins
import copy
import sys

import peft
import pytest
import torch
from small_transformers import NETWORKS, small_model
from torch import nn
from torch.nn import functional as F

from torchthaw import Stage, StagePlan, TorchvisionConfig, TorchvisionForImageClassification, param_groups
from torchthaw.errors import PlanError
from torchthaw.stages.adapters import add_adapters, weights_to_adapt, with_adapters
from torchthaw.stages.freezing import freeze_for_stage
from torchthaw.stages.low_rank import (
    adapted_weights,
    adapter_parameters,
    merge_adapters,
    take_merged_snapshot,
    weight_at,
    with_adapted_weights,
)
from torchthaw.stages.presets import fill_defaults
from torchthaw.stages.proof import digest
from torchthaw.stages.snapshots import live_names

SMALL = list(NETWORKS)
STAGE = Stage("adapters", "all", lora={"rank": 4, "alpha": 6}, learning_rate=1e-2)


def images(number=4, seed=0):
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def adapted(architecture, stage=STAGE, *, seed=0):
    """A small model that is ready for a stage with adapters, in training mode."""
    model = small_model(architecture)
    add_adapters(model.layer_groups(), stage, seed=seed)
    freeze_for_stage(model, stage, "eval")
    return model.train()


def train(model, steps=3, rate=1e-2):
    groups = param_groups(model, model.layer_groups(), Stage("adapters", "all", lora=4, learning_rate=rate))
    optimizer = torch.optim.AdamW(groups)
    for _ in range(steps):
        model(images(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def on_meta(architecture):
    with torch.device("meta"):
        return TorchvisionForImageClassification(TorchvisionConfig(architecture=architecture, num_labels=3))


# What trains


@pytest.mark.parametrize("architecture", SMALL)
def test_only_adapters_and_the_head_change_and_reach_every_layer(architecture):
    model = adapted(architecture)
    before = {name: digest(tensor) for name, tensor in model.named_parameters()}
    places = adapted_weights(model)
    logits = model.eval()(images()).logits
    assert torch.equal(logits, small_model(architecture)(images()).logits), "it begins as what it was"
    train(model.train())
    own = set(adapter_parameters(model))
    head = {name for name in model.layer_groups()["head"].parameters if "classifier.0" not in name}
    moved = {name for name, tensor in model.named_parameters() if digest(tensor) != before[name]}
    assert moved == own | head
    assert len(own) == 2 * len(places) > 10


@pytest.mark.parametrize("architecture", SMALL)
def test_merged_weights_are_those_of_the_formula_and_keep_logits_to_the_last_bit(architecture):
    model = adapted(architecture)
    original = {name: weight_at(place).detach().clone() for name, place in adapted_weights(model).items()}
    train(model)
    matrices = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    snapshot = take_merged_snapshot(model, with_adapted_weights(model, live_names(model)))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.eval()
    with torch.no_grad():
        logits = model(images(seed=1)).logits
        merge_adapters(model)
        assert torch.equal(model(images(seed=1)).logits, logits)
    assert list(state) == list(small_model(architecture).state_dict()), "torchvision's own keys"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
        assert name not in snapshot or torch.equal(tensor, snapshot[name])
    for name, before in original.items():
        layer, _, attribute = name.rpartition(".")
        a, b = (matrices[f"{layer}.lora_{attribute}.lora_{letter}"] for letter in "AB")
        by_hand = before.double() + 6 / 4 * b.double() @ a.double()
        torch.testing.assert_close(state[name].double(), by_hand, atol=1e-6, rtol=1e-6)
        assert not torch.equal(state[name], before)
        assert torch.linalg.matrix_rank(state[name].double() - before.double(), atol=1e-5) <= 4


def test_the_numbers_are_those_of_pefts_own_layer():
    """Where peft can adapt a layer itself: start, output and gradients."""
    torch.manual_seed(0)
    theirs = nn.ModuleDict({"layer": nn.Linear(12, 10)})
    ours = copy.deepcopy(theirs)
    stage = Stage("s", "all", lora=3)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["layer"])
    with torch.random.fork_rng():
        torch.manual_seed(5)
        peft.inject_adapter_in_model(config, theirs)

    class Group:
        modules, parameters = {"layer": ours["layer"]}, dict(ours.named_parameters())

    random = torch.random.get_rng_state()
    add_adapters({"block": Group, "head": Group}, stage, seed=5)
    assert torch.equal(torch.random.get_rng_state(), random), "the run's random numbers are left alone"
    own = adapter_parameters(ours)
    a, b = own["layer.lora_weight.lora_A"], own["layer.lora_weight.lora_B"]
    their_a, their_b = theirs["layer"].lora_A["default"].weight, theirs["layer"].lora_B["default"].weight
    assert torch.equal(a, their_a)
    assert torch.equal(b, their_b)
    inputs = torch.randn(7, 12)
    for matrix in (b, their_b):
        nn.init.ones_(matrix)
    for model in (ours, theirs):
        model["layer"](inputs).square().sum().backward()
    torch.testing.assert_close(ours["layer"](inputs), theirs["layer"](inputs))
    torch.testing.assert_close(a.grad, their_a.grad)
    torch.testing.assert_close(b.grad, their_b.grad)


def test_recomputed_blocks_give_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = adapted("swin_t", seed=3)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(images(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        gradients.append([p.grad for p in adapter_parameters(model).values()])
    assert all(torch.allclose(one, other, atol=1e-7) for one, other in zip(*gradients, strict=True))
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients[0])


def test_copies_have_adapters_of_their_own():
    model = adapted("vit_b_16")
    twin = copy.deepcopy(model)
    train(twin)
    assert all(not p.any() for name, p in adapter_parameters(model).items() if name.endswith("B"))
    merge_adapters(twin)
    assert adapted_weights(model)
    assert not adapted_weights(twin)
    assert type(twin.backbone.encoder.layers[0].mlp[0]) is nn.Linear


def test_weights_of_half_precision_get_adapters_of_full_precision():
    model = small_model("vit_b_16").to(torch.bfloat16)
    add_adapters(model.layer_groups(), STAGE, seed=0)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    assert model(images().bfloat16()).logits.dtype == torch.bfloat16
    merge_adapters(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# Why not peft's own layers


def injected(architecture, targets):
    torch.manual_seed(0)
    model = small_model(architecture)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=targets), model.backbone)
    return model.train()


def test_trap_pefts_layers_in_swins_attention_learn_nothing():
    model = injected("swin_t", ["qkv"])
    model.backbone.head.requires_grad_(True)
    model(images(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    theirs = [p for name, p in model.named_parameters() if "lora_" in name]
    assert theirs
    assert all(p.grad is None for p in theirs)
    ours = adapted("swin_t", Stage("s", "all", lora={"rank": 4, "targets": ["qkv"]}))
    ours(images(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert all(p.grad.any() for name, p in adapter_parameters(ours).items() if name.endswith("B"))


def test_trap_pefts_layers_round_the_frozen_weights_of_attention():
    model = injected("vit_b_16", ["self_attention"])
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)

    def frozen():
        return {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("in_proj_weight")}

    before = frozen()
    model(images())
    assert any(not torch.equal(before[name], p) for name, p in frozen().items())


# Which weights


@pytest.mark.parametrize(
    ("architecture", "kinds"),
    [
        ("vit_b_16", {"self_attention.in_proj": 12, "self_attention.out_proj": 12, "mlp.0": 12, "mlp.3": 12}),
        ("swin_t", {"attn.qkv": 12, "attn.proj": 12, "mlp.0": 12, "mlp.3": 12, "reduction": 3}),
        ("swin_v2_t", {"attn.qkv": 12, "attn.proj": 12, "mlp.0": 12, "mlp.3": 12, "reduction": 3}),
        ("convnext_tiny", {"block.3": 18, "block.5": 18}),
        ("maxvit_t", {"to_qkv": 22, "merge": 22, "mlp_layer.1": 22, "mlp_layer.3": 22, "classifier.3": 1}),
    ],
)
def test_all_linear_maps_before_the_head_are_adapted(architecture, kinds):
    model = on_meta(architecture)
    names = [
        name.removesuffix(".weight").removesuffix("_weight") for name in weights_to_adapt(model.layer_groups(), STAGE)
    ]
    counted = {kind: sum(f".{name}.".endswith(f".{kind}.") for name in names) for kind in kinds}
    if architecture == "maxvit_t":
        counted |= {kind: sum(kind in name for name in names) for kind in ("to_qkv", "merge")}
        counted |= {kind: sum(kind in name for name in names) for kind in ("mlp_layer.1", "mlp_layer.3")}
    assert counted == kinds
    assert len(names) == sum(kinds.values())
    with with_adapters(model, STAGE):
        frozen = freeze_for_stage(model, STAGE, "eval")
        expected = sum(4 * (sum(weight_at(place).shape)) for place in adapted_weights(model).values())
        head = sum(p.numel() for p in model.layer_groups()["head"].parameters.values())
        assert frozen.trainable_parameters == expected + head
        assert frozen.groups == ("stem",)
    assert not adapter_parameters(model)


def test_targets_and_groups_choose():
    groups = on_meta("vit_b_16").layer_groups()

    def chosen(unfreeze, *targets):
        return weights_to_adapt(groups, Stage("s", unfreeze, lora={"rank": 2, "targets": list(targets)}))

    assert len(chosen(2, "mlp")) == 4
    assert len(chosen("all", "self_attention")) == 24
    assert len(chosen("all", "in_proj", "mlp.0")) == 24
    assert len(chosen("all", "*_proj")) == 24
    assert len(chosen(["block1[01]", "head"])) == 8
    # The networks of position biases only if they are named.
    biases = Stage("s", "all", lora={"rank": 1, "targets": ["cpb_mlp"]})
    assert len(weights_to_adapt(on_meta("swin_v2_t").layer_groups(), biases)) == 24


def test_optimizer_groups_are_those_of_layer_groups_and_adapters_decay():
    stage = Stage("s", "all", lora=4, learning_rate=1e-2, layer_decay=0.5, weight_decay=0.1)
    model = adapted("vit_b_16", stage)
    groups = param_groups(model, model.layer_groups(), stage)
    assert [group["name"] for group in groups] == [
        "block0/decay", "block1/decay", "block2/decay", "head/decay", "head/no_decay",
    ]  # fmt: skip
    assert [group["lr"] for group in groups] == [1e-2 * 0.5**power for power in (3, 2, 1, 0, 0)]
    assert [len(group["params"]) for group in groups] == [8, 8, 8, 1, 1]


def test_batch_norm_of_adapted_groups_stays_as_it_is():
    model = on_meta("maxvit_t")
    with with_adapters(model, STAGE):
        freeze_for_stage(model, STAGE, "eval")
        model.train()
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        assert norms
        assert not any(norm.training for norm in norms)
        assert model.backbone.blocks[0].layers[0].training


def test_defaults_of_a_stage():
    stage = Stage("s", "all", lora=8)
    assert (stage.adapters.rank, stage.adapters.alpha, stage.adapters.targets) == (8, 16.0, ())
    assert stage.adapters.scale == 2.0
    assert stage.batch_norm == "eval"
    filled = fill_defaults(StagePlan((stage,)), transformer=True).stages[0]
    assert (filled.learning_rate, filled.layer_decay) == (1e-3, 1.0)
    assert StagePlan.from_dict(StagePlan((stage,)).to_dict()) == StagePlan((stage,))
    assert Stage("s", "all").adapters is None


# Errors


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (0, "the rank of lora is 0; write a whole number from 1 on"),
        (True, "lora is True; write, for example, lora: 8"),
        ("8", "lora is '8'; write, for example, lora: 8"),
        ({}, "lora is {}; write, for example, lora: 8"),
        ({"alpha": 8}, "the rank of lora is None"),
        ({"rank": 2.5}, "the rank of lora is 2.5"),
        ({"rank": 4, "alpha": 0}, "alpha of lora is 0; write a positive number such as 8"),
        ({"rank": 4, "target": ["mlp"]}, "unknown key 'target'. Did you mean 'targets'?"),
        ({"rank": 4, "targets": [3]}, r"targets of lora is \[3\]; write names or patterns"),
        ({"rank": 4, "dropout": 0.1}, "lora has dropout, which belongs to the input of a layer"),
    ],
)
def test_settings_that_do_not_fit_are_refused(lora, message):
    with pytest.raises(PlanError, match=f"stage 's': .*{message}|stage 's'.*{message}"):
        Stage("s", "all", lora=lora)


def test_what_contradicts_adapters_is_refused():
    with pytest.raises(PlanError, match="unfreeze is 'head'; lora adapts layers of the backbone: write all"):
        Stage("s", "head", lora=4)
    with pytest.raises(PlanError, match="batch_norm is 'train'; lora freezes the statistics"):
        Stage("s", "all", lora=4, batch_norm="train")


@pytest.mark.parametrize(
    ("architecture", "unfreeze", "lora", "message"),
    [
        ("vit_b_16", ["stem", "head"], 4, r"no linear layer in what it unfreezes \(stem, head\); write unfreeze: all"),
        ("vit_b_16", "all", {"rank": 4, "targets": ["qkv"]}, "target 'qkv', which matches no linear layer.*in_proj"),
        ("swin_t", "all", {"rank": 4, "targets": ["quv"]}, "Did you mean 'qkv'"),
        ("swin_t", "all", 96, "rank of lora is 96, but .* is a matrix of 288 x 96, of rank 96 at most"),
    ],
)
def test_stages_that_do_not_fit_the_model_are_refused(architecture, unfreeze, lora, message):
    with pytest.raises(PlanError, match=message):
        weights_to_adapt(on_meta(architecture).layer_groups(), Stage("s", unfreeze, lora=lora))


def test_without_peft_the_error_says_how_to_install_it(monkeypatch):
    model = small_model("vit_b_16")
    imported = builtins.__import__

    def without_peft(name, *args, **kwargs):
        if name.split(".")[0] == "peft":
            raise ModuleNotFoundError("No module named 'peft'")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    monkeypatch.delitem(sys.modules, "peft")
    with pytest.raises(
        PlanError, match=r"stage 'adapters' has lora, which needs peft.*pip install 'torchthaw\[lora\]'"
    ):
        add_adapters(model.layer_groups(), STAGE, seed=0)
    assert not adapted_weights(model)


def test_a_layer_whose_weight_is_handed_on_sees_the_adapter():
    """As Swin's attention does it."""
    model = adapted("swin_t")
    name, (layer, _) = next(item for item in adapted_weights(model).items() if "qkv" in item[0])
    nn.init.ones_(adapter_parameters(model)[f"{name.removesuffix('.weight')}.lora_weight.lora_B"])
    inputs = torch.randn(2, layer.in_features)
    assert not torch.equal(F.linear(inputs, layer.weight), F.linear(inputs, layer._parameters["weight"]))
    assert torch.equal(F.linear(inputs, layer.weight, layer.bias), layer(inputs))
