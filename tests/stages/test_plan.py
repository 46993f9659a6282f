"""Stages say what trains at which rate, and refuse what cannot work."""

import json
import math
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from torchthaw.errors import PlanError
from torchthaw.stages.plan import SCHEDULES, Stage, StagePlan
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


def test_a_range_rises_from_the_first_live_group_to_the_head_evenly_on_a_logarithmic_scale():
    rates = Stage("s", unfreeze=2, learning_rate="1e-5..1e-3").learning_rates(GROUPS)
    assert list(rates) == ["layer3", "layer4", "head"]
    assert list(rates.values()) == pytest.approx([1e-5, 1e-4, 1e-3])
    rates = Stage("s", learning_rate="2e-6 .. 5e-3").learning_rates(GROUPS)
    logarithms = torch.linspace(math.log(2e-6), math.log(5e-3), len(GROUPS), dtype=torch.float64)
    assert list(rates.values()) == pytest.approx(logarithms.exp().tolist())
    assert list(rates) == GROUPS


def test_a_range_gives_a_single_group_its_high_rate():
    assert Stage("s", unfreeze="head", learning_rate="1e-5..1e-3").learning_rates(GROUPS) == {"head": 1e-3}
    assert Stage("s", unfreeze="layer2", learning_rate="1e-5..1e-3").learning_rates(GROUPS) == {"layer2": 1e-3}


@pytest.mark.parametrize("rate", [1e-3, {"head": 1e-3, "layer*": 2e-4, "backbone": 3e-5}, "1e-5..1e-3"])
def test_a_lower_rate_is_lower_in_every_group_and_nothing_else_changes(rate):
    stage = Stage("s", steps=9, learning_rate=rate, layer_decay=0.5 if rate == 1e-3 else None, on_nan="retry")
    lower = stage.at_lower_rate(0.1)
    before, after = stage.learning_rates(GROUPS), lower.learning_rates(GROUPS)
    assert after == pytest.approx({group: rate / 10 for group, rate in before.items()})
    assert StagePlan((lower,)).to_dict()["stages"][0] | {"learning_rate": 0} == (
        StagePlan((stage,)).to_dict()["stages"][0] | {"learning_rate": 0}
    )


def test_a_stage_is_one_epoch_long_unless_it_says_otherwise():
    assert (Stage("s").epochs, Stage("s").steps) == (1, None)
    assert (Stage("s", epochs=3).epochs, Stage("s", epochs=3).steps) == (3, None)
    assert (Stage("s", steps=30).epochs, Stage("s", steps=30).steps) == (None, 30)


@pytest.mark.parametrize(
    ("warmup", "schedule", "total", "steps"),
    [
        (0.1, "cosine", 200, 20),
        (0.1, "cosine", 27, 3),
        (0, "cosine", 200, 0),
        (0.0, "linear", 200, 0),
        (1, "cosine", 200, 1),
        (50, "cosine", 200, 50),
        (50, "cosine", 30, 30),
        (0.5, "constant_with_warmup", 10, 5),
        (50, "constant", 200, 0),
        (0.1, "reduce_lr_on_plateau", 200, 0),
    ],
)
def test_warmup_is_a_share_or_a_number_of_steps(warmup, schedule, total, steps):
    assert Stage("s", warmup=warmup, schedule=schedule).warmup_steps(total) == steps


def test_schedules_are_those_of_transformers():
    assert sorted(SCHEDULES) == sorted(member.value for member in SchedulerType)


