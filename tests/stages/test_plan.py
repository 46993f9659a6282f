"""Stages say what trains at which rate, and refuse what cannot work."""

import json

import pytest

from torchthaw.errors import PlanError
from torchthaw.stages.plan import Stage, StagePlan
from torchthaw.stages.presets import PRESETS, fill_defaults, make_plan, preset_plan

GROUPS = ["stem", "layer1", "layer2", "layer3", "layer4", "head"]


@pytest.mark.parametrize(
    ("unfreeze", "live"),
    [
        ("head", ["head"]),
        (0, ["head"]),
        (1, ["layer4", "head"]),
        (2, ["layer3", "layer4", "head"]),
        ("all", GROUPS),
        (["layer[12]", "head"], ["layer1", "layer2", "head"]),
        ("layer4", ["layer4"]),
    ],
)
def test_unfreeze_names_the_live_groups(unfreeze, live):
    assert list(Stage("s", unfreeze=unfreeze).live_groups(GROUPS)) == live


def test_layer_decay_lowers_the_rate_towards_the_input():
    rates = Stage("s", unfreeze=2, learning_rate=1.0, layer_decay=0.5).learning_rates(GROUPS)
    assert rates == {"head": 1.0, "layer4": 0.5, "layer3": 0.25}


def test_a_groups_own_rate_wins_over_a_pattern_and_a_pattern_over_backbone():
    stage = Stage("s", learning_rate={"backbone": 1e-5, "layer*": 1e-4, "layer4": 3e-4, "head": 1e-3})
    assert stage.learning_rates(GROUPS) == {
        "stem": 1e-5,
        "layer1": 1e-4,
        "layer2": 1e-4,
        "layer3": 1e-4,
        "layer4": 3e-4,
        "head": 1e-3,
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unfreeze": []}, "unfreezes nothing"),
        ({"unfreeze": -1}, "unfreeze is -1"),
        ({"learning_rate": 0.0}, "learning rate is 0.0, so nothing would be learned"),
        ({"learning_rate": float("nan")}, "learning rate is nan"),
        ({"learning_rate": {"head": 0.0}}, "learning rate of 'head' is 0.0"),
        ({"learning_rate": {"head": 1e-3}, "layer_decay": 0.5}, "both layer_decay and a rate per group"),
        ({"layer_decay": 1.5}, "layer_decay is 1.5"),
        ({"epochs": 0}, "epochs is 0"),
        ({"warmup": 1.0}, "warmup is 1.0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"batch_norm": "frozen"}, "unknown batch_norm 'frozen'"),
        ({"name": ""}, "empty name"),
    ],
)
def test_a_stage_refuses_what_cannot_work(fields, message):
    with pytest.raises(PlanError, match=message):
        Stage(**{"name": "s", **fields})


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Stage("s", unfreeze="layer5", learning_rate=1e-3), "'layer5', which matches no layer group. Did you mean"),
        (Stage("s", unfreeze=6, learning_rate=1e-3), "unfreeze is 6, but the backbone has 5 groups"),
        (Stage("s", learning_rate={"heed": 1e-3}), "learning_rate names 'heed'.*Did you mean 'head'"),
        (Stage("s", unfreeze=1, learning_rate={"head": 1e-3}), "trains 'layer4' but learning_rate has no rate"),
    ],
)
def test_a_stage_that_does_not_fit_the_backbone_is_refused(stage, message):
    with pytest.raises(PlanError, match=message):
        StagePlan((stage,)).check_groups(GROUPS)


def test_a_plan_needs_stages_with_distinct_names():
    with pytest.raises(PlanError, match="no stage"):
        StagePlan(())
    with pytest.raises(PlanError, match="share the name 'a'"):
        StagePlan((Stage("a"), Stage("a")))


def test_a_plan_survives_json():
    plan = StagePlan((Stage("a", unfreeze=["head", "layer4"], learning_rate={"head": 1e-3, "layer4": 1e-4}),), "mine")
    assert StagePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_an_unknown_stage_key_is_refused_with_the_closest():
    with pytest.raises(PlanError, match="unknown key 'epoch'. Did you mean 'epochs'"):
        StagePlan.from_dict({"stages": [{"name": "a", "epoch": 3}]})


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("epochs", [3, 7, 10, 31])
def test_a_preset_shares_out_all_epochs(name, epochs):
    plan = preset_plan(name, epochs=epochs)
    assert plan.epochs == epochs
    assert all(stage.epochs >= 1 for stage in plan.stages)


def test_the_staged_preset_is_three_two_two():
    assert [(s.unfreeze, s.epochs) for s in preset_plan("staged").stages] == [("head", 3), (1, 2), ("all", 2)]


def test_presets_refuse_unknown_names_and_too_few_epochs():
    with pytest.raises(PlanError, match="unknown plan 'stagd'. Did you mean 'staged'"):
        make_plan("stagd")
    with pytest.raises(PlanError, match="3 stages and needs at least as many epochs, not 2"):
        make_plan("staged", epochs=2)
    with pytest.raises(PlanError, match="1 epochs long in all, but 5 epochs"):
        make_plan([Stage("a")], epochs=5)


@pytest.mark.parametrize("transformer", [True, False])
def test_defaults_train_the_backbone_at_a_tenth_or_less_of_the_head(transformer):
    plan = fill_defaults(preset_plan("two_phase"), transformer=transformer)
    head, everything = (stage.learning_rates(GROUPS) for stage in plan.stages)
    assert max(rate for group, rate in everything.items() if group != "head") <= 0.2 * head["head"]
    assert min(everything.values()) <= head["head"] / 10
    assert list(everything.values()) == sorted(everything.values())


def test_the_heads_rate_moves_the_others_in_proportion_and_leaves_explicit_rates():
    plan = StagePlan((Stage("open"), Stage("given", learning_rate=5e-5)))
    low = fill_defaults(plan, transformer=False, head_rate=1e-3)
    high = fill_defaults(plan, transformer=False, head_rate=1e-2)
    assert high.stages[0].learning_rate == pytest.approx(10 * low.stages[0].learning_rate)
    assert high.stages[1].learning_rate == low.stages[1].learning_rate == 5e-5
