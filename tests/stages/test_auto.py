"""The rules of `plan: auto`, and the stages that they are for."""

import dataclasses

import pytest

from torchthaw.errors import PlanError
from torchthaw.stages.auto import (
    FAR_BITS,
    FAR_IMAGES,
    FAR_PROBE,
    FAR_SHIFT,
    FAR_STEPS,
    FEW_IMAGES,
    NEAR,
    TRY_BATCH,
    TRY_IMAGES,
    TRY_STEPS,
    Extent,
    Findings,
    added,
    anew,
    choose,
    chosen,
    may_add,
    may_relearn,
    written_out,
)
from torchthaw.stages.plan import Stage, StagePlan
from torchthaw.stages.presets import fill_defaults, make_plan


@pytest.mark.parametrize(
    ("macro_f1", "rate", "word"),
    [
        (None, 3e-4, "without a linear probe"),
        (1.0, 5e-4, "smaller steps"),
        (NEAR, 5e-4, "smaller steps"),
        (NEAR - 1e-3, 1e-3, "larger steps"),
        (0.0, 1e-3, "larger steps"),
    ],
)
def test_rates_go_by_the_probe(macro_f1, rate, word):
    choice = choose(Findings(macro_f1, shift=FAR_SHIFT - 1e-3), transformer=False)
    assert (choice.rate, choice.relearns) == (rate, False)
    assert choice.keeps_statistics is (macro_f1 is not None)
    assert word in choice.reason
    if macro_f1 is not None:
        assert f"{macro_f1:.3f}" in choice.reason


@pytest.mark.parametrize("macro_f1", [None, 0.1, 0.7, 0.95])
def test_transformers_keep_the_defaults_of_their_family(macro_f1):
    choice = choose(Findings(macro_f1, shift=2.0), transformer=True)
    assert (choice.rate, choice.relearns, choice.keeps_statistics) == (2e-4, False, False)


@pytest.mark.parametrize("macro_f1", [FAR_PROBE, 0.95])
def test_far_images_train_batch_norm_and_a_new_head(macro_f1):
    far = choose(Findings(macro_f1, shift=FAR_SHIFT), transformer=False)
    assert (far.rate, far.relearns) == (1e-3, True)
    assert "0.50 from the pretrained ones" in far.reason
    (stage,) = fill_defaults(StagePlan((Stage("all", by_probe=True),)), transformer=False).stages
    found = chosen(stage, far, head_rate=2e-3, transformer=False)
    relearning = {"learning_rate": 2e-3, "batch_norm": "train", "new_head": True}
    assert found == dataclasses.replace(stage, layer_decay=1.0, **relearning)
    given = dataclasses.replace(stage, layer_decay=0.6)
    found = chosen(given, far, head_rate=2e-3, transformer=False)
    assert found == dataclasses.replace(stage, layer_decay=0.6, **relearning)


def test_far_images_that_the_probe_tells_badly_are_not_learned_anew():
    choice = choose(Findings(FAR_PROBE - 1e-3, shift=2.0), transformer=False)
    assert (choice.rate, choice.relearns, choice.keeps_statistics) == (1e-3, False, True)


ENOUGH = Extent(FAR_IMAGES, 32, FAR_STEPS, FAR_BITS)
WORTH_A_TRY = Extent(TRY_IMAGES, TRY_BATCH, TRY_STEPS, FAR_BITS)


@pytest.mark.parametrize(
    ("enough", "worth_a_try", "change"),
    [
        (True, True, {}),
        (False, True, {"images": FAR_IMAGES - 1}),
        (False, True, {"batch_size": 31}),
        (False, True, {"steps": FAR_STEPS - 1}),
        (False, False, {"images": TRY_IMAGES - 1}),
        (False, False, {"images": None}),
        (False, False, {"batch_size": TRY_BATCH - 1}),
        (False, False, {"steps": TRY_STEPS - 1}),
        (False, False, {"label_bits": FAR_BITS - 1}),
        (False, False, {"label_bits": None}),
    ],
)
def test_how_much_there_is_to_learn_from(enough, worth_a_try, change):
    extent = dataclasses.replace(ENOUGH, **change)
    assert (extent.is_enough, extent.is_worth_a_try) == (enough, worth_a_try)