def rates_over(schedule, steps, warmup, arguments):
    """Follows a schedule of transformers from a peak of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(schedule, optimizer, warmup, steps, scheduler_specific_kwargs=dict(arguments or {}))
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(*([1.0] if schedule in ("reduce_lr_on_plateau", "greedy") else []))
    return rates


NEEDED = {
    "cosine_with_min_lr": {"min_lr_rate": 0.25},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.25},
    "warmup_stable_decay": {"num_decay_steps": 8},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_runs_with_the_arguments_that_a_stage_asks_for(schedule):
    stage = Stage("s", steps=40, schedule=schedule, schedule_args=NEEDED.get(schedule))
    warmup = stage.warmup_steps(40)
    rates = rates_over(schedule, 40, warmup, stage.schedule_args)
    assert max(rates) == pytest.approx(1)
    # This one starts above 0 and so gets there a step earlier.
    peak = warmup - (schedule == "cosine_warmup_with_min_lr")
    assert rates.index(max(rates)) == peak, "warmup_steps says how long the rates rise"
    assert rates[:warmup] == sorted(rates[:warmup])


@pytest.mark.parametrize("schedule", NEEDED)
def test_a_schedule_without_what_it_needs_is_refused_before_transformers_does(schedule):
    with pytest.raises(PlanError, match=f"the schedule {schedule} needs .*schedule_args: "):
        Stage("s", schedule=schedule, schedule_args={"num_cycles": 0.5})
    with pytest.raises((TypeError, ValueError)):
        rates_over(schedule, 40, 4, {"num_cycles": 0.5})


def test_schedule_arguments_reach_the_schedule():
    stage = Stage("s", schedule="cosine_with_min_lr", schedule_args={"min_lr_rate": 0.25})
    assert rates_over(stage.schedule, 400, 0, stage.schedule_args)[-1] == pytest.approx(0.25, abs=1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unfreeze": []}, "unfreezes nothing"),
        ({"unfreeze": 1.5}, "unfreeze is 1.5"),
        ({"unfreeze": ["head", 4]}, "unfreeze is .*write head, a number of groups"),
        ({"unfreeze": True}, "unfreeze is True"),
        ({"unfreeze": -1}, "unfreeze is -1"),
        ({"epochs": 2, "steps": 10}, r"both epochs \(2\) and steps \(10\)"),
        ({"epochs": 1.5}, "epochs is 1.5; write a whole number from 1 on"),
        ({"steps": 0}, "steps is 0; write a whole number from 1 on"),
        ({"steps": True}, "steps is True"),
        ({"learning_rate": "fast"}, r"the text 'fast'; write a number such as 1e-3 .* or a range such as 1e-5\.\.1e-3"),
        ({"learning_rate": "1e-3"}, "the text '1e-3'; write a number such as 1e-3"),
        ({"learning_rate": "1e-5..1e-4..1e-3"}, "the text '1e-5..1e-4..1e-3'"),
        ({"learning_rate": "1e-3..1e-5"}, "the lower one first, such as 1e-5..1e-3"),
        ({"learning_rate": "0..1e-5"}, "write positive numbers"),
        ({"learning_rate": "1e-5..inf"}, "write positive numbers"),
        ({"learning_rate": "nan..1"}, "write positive numbers"),
        ({"learning_rate": "1e-5..1e-3", "layer_decay": 0.5}, "both layer_decay and a range of rates"),
        ({"learning_rate": {"head": "1e-3"}}, "learning rate of 'head' is '1e-3'"),
        ({"learning_rate": {}}, "an empty mapping"),
        ({"learning_rate": [1e-3]}, r"learning rate is \[0.001\]"),
        ({"warmup": 2.5}, "warmup is 2.5; write a share of the stage's steps below 1, or a whole number"),
        ({"warmup": -0.1}, "warmup is -0.1"),
        ({"warmup": True}, "warmup is True"),
        ({"schedule_args": {"num_training_steps": 5}}, "has 'num_training_steps'; write it as the stage's epochs or"),
        ({"schedule_args": ["num_cycles"]}, "schedule_args is .*write a mapping"),
        ({"optimizer_args": {"lr": 1}}, "optimizer_args has 'lr'; write it as the stage's learning_rate"),
        ({"optimizer_args": {"f": print}}, "optimizer_args.f has the value <built-in"),
        ({"optimizer": ""}, "optimizer is ''; write an optim of transformers"),
        ({"optimizer": 3}, "optimizer is 3"),
        ({"max_grad_norm": -1}, "max_grad_norm is -1; write 0 or a positive number"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm is nan"),
        ({"batch_size": 0}, "batch_size is 0; write a whole number from 1 on"),
        ({"image_size": 15}, "image_size is 15; write a whole number from 16 on"),
        ({"image_size": 32.0}, "image_size is 32.0"),
        ({"augmentation": ""}, "augmentation is ''; write a name such as light"),
        ({"augmentation": 3}, "augmentation is 3"),
        ({"patience": 0}, "patience is 0; write a whole number from 1 on"),
        ({"on_nan": "rety"}, "unknown on_nan 'rety'. Did you mean 'retry'"),
        ({"frozen_dropout": "yes"}, "frozen_dropout is 'yes'; write true or false"),
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
        ({"name": ""}, "a stage has the name ''"),
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


def test_a_plan_survives_json_and_yaml():
    everything = Stage(
        "b",
        unfreeze=2,
        learning_rate="1e-5..1e-3",
        steps=120,
        warmup=10,
        schedule="polynomial",
        schedule_args={"power": 2.0},
        weight_decay=0.1,
        batch_norm="freeze_affine",
        optimizer="sgd",
        optimizer_args={"betas": (0.9, 0.95), "nesterov": True},
        max_grad_norm=0.0,
        batch_size=8,
        image_size=64,
        augmentation={"crop_scale": (0.5, 1.0)},
        patience=2,
        on_nan="retry",
        frozen_dropout=True,
    )
    rates = Stage("a", unfreeze=["head", "layer4"], learning_rate={"head": 1e-3, "layer4": 1e-4})
    plan = StagePlan((rates, everything), "mine")
    assert StagePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert StagePlan.from_dict(yaml.safe_load(yaml.safe_dump(plan.to_dict()))) == plan
    changed = plan.to_dict()
    changed["stages"][1]["optimizer_args"]["nesterov"] = False
    assert plan.stages[1].optimizer_args["nesterov"], "what to_dict gives away is a copy"


def test_an_unknown_stage_key_is_refused_with_the_closest():
    with pytest.raises(PlanError, match="stage 'a' has the unknown key 'epoch'. Did you mean 'epochs'"):
        StagePlan.from_dict({"stages": [{"name": "a", "epoch": 3}]})


@pytest.mark.parametrize("stage", [{"unfreeze": "head"}, "head"])
def test_a_stage_without_a_name_is_refused_by_its_number(stage):
    with pytest.raises(PlanError, match="stage number 2 has no name: .*head"):
        StagePlan.from_dict({"stages": [{"name": "a"}, stage]})


def test_the_length_of_a_plan_is_in_epochs_unless_a_stage_counts_steps():
    assert StagePlan((Stage("a", epochs=2), Stage("b"))).epochs == 3
    assert StagePlan((Stage("a", epochs=2), Stage("b", steps=1))).epochs is None


def test_epochs_do_not_go_with_a_plan_in_steps_but_its_marker_does():
    plan = StagePlan((Stage("a", steps=10), Stage("b")))
    for epochs in (None, 0, 0.0):
        assert make_plan(plan, epochs=epochs) == plan
        assert make_plan(plan.to_dict(), epochs=epochs) == plan
    with pytest.raises(PlanError, match="3 epochs by one setting, but its stages are counted in steps"):
        make_plan(plan, epochs=3)
    with pytest.raises(PlanError, match="1 epochs long in all, but 0 epochs"):
        make_plan([Stage("a")], epochs=0)


def test_plans_need_no_torch():
    code = (
        "import sys; sys.argv = ['torchthaw']; import torchthaw.stages.presets; "
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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
    plan = StagePlan((Stage("open"), Stage("given", learning_rate=5e-5), Stage("range", learning_rate="1e-5..1e-3")))
    low = fill_defaults(plan, transformer=False, head_rate=1e-3)
    high = fill_defaults(plan, transformer=False, head_rate=1e-2)
    assert high.stages[0].learning_rate == pytest.approx(10 * low.stages[0].learning_rate)
    assert high.stages[1].learning_rate == low.stages[1].learning_rate == 5e-5
    assert high.stages[2].learning_rates(GROUPS)["head"] == 1e-3


def test_filling_defaults_leaves_everything_else_as_it_is():
    given = Stage("s", steps=5, warmup=3, optimizer="sgd", batch_size=4, image_size=64, patience=1, on_nan="retry")
    plan = fill_defaults(StagePlan((given,)), transformer=True, weight_decay=0.3)
    filled = plan.to_dict()["stages"][0]
    before = StagePlan((given,)).to_dict()["stages"][0]
    assert {key for key in filled if filled[key] != before[key]} == {"learning_rate", "layer_decay", "weight_decay"}
    assert filled["weight_decay"] == 0.3