@pytest.mark.parametrize(
    ("may", "change"),
    [
        (True, {}),
        (True, {"validates": False}),
        (True, {"extent": WORTH_A_TRY}),
        (False, {"extent": WORTH_A_TRY, "validates": False}),
        (False, {"extent": Extent(TRY_IMAGES - 1, 32, FAR_STEPS, FAR_BITS)}),
        (False, {"transformer": True}),
        (False, {"stage": Stage("all")}),
        (False, {"stage": Stage("all", by_probe=True, batch_norm="eval")}),
        (False, {"stage": Stage("last block", 1, by_probe=True)}),
    ],
)
def test_what_may_learn_batch_norm_and_head_anew(may, change):
    given = {"stage": Stage("all", by_probe=True), "extent": ENOUGH, "validates": True, "transformer": False, **change}
    assert may_relearn(given.pop("stage"), given.pop("extent"), **given) is may


def test_of_fewer_far_images_both_ways_are_tried():
    (stage,) = fill_defaults(StagePlan((Stage("all", by_probe=True, epochs=3),)), transformer=False).stages
    found = Findings(NEAR, FAR_SHIFT, TRY_IMAGES, enough=False)
    first = choose(found, transformer=False)
    assert (first.rate, first.keeps_statistics, first.relearns, first.tries_anew) == (5e-4, True, False, True)
    assert "0.50 from the pretrained ones" in first.reason
    second = anew(found)
    assert (second.relearns, second.tries_anew) == (True, False)
    assert "unless validation speaks against it" in second.reason
    further = added(stage)
    assert further == dataclasses.replace(stage, name="all anew")
    run = chosen(further, second, head_rate=1e-3, transformer=False)
    assert (run.batch_norm, run.new_head, run.learning_rate, run.layer_decay, run.epochs) == ("train", True, 1e-3, 1, 3)
    for other in (
        Findings(NEAR, FAR_SHIFT - 1e-3, TRY_IMAGES, enough=False),
        Findings(FAR_PROBE - 1e-3, FAR_SHIFT, TRY_IMAGES, enough=False),
        Findings(NEAR, None, TRY_IMAGES, enough=False),
        Findings(NEAR, FAR_SHIFT, FAR_IMAGES),
    ):
        assert not choose(other, transformer=False).tries_anew


def test_which_plans_may_get_a_further_stage():
    plan = make_plan("auto").stages
    probed = (dataclasses.replace(plan[0], solver="probe"), plan[1])
    options = {"validates": True, "transformer": False}
    assert may_add(probed, WORTH_A_TRY, **options).name == "all anew"
    assert may_add(probed, ENOUGH, **options) is None
    assert may_add(probed, WORTH_A_TRY, validates=False, transformer=False) is None
    assert may_add((dataclasses.replace(plan[0], solver="gradient"), plan[1]), WORTH_A_TRY, **options) is None


@pytest.mark.parametrize(("head_rate", "rate"), [(None, 1e-3), (2e-3, 2e-3)])
def test_a_further_stage_written_out_is_run_as_it_was(head_rate, rate):
    further = added(Stage("all", by_probe=True, epochs=3))
    plan = StagePlan((written_out(further, head_rate=head_rate),))
    (filled,) = fill_defaults(plan, transformer=False, head_rate=head_rate).stages
    (stage,) = fill_defaults(StagePlan((further,)), transformer=False, head_rate=head_rate).stages
    run = chosen(stage, anew(Findings(0.9, 0.6)), head_rate=rate, transformer=False)
    assert filled == dataclasses.replace(run, by_probe=False)
    assert filled.learning_rate == rate


def test_a_stage_gets_what_was_chosen_and_keeps_what_was_given():
    far = choose(Findings(0.2), transformer=False)
    (stage,) = fill_defaults(StagePlan((Stage("all", by_probe=True),)), transformer=False).stages
    assert (stage.learning_rate, stage.layer_decay) == (3e-4, 0.3)
    found = chosen(stage, far, head_rate=1e-3, transformer=False)
    # `auto` would train BatchNorm of many images.
    assert found == dataclasses.replace(stage, learning_rate=1e-3, batch_norm="eval")
    unknown = chosen(stage, choose(Findings(None), transformer=False), head_rate=1e-3, transformer=False)
    assert unknown.batch_norm == "auto"
    given = dataclasses.replace(stage, batch_norm="train", layer_decay=0.5)
    found = chosen(given, far, head_rate=2e-3, transformer=False)
    assert (found.batch_norm, found.layer_decay) == ("train", 0.5)
    assert found.learning_rate == pytest.approx(2e-3)  # all rates move with the head's


@pytest.mark.parametrize(
    ("images", "macro_f1", "shift", "transformer", "share"),
    [
        (FEW_IMAGES - 1, 0.5, None, False, 0.5),
        (10, 0.95, None, False, 0.5),
        (FEW_IMAGES, 0.95, None, False, None),
        (None, 0.95, None, False, None),
        (10, None, None, False, None),
        (10, 0.5, None, True, None),
        (FAR_IMAGES - 1, FAR_PROBE, FAR_SHIFT, False, None),
    ],
)
def test_of_few_images_half_of_the_way_is_gone(images, macro_f1, shift, transformer, share):
    choice = choose(Findings(macro_f1, shift, images), transformer=transformer)
    assert choice.share == share
    assert ("50 % of their way" in choice.reason) is (share is not None)

    def shared(**options):
        (stage,) = fill_defaults(StagePlan((Stage("s", by_probe=True, **options),)), transformer=transformer).stages
        return chosen(stage, choice, head_rate=1e-3, transformer=transformer).wise_ft

    assert shared() == share
    assert shared(wise_ft=0.8) == 0.8
    assert shared(unfreeze="head") is None


def test_the_preset():
    plan = make_plan("auto", epochs=5)
    assert [(stage.name, stage.epochs, stage.solver, stage.by_probe) for stage in plan.stages] == [
        ("head", 1, "auto", False),
        ("all", 4, "gradient", True),
    ]
    assert StagePlan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unfreeze": "all", "solver": "probe"}, "write unfreeze: head"),
        ({"unfreeze": 1, "solver": "auto"}, "write unfreeze: head"),
        ({"unfreeze": "head", "solver": "prob"}, "Did you mean 'probe'"),
        ({"by_probe": "yes"}, "write true or false"),
        ({"new_head": 1}, "write true or false"),
        ({"wise_ft": 0}, "wise_ft is 0; write the share of the stage's weights, such as 0.5"),
        ({"wise_ft": 1.5}, "write the share of the stage's weights"),
        ({"wise_ft": True}, "write the share of the stage's weights"),
        ({"wise_ft": 0.5, "unfreeze": "head"}, "for stages that train more than the head"),
    ],
)
def test_what_no_stage_can_be(options, message):
    with pytest.raises(PlanError, match=message):
        Stage("s", **options)


def test_a_new_head_has_to_train():
    with pytest.raises(PlanError, match="new_head is True; the head does not train: add head to unfreeze"):
        Stage("s", ("layer*",), new_head=True).live_groups(["stem", "layer1", "head"])


def test_a_rate_is_given_or_chosen():
    plan = StagePlan((Stage("all", learning_rate=1e-3, by_probe=True),))
    with pytest.raises(PlanError, match=r"stage 'all': by_probe chooses the rates, but learning_rate is 0.001"):
        fill_defaults(plan, transformer=False)
